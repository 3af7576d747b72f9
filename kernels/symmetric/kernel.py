"""What dispatch, pieces and tuning know of a kernel. Each kernel's file ends with its own; `registry.py` lists them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..call import Call
from .operands import Launch
from .workspace import Workspace


@dataclass(frozen=True)
class Kernel:
    """One way to run a boundary.

    `why_not(call, ws, split)`: why the workspace does not hold the call; empty where it does. `bind(call, ws, split,
    warps, registers)`: the call, ready to be launched. `room(ws)`: how many words of x the workspace holds in one call.
    `candidates(quads)`: (split, warps) worth measuring for rows of so many 16-byte pieces. `label(split, warps)`: the
    name under which that is measured. `splits`: whether a row may be several programs'; the others are given 1.
    `otherwise`: the kernel to take where this one does not hold the call.
    """

    name: str
    why_not: Callable[[Call, Workspace, int], str]
    bind: Callable[[Call, Workspace, int, int, int], Launch]
    room: Callable[[Workspace], int]
    candidates: Callable[[int], list[tuple[int, int]]]
    label: Callable[[int, int], str]
    splits: bool = False
    otherwise: str = ""

    def fits(self, call: Call, ws: Workspace, split: int) -> bool:
        return not self.why_not(call, ws, split)

    def most_rows(self, call: Call, ws: Workspace) -> int:
        """How many rows of such a call the workspace holds."""
        return self.room(ws) // call.row_words
