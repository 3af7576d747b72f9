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
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .patience import GONE
from .symmetric.dispatch import Table
from .symmetric.operands import Launch
from .symmetric.workspace import Workspace

#: Records of one group at most. With more the program asks for ever new shapes, and all begin anew.
MOST = 4096
#: Of a kernel's arguments: x, residual, pre_bias, weight, bias, y, hidden, total, mean, rstd, eps.
TENSORS = 11


@dataclass(frozen=True)
class Record:
    """One launch. `launch(*addresses, *rest, *last, stream=...)` does it again, `last` being the addresses of q and of
    scale where it quantises; `late`: words of the host's memory, one for
    each workspace of the group, that are not 0 once a kernel gave up waiting for a peer."""

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


def record_of(
    launch: Launch, tensors: tuple[Tensor | None, ...], ws: Workspace, table: Table, workspaces: tuple[Workspace, ...]
) -> Record | None:
    """The record of a launch that was just made for a call with these tensors (in the order of TENSORS), or None where
    it cannot be made again with others: inputs were copied, a tensor does not lie on 16 bytes, or nothing compiled was
    launched. `workspaces`: all that kernels of the group may still run on."""
    ready = launch.args[:TENSORS]
    if launch.kernel is None or any(a is not b for a, b in zip(ready, tensors, strict=True)):
        return None
    if any(t is not None and t.data_ptr() % 16 for t in (*tensors[:-1], *launch.last.values())):
        # of eps's place no kernel is compiled for
        return None
    found = launch.compiled()
    if found is None:
        return None
    compiled, constexprs = found
    # The watch is pinned memory of the host: only the launcher knows the device's address of it.
    rest = [a.data_ptr() if isinstance(a, Tensor) and a is not ws.watch else a for a in launch.args[TENSORS:]]
    late = tuple(ctypes.c_int32.from_address(each.watch.data_ptr() + 4 * GONE) for each in workspaces)
    return Record(ws, table, compiled[(launch.programs, 1, 1)], (*rest, *constexprs), late)
