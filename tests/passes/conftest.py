"""Fixtures for the tests of the passes."""

from __future__ import annotations

import warnings

import pytest

from ..graphs import fake_world


@pytest.fixture
def two_ranks():
    """Two ranks, and no internal error: those are warnings."""
    with fake_world(2), warnings.catch_warnings():
        warnings.filterwarnings("error", message="tpfuse left a graph")
        yield
