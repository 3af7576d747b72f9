"""The backward of a norm and of the addition behind it: the work of one rank once a gradient's sum is there.

    n = (h - mean) * rstd                        (mean is 0 for RMSNorm)
    g = dy * (weight + weight_offset)
    dx = (g - n * mean(g * n) [- mean(g), LayerNorm]) * rstd + residual
    dweight = sum over rows of dy * n,  dbias = sum over rows of dy

All of it in float32 (float64 where an input is), `dx` rounded once. `norm_backward` runs two Triton kernels on CUDA
tensors. In the first, each program takes every n-th row, loads the next ones while it computes on this one, and keeps
its part of the vectors' gradients in registers; the second adds up the parts. Elsewhere, and where the kernels do not
reach, it runs `norm_backward_reference`: the same formula in plain torch operations.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .add_norm import on_device_of
from .call import KERNEL_DTYPES, MAX_HIDDEN, NORMS, kernel_takes
from .compat import next_power_of_2, tl, triton
from .device import LAYER
from .symmetric.operands import launch_again

#: Rows that a program holds or has under way: two are loaded ahead while it computes on one.
STAGES = 3
#: Programs to a multiprocessor, where the rows under way fit its shared memory. Each leaves a row of partial sums
#: behind, which more programs than these do not earn.
PROGRAMS_PER_MULTIPROCESSOR = 2
_WITH_ROWS = "dy", "h", "mean", "rstd", "residual"
_PARTS, _COLUMNS = 64, 16  # of the partial sums, what one program of the second kernel adds at once


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

    def of_rows(self, first: int, stop: int) -> NormBackwardCall:
        """The call on these rows alone."""
        cut = {name: t[first:stop] for name in _WITH_ROWS if (t := getattr(self, name)) is not None}
        return replace(self, **cut)

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
def _row(
    dy_ptr, h_ptr, mean_ptr, rstd_ptr, residual_ptr, dx_ptr, weight, eps, row, dy_stride, h_stride, r_stride, cols,
    mask, H: tl.constexpr, NORM: tl.constexpr, STRIDED: tl.constexpr, theirs_ptr, state_ptr, sum_ptr,
):  # fmt: skip
    """Finish one row of dx; gives its parts of the gradients of the weight and of the bias."""
    at = row.to(tl.int64)
    dy = tl.load(dy_ptr + at * (dy_stride if STRIDED else H) + cols, mask=mask, other=0.0).to(tl.float32)
    if theirs_ptr is not None:
        dy += tl.load(theirs_ptr + at * H + cols, mask=mask, other=0.0).to(tl.float32)
        if tl.load(state_ptr + 1) != 0:
            dy = tl.full(dy.shape, float("nan"), tl.float32)
        if sum_ptr is not None:
            tl.store(sum_ptr + at * H + cols, dy.to(sum_ptr.dtype.element_ty), mask=mask)
    h = tl.load(h_ptr + at * (h_stride if STRIDED else H) + cols, mask=mask, other=0.0).to(tl.float32)
    if NORM == 1:
        if mean_ptr is not None:  # noqa: SIM108 (the pointer is compiled away)
            mean = tl.load(mean_ptr + at).to(tl.float32)
        else:
            mean = tl.sum(h, axis=0) / H
        h = tl.where(mask, h - mean, 0.0)
    if rstd_ptr is not None:  # noqa: SIM108
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
    return dy * n, dy


@triton.jit(do_not_specialize=["rows", "programs"])
def _norm_backward_kernel(
    dy_ptr, h_ptr, mean_ptr, rstd_ptr, weight_ptr, residual_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    weight_offset, eps, rows, programs, dy_stride, h_stride, r_stride,
    H: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, STRIDED: tl.constexpr, STAGES: tl.constexpr,
    theirs_ptr=None, state_ptr=None, sum_ptr=None,
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
    if STAGES == 1:  # also because the interpreter takes no tensor as a bound of a range
        row = pid
        while row < rows:
            of_weight, of_bias = _row(
                dy_ptr, h_ptr, mean_ptr, rstd_ptr, residual_ptr, dx_ptr, weight, eps, row, dy_stride, h_stride,
                r_stride, cols, mask, H, NORM, STRIDED, theirs_ptr, state_ptr, sum_ptr,
            )  # fmt: skip
            dweight += of_weight
            dbias += of_bias
            row += programs
    else:
        for row in tl.range(pid, rows, programs, num_stages=STAGES):
            of_weight, of_bias = _row(
                dy_ptr, h_ptr, mean_ptr, rstd_ptr, residual_ptr, dx_ptr, weight, eps, row, dy_stride, h_stride,
                r_stride, cols, mask, H, NORM, STRIDED, theirs_ptr, state_ptr, sum_ptr,
            )  # fmt: skip
            dweight += of_weight
            dbias += of_bias
    if dweight_ptr is not None:
        tl.store(dweight_ptr + pid * H + cols, dweight, mask=mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + pid * H + cols, dbias, mask=mask)


@triton.jit(do_not_specialize=["parts"])
def _add_up_kernel(
    partial_ptr, first_ptr, second_ptr, parts, H: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """first[H], second[H] = the sums over partial[2, parts, H], one program for some columns of one of them."""
    vector = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    own = tl.arange(0, PARTS)
    total = tl.zeros([PARTS, COLUMNS], tl.float32)
    first = 0
    while first < parts:
        at = first + own
        total += tl.load(
            partial_ptr + (vector * parts + at[:, None]) * H + cols[None, :],
            mask=(at < parts)[:, None] & (cols < H)[None, :], other=0.0,
        )  # fmt: skip
        first += PARTS
    sums = tl.sum(total, axis=0)
    if vector == 0:
        tl.store(first_ptr + cols, sums, mask=cols < H)
    else:
        tl.store(second_ptr + cols, sums, mask=cols < H)


def norm_backward(call: NormBackwardCall) -> NormBackwardOut:
    """The formula above. Raises KeyError for an unknown `norm`."""
    if not call.kernel_takes():
        return norm_backward_reference(call)
    dx = torch.empty(call.dy.shape, dtype=call.out_dtype, device=call.dy.device)
    with on_device_of(call.dy):
        parts = Parts(call)
        parts.of(call, dx)
        return NormBackwardOut(dx, *parts.added_up())


class Parts:
    """The gradients of the norm's vectors, summed up of the rows of one call, or of `calls` of them. Not shared."""

    def __init__(self, call: NormBackwardCall, calls: int = 1) -> None:
        self.wanted = (call.want_weight, call.want_bias)
        self.programs, _ = _schedule(len(call.dy), _row_bytes(call), call.dy.device)
        shape = (sum(self.wanted), calls * self.programs, call.dy.shape[1])
        empty = torch.empty if calls == 1 else torch.zeros  # of a call with fewer rows, programs have nothing to add
        self.partial = empty(shape, dtype=torch.float32, device=call.dy.device)
        self.made = 0

    def of(self, call: NormBackwardCall, dx: Tensor, theirs: Tensor | None = None, state: Tensor | None = None,
           total: Tensor | None = None) -> None:  # fmt: skip
        """Finish the rows of one call, at most as many as of the first, into `dx`. theirs: what is to be added to dy,
        contiguous; then `state` says whether this rank is dead, and into `total` goes the sum, where it is wanted."""
        rows, H = call.dy.shape
        dy, h, residual = _unit(call.dy), _unit(call.h), None if call.residual is None else _unit(call.residual)
        strides = [H if t is None else t.stride(0) for t in (dy, h, residual)]
        block = next_power_of_2(H)
        programs, stages = _schedule(rows, _row_bytes(call, theirs), dy.device)
        programs = min(programs, self.programs)
        into = iter(self.partial[:, self.made :])
        dweight, dbias = (next(into) if each else None for each in self.wanted)
        self.made += programs
        args = (
            dy, h, _flat(call.mean), _flat(call.rstd), _flat(call.weight), residual, dx, dweight, dbias,
            call.weight_offset, call.eps, rows, programs, *strides,
        )  # fmt: skip
        options = {
            "H": H, "BLOCK": block, "NORM": NORMS[call.norm], "STRIDED": any(stride != H for stride in strides),
            "STAGES": stages, "theirs_ptr": theirs, "state_ptr": state, "sum_ptr": total,
            "num_warps": min(max(block // 512, 1), 16),
        }  # fmt: skip
        launch_again(_norm_backward_kernel, programs, args, options, dy.device.index)

    def added_up(self) -> tuple[Tensor | None, Tensor | None]:
        """(dweight, dbias)."""
        with on_device_of(self.partial):
            vectors = iter(_add_up(self.partial))
        of_weight, of_bias = (next(vectors) if each else None for each in self.wanted)
        return of_weight, of_bias


def _row_bytes(call: NormBackwardCall, theirs: Tensor | None = None) -> int:
    """What one row loads."""
    loaded = [t for t in (call.dy, call.h, call.residual, theirs) if t is not None]
    return int(next_power_of_2(call.dy.shape[1]) * sum(t.element_size() for t in loaded))


def _add_up(partial: Tensor) -> list[Tensor]:
    """[vectors, parts, H] -> that many [H], each a tensor of its own, as an operator's results must be."""
    vectors, parts, H = partial.shape
    out = [torch.empty(H, dtype=torch.float32, device=partial.device) for _ in range(vectors)]
    if vectors:
        grid = (-(-H // _COLUMNS), vectors)
        _add_up_kernel[grid](partial, out[0], out[-1], parts, H=H, PARTS=_PARTS, COLUMNS=_COLUMNS)
    return out


def _schedule(rows: int, row_bytes: int, device: torch.device) -> tuple[int, int]:
    """How many programs run, and how many rows each holds or has under way. `row_bytes`: what one row loads."""
    if device.type != "cuda":
        return min(rows, 8), 1  # the interpreter
    facts: Any = torch.cuda.get_device_properties(device)
    stages = min(STAGES, max(facts.shared_memory_per_block_optin // row_bytes, 1))
    fit = max(facts.shared_memory_per_multiprocessor // (stages * row_bytes), 1)
    programs = min(rows, min(PROGRAMS_PER_MULTIPROCESSOR, fit) * facts.multi_processor_count)
    return programs, stages if programs < rows else 1


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
