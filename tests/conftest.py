"""Fixtures for all tests."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from .graphs import fake_world

# Two cores are enough for tiny tensors, and several test processes share them.
torch.set_num_threads(1)


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
