"""Copies and events by the CUDA driver: what is asked for, and what is said where it refuses. There need be no GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from tpfuse.errors import OpError
from tpfuse.kernels.driver import driver


def test_the_driver_says_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A C library stands for CUDA's: `abs` gives back what it is given."""
    library, asked = ctypes.CDLL("libc.so.6"), []

    def function(name: str) -> Any:
        found = type(library.abs)(("abs", library))
        asked.append((name, found))
        return found

    class Library:
        __getattr__ = staticmethod(function)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    found = driver.__wrapped__()
    assert [name for name, _ in asked] == ["cuMemcpyDtoDAsync_v2", "cuEventRecord", "cuStreamWaitEvent"]
    assert [getattr(found, field) for field in ("copy", "record", "wait")] == [each for _, each in asked]
    for each in found:
        assert each(*[0] * len(each.argtypes)) is None
        with pytest.raises(OpError, match="error 700"):
            each(700, *[0] * (len(each.argtypes) - 1))


def test_there_may_be_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert driver.__wrapped__() is None
