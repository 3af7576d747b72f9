"""The backward of a norm between two ranks, by copies: rows are finished as `norm_backward` does.

    s = x + the peer's x, of the rows that are this rank's to finish
    dx = backward of the norm (s) + residual

scattered: those are its half of the rows, and dx of both ranks is gathered (`exchanged.py`); the gradients of weight
and bias are sums over the own rows. Otherwise each rank finishes all rows (`copied.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..norm_backward import NormBackwardCall, NormBackwardOut, Parts, norm_backward_reference
from .copied import Whole
from .copies import Finish, InCalls, slot
from .exchanged import Exchange
from .workspace import Workspace


def norm_backward_by_copies(
    x: Tensor, dx: Tensor, call: NormBackwardCall, ws: Workspace, product: Callable[[int, int], None] | None,
    total: Tensor | None, scattered: bool,
) -> NormBackwardOut:  # fmt: skip
    """x: [rows, H], contiguous; dx: the same, to be filled; `call.dy`: the rows of x that are to be finished, and its
    other tensors are of those rows; product: as `Call.product`, of x; total: to be filled with s of those rows, or
    None. `out.dx` is `dx`. Both ranks must make the same call; what they compute of their rows is a rank's own
    affair."""
    share = len(x) // 2
    steps: InCalls = Exchange(ws, x, product, dx) if scattered else Whole(ws, x, product)
    own = dx[ws.rank * share : (ws.rank + 1) * share] if scattered else dx
    add = _in_kernels if call.kernel_takes() else _plainly
    rows, finished = add(call, own, ws, total, steps.chunks)

    def finishing(start: int, stop: int) -> Finish:
        theirs = slot(ws, 0, x.dtype)[: (stop - start) * x.shape[1]].view(stop - start, -1)
        return lambda first, last: rows(start + first, start + last, theirs[first:last])

    steps.run(finishing)
    return NormBackwardOut(dx, *finished())


#: Finishes these rows, of which the last argument is the peer's part.
_Rows = Callable[[int, int, Tensor], None]
_Vectors = Callable[[], tuple[Tensor | None, Tensor | None]]


def _in_kernels(
    call: NormBackwardCall, dx: Tensor, ws: Workspace, total: Tensor | None, chunks: int
) -> tuple[_Rows, _Vectors]:  # fmt: skip
    parts = Parts(call, chunks)

    def rows(first: int, stop: int, theirs: Tensor) -> None:
        here = None if total is None else total[first:stop]
        parts.of(call.of_rows(first, stop), dx[first:stop], theirs, ws.state, here)

    return rows, parts.added_up


def _plainly(
    call: NormBackwardCall, dx: Tensor, ws: Workspace, total: Tensor | None, chunks: int
) -> tuple[_Rows, _Vectors]:  # fmt: skip
    vectors: list[NormBackwardOut] = []

    def rows(first: int, stop: int, theirs: Tensor) -> None:
        part = call.of_rows(first, stop)
        s = (part.dy.to(call.vector_dtype) + theirs.to(call.vector_dtype)).to(part.dy.dtype)
        s = torch.where(ws.state[1] != 0, torch.full_like(s, float("nan")), s)
        vectors.append(norm_backward_reference(replace(part, dy=s)))
        dx[first:stop].copy_(vectors[-1].dx)
        if total is not None:
            total[first:stop].copy_(s)

    def added_up() -> tuple[Tensor | None, Tensor | None]:
        zeros = torch.zeros(dx.shape[1], dtype=call.vector_dtype, device=dx.device)
        of_weight = sum((t for out in vectors if (t := out.dweight) is not None), zeros)
        of_bias = sum((t for out in vectors if (t := out.dbias) is not None), zeros)
        return of_weight if call.want_weight else None, of_bias if call.want_bias else None

    return rows, added_up
