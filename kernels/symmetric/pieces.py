"""One call of any size: in one launch where the workspace holds it, else on some of the rows after the other.

The shape is equal on all ranks, so all of them cut alike. Pieces are calls like any other: they move the epoch, and a
captured graph replays them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ..add_norm import AddNormOut, empty_outputs
from .dispatch import Entry, bind
from .operands import Launch, Operands
from .registry import KERNELS
from .workspace import Workspace


def run(
    entry: Entry, op: Operands, ws: Workspace, batch_invariant: bool = False,
    ran: Callable[[Launch], None] | None = None,
) -> tuple[AddNormOut, Tensor | None] | None:  # fmt: skip
    """What `bind(entry, op, ws, batch_invariant)` gives, run; in pieces where it is too large. None for the functional
    path. `ran` is told of a call that was one launch."""
    launch = bind(entry, op, ws, batch_invariant)
    if launch is not None:
        done = launch.run()
        if ran is not None:
            ran(launch)
        return done
    most = most_rows("one_shot" if batch_invariant else entry.kernel, op, ws)
    if most == 0:
        return None
    out, total = op.out, op.sum_out
    if out is None:
        out = empty_outputs(op.x, op.norm, op.out_dtype, op.residual_dtype, op.stats)
        total = torch.empty(op.x.shape, dtype=op.x.dtype, device=op.x.device) if op.want_sum else None
    count = -(-op.rows // most)
    each = -(-op.rows // count)
    for start in range(0, op.rows, each):
        piece = bind(entry, _rows(op, out, total, start, start + each), ws, batch_invariant)
        if piece is None:  # the same for every piece and on every rank: nothing has been launched yet
            return None
        piece.run()
    return out, total


def most_rows(kernel: str, op: Operands, ws: Workspace) -> int:
    """How many rows of such a call the workspace holds for `kernel`."""
    found = KERNELS.get(kernel)
    return found.most_rows(op, ws) if found is not None else 0


def _rows(op: Operands, out: AddNormOut, total: Tensor | None, start: int, stop: int) -> Operands:
    """The call on rows `start` to `stop` alone, writing into those rows of `out` and `total`."""

    def each(t: Tensor) -> Tensor:
        return t.reshape(op.rows, -1)[start:stop]

    def cut(t: Tensor | None) -> Tensor | None:
        return None if t is None else each(t)

    into = AddNormOut(each(out.y), cut(out.residual_out), cut(out.mean), cut(out.rstd))
    return dataclasses.replace(op, x=each(op.x), residual=cut(op.residual), out=into, sum_out=cut(total))
