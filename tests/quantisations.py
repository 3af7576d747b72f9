"""How frameworks quantise a normed row y [..., H], as programs write it: each gives (q, scale)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn


def float8_per_row(y: Tensor) -> tuple[Tensor, Tensor]:
    """As torchao's inference: the scale in y's dtype, no eps."""
    scale = (y.abs().amax(-1, keepdim=True) / 448).float()
    return (y.float() / scale).clamp(-448, 448).to(E4M3), scale


def by_hand(y: Tensor) -> tuple[Tensor, Tensor]:
    """In float32, with an eps on the maximum."""
    scale = y.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
    return (y.float() / scale).clamp(min=-448, max=448).to(E4M3), scale


def groups(y: Tensor) -> tuple[Tensor, Tensor]:
    """As DeepGEMM's per_token_cast_to_fp8: 128 columns share a scale."""
    rows = y.view(*y.shape[:-1], -1, 128)
    most = rows.abs().float().amax(-1, keepdim=True).clamp(1e-4)
    return (rows * (448.0 / most)).to(E4M3).view_as(y), (most / 448.0).squeeze(-1)


def int8_per_row(y: Tensor) -> tuple[Tensor, Tensor]:
    """As torchao's dynamic int8: from the least and the greatest, rounded to y's dtype twice."""
    zero = torch.zeros((), dtype=y.dtype, device=y.device)
    least, most = (torch.minimum(y.amin(-1, keepdim=True), zero), torch.maximum(y.amax(-1, keepdim=True), zero))
    scale = (torch.maximum(-least, most) / 127.5).float().clamp_min(1.1920928955078125e-07).to(y.dtype).float()
    return torch.clamp(torch.round(y * (1.0 / scale)), -128, 127).to(torch.int8), scale


def power_of_two(y: Tensor) -> tuple[Tensor, Tensor]:
    """As torchao's float8 training by rows: q is multiplied, and the product gets the reciprocal."""
    most = y.abs().amax(-1, keepdim=True).double().clamp(min=1e-12)
    scale = torch.exp2(torch.floor(torch.log2((448.0 / most).float())))
    return (y.float() * scale).clamp(-448.0, 448.0).to(E4M3), 1.0 / scale


SPELLINGS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    function.__name__: function for function in (float8_per_row, by_hand, groups, int8_per_row, power_of_two)
}


# -- operators that quantise by themselves: what their authors publish, registered in their names ----------------------


def _fbgemm(rows: Tensor) -> list[Tensor]:
    scale = (rows.float().abs().amax(-1) / 448).clamp_min(1 / (448 * 512))
    return [(rows.float() / scale[..., None]).clamp(-448, 448).to(E4M3), scale]


def _triton(rows: Tensor) -> tuple[Tensor, Tensor]:
    most = rows.float().abs().amax(-1).clamp_min(1e-12)
    factor = torch.full_like(most, 448) / most  # `448 / most` would multiply the reciprocal
    return (rows.float() * factor[..., None]).clamp(-448, 448).to(E4M3), torch.ones_like(most) / factor


def _bitsandbytes(rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    most = rows.abs().amax(-1).float()
    factor = 127.0 / most  # which multiplies the reciprocal
    return torch.round(rows.float() * factor[..., None]).to(torch.int8), most, None


_LIBRARIES = {name: torch.library.Library(name, "FRAGMENT") for name in ("fbgemm", "triton", "bitsandbytes")}
_SCHEMAS = {
    "fbgemm::quantize_fp8_per_row": (
        "(Tensor input, Tensor? bs=None, Tensor? scale_ub=None, ScalarType? output_dtype=None,"
        " bool stochastic_rounding=False) -> Tensor[]", _fbgemm,
    ),
    "triton::quantize_fp8_row": (
        "(Tensor a, Tensor? scale_ub=None, Tensor? zero_start_index_M=None, bool use_triton=True,"
        " Device? output_device=None, int? align_rows_to=None) -> (Tensor, Tensor)", _triton,
    ),
    "bitsandbytes::int8_vectorwise_quant": (
        "(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)", _bitsandbytes,
    ),
}  # fmt: skip
for _name, (_schema, _function) in _SCHEMAS.items():
    _library, _op = _LIBRARIES[_name.split("::")[0]], _name.split("::")[1]
    _library.define(_op + _schema)
    _library.impl(_op, lambda rows, *_, _function=_function: _function(rows), "CompositeExplicitAutograd")
    torch.library.register_fake(_name, lambda rows, *_, _function=_function: _function(rows), lib=_library)

#: ModelOpt's, which rounds to a format and back; one that is called with INT8 and a largest magnitude.
_TENSORRT = torch.library.Library("tensorrt", "FRAGMENT")
_TENSORRT.define(
    "quantize_op(Tensor input, Tensor amax, int num_bits, int exponent_bits, bool unsigned, bool narrow_range)"
    " -> Tensor"
)


def _quantize_op(rows: Tensor, amax: Tensor, bits: int, exponent: int, unsigned: bool, narrow: bool) -> Tensor:
    scale = 127.0 / amax.float()
    return (torch.round(rows.float() * scale).clamp(-127, 127) / scale).to(rows.dtype)


_TENSORRT.impl("quantize_op", _quantize_op, "CompositeExplicitAutograd")
torch.library.register_fake("tensorrt::quantize_op", _quantize_op, lib=_TENSORRT)

#: By name: what calls the operator on rows [.., H] seen as [N, H], and gives (q, scale).
OPERATORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "fbgemm": lambda y, *more: tuple(torch.ops.fbgemm.quantize_fp8_per_row(y.flatten(0, -2), *more)),
    "triton": lambda y, *more: torch.ops.triton.quantize_fp8_row(y.flatten(0, -2), *more),
    "triton, rows as they are": lambda y: torch.ops.triton.quantize_fp8_row(y),
    "bitsandbytes": lambda y, *more: torch.ops.bitsandbytes.int8_vectorwise_quant(y.flatten(0, -2), *more)[:2],
}


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN wherever the other has NaN."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(torch.nan_to_num(a.float(), 7.0), torch.nan_to_num(b.float(), 7.0))
        and torch.equal(a.float().isnan(), b.float().isnan())
    )
