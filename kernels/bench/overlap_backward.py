"""The backward of a norm by copies, as a call of a batch of `overlap.py`; 2 ranks.

x of both ranks are small whole numbers, so `total`, their sum, must be right bit for bit; dx must be to a rounding, and
the gradients of the weight to what the order of a sum changes; those of the bias are sums of whole numbers again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from ..add_norm import on_device_of
from ..call import NORMS
from ..compat import INTERPRETED, next_power_of_2
from ..norm_backward import NormBackwardCall, Parts
from ..symmetric.copied import Whole
from ..symmetric.copies import RANKS, READY, Copies, chunks_of, slot
from ..symmetric.exchanged import Exchange, halves_of
from ..symmetric.norm_backward_by_copies import norm_backward_by_copies
from ..symmetric.workspace import Workspace
from .overlap_device import EPS, check_dx_kernel, check_vectors_kernel, fill_kernel, fill_norm_kernel
from .overlap_steps import F32, Bound, Call, Ledger, Step, given

_COLUMNS = 64  # of the gradients of vectors, what one program checks


@dataclass(frozen=True)
class BackwardLaunch:
    """`run` and `load` as a `Launch` of a kernel has them. `vectors`: where the gradients of weight and bias go."""

    x: Tensor
    dx: Tensor
    call: NormBackwardCall
    ws: Workspace
    product: Callable[[int, int], None] | None
    total: Tensor
    scattered: bool
    vectors: tuple[Tensor, Tensor | None]

    def run(self) -> None:
        out = norm_backward_by_copies(
            self.x, self.dx, self.call, self.ws, self.product, self.total, self.scattered
        )  # fmt: skip
        for into, made in zip(self.vectors, (out.dweight, out.dbias), strict=True):
            if into is not None and made is not None:
                into.copy_(made[None])

    def load(self) -> None:
        """Rows are finished here with whatever the slot holds: that waits for nobody, and what it leaves behind is
        filled anew before the call."""
        if INTERPRETED or not len(self.x):
            return
        copies = Copies(self.ws, self.x.view(-1).view(torch.int32))
        with on_device_of(self.x):
            for step in (copies.beginning(), copies.waiting(READY, 0, 4)):
                step.load()
            if self.scattered:  # and what takes the peer's rows
                Exchange(self.ws, self.x, self.product, self.dx).load(copies.beginning())
            rows, chunks_of_rows = len(self.total), halves_of if self.scattered else chunks_of
            parts = Parts(self.call, (Exchange if self.scattered else Whole).most_chunks)
            theirs = slot(self.ws, 0, self.x.dtype)[: self.total.numel()].view(rows, -1)
            for first, stop in chunks_of_rows(rows):
                dx, total = self.dx[: stop - first], self.total[first:stop]
                parts.of(self.call.of_rows(first, stop), dx, theirs[first:stop], self.ws.state, total)
            parts.added_up()


def bind_backward(ws: Workspace, ledger: Ledger, index: int, call: Call, own: Random, pause: Any) -> Bound:
    recipe, rows, layer = call.recipe, call.rows, call.recipe.norm == "layer_norm"
    if ws.world != RANKS or ws.remote is None or rows * recipe.hidden * recipe.dtype.itemsize > 4 * ws.copy_words:
        raise ValueError(f"{call} does not fit")
    scattered = recipe.scattered
    first, stop = (ws.rank * rows // 2, (ws.rank + 1) * rows // 2) if scattered else (0, rows)
    dx = ledger.tensor(index, "y", rows, recipe)
    residual, total, h = (
        ledger.tensor(index, name, stop - first, recipe) for name in ("residual", "residual_out", "h")
    )
    mean, rstd = (ledger.room(index, name, stop - first, 1, F32) for name in ("mean", "rstd"))
    dweight, dbias = (ledger.room(index, name, 1, recipe.hidden, F32) for name in ("dweight", "dbias"))
    weight = (1.0 + torch.arange(recipe.hidden, device=dx.device) % 4 * 0.25).to(recipe.dtype)
    x = given(ledger, index, call, dx, own, pause)
    op = NormBackwardCall(
        x.x[first:stop], h, mean if layer else None, rstd, weight, residual, norm=recipe.norm, eps=EPS,
        out_dtype=recipe.dtype, want_weight=True, want_bias=layer,
    )  # fmt: skip
    vectors = dweight, dbias if layer else None
    launch = BackwardLaunch(x.x, dx, op, ws, x.product, total, scattered, vectors)
    if not rows:
        return Bound([], launch, [])
    sizes = {"H": recipe.hidden, "BLOCK": next_power_of_2(recipe.hidden)}
    norm = {"WORLD": ws.world, "NORM": NORMS[recipe.norm]}
    tolerance = 1e-5 if recipe.dtype == F32 else torch.finfo(recipe.dtype).eps
    fill = [
        Step(fill_kernel, rows, (
            x.filled, residual, dx, total, ledger.clock, index, ws.rank, first, stop
        ), sizes),
        Step(fill_norm_kernel, stop - first, (
            h, mean, rstd, dweight, dbias, ledger.clock, index, first
        ), {**sizes, "NORM": norm["NORM"]}),
    ]  # fmt: skip
    check = [
        Step(check_dx_kernel, rows, (
            dx, total, weight, ledger.clock, index, first, stop, ledger.tally
        ), {**sizes, **norm, "TOLERANCE": tolerance}),
        Step(check_vectors_kernel, -(-recipe.hidden // _COLUMNS), (
            *vectors, mean, rstd, ledger.clock, index, first, stop, ledger.tally
        ), {"H": recipe.hidden, "BLOCK": _COLUMNS, **norm}),
    ]  # fmt: skip
    return Bound([*x.fill, *fill], launch, check)
