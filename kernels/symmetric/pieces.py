"""One call of any size: in one launch where the workspace holds it, else on some of the rows after the other.

The shape is equal on all ranks, so all of them cut alike. Pieces are calls like any other: they move the epoch, and a
captured graph replays them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..call import AddNormOut, Call
from .dispatch import Entry, bind
from .operands import Launch, lies_ready
from .registry import KERNELS
from .workspace import Workspace


def run(
    entry: Entry, call: Call, ws: Workspace, ran: Callable[[list[Launch]], None] | None = None
) -> tuple[AddNormOut, Tensor | None] | None:
    """What `bind(entry, call, ws)` gives, run; in pieces where it is too large. None for the functional
    path. `ran` is told of the launches, in the order of their rows, but of no pieces whose rows are copied first: no
    record could be made of those, and to keep them would hold copies of all rows at once."""
    launch = bind(entry, call, ws)
    if launch is not None:
        done = launch.run()
        if ran is not None:
            ran([launch])
        return done
    most = most_rows("one_shot" if call.batch_invariant else entry.kernel, call, ws)
    if most == 0:
        return None
    out, total = call.outputs()
    count = -(-call.rows // most)
    each = -(-call.rows // count)
    if not all(t is None or lies_ready(t) for t in (call.x, call.residual)):
        ran = None
    # Once: of rows that no view gives, each piece would copy all.
    call = dataclasses.replace(call, x=_by_rows(call.x), residual=_by_rows(call.residual))
    launches = []
    for start in range(0, call.rows, each):
        piece = bind(entry, _rows(call, out, total, start, start + each), ws)
        if piece is None:  # the same for every piece and on every rank: nothing has been launched yet
            return None
        piece.run()
        if call.product is not None and not piece.multiplies:
            ran = None  # each has a copy of its rows
        if ran is not None:
            launches.append(piece)
    if ran is not None:
        ran(launches)
    return out, total


def most_rows(kernel: str, call: Call, ws: Workspace) -> int:
    """How many rows of such a call the workspace holds for `kernel`."""
    found = KERNELS.get(kernel)
    return found.most_rows(call, ws) if found is not None else 0


def _by_rows(t: Tensor | None) -> Any:
    return None if t is None else t.reshape(-1, t.shape[-1])


def _rows(call: Call, out: AddNormOut, total: Tensor | None, start: int, stop: int) -> Call:
    """The call on rows `start` to `stop` alone, writing into those rows of `out` and `total`."""

    def each(t: Tensor) -> Tensor:
        return t.reshape(call.rows, -1)[start:stop]

    def cut(t: Tensor | None) -> Tensor | None:
        return None if t is None else each(t)

    def multiply(first: int, stop: int) -> None:
        assert call.product is not None
        call.product(start + first, start + stop)

    into = AddNormOut(each(out.y), *map(cut, (out.residual_out, out.mean, out.rstd, out.q, out.scale)))
    product = None if call.product is None else multiply
    return dataclasses.replace(
        call, x=each(call.x), residual=cut(call.residual), out=into, sum_out=cut(total), product=product
    )
