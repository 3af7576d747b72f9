"""The backward of a norm and of the addition behind it: the work of one rank once a gradient's sum is there.

    n = (h - mean) * rstd                        (mean is 0 for RMSNorm)
    g = dy * (weight + weight_offset)
    dx = (g - n * mean(g * n) [- mean(g), LayerNorm]) * rstd + residual
    dweight = sum over rows of dy * n,  dbias = sum over rows of dy

All of it in float32 (float64 where an input is), `dx` rounded once. `norm_backward` runs one Triton kernel on CUDA
tensors: each program takes every n-th row and keeps its part of the vectors' gradients in registers. Elsewhere, and
where the kernel does not reach, it runs `norm_backward_reference`: the same formula in plain torch operations.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .add_norm import on_device_of
from .call import KERNEL_DTYPES, MAX_HIDDEN, NORMS, kernel_takes
from .compat import next_power_of_2, tl, triton
from .device import LAYER

#: Programs to a multiprocessor: they hide each other's waits, and each leaves one row of partial sums behind.
PROGRAMS_PER_MULTIPROCESSOR = 4
_PROGRAMS_ELSEWHERE = 8  # in the interpreter


@dataclass(frozen=True, kw_only=True)
class NormBackwardCall:
    """What the backward of a norm computes on. dy, h, residual: [rows, H]; mean, rstd: [rows, 1], or None: computed
    from `h` and `eps` then; weight: [H] or None; any float dtypes. want_weight, want_bias: which gradients of vectors
    are wanted."""

    dy: Tensor = field(kw_only=False)
    h: Tensor = field(kw_only=False)
    mean: Tensor | None = field(default=None, kw_only=False)
    rstd: Tensor | None = field(default=None, kw_only=False)
    weight: Tensor | None = field(default=None, kw_only=False)
    residual: Tensor | None = field(default=None, kw_only=False)
    norm: str
    eps: float
    weight_offset: float = 0.0
    out_dtype: torch.dtype
    want_weight: bool
    want_bias: bool

    @property
    def given(self) -> tuple[Tensor | None, ...]:
        return self.dy, self.h, self.mean, self.rstd, self.weight, self.residual

    @property
    def vector_dtype(self) -> torch.dtype:
        """In which all is computed, and gradients of vectors are given."""
        given = (self.dy, self.h, self.weight, self.residual)
        return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in given) else torch.float32

    def kernel_takes(self) -> bool:
        rows, hidden = self.dy.shape
        sized = 0 not in (rows, hidden) and hidden <= MAX_HIDDEN
        return sized and self.out_dtype in KERNEL_DTYPES and kernel_takes(*self.given)


@dataclass(frozen=True)
class NormBackwardOut:
    """`dx`: [rows, H]; `dweight`, `dbias`: [H], float32 (float64 where an input is); None where not asked for."""

    dx: Tensor
    dweight: Tensor | None
    dbias: Tensor | None


@triton.jit
def _norm_backward_kernel(
    dy_ptr, h_ptr, mean_ptr, rstd_ptr, weight_ptr, residual_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    weight_offset, eps, rows, programs, dy_stride, h_stride, r_stride,
    H: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, STRIDED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < H
    weight = tl.full([BLOCK], 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    weight += weight_offset
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    row = pid
    while row < rows:
        at = row.to(tl.int64)
        dy = tl.load(dy_ptr + at * (dy_stride if STRIDED else H) + cols, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + at * (h_stride if STRIDED else H) + cols, mask=mask, other=0.0).to(tl.float32)
        if NORM == 1:
            if mean_ptr is not None:  # noqa: SIM108 (the pointer is compiled away)
                mean = tl.load(mean_ptr + at).to(tl.float32)
            else:
                mean = tl.sum(h, axis=0) / H
            h = tl.where(mask, h - mean, 0.0)
        if rstd_ptr is not None:
            rstd = tl.load(rstd_ptr + at).to(tl.float32)
        else:
            rstd = tl.rsqrt(tl.sum(h * h, axis=0) / H + eps)
        n = h * rstd
        g = dy * weight
        dx = g - n * (tl.sum(g * n, axis=0) / H)
        if NORM == 1:
            dx -= tl.sum(g, axis=0) / H
        dx *= rstd
        if residual_ptr is not None:
            r_row = residual_ptr + at * (r_stride if STRIDED else H)
            dx += tl.load(r_row + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at * H + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dweight += dy * n
        dbias += dy
        row += programs
    if dweight_ptr is not None:
        tl.store(dweight_ptr + pid * H + cols, dweight, mask=mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + pid * H + cols, dbias, mask=mask)


def norm_backward(call: NormBackwardCall) -> NormBackwardOut:
    """The formula above. Raises KeyError for an unknown `norm`."""
    if not call.kernel_takes():
        return norm_backward_reference(call)
    rows, H = call.dy.shape
    dy, h, residual = _unit(call.dy), _unit(call.h), None if call.residual is None else _unit(call.residual)
    strides = [H if t is None else t.stride(0) for t in (dy, h, residual)]
    programs = min(rows, _programs(dy.device))
    block = next_power_of_2(H)
    with on_device_of(dy):
        dx = torch.empty((rows, H), dtype=call.out_dtype, device=dy.device)
        partial = [
            torch.empty((programs, H), dtype=torch.float32, device=dy.device) if wanted else None
            for wanted in (call.want_weight, call.want_bias)
        ]
        _norm_backward_kernel[(programs,)](
            dy, h, _flat(call.mean), _flat(call.rstd), _flat(call.weight), residual, dx, *partial,
            call.weight_offset, call.eps, rows, programs, *strides, H=H, BLOCK=block, NORM=NORMS[call.norm],
            STRIDED=any(stride != H for stride in strides), num_warps=min(max(block // 512, 1), 16),
        )  # fmt: skip
        vectors = [None if each is None else each.sum(0) for each in partial]
    return NormBackwardOut(dx, *vectors)


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROGRAMS_ELSEWHERE
    return PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def _unit(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _flat(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.reshape(-1).contiguous()


def norm_backward_reference(call: NormBackwardCall) -> NormBackwardOut:
    """The same contract as `norm_backward` in plain torch operations: any device."""
    layer, acc = NORMS[call.norm] == LAYER, call.vector_dtype
    dy, h, weight = call.dy.to(acc), call.h.to(acc), call.weight
    if layer:
        h = h - (h.mean(-1, keepdim=True) if call.mean is None else call.mean.to(acc))
    rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + call.eps) if call.rstd is None else call.rstd.to(acc)
    n = h * rstd
    g = dy * (call.weight_offset + (1.0 if weight is None else weight.to(acc)))
    dx = g - n * (g * n).mean(-1, keepdim=True)
    if layer:
        dx = dx - g.mean(-1, keepdim=True)
    dx = dx * rstd
    if call.residual is not None:
        dx = dx + call.residual.to(acc)
    dweight, dbias = (dy * n).sum(0) if call.want_weight else None, dy.sum(0) if call.want_bias else None
    return NormBackwardOut(dx.to(call.out_dtype), dweight, dbias)
