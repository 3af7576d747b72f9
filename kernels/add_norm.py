"""Add and normalise: the work of one rank at a boundary, after its all-reduce.

    h = alpha * s + pre_bias + residual          (float32)
    rms_norm:   n = h * rsqrt(mean(h^2) + eps) * (weight + weight_offset) [+ bias]
    layer_norm: n = (h - mean(h)) * rsqrt(var(h) + eps) * (weight + weight_offset) + bias
    none:       n = h * (weight + weight_offset) + bias      (for a boundary that only adds; no statistics)
    pre-norm  (post=False): y = n ;  residual_out = h          (each rounded once to its dtype)
    post-norm (post=True):  h = alpha * s + pre_bias (no residual in it); y = residual + n ; residual_out = h if asked

`add_norm` runs one Triton program a row on CUDA tensors; elsewhere, and where the kernel does not reach, it runs
`add_norm_reference`: the same formula in plain torch operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .call import NORMS, AddNormOut, Call
from .compat import next_power_of_2, tl, triton
from .device import (
    LAYER,
    NONE,
    begin_row,
    end_row,
    load_addends,
    load_eps,
    load_scales,
    row_statistics,
    store_statistics,
)
from .quantise import quantise_row
from .quantise_program import converts_fp8, encoded


@triton.jit(do_not_specialize=["s_stride", "r_stride"], do_not_specialize_on_alignment=["eps_ptr"])
def _add_norm_kernel(
    s_ptr, residual_ptr, pre_bias_ptr, weight_ptr, bias_ptr, y_ptr, residual_out_ptr, mean_ptr, rstd_ptr,
    eps_ptr, eps, weight_offset, alpha, s_stride, r_stride,
    H: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, POST: tl.constexpr, STRIDED: tl.constexpr,
    PIECES: tl.constexpr, LATE: tl.constexpr, EVICT: tl.constexpr, STORE: tl.constexpr,
    q_ptr=None, scale_ptr=None, QUANT: tl.constexpr = None,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    # Rows that lie apart by something else than H are the exception; only the rule gets wide loads.
    s_row = s_ptr + row * (s_stride if STRIDED else H)
    r_row = residual_ptr
    if residual_ptr is not None:
        r_row = residual_ptr + row * (r_stride if STRIDED else H)
    hs, residuals, factors, masks = (), (), (), ()
    for i in tl.static_range(PIECES):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        mask = cols < H
        s = tl.load(s_row + cols, mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32)
        residual, pre_bias = load_addends(r_row, pre_bias_ptr, cols, mask, EVICT)
        if not LATE:
            factors = factors + (load_scales(weight_ptr, bias_ptr, weight_offset, cols, mask),)  # type: ignore[assignment]  # noqa: RUF005
        h = begin_row(s, residual, pre_bias, alpha, residual_out_ptr, row, cols, mask, H, POST, STORE)
        hs = hs + (h,)  # type: ignore[assignment]  # noqa: RUF005
        residuals = residuals + (residual,)  # type: ignore[assignment]  # noqa: RUF005
        masks = masks + (mask,)  # type: ignore[assignment]  # noqa: RUF005
    mean, rstd = row_statistics(hs, masks, H, load_eps(eps_ptr, eps), NORM, None, 0, 0, 1)
    for i in tl.static_range(PIECES):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        if LATE:
            weight, bias = load_scales(weight_ptr, bias_ptr, weight_offset, cols, masks[i])
        else:
            weight, bias = factors[i]
        y = end_row(hs[i], mean, rstd, weight, bias, residuals[i], y_ptr, row, cols, masks[i], H, POST, STORE)
        if QUANT is not None:  # of a row in one piece
            quantise_row(y, masks[i], cols, row, q_ptr, scale_ptr, H, QUANT)
    store_statistics(mean, rstd, mean_ptr, rstd_ptr, row, NORM)


def _rows(t: Tensor) -> Tensor:
    """`t` as [rows, H] with unit column stride; a view where one exists, else a copy."""
    if t.dim() == 2 and t.stride(1) == 1:
        return t
    return (t if t.stride(-1) == 1 else t.contiguous()).reshape(-1, t.shape[-1])


def _vector(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def split_eps(eps: float | Tensor, device: torch.device) -> tuple[Tensor | None, float]:
    """(device tensor to load or None, value): a 0-d tensor on the device is left there, so nothing waits for it."""
    if isinstance(eps, Tensor):
        return (None, float(eps)) if eps.device.type == "cpu" and device.type != "cpu" else (eps, 0.0)
    return None, float(eps)


def scales(weight_offset: float, alpha: float) -> tuple[float | None, float | None]:
    """As the kernels take them: None where it changes nothing."""
    return weight_offset or None, None if alpha == 1.0 else alpha


def on_device_of(t: Tensor):
    """Triton launches on the current device, whatever the tensors say."""
    if t.device.type != "cuda" or t.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(t.device)


def quant_program(call: Call) -> dict[str, tuple]:
    """The constexpr that tells a kernel how y is quantised; nothing where it is not."""
    if call.quantisation is None:
        return {}
    card = call.x.device
    return {"QUANT": encoded(call.quantisation, call.out_dtype, on_gpu=call.x.is_cuda, converts=converts_fp8(card))}


def quantised_tensors(out: AddNormOut) -> dict[str, Tensor]:
    """Where a kernel stores quantised rows, as bytes, and their scales, by the names of its last two arguments; nothing
    where y is not quantised. A view is made here, because Triton knows no pointer to every FP8."""
    return {} if out.q is None or out.scale is None else {"q_ptr": out.q.view(torch.int8), "scale_ptr": out.scale}


def add_norm(call: Call) -> AddNormOut:
    """The formula above, on `call.x` as the sum s: [..., H] of any float dtype, as the other tensors.

    An eps on the device is read there, without a synchronisation. Sums and norms are float32 (float64 when an input is
    float64). The outputs are new contiguous tensors, or those of `call.out` where the kernel runs. Raises KeyError for
    an unknown `norm`.
    """
    if not call.kernels_take():
        return add_norm_reference(call)
    out, _ = call.outputs()
    s2, r2 = _rows(call.x), None if call.residual is None else _rows(call.residual)
    rows, H = s2.shape
    if rows == 0:
        return out
    eps_tensor, eps_value = split_eps(call.eps_given, s2.device)
    block = next_power_of_2(H)
    options = {**tuning(block, rows, s2.numel() * s2.element_size(), call.norm, call.batch_invariant)}
    if call.quant:
        options |= {"PIECES": 1, **quant_program(call), **quantised_tensors(out)}
    with on_device_of(s2):
        _add_norm_kernel[(rows,)](
            s2, r2, _vector(call.pre_bias), _vector(call.weight), _vector(call.bias), out.y, out.residual_out, out.mean,
            out.rstd, eps_tensor, eps_value, *scales(call.weight_offset, call.alpha), s2.stride(0),
            0 if r2 is None else r2.stride(0), H=H, NORM=NORMS[call.norm], POST=call.post,
            STRIDED=s2.stride(0) != H or (r2 is not None and r2.stride(0) != H),
            BLOCK=block // options["PIECES"], **options,
        )  # fmt: skip
    return out


@dataclass(frozen=True)
class Band:
    """How the kernel runs while s (and so each of its four large tensors, where dtypes agree) has less than `below`
    bytes.

    `late`: weight and bias are loaded after the statistics. That is a wait more for a row, but the registers that they
    would hold let more rows share a multiprocessor. `evict`, `store`: what the cache is told about inputs (read for the
    last time) and outputs. `elements`: of a row that a thread takes (RMSNorm, LayerNorm); with `resident` more, where
    only that lets all rows be resident at once. `most`: warps a row.
    """

    below: float
    late: bool
    evict: str
    store: str
    elements: tuple[int, int]
    resident: bool = False
    most: int = 16


_MB = 1 << 20
# From benchmarks/norm.py --variants on an H100. Few rows: what counts is the wait for memory, and for LayerNorm, whose
# warps meet twice, that they are few. Then each multiprocessor has several rows, all at once. From about 9 MB on they
# come in waves, and the four tensors no longer fit the L2 cache, which should keep none of them; past 28 MB it keeps
# nothing in any case, and the hints cost.
BANDS = (
    Band(7 * _MB // 4, False, "", "", (8, 16)),
    Band(3 * _MB, False, "evict_first", "", (8, 16)),
    Band(9 * _MB, True, "evict_first", "", (8, 16), resident=True),
    Band(14 * _MB, True, "evict_first", ".cs", (8, 8)),
    Band(28 * _MB, True, "evict_first", ".cs", (32, 32)),
    Band(128 * _MB, True, "", "", (64, 64)),
    Band(float("inf"), False, "", "", (8, 8), most=32),
)
MULTIPROCESSORS = 132  # of an H100 and an H200
MOST_ELEMENTS = 64  # of a row that a thread takes: with more it runs out of registers
#: Registers of a thread by the elements it takes (rows of 2048 to 8192 in bf16): RMSNorm, LayerNorm.
REGISTERS = {8: (32, 32), 16: (32, 40), 32: (64, 64), 64: (96, 104)}


@lru_cache(maxsize=1024)
def tuning(block: int, rows: int, size: int, norm: str, batch_invariant: bool = False) -> Mapping[str, Any]:
    """The kernel's options for `rows` rows padded to `block` elements and tensors of `size` bytes; `batch_invariant`:
    those of few rows whatever the size, because pieces and warps decide in which order a row is summed.

    A thread takes what the band says, but a row has no more than `most` warps and no fewer than 4, unless these would
    load less than 16 bytes a thread or take more than MOST_ELEMENTS. Where all rows are resident, a row goes in two
    pieces, the first stored before the second is loaded, from 5.5 MB on, RMSNorm also from three rows a multiprocessor.
    """
    band = BANDS[0] if batch_invariant else next(band for band in BANDS if size < band.below)
    layer = norm == "layer_norm"
    most = min(max(block // 256, 1), 16 if layer else band.most)
    fewest = max(min(4, most), block // 32 // MOST_ELEMENTS)
    warps = min(max(block // 32 // band.elements[layer], fewest), most)
    pieces = 1
    if band.resident:
        each = -(-rows // MULTIPROCESSORS)
        pieces = 2 if (size >= 5.5 * _MB or (each > 2 and not layer)) and block >= 512 else 1
        while warps > fewest and each > _resident(block, warps, layer):
            warps //= 2
    return MappingProxyType(
        {"EVICT": band.evict, "STORE": band.store, "PIECES": pieces, "LATE": band.late, "num_warps": warps}
    )


def _resident(block: int, warps: int, layer: bool) -> int:
    """How many rows a multiprocessor holds: it has 64 warps and 65,536 registers."""
    elements = max(block // 32 // warps, 8)
    return min(64 // warps, 65536 // (32 * warps * REGISTERS[elements][layer]))


def add_norm_reference(call: Call) -> AddNormOut:
    """The same contract as `add_norm` in plain torch operations: any device, any leading shape, traceable."""
    s, residual, pre_bias, weight, bias = call.x, call.residual, call.pre_bias, call.weight, call.bias
    layer = NORMS[call.norm] == LAYER
    given = [t for t in (s, residual, pre_bias, weight, bias) if t is not None]
    acc = torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32
    h = s.to(acc) * call.alpha
    if pre_bias is not None:
        h = h + pre_bias.to(acc)
    if residual is not None and not call.post:
        h = h + residual.to(acc)
    eps = call.eps_given
    if isinstance(eps, Tensor):
        eps = eps.to(device=s.device, dtype=acc)
    if layer:
        mean = h.mean(-1, keepdim=True)
        centred = h - mean
    else:
        mean, centred = None, h
    if NORMS[call.norm] == NONE:
        rstd = torch.ones_like(centred[..., :1])
    else:
        rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    n = centred * rstd
    if weight is not None:
        n = n * (weight.to(acc) + call.weight_offset)
    elif call.weight_offset:
        n = n * (1.0 + call.weight_offset)
    if bias is not None:
        n = n + bias.to(acc)
    if residual is not None and call.post:
        n = n + residual.to(acc)

    def rounded(t: Tensor, dtype: torch.dtype) -> Tensor:
        # copy: with no residual, alpha 1 and equal dtypes `h` would otherwise be `s` itself
        return t.to(dtype, copy=True, memory_format=torch.contiguous_format)

    y = rounded(n, call.out_dtype)
    q, scale = (None, None) if call.quantisation is None else call.quantisation.of(y)
    return AddNormOut(
        y=y,
        residual_out=None if call.hidden_dtype is None else rounded(h, call.hidden_dtype),
        mean=mean if call.stats else None,
        rstd=rstd if call.stats else None,
        q=q,
        scale=scale,
    )
