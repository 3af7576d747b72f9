"""Releases of torch: what is too old says so at once, and private names of torch live in one file."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tpfuse
from tests.test_rooms import modules
from tpfuse._torch_private import NEWEST, OLDEST, check_torch_version

PACKAGE = Path(tpfuse.__file__).parent
ROOT = Path(__file__).resolve().parent.parent


# -- versions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.10.0", "2.9.1+cu128", "1.13.1", "2.4.0a0+git123"])
def test_a_release_that_is_too_old_is_refused(version):
    with pytest.raises(tpfuse.TPFuseError, match=r"needs torch 2\.11 or newer") as caught:
        check_torch_version(version)
    assert version in str(caught.value) and "pip install" in str(caught.value)


@pytest.mark.parametrize("version", ["2.16.0", "3.0.0", "2.100.0"])
def test_a_release_that_nobody_has_tried_warns(version):
    with pytest.warns(UserWarning, match=f"this is torch {version}"):
        check_torch_version(version)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.15.0a0+git1", torch.__version__, "unknown"])
def test_a_release_that_is_supported_says_nothing(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_torch_version(version)


def test_an_old_release_is_one_clear_message_at_import():
    code = "import torch; torch.__version__ = '2.10.0'; import tpfuse"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        done.stderr.strip().splitlines()[-1].startswith("tpfuse.errors.TPFuseError: tpfuse needs torch 2.11 or newer")
    )


def test_the_packages_requirement_starts_where_the_supported_range_does():
    assert f'"torch>={OLDEST[0]}.{OLDEST[1]}"' in (ROOT / "setup.py").read_text("utf-8")
    assert OLDEST < NEWEST


# -- the matrix -------------------------------------------------------------------------------------------------------


def matrix():
    spec = importlib.util.spec_from_file_location("versions", ROOT / "benchmarks" / "versions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_matrix_counts_outcomes_and_names_failures(tmp_path):
    log = tmp_path / "junit.xml"
    log.write_text(
        "<testsuites><testsuite><testcase classname='a' name='x'/>"
        "<testcase classname='a' name='y'><failure/></testcase>"
        "<testcase classname='a' name='z'><skipped/></testcase><testcase classname='a' name='w'><error/></testcase>"
        "</testsuite></testsuites>"
    )
    counted = matrix().outcomes(log)
    assert counted == {"passed": 1, "failed": 2, "skipped": 1, "failures": ["a::y", "a::w"]}


def test_the_matrix_runs_every_supported_release_and_makes_nothing_unasked(tmp_path):
    versions = matrix()
    minors = [int(release.split(".")[1]) for release in versions.RELEASES if release != "newest"]
    assert minors == list(range(OLDEST[1], NEWEST[1])) and versions.RELEASES[-1] == "newest"
    assert versions.environment(tmp_path, "2.11", install=False) is None and not list(tmp_path.iterdir())
    assert "tests/test_versions.py" in versions.test_files(["tests"])


def test_a_test_file_that_crashes_is_a_failure(tmp_path, monkeypatch):
    versions = matrix()
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    (tmp_path / "test_crash.py").write_text("import os\n\ndef test_crash():\n    os._exit(9)\n")
    outcome = versions.run_file(Path(sys.executable), "test_crash.py", [])
    assert (outcome["passed"], outcome["failed"]) == (0, 1) and "pytest ended with 9" in outcome["failures"][0]


# -- private names ----------------------------------------------------------------------------------------------------

#: The documented homes of the functional collectives and of symmetric memory.
HOMES = {"torch.distributed._functional_collectives", "torch.distributed._symmetric_memory"}
#: Private names of ours or of the standard library, and those of Triton, that any object may have.
OURS = ("_tpfuse",)
NOT_TORCH = {"_init_handles", "_current_frames", "_exit", "_held", "_place", "_name"}


def private_names(source: str) -> Iterator[str]:
    """Every private name of torch in `source`: imported, or read off anything but `self`, a module of ours or an
    operator namespace."""
    tree = ast.parse(source)
    ours = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("tpfuse"))
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("torch") and "._" in alias.name and alias.name not in HOMES:
                    yield f"line {node.lineno}: {alias.name}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if "._" in name and name not in HOMES and node.module not in HOMES:
                    yield f"line {node.lineno}: {name}"
        elif isinstance(node, ast.Attribute) and _is_private(node.attr):
            chain = ast.unparse(node)
            first = chain.split(".")[0]
            operators = chain.startswith("torch.ops.") or ".aten." in f".{chain}" or ".prims." in f".{chain}"
            if first in ("self", "cls", *ours - {"torch"}) and not operators and chain.count("._") == 1:
                continue
            if not operators and chain not in HOMES:
                yield f"line {node.lineno}: {chain}"


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith(("__", *OURS)) and name not in NOT_TORCH


@pytest.mark.parametrize(
    "source",
    [
        "import torch._dynamo",
        "from torch._inductor import config",
        "from torch.utils._pytree import tree_map",
        "from torch.distributed.distributed_c10d import _resolve_process_group",
        "import torch\ntorch._dynamo.reset()",
        "import torch.distributed as dist\ndist.distributed_c10d._world",
        "def f(node): return node.target._schema",
        "def f(mesh): return mesh._flatten('x')",
    ],
)
def test_the_scan_finds_private_names(source):
    assert list(private_names(source))


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed._functional_collectives as funcol",
        "import torch\ntorch.ops._c10d_functional.all_reduce\ntorch.ops.aten._to_copy.default",
        "class A:\n    def f(self): return self._x",
        "from . import one_shot as _one_shot\n_one_shot.fits()",
        "def f(model): return model._tpfuse_policy, model.__class__",
    ],
)
def test_the_scan_leaves_alone_what_is_not_private_to_torch(source):
    assert not list(private_names(source))


def test_private_names_of_torch_live_in_one_place():
    known = modules().items()
    found = {name: names for name, path in known if (names := list(private_names(path.read_text("utf-8"))))}
    # An integration steps into another package, and says there what it needs of it.
    theirs = ("tpfuse._torch_private", "tpfuse.integrations")
    elsewhere = {name: names for name, names in found.items() if not name.startswith(theirs)}
    assert not elsewhere
    assert len(found) > 5, "the scan finds them where they are"


def test_every_private_name_says_what_to_do_when_it_is_gone():
    sources = [path.read_text("utf-8") for path in sorted((PACKAGE / "_torch_private").glob("*.py"))]
    for function in (node for source in sources for node in ast.parse(source).body):
        if isinstance(function, ast.FunctionDef) and list(private_names(ast.unparse(function))):
            words = (ast.get_docstring(function) or "").lower()
            assert "if " in words and any(word in words for word in (" goes:", " go:", " gone", " moves:")), (
                function.name
            )
