"""What lands where when tpfuse is built and installed. Nothing here needs a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = (".git", ".venv*", "build", "dist", "*.egg-info", "demo-output", "__pycache__", ".*_cache", ".hypothesis")

pytest.importorskip("setuptools", "70.1")


def run(*command: str, cwd: Path, **kwargs) -> str:
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout


def build_wheel(source: Path, into: Path) -> Path:
    run(*pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(into), str(source)), cwd=into)
    (wheel,) = into.glob("tpfuse-*.whl")
    return wheel


def pip(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pip", "--disable-pip-version-check", arguments[0], "--no-index", *arguments[1:])


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the sources, since building leaves files behind."""
    copy = tmp_path_factory.mktemp("source") / "tpfuse"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_every_module_and_nothing_generic(wheel):
    files = files_of(wheel)
    tops = {name.split("/")[0] for name in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tpfuse"}
    expected = {
        f"{package}/{path.relative_to(ROOT / folder)}"
        for package, folder in (("tpfuse", "tpfuse"), ("tpfuse/passes", "passes"), ("tpfuse/kernels", "kernels"))
        for path in (ROOT / folder).rglob("*.py")
    }
    # py.typed says that the annotations are meant to be checked by those who import the package.
    assert {name for name in files if name.startswith("tpfuse/")} == expected | {"tpfuse/py.typed"}


def test_metadata_names_the_entry_point_the_licence_and_the_dependencies(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        licence = next(name for name in archive.namelist() if name.startswith(info) and name.endswith("LICENSE"))
        assert b"Apache License" in archive.read(licence)
    assert "[torch_dynamo_backends]\ntpfuse = tpfuse.backend:tpfuse" in entry_points
    assert "tpfuse = tpfuse.__main__:app" in entry_points
    assert "Apache-2.0" in (metadata["License-Expression"] or metadata["License"])
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {"torch>=2.11", "dataclasses-json>=0.6"} <= set(required)
    assert not any("transformers" in line for line in required)


def test_sdist_builds_the_same_wheel(source, wheel, tmp_path):
    run(sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path), cwd=source)
    (archive,) = tmp_path.glob("tpfuse-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert files_of(build_wheel(unpacked, tmp_path)) == files_of(wheel)


FILES = """
import tpfuse, tpfuse.passes.pipeline, tpfuse.kernels
print(tpfuse.__file__)
print(tpfuse.passes.pipeline.__file__)
"""
BACKEND = """
from torch._dynamo import list_backends, lookup_backend
import tpfuse.backend
print("tpfuse" in list_backends(), lookup_backend("tpfuse") is tpfuse.backend.tpfuse)
"""


def test_installed_wheel_is_found_by_torch_compile(wheel, tmp_path):
    site = tmp_path / "site"
    run(*pip("install", "--no-deps", "--target", str(site), str(wheel)), cwd=tmp_path)
    tops = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert tops - {"bin", "__pycache__"} == {"tpfuse"}
    where, passes, found = run_python(FILES + BACKEND, site, tmp_path)
    assert Path(where).is_relative_to(site) and Path(passes).is_relative_to(site)
    assert found == "True True"


def test_source_tree_imports_without_being_installed(tmp_path):
    where, passes = run_python(FILES, ROOT, tmp_path)[-2:]
    assert Path(where).is_relative_to(ROOT) and Path(passes).resolve() == ROOT / "passes" / "pipeline.py"


def run_python(code: str, path: Path, cwd: Path) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONWARNINGS": "ignore"}
    return run(sys.executable, "-c", code, cwd=cwd, env=environment).splitlines()[-3:]
