"""What every kernel does to one row once it holds the sum: alpha, bias, residual, norm, outputs. Triton device code.

A row (or, when a row is split over several programs, a part of one) is a float32 tensor of a power-of-two length with
a mask. `norm` is data: 0 RMSNorm, 1 LayerNorm.
"""

from __future__ import annotations

from .compat import tl, triton

RMS = 0
LAYER = 1


@triton.jit
def load_vector(ptr, cols, mask, HAS: tl.constexpr, default: tl.constexpr):
    """`ptr[cols]` as float32, or a constant where the tensor is absent."""
    if HAS:
        v = tl.load(ptr + cols, mask=mask, other=0.0).to(tl.float32)
    else:
        v = tl.full(cols.shape, default, tl.float32)
    return v


@triton.jit
def row_statistics(h, mask, H: tl.constexpr, eps, NORM: tl.constexpr):
    """(mean, rstd) of a whole row held by one program; the mean is 0 for RMSNorm. LayerNorm takes two passes over the
    registers: E[h^2] - mean^2 would cancel."""
    if NORM == 1:
        mean = tl.sum(h, axis=0) / H
        d = tl.where(mask, h - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(d * d, axis=0) / H + eps)
    else:
        mean = 0.0
        rstd = tl.rsqrt(tl.sum(h * h, axis=0) / H + eps)
    return mean, rstd


@triton.jit
def load_eps(eps_ptr, eps, EPS_IN_MEMORY: tl.constexpr):
    """eps as float32: an argument, or a 0-d device tensor that the host must not wait for."""
    if EPS_IN_MEMORY:
        value = tl.load(eps_ptr).to(tl.float32)
    else:
        value = eps
    return value
