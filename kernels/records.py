"""Launches of a group's calls, remembered: what a call like an earlier one needs to be launched again.

A record holds what does not change between calls of the same options, shapes, dtypes and alignment: the compiled
kernel, its grid, the numbers and the addresses of the workspace. Launching it with other tensors is right for the
reason that replaying a captured graph is: the count of calls lives on the device, and the number of rows is in the key,
so the choice of the kernel is remembered and not skipped.

It holds as long as the workspace is the one in use, the group lives, and the dispatch table is the one it was chosen
by. `replay.py` asks for all of that at each call: what does not hold any more is never launched, whoever forgot to
throw it away. Records belong to their group's `Member`, so they go with it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .patience import GONE
from .symmetric.dispatch import Table
from .symmetric.operands import Launch
from .symmetric.workspace import Workspace

#: Records of one group at most. With more the program asks for ever new shapes, and all begin anew.
MOST = 4096
_NAMES = "x", "residual", "pre_bias", "weight", "bias", "y", "hidden", "total", "mean", "rstd", "eps"
_WITHOUT_ROWS = {"pre_bias", "weight", "bias", "eps"}
#: How many of a kernel's arguments, the first ones, are tensors of the call, in the order of _NAMES.
TENSORS = len(_NAMES)


@dataclass(frozen=True)
class Record:
    """One call. `launch(*addresses, *rest, *last, stream=...)` does it again, `last` being the addresses of q and of
    scale where it quantises; `late`: words of the host's memory, one for each workspace of the group, that are not 0
    once a kernel gave up waiting for a peer."""

    workspace: Workspace
    table: Table
    launch: Callable[..., Any]
    rest: tuple
    late: tuple[ctypes.c_int32, ...]


class Records:
    """All records of one group, by key. The lock is for those who change them: a reader takes what `known` holds, which
    is one look into a dict, and a record never changes, so it finds all of one or nothing."""

    __slots__ = ("_lock", "known")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.known: dict[Hashable, Record] = {}

    def keep(self, key: Hashable, record: Record) -> None:
        with self._lock:
            if len(self.known) >= MOST:
                self.known.clear()
            self.known[key] = record

    def clear(self) -> None:
        with self._lock:
            self.known.clear()


@dataclass(frozen=True)
class _InPieces:
    """A call that is several launches, each of some rows. `each`: a launch, by how many bytes its tensors lie behind
    the call's (in the order of TENSORS), and its other arguments."""

    each: tuple[tuple[Callable[..., Any], tuple[int, ...], tuple], ...]

    def __call__(self, *addresses: int | None, stream: int) -> None:
        for launch, behind, rest in self.each:
            own = [at if at is None else at + by for at, by in zip(addresses, behind, strict=True)]
            launch(*own, *rest, stream=stream)


def record_of(
    launches: Sequence[Launch], tensors: tuple[Tensor | None, ...], ws: Workspace, table: Table,
    workspaces: tuple[Workspace, ...],
) -> Record | None:  # fmt: skip
    """The record of a call that was just made with these tensors (in the order of TENSORS) by one launch or by several,
    each of the rows behind those of the one before; or None where it cannot be made again with others: inputs were
    copied, a tensor does not lie on 16 bytes, nothing compiled was launched, or several launches quantise.
    `workspaces`: all that kernels of the group may still run on."""
    if any(t is not None and t.data_ptr() % 16 for t in (*tensors[:-1], *launches[0].last.values())):
        # of eps's place no kernel is compiled for
        return None
    pieces, first, row_bytes = [], 0, _row_bytes(tensors)
    for launch in launches:
        found = launch.compiled()
        behind = tuple(first * each for each in row_bytes)
        if found is None or not _lie_behind(launch.args[:TENSORS], tensors, behind):
            return None
        compiled, constexprs = found
        # The watch is pinned memory of the host: only the launcher knows the device's address of it.
        rest = [a.data_ptr() if isinstance(a, Tensor) and a is not ws.watch else a for a in launch.args[TENSORS:]]
        pieces.append((compiled[(launch.programs, 1, 1)], behind, (*rest, *constexprs)))
        first += launch.out.y.numel() // launch.out.y.shape[-1]
    late = tuple(ctypes.c_int32.from_address(each.watch.data_ptr() + 4 * GONE) for each in workspaces)
    if len(pieces) == 1:
        return Record(ws, table, pieces[0][0], pieces[0][2], late)
    return None if launches[0].last else Record(ws, table, _InPieces(tuple(pieces)), (), late)


def _row_bytes(tensors: tuple[Tensor | None, ...]) -> list[int]:
    """Of each tensor; 0 where it has no rows."""
    named = zip(_NAMES, tensors, strict=True)
    return [0 if t is None or name in _WITHOUT_ROWS else t.shape[-1] * t.element_size() for name, t in named]


def _lie_behind(given: tuple, tensors: tuple[Tensor | None, ...], behind: tuple[int, ...]) -> bool:
    """Whether a launch was given the call's own tensors, from so many bytes on, and no copies of them."""
    return all(
        a is t if a is None or t is None else a.data_ptr() == t.data_ptr() + by
        for a, t, by in zip(given, tensors, behind, strict=True)
    )
