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
where they are scattered, and then still a partial sum over the group. `overlap` lets two ranks make the first of them,
and the second with a gather behind it (gather_ops.py), by copies. The passes insert these operators; on every device
they are a functional collective and the local kernel (kernels/norm_backward.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._torch_private import group_size, register_local_tensor_rule
from .kernels.entry import reduce_norm_backward
from .kernels.norm_backward import NormBackwardCall, norm_backward

_LIBRARY = torch.library.Library("tpfuse", "FRAGMENT")
ARGUMENTS = (
    "(Tensor x, Tensor h, Tensor? mean, Tensor? rstd, Tensor? weight, Tensor? residual, *, str norm, float eps,"
    " float weight_offset, ScalarType out_dtype, bool want_sum, bool want_weight, bool want_bias, str group_name,"
    " bool overlap=False) -> Tensor[]"
)
_c10d = torch.ops._c10d_functional


def _all_reduced(x: Tensor, group_name: str) -> Tensor:
    return _c10d.wait_tensor(_c10d.all_reduce(x.contiguous(), "sum", group_name))


def _scattered(x: Tensor, group_name: str) -> Tensor:
    return _c10d.wait_tensor(_c10d.reduce_scatter_tensor(x.contiguous(), "sum", group_size(group_name), group_name))


def _results(call: NormBackwardCall, total: Tensor | None) -> list[Tensor]:
    """[dx, the sum, dweight, dbias] of a sum that is there, without what is not wanted."""
    out = norm_backward(call)
    return [t for t in (out.dx, total, out.dweight, out.dbias) if t is not None]


def _fake_results(call: NormBackwardCall, rows: Any, want_sum: bool) -> list[Tensor]:
    hidden = call.dy.shape[1]
    outputs = [call.dy.new_empty((rows, hidden), dtype=call.out_dtype)]
    outputs += [call.dy.new_empty((rows, hidden))] if want_sum else []
    vectors = (call.want_weight, call.want_bias)
    return outputs + [call.dy.new_empty((hidden,), dtype=call.vector_dtype) for wanted in vectors if wanted]


def by_copies(
    scattered: bool, x: Tensor, *operands: Any, want_sum: bool, group_name: str, overlap: bool = True, **options: Any
) -> list[Tensor] | None:  # fmt: skip
    """[dx of all rows, the other results], new tensors; None where it is not made by copies, on all ranks alike."""
    h = operands[0]
    call, total = NormBackwardCall(h, *operands, **options), h.new_empty(h.shape, dtype=x.dtype) if want_sum else None
    dx = torch.empty_like(x, dtype=call.out_dtype, memory_format=torch.contiguous_format)
    out = reduce_norm_backward(x, dx, call, group_name, scattered, None, total)
    return None if out is None else [dx, *(t for t in (total, out.dweight, out.dbias) if t is not None)]


def _define(name: str, arguments: str, run: Callable[..., list[Tensor]], fake: Callable[..., list[Tensor]]) -> None:
    _LIBRARY.define(name + arguments, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tpfuse::{name}", fake, lib=_LIBRARY)
    register_local_tensor_rule(f"tpfuse::{name}", run)


def _define_paying(name: str, pay: Callable[[Tensor, str], Tensor], scattered: bool) -> None:
    """An operator that pays the sum by `pay` first."""

    def run(
        x: Tensor, *operands: Any, want_sum: bool, group_name: str, overlap: bool = False, **options: Any
    ) -> list[Tensor]:  # fmt: skip
        if overlap and not scattered:
            done = by_copies(False, x, *operands, want_sum=want_sum, group_name=group_name, **options)
            if done is not None:
                return done
        total = pay(x, group_name)
        return _results(NormBackwardCall(total, *operands, **options), total if want_sum else None)

    def fake(
        x: Tensor, *operands: Any, want_sum: bool, group_name: str, overlap: bool = False, **options: Any
    ) -> list[Tensor]:  # fmt: skip
        rows = x.shape[0] // group_size(group_name) if scattered else x.shape[0]
        return _fake_results(NormBackwardCall(x, *operands, **options), rows, want_sum)

    _define(name, ARGUMENTS, run, fake)


def _define_local() -> None:
    """tpfuse::norm_backward, the same of a sum that is there: what compiled graphs call behind the collective."""

    def run(*operands: Any, **options: Any) -> list[Tensor]:
        return _results(NormBackwardCall(*operands, **options), None)

    def fake(*operands: Any, **options: Any) -> list[Tensor]:
        call = NormBackwardCall(*operands, **options)
        return _fake_results(call, call.dy.shape[0], want_sum=False)

    arguments = ARGUMENTS.replace("Tensor x,", "Tensor total,").replace(" bool want_sum,", "")
    _define("norm_backward", arguments.replace(", str group_name, bool overlap=False)", ")"), run, fake)


_define_local()
_define_paying("all_reduce_norm_backward", _all_reduced, scattered=False)
_define_paying("reduce_scatter_norm_backward", _scattered, scattered=True)
