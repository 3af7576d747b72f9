"""Packaging: `passes/` and `kernels/` stand at the top level and are imported as `tpfuse.passes` and `tpfuse.kernels`.

The links `tpfuse/passes` and `tpfuse/kernels` make that true in the source tree, in editable installs and in the
wheel alike; nothing but `tpfuse` lands in site-packages.
"""

from pathlib import Path

from setuptools import find_packages, setup

DEMO = ["transformers>=5.0", "accelerate>=1.0", "matplotlib>=3.8", "rich>=13", "numpy"]

setup(
    name="tpfuse",
    version="0.1.0",
    description="Fused all-reduce + residual + norm for tensor-parallel models under torch.compile",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["tpfuse", "tpfuse.*"]),
    install_requires=[
        "torch>=2.11",
        "triton; platform_system == 'Linux'",
        "dataclasses-json>=0.6",
        "rich>=13",
        "typer>=0.12",
        "safetensors>=0.4",
    ],
    extras_require={
        "demo": DEMO,
        "test": [
            *DEMO,
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "expecttest",
            "hypothesis>=6.100",
            "build",
            "ruff",
        ],
    },
    entry_points={
        "torch_dynamo_backends": ["tpfuse = tpfuse.backend:tpfuse"],
        "console_scripts": ["tpfuse = tpfuse.__main__:app"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
    ],
)
