"""Fixtures for all tests."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist

from .graphs import fake_world

# Two cores are enough for tiny tensors, and several test processes share them.
torch.set_num_threads(1)


# The first process of a run makes the store; those that it starts inherit all three. A compiler of the user's choice
# stays the one that is used.
COMPILER = Path(__file__).parent / "cxx" / "g++"
can_share = sys.platform == "linux" and shutil.which("g++") and os.access(COMPILER, os.X_OK)
made_by = 0
if can_share and not {"CXX", "TPFUSE_TESTS_COMPILED"} & set(os.environ):
    made_by = os.getpid()
    os.environ["TPFUSE_TESTS_COMPILED"] = tempfile.mkdtemp(prefix="compiled-for-tests-")
    os.environ["TPFUSE_TESTS_PYTHON"] = sys.executable
    os.environ["CXX"] = str(COMPILER)
if "TPFUSE_TESTS_COMPILED" in os.environ:
    torch._inductor.config.cpp.cxx = (None, os.environ["CXX"])


def pytest_unconfigure(config):
    if made_by == os.getpid():  # and not a run inside a test
        shutil.rmtree(os.environ["TPFUSE_TESTS_COMPILED"], ignore_errors=True)


@pytest.fixture(autouse=True)
def own_environment():
    """A test that takes a rank's place (RANK, WORLD_SIZE) leaves nothing of it to the next one."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def own_compile_cache(tmp_path, monkeypatch):
    """No test sees what another one compiled."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def no_process_group_left_behind():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def four_ranks():
    """A fake process group of four ranks: enough to trace and rewrite, and for LocalTensorMode to sum over."""
    with fake_world(4):
        yield 4
