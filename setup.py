"""Packaging: `passes/` and `kernels/` stand at the top level and are imported as `tpfuse.passes` and `tpfuse.kernels`.

The links `tpfuse/passes` and `tpfuse/kernels` make that true in the source tree, in editable installs and in the
wheel alike; nothing but `tpfuse` lands in site-packages.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
INIT = (HERE / "tpfuse/__init__.py").read_text(encoding="utf-8")
[VERSION] = re.findall(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)
DEMO = ["transformers>=5.0", "accelerate>=1.0", "matplotlib>=3.8", "rich>=13", "numpy"]

setup(
    name="tpfuse",
    version=VERSION,
    description="Fused all-reduce + residual + norm for tensor-parallel models under torch.compile",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The tpfuse authors",
    keywords="pytorch torch.compile tensor-parallel all-reduce fusion triton",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["tpfuse", "tpfuse.*"]),
    package_data={"tpfuse": ["py.typed"]},
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
            "peft>=0.17",
            "build",
            "ruff",
            "mypy",
        ],
    },
    entry_points={
        "torch_dynamo_backends": ["tpfuse = tpfuse.backend:tpfuse"],
        "console_scripts": ["tpfuse = tpfuse.__main__:app"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
