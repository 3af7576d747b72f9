"""A gradient's collective, the backward of a norm and the residual's gradient: one functional operation each.

    tpfuse::all_reduce_norm_backward        s = the sum of x over the group
    tpfuse::reduce_scatter_norm_backward    s = this rank's rows of that sum

    n = (h - mean) * rstd                                  (mean is 0 for RMSNorm)
    g = s * (weight + weight_offset)
    dx = (g - n * mean(g * n) [- mean(g), LayerNorm]) * rstd + residual
    dweight = sum over this rank's rows of s * n,  dbias = sum over this rank's rows of s

x: [rows, H], of which each rank gets an equal share where they are scattered; h, residual: [own rows, H]; rstd, mean:
[own rows, 1], or None (then computed from h and eps); weight: [H] or None. Results: [dx, s if want_sum, dweight
if want_weight, dbias if want_bias]; the two last are float32 (float64 where an input is).

The gradients of weight and bias are what the graph had: of all rows where every rank has all, of a rank's own rows
where they are scattered, and then still a partial sum over the group. The passes insert these operators; on every
device they are a functional collective and the local kernel (kernels/norm_backward.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._torch_private import group_size, register_local_tensor_rule
from .kernels.norm_backward import norm_backward

_LIBRARY = torch.library.Library("tpfuse", "FRAGMENT")
ARGUMENTS = (
    "(Tensor x, Tensor h, Tensor? mean, Tensor? rstd, Tensor? weight, Tensor? residual, *, str norm, float eps,"
    " float weight_offset, ScalarType out_dtype, bool want_sum, bool want_weight, bool want_bias, str group_name)"
    " -> Tensor[]"
)
_c10d = torch.ops._c10d_functional


def _all_reduced(x: Tensor, group_name: str) -> Tensor:
    return _c10d.wait_tensor(_c10d.all_reduce(x.contiguous(), "sum", group_name))


def _scattered(x: Tensor, group_name: str) -> Tensor:
    return _c10d.wait_tensor(_c10d.reduce_scatter_tensor(x.contiguous(), "sum", group_size(group_name), group_name))


def _define(name: str, pay: Callable[[Tensor, str], Tensor], scattered: bool) -> None:
    def run(
        x: Tensor, h: Tensor, mean: Tensor | None, rstd: Tensor | None, weight: Tensor | None, residual: Tensor | None,
        *, norm: str, eps: float, weight_offset: float, out_dtype: torch.dtype, want_sum: bool, want_weight: bool,
        want_bias: bool, group_name: str,
    ) -> list[Tensor]:  # fmt: skip
        total = pay(x, group_name)
        out = norm_backward(
            total, h, mean, rstd, weight, residual, norm=norm, eps=eps, weight_offset=weight_offset,
            out_dtype=out_dtype, want_weight=want_weight, want_bias=want_bias,
        )  # fmt: skip
        found = (out.dx, total if want_sum else None, out.dweight, out.dbias)
        return [t for t in found if t is not None]

    def fake(
        x: Tensor, h: Tensor, mean: Tensor | None, rstd: Tensor | None, weight: Tensor | None, residual: Tensor | None,
        *, norm: str, eps: float, weight_offset: float, out_dtype: torch.dtype, want_sum: bool, want_weight: bool,
        want_bias: bool, group_name: str,
    ) -> list[Tensor]:  # fmt: skip
        rows = x.shape[0] // group_size(group_name) if scattered else x.shape[0]
        vector = _vector_dtype(x, h, weight, residual)
        outputs = [x.new_empty((rows, x.shape[1]), dtype=out_dtype)]
        if want_sum:
            outputs.append(x.new_empty((rows, x.shape[1])))
        return outputs + [x.new_empty(x.shape[1:], dtype=vector) for wanted in (want_weight, want_bias) if wanted]

    _LIBRARY.define(name + ARGUMENTS, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tpfuse::{name}", fake, lib=_LIBRARY)
    register_local_tensor_rule(f"tpfuse::{name}", run)


def _define_local() -> None:
    """tpfuse::norm_backward, the same of a sum that is there: what compiled graphs call behind the collective."""

    def run(
        total: Tensor, h: Tensor, mean: Tensor | None, rstd: Tensor | None, weight: Tensor | None,
        residual: Tensor | None, *, norm: str, eps: float, weight_offset: float, out_dtype: torch.dtype,
        want_weight: bool, want_bias: bool,
    ) -> list[Tensor]:  # fmt: skip
        out = norm_backward(
            total, h, mean, rstd, weight, residual, norm=norm, eps=eps, weight_offset=weight_offset,
            out_dtype=out_dtype, want_weight=want_weight, want_bias=want_bias,
        )  # fmt: skip
        return [t for t in (out.dx, out.dweight, out.dbias) if t is not None]

    def fake(
        total: Tensor, h: Tensor, mean: Tensor | None, rstd: Tensor | None, weight: Tensor | None,
        residual: Tensor | None, *, out_dtype: torch.dtype, want_weight: bool, want_bias: bool, **_: object,
    ) -> list[Tensor]:  # fmt: skip
        vector = _vector_dtype(total, h, weight, residual)
        vectors = [total.new_empty(total.shape[1:], dtype=vector) for wanted in (want_weight, want_bias) if wanted]
        return [total.new_empty(total.shape, dtype=out_dtype), *vectors]

    arguments = ARGUMENTS.replace("Tensor x,", "Tensor total,").replace(" bool want_sum,", "")
    arguments = arguments.replace(", str group_name)", ")")
    _LIBRARY.define("norm_backward" + arguments, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl("norm_backward", run, "CompositeExplicitAutograd")
    torch.library.register_fake("tpfuse::norm_backward", fake, lib=_LIBRARY)
    register_local_tensor_rule("tpfuse::norm_backward", run)


def _vector_dtype(*given: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in given) else torch.float32


_define_local()
_define("all_reduce_norm_backward", _all_reduced, scattered=False)
_define("reduce_scatter_norm_backward", _scattered, scattered=True)
