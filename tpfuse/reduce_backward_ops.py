"""A gradient's collectives and the backward of the norm between them, as compiled graphs call them: one operator.

    tpfuse::reduce_norm_backward(factors, product, dx, h, mean, rstd, weight, residual, total, dweight, dbias)

is tpfuse::all_reduce_norm_backward, or, `scattered`, tpfuse::reduce_scatter_norm_backward and the gather of its first
result (backward_ops.py has the formula). dx [rows, H] is filled with that of all rows; total, dweight, dbias, where
they are given, with the sum of the rows that this rank finishes and the gradients of the vectors over those; h, mean,
rstd, residual: of those rows. `product` is a word of product_ops.py and `factors` are what it takes; with '' there is
one factor, x [rows, H], of `dtype`.

Two ranks whose calls are large do all of it by copies (kernels/symmetric/norm_backward_by_copies.py), and rows travel
while others are multiplied. Otherwise the collectives run one after the other.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ._torch_private import group_size
from .kernels.entry import reduce_norm_backward as by_copies
from .kernels.norm_backward import NormBackwardCall, NormBackwardOut, norm_backward
from .product_ops import PRODUCTS, room_for

_LIBRARY = torch.library.Library("tpfuse", "FRAGMENT")
_c10d = torch.ops._c10d_functional
NAME = "reduce_norm_backward"
_ARGUMENTS = (
    "(Tensor[] factors, str product, Tensor(a!) dx, Tensor h, Tensor? mean, Tensor? rstd, Tensor? weight,"
    " Tensor? residual, Tensor(b!)? total=None, Tensor(c!)? dweight=None, Tensor(d!)? dbias=None, *, str norm,"
    " float eps, float weight_offset, ScalarType dtype, bool scattered, str group_name) -> ()"
)


def _run(
    factors: list[Tensor], product: str, dx: Tensor, h: Tensor, mean: Tensor | None, rstd: Tensor | None,
    weight: Tensor | None, residual: Tensor | None, total: Tensor | None = None, dweight: Tensor | None = None,
    dbias: Tensor | None = None, *, norm: str, eps: float, weight_offset: float, dtype: torch.dtype, scattered: bool,
    group_name: str,
) -> None:  # fmt: skip
    x, multiply = factors[0], None
    if product:
        x, fill = room_for(dtype, dx), PRODUCTS[product]

        def multiply(first: int, stop: int) -> None:
            fill(slice(first, stop), x[first:stop], *factors)

    call = NormBackwardCall(
        h, h, mean, rstd, weight, residual, norm=norm, eps=eps, weight_offset=weight_offset, out_dtype=dx.dtype,
        want_weight=dweight is not None, want_bias=dbias is not None,
    )  # fmt: skip
    out = by_copies(x, dx, call, group_name, scattered, multiply, total)
    if out is None:
        if multiply is not None:
            multiply(0, len(x))
        out = _one_after_the_other(x, dx, call, group_name, scattered, total)
    for given, made in ((dweight, out.dweight), (dbias, out.dbias)):
        if given is not None and made is not None:
            given.copy_(made)


def _one_after_the_other(
    x: Tensor, dx: Tensor, call: NormBackwardCall, group_name: str, scattered: bool, total: Tensor | None
) -> NormBackwardOut:  # fmt: skip
    ranks = group_size(group_name)
    if scattered:
        pending = _c10d.reduce_scatter_tensor(x.contiguous(), "sum", ranks, group_name)
    else:
        pending = _c10d.all_reduce(x.contiguous(), "sum", group_name)
    s = _c10d.wait_tensor(pending)
    out = norm_backward(replace(call, dy=s))
    gathered = out.dx
    if scattered:
        gathered = _c10d.wait_tensor(_c10d.all_gather_into_tensor(out.dx, ranks, group_name))
    dx.copy_(gathered)
    if total is not None:
        total.copy_(s)
    return out


_LIBRARY.define(NAME + _ARGUMENTS, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl(NAME, _run, "CompositeExplicitAutograd")
for _key in ("Autograd", "ADInplaceOrView"):
    _LIBRARY.impl(NAME, torch.library.fallthrough_kernel, _key)
torch.library.register_fake(f"tpfuse::{NAME}", lambda *_, **__: None, lib=_LIBRARY)
