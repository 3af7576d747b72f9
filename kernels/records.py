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
from collections.abc import Callable, Hashable, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from .patience import GONE
from .symmetric.dispatch import Table
from .symmetric.operands import NAMES, Launch
from .symmetric.workspace import Workspace

#: Steps in all records of one group, at most. With more the program asks for ever new shapes, and all begin anew.
MOST = 1 << 14
_WITHOUT_ROWS = {"pre_bias", "weight", "bias", "eps"}


@dataclass(frozen=True)
class Record:
    """One call. `launch(*addresses, *rest, *last, stream=...)` does it again, `last` being the addresses of q and of
    scale where it quantises, and `product=...` behind it where x is one (`Call.product`); `late`: words of the host's
    memory, one for each workspace of the group, that are not 0 once a kernel gave up waiting for a peer; `size`: how
    many steps it holds."""

    workspace: Workspace
    table: Table
    launch: Callable[..., Any]
    rest: tuple
    late: tuple[ctypes.c_int32, ...]
    size: int = 1


class Records:
    """All records of one group, by key. The lock is for those who change them: a reader takes what `known` holds, which
    is one look into a dict, and a record never changes, so it finds all of one or nothing."""

    __slots__ = ("_lock", "_size", "known")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._size = 0
        self.known: dict[Hashable, Record] = {}

    def keep(self, key: Hashable, record: Record) -> None:
        with self._lock:
            former = self.known.get(key)
            self._size -= 0 if former is None else former.size
            if self._size + record.size > MOST:
                self.known.clear()
                self._size = 0
            self.known[key] = record
            self._size += record.size

    def clear(self) -> None:
        with self._lock:
            self.known.clear()
            self._size = 0


@dataclass(frozen=True)
class _InPieces:
    """A call that is several launches, each of some rows. `each`: a launch, its first row, by how many bytes its
    tensors lie behind the call's (in the order of NAMES), and its other arguments."""

    each: tuple[tuple[Callable[..., Any], int, tuple[int, ...], tuple], ...]

    def __len__(self) -> int:
        return sum(map(_steps_of, (launch for launch, *_ in self.each)))

    def __call__(self, *addresses: int | None, stream: int, product: Callable[[int, int], None] | None = None) -> None:
        for launch, row, behind, rest in self.each:
            own = [at if at is None else at + by for at, by in zip(addresses, behind, strict=True)]
            if product is None:
                launch(*own, *rest, stream=stream)
            else:
                launch(*own, *rest, stream=stream, product=partial(_behind, product, row))


def _behind(product: Callable[[int, int], None], row: int, first: int, stop: int) -> None:
    product(row + first, row + stop)


def record_of(
    launches: Sequence[Launch], tensors: tuple[Tensor | None, ...], ws: Workspace, table: Table,
    workspaces: tuple[Workspace, ...],
) -> Record | None:  # fmt: skip
    """The record of a call that was just made with these tensors (in the order of NAMES) by one launch or by several,
    each of the rows behind those of the one before; or None where it cannot be made again with others: inputs were
    copied, a tensor does not lie on 16 bytes, nothing compiled was launched, or several launches quantise.
    `workspaces`: all that kernels of the group may still run on."""
    last = launches[0].last
    if any(t is not None and t.data_ptr() % 16 for t in (*tensors[:-1], *last.values())):
        # of eps's place no kernel is compiled for
        return None
    if last and len(launches) > 1:
        return None
    pieces, first, row_bytes = [], 0, _row_bytes(tensors)
    for launch in launches:
        behind = tuple(first * each for each in row_bytes)
        places = tuple(t if t is None else t.data_ptr() + by for t, by in zip(tensors, behind, strict=True))
        made = launch.again(places, ws.watch)
        if made is None:
            return None
        pieces.append((made[0], first, behind, made[1]))
        first += launch.out.y.numel() // launch.out.y.shape[-1]
    late = tuple(ctypes.c_int32.from_address(each.watch.data_ptr() + 4 * GONE) for each in workspaces)
    again, rest = (pieces[0][0], pieces[0][3]) if len(pieces) == 1 else (_InPieces(tuple(pieces)), ())
    return Record(ws, table, again, rest, late, _steps_of(again))


def _steps_of(launch: Callable[..., Any]) -> int:
    return len(launch) if isinstance(launch, Sized) else 1


def _row_bytes(tensors: tuple[Tensor | None, ...]) -> list[int]:
    """Of each tensor; 0 where it has no rows."""
    named = zip(NAMES, tensors, strict=True)
    return [0 if t is None or name in _WITHOUT_ROWS else t.shape[-1] * t.element_size() for name, t in named]
