"""Operators that quantise rows by themselves, by name: the steps that they stand for. Reads only.

Nobody sees into them, so what they compute is known from what their authors publish: the scale of a row from its
largest magnitude in float32, with the least scale that each allows. Only calls whose options are left as they are
count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from tpfuse._torch_private import REQUIRED, defaults_of, operator_full_name
from tpfuse.quantisation import QuantStep

from ..facts import aten_ops as ops
from ..facts.graph import argument, same_size, value

_F32, _E4M3, _INT8 = torch.float32, torch.float8_e4m3fn, torch.int8
_MOST = 448.0
#: Numbers a step; equal steps have one number.
Number = Callable[[QuantStep], int]


@dataclass(frozen=True)
class Quantiser:
    """`steps(number, y in float32)` gives the numbers of (q, scale), which the operator returns first. may: options
    that change nothing, with what they may be."""

    steps: Callable[[Number, int], tuple[int, int]]
    q: torch.dtype
    may: tuple[tuple[str, object], ...] = ()


def _largest(of: Number, y: int) -> int:
    return of(QuantStep("amax", (of(QuantStep("abs", (y,), _F32)),), _F32))


def _as_e4m3(of: Number, scaled: int) -> int:
    low = of(QuantStep("max", (scaled, -_MOST), _F32))
    return of(QuantStep("to", (of(QuantStep("min", (low, _MOST), _F32)),), _E4M3))


def _fbgemm(of: Number, y: int) -> tuple[int, int]:
    """s = max(|y|) / 448, at least 1 / (448 * 512); q = y / s."""
    share = of(QuantStep("div", (_largest(of, y), _MOST), _F32))
    scale = of(QuantStep("max", (share, _rounded(1 / (_MOST * 512))), _F32))
    return _as_e4m3(of, of(QuantStep("div", (y, scale), _F32))), scale


def _triton(of: Number, y: int) -> tuple[int, int]:
    """f = 448 / max(|y|), which is at least 1e-12; q = y * f, s = 1 / f."""
    largest = of(QuantStep("max", (_largest(of, y), _rounded(1e-12)), _F32))
    factor = of(QuantStep("div", (_MOST, largest), _F32))
    return _as_e4m3(of, of(QuantStep("mul", (y, factor), _F32))), of(QuantStep("div", (1.0, factor), _F32))


def _bitsandbytes(of: Number, y: int) -> tuple[int, int]:
    """s = max(|y|); q = round(y * f), f being 127 times the reciprocal of s, as PyTorch divides numbers by tensors."""
    largest = _largest(of, y)
    factor = of(QuantStep("mul", (of(QuantStep("reciprocal", (largest,), _F32)), 127.0), _F32))
    scaled = of(QuantStep("mul", (y, factor), _F32))
    return of(QuantStep("to", (of(QuantStep("round", (scaled,), _F32)),), _INT8)), largest


def _rounded(number: float) -> float:
    return float(torch.tensor(number, dtype=_F32))


QUANTISERS = {
    "fbgemm::quantize_fp8_per_row": Quantiser(_fbgemm, _E4M3, (("output_dtype", _E4M3),)),
    "triton::quantize_fp8_row": Quantiser(_triton, _E4M3),
    "bitsandbytes::int8_vectorwise_quant": Quantiser(_bitsandbytes, _INT8),
}
#: Operators that round rows to such a format and give them back in the dtype they had.
ROUNDING = ("tensorrt::quantize_op", "tensorrt::dynamic_block_quantize_op")
ROUNDED = "rounds the normed value and gives it back in the dtype it had, so there are no quantised rows to hand out"


def rounding_of(node: fx.Node) -> str:
    """The name of the operator that `node` calls, if it is such."""
    name = operator_full_name(node.target) if node.op == "call_function" else ""
    return name if name in ROUNDING else ""


def quantiser_of(node: fx.Node) -> Quantiser | None:
    """What `node` is, if it calls such an operator, with no option set, and nothing but rows and scales is read."""
    known = QUANTISERS.get(operator_full_name(node.target)) if node.op == "call_function" else None
    if known is None:
        return None
    (first, *options) = defaults_of(node.target).items()
    if not isinstance(argument(node, first[0]), fx.Node):
        return None
    for name, default in options:
        given = argument(node, name)
        if given != (None if default is REQUIRED else default) and (name, given) not in known.may:
            return None
    parts = {user.args[1] for user in node.users if user.target is ops.operator.getitem and user.users}
    others = [user for user in node.users if user.target is not ops.operator.getitem]
    return known if not others and parts <= {0, 1} else None


def quantised_rows(node: fx.Node) -> fx.Node:
    """What the operator quantises."""
    rows: fx.Node = argument(node, next(iter(defaults_of(node.target))))
    return rows


def part_of(node: fx.Node, of: Number, y: int) -> tuple[int, bool] | None:
    """(number, whether it is rows) of `node`, which takes one of an operator's results; `y`: its rows in float32."""
    operator = node.args[0]
    known = quantiser_of(operator) if isinstance(operator, fx.Node) else None
    result, rows = value(node), value(quantised_rows(operator)) if isinstance(operator, fx.Node) and known else None
    if known is None or result is None or rows is None:
        return None
    q, scale = known.steps(of, y)
    if node.args[1] == 0:
        return (q, True) if result.dtype is known.q and same_size(result.numel(), rows.numel()) else None
    one_each = same_size(result.numel() * rows.shape[-1], rows.numel())
    return (scale, False) if node.args[1] == 1 and result.dtype is _F32 and one_each else None


__all__ = ["QUANTISERS", "ROUNDED", "Quantiser", "part_of", "quantised_rows", "quantiser_of", "rounding_of"]
