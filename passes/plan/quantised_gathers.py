"""Plan: whether own rows are quantised before they are gathered. Pure Python.

What is read here (the ranks of a group, the bytes of a row) is equal on all ranks, so the choice is too.
"""

from __future__ import annotations

from collections.abc import Sequence

from .layouts import NOMINAL_ROWS, cost_us


def quantised_first(ranks: Sequence[int], plain: int, packed: int, read_as_they_are: bool) -> bool:
    """Whether that costs less. ranks: of each gather, one behind another; plain, packed: bytes of a row as it is
    written, and of a quantised one with its scales; read_as_they_are: whether the gathered rows are read as they are
    besides, and have to be gathered too."""
    written = _cost(ranks, plain)
    return _cost(ranks, packed) + (written if read_as_they_are else 0.0) < written


def _cost(ranks: Sequence[int], row: int) -> float:
    total, rows = 0.0, NOMINAL_ROWS
    for count in ranks:
        rows *= count
        total += cost_us("all_gather", count, float(rows * row))
    return total
