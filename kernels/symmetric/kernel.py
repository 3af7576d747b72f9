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

    `worlds`: how many ranks it takes. `refusal(call, ws, split)`: why the workspace does not hold the call; empty where
    it does. `bind(call, ws, split, warps, registers)`: the call, ready to be launched. `most_rows(call, ws)`: how many
    rows of such a call the workspace holds. `candidates(quads)`: (split, warps) worth measuring for rows of so many
    16-byte pieces. `label(split, warps)`: the name under which that is measured. `splits`: whether a row may be several
    programs'; the others are given 1. `otherwise`: the kernel to take where this one does not hold the call.
    """

    name: str
    worlds: range
    refusal: Callable[[Call, Workspace, int], str]
    bind: Callable[[Call, Workspace, int, int, int], Launch]
    most_rows: Callable[[Call, Workspace], int]
    candidates: Callable[[int], list[tuple[int, int]]]
    label: Callable[[int, int], str]
    splits: bool = False
    otherwise: str = ""

    def why_not(self, call: Call, ws: Workspace, split: int) -> str:
        """Why it cannot run the call on this workspace; empty where it can."""
        if ws.world not in self.worlds:
            return f"{ws.world} ranks; {self.name} takes {self.worlds.start} to {self.worlds.stop - 1}"
        return self.refusal(call, ws, split)

    def fits(self, call: Call, ws: Workspace, split: int) -> bool:
        return not self.why_not(call, ws, split)
