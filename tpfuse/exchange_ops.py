"""The backward of a norm whose rows are scattered and gathered, as compiled graphs call it.

    tpfuse::exchange_norm_backward(factors, product, gathered, h, mean, rstd, weight, residual, total, dweight, dbias)

is tpfuse::reduce_scatter_norm_backward and the gather of its first result (backward_ops.py has the formula):
`gathered` [rows of all, H] is filled with dx of all ranks, and total, dweight, dbias, where they are given, with the
own rows' sum and the gradients of the vectors. `product` is a word of product_ops.py and `factors` are what it takes;
with '' there is one factor, x [rows of all, H]. h, mean, rstd, residual: of the own rows.

Two ranks whose calls are large do all of it by copies (kernels/symmetric/exchanged_backward.py), and rows travel while
others are multiplied. Otherwise the collectives run one after the other.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ._torch_private import group_rank, group_size
from .kernels.entry import exchange_norm_backward
from .kernels.norm_backward import NormBackwardCall, norm_backward
from .product_ops import PRODUCTS

_LIBRARY = torch.library.Library("tpfuse", "FRAGMENT")
_c10d = torch.ops._c10d_functional
NAME = "exchange_norm_backward"
_ARGUMENTS = (
    "(Tensor[] factors, str product, Tensor(a!) gathered, Tensor h, Tensor? mean, Tensor? rstd, Tensor? weight,"
    " Tensor? residual, Tensor(b!)? total=None, Tensor(c!)? dweight=None, Tensor(d!)? dbias=None, *, str norm,"
    " float eps, float weight_offset, ScalarType dtype, str group_name) -> ()"
)


def _run(
    factors: list[Tensor], product: str, gathered: Tensor, h: Tensor, mean: Tensor | None, rstd: Tensor | None,
    weight: Tensor | None, residual: Tensor | None, total: Tensor | None = None, dweight: Tensor | None = None,
    dbias: Tensor | None = None, *, norm: str, eps: float, weight_offset: float, dtype: torch.dtype, group_name: str,
) -> None:  # fmt: skip
    x, multiply = factors[0], None
    if product:
        x, fill = torch.empty(gathered.shape, dtype=dtype, device=gathered.device), PRODUCTS[product]

        def multiply(first: int, stop: int) -> None:
            fill(slice(first, stop), x[first:stop], *factors)

    own = x.chunk(group_size(group_name))[group_rank(group_name)]
    call = NormBackwardCall(
        own, h, mean, rstd, weight, residual, norm=norm, eps=eps, weight_offset=weight_offset,
        out_dtype=gathered.dtype, want_weight=dweight is not None, want_bias=dbias is not None,
    )  # fmt: skip
    out = exchange_norm_backward(x, gathered, call, group_name, multiply, total)
    if out is None:
        if multiply is not None:
            multiply(0, len(x))
        ranks = group_size(group_name)
        scattered = _c10d.reduce_scatter_tensor(x.contiguous(), "sum", ranks, group_name)
        s = _c10d.wait_tensor(scattered)
        out = norm_backward(replace(call, dy=s))
        gathered.copy_(_c10d.wait_tensor(_c10d.all_gather_into_tensor(out.dx, ranks, group_name)))
        if total is not None:
            total.copy_(s)
    for given, made in ((dweight, out.dweight), (dbias, out.dbias)):
        if given is not None and made is not None:
            given.copy_(made)


_LIBRARY.define(NAME + _ARGUMENTS, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl(NAME, _run, "CompositeExplicitAutograd")
for _key in ("Autograd", "ADInplaceOrView"):
    _LIBRARY.impl(NAME, torch.library.fallthrough_kernel, _key)
torch.library.register_fake(f"tpfuse::{NAME}", lambda *_, **__: None, lib=_LIBRARY)
