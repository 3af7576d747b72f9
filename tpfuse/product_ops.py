"""A matrix product and the boundary behind it, as compiled graphs call them: one operator.

    tpfuse::product_all_reduce_norm.lean([a, b], "mm", y, spec, residual, weight, hidden)     and lean.py's other forms
    tpfuse::product_reduce_scatter_norm_gather.lean(...)                                      the same

is tpfuse::all_reduce_norm, or the operator of gather_ops.py, of x = a @ b, or of another of PRODUCTS: a [rows, k],
b [k, hidden], y of any shape with `rows` rows of `hidden`, x of the dtype in `spec`. From FROM_BYTES of x on the call
hands its kernel the product, and those that can send some rows while others are multiplied
(kernels/symmetric/copies.py) do so; every other kernel, and every smaller call, begins when x is there. What a rank
sends, and when a peer may count on it, is the same in any case: a peer may have another product, or none and not this
operator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from .boundary_spec import FORMS, read_spec
from .kernels.call import Call
from .kernels.symmetric.copies import FROM_BYTES, RANKS
from .lean import declared, kernels_of

#: In front of the name of the operator behind the product.
PREFIX = "product_"
__all__ = ["FROM_BYTES", "PREFIX", "PRODUCTS", "RANKS", "define"]

SCALED_MM = torch.ops.aten._scaled_mm.out


def _mm(rows: slice, out: Tensor, a: Tensor, b: Tensor) -> None:
    torch.mm(a[rows], b, out=out)


def _addmm(rows: slice, out: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> None:
    torch.addmm(bias, a[rows], b, out=out)


def _mms(rows: slice, out: Tensor, *factors: Tensor) -> None:
    """a1 @ b1 + a2 @ b2 + ...: the sum so far is rounded once for each further product. A graph rounds as often or more
    often: each product by itself, and what it adds up."""
    torch.mm(factors[0][rows], factors[1], out=out)
    for a, b in zip(factors[2::2], factors[3::2], strict=True):
        out.addmm_(a[rows], b)


def _scaled_mm(
    rows: slice, out: Tensor, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    *, fast: bool,
) -> None:  # fmt: skip
    if scale_a.numel() > 1:  # one of each row
        scale_a = scale_a[rows]
        # As the scales of a whole product lie: nothing is known of kernels that are given others.
        scale_a = scale_a if scale_a.data_ptr() % 16 == 0 else scale_a.clone()
    SCALED_MM(a[rows], b, scale_a, scale_b, bias, out_dtype=out.dtype, use_fast_accum=fast, out=out)


#: By the word that a graph has for a product: how `rows` of it are computed into `out`, of factors in the order in
#: which the aten operator takes them; of a sum of products ("mms") those of one after those of the other, and bits may
#: differ from the graph's. Which products are taken: passes/rewrite/overlap.py.
PRODUCTS: dict[str, Callable[..., None]] = {
    "mm": _mm,
    "mms": _mms,
    "addmm": _addmm,
    "scaled_mm": partial(_scaled_mm, fast=False),
    "scaled_mm, fast": partial(_scaled_mm, fast=True),
}


def define(library: torch.library.Library, name: str, run: Callable[[Call, Any], list[Tensor]]) -> None:
    """Define the operator for a product and `name` behind it. `run`: as of the lean forms of that."""
    kernels = kernels_of(run)
    for form, names in FORMS.items():
        full_name = f"{PREFIX}{name}.{form}"
        arguments = declared(names).replace("Tensor x", "Tensor[] factors, str product")
        library.define(f"{full_name}({arguments}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(full_name, partial(_call, name, kernels[form], form), "CompositeExplicitAutograd")
        for key in ("Autograd", "ADInplaceOrView"):
            library.impl(full_name, torch.library.fallthrough_kernel, key)
        torch.library.register_fake(f"tpfuse::{full_name}", lambda *_, **__: None, lib=library)


def room_for(dtype: torch.dtype, result: Tensor) -> Tensor:
    """Where a product goes whose rows become those of `result`: into its memory, where that fits, since the factors are
    still held, and two more buffers would be the most that a step needs."""
    fits = dtype == result.dtype and result.is_contiguous()
    return result if fits else torch.empty(result.shape, dtype=dtype, device=result.device)


def _call(name: str, kernel: Callable[..., None], form: str, factors: list[Tensor], product: str, *rest: Any) -> None:
    """`rest`: the arguments of the lean form behind its x, which begin with y and the spec."""
    y, dtype, fill = rest[0], _dtype_of_x(rest[1]), PRODUCTS[product]
    if y.numel() * dtype.itemsize < FROM_BYTES:
        x = torch.empty(y.shape, dtype=dtype, device=y.device)
        fill(slice(None), x.view(-1, y.shape[-1]), *factors)
        getattr(getattr(torch.ops.tpfuse, name), form)(x, *rest)
        return
    x = room_for(dtype, y)
    rows = x.view(-1, y.shape[-1])

    def multiply(first: int, stop: int) -> None:
        fill(slice(first, stop), rows[first:stop], *factors)

    kernel(x, *rest, product=multiply)


@lru_cache(maxsize=4096)
def _dtype_of_x(spec: str) -> torch.dtype:
    dtype = read_spec(spec).operands[0]
    assert dtype is not None, "there always is one"
    return dtype
