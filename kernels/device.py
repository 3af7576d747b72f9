"""What every kernel does to one row once it holds the sum: alpha, bias, residual, norm, outputs. Triton device code.

A row, or the part of a row that one program holds, is a float32 tensor of a power-of-two length with a mask; `cols`
are the columns of the whole row. What is absent is None, and so are an alpha of 1 and a weight offset of 0: what they
would need is not compiled.
"""

from __future__ import annotations

from .compat import tl, triton
from .patience import POLLS, out_of_patience, report
from .quantise import quantise_row
from .spin import WORD, WORD_REGISTERS
from .words import INBOX_WORDS, POISON, SENTINEL

RMS, LAYER, NONE = 0, 1, 2  # the kernels' NORM; NONE leaves h as it is
_SENTINEL, _NAN, _POLLS = tl.constexpr(SENTINEL), tl.constexpr(POISON), tl.constexpr(POLLS)
_INBOX_WORDS = tl.constexpr(INBOX_WORDS)
_AS_EVER = tl.constexpr("")  # no wish how the cache treats an access


@triton.jit
def nothing(cols):
    """-0.0, by a detour because Triton turns the constant into 0.0. Adding it changes no number and compiles to
    nothing; adding 0.0 would turn a -0.0 into 0.0, so that is an instruction."""
    return tl.zeros(cols.shape, tl.float32) * -1.0


@triton.jit
def load_addends(residual_row, pre_bias_ptr, cols, mask, EVICT: tl.constexpr = _AS_EVER):
    """(residual, pre_bias) as float32. EVICT: the cache's policy for the residual, which is read once."""
    residual, pre_bias = nothing(cols), nothing(cols)
    if residual_row is not None:
        residual = tl.load(residual_row + cols, mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32)
    if pre_bias_ptr is not None:
        pre_bias = tl.load(pre_bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return residual, pre_bias


@triton.jit
def load_scales(weight_ptr, bias_ptr, weight_offset, cols, mask):
    """(weight + offset, bias) as float32; they serve every row."""
    weight, bias = tl.full(cols.shape, 1.0, tl.float32), nothing(cols)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if weight_offset is not None:
        weight += weight_offset
    return weight, bias


@triton.jit
def load_row(residual_row, pre_bias_ptr, weight_ptr, bias_ptr, weight_offset, cols, mask):
    """(residual, pre_bias, weight + offset, bias) as float32. Called before a wait, so that the loads overlap it."""
    residual, pre_bias = load_addends(residual_row, pre_bias_ptr, cols, mask)
    weight, bias = load_scales(weight_ptr, bias_ptr, weight_offset, cols, mask)
    return residual, pre_bias, weight, bias


@triton.jit
def load_eps(eps_ptr, eps):
    """eps as float32: an argument, or a 0-d device tensor that the host must not wait for."""
    value = eps
    if eps_ptr is not None:
        value = tl.load(eps_ptr).to(tl.float32)
    return value


@triton.jit
def exchange(value, inbox, pid, part, SPLIT: tl.constexpr, rank, epoch, watch_ptr, SPIN: tl.constexpr):
    """The `value`s of the SPLIT programs that share a row (pids pid-part .. pid-part+SPLIT-1), as a tensor [SPLIT].

    Each program writes its value into the inbox of every program of the row and waits on its own, then makes it empty
    again. One program reads an inbox, and the next call writes it only after this kernel ended, so one slot is enough.
    A wait that is given up counts as one for the own `rank`, and brings NaN. SPIN: as in `receive.py`.
    """
    index = tl.arange(0, SPLIT)
    word = value.to(tl.int32, bitcast=True)
    word = tl.where(word == _SENTINEL, 0, word)
    tl.store(inbox + (pid - part + index) * SPLIT + part, tl.zeros([SPLIT], tl.int32) + word)
    mine = inbox + pid * SPLIT + index
    if SPIN:
        words = tl.inline_asm_elementwise(
            WORD, WORD_REGISTERS, [mine.to(tl.int64), watch_ptr.to(tl.int64), epoch, rank], tl.int32, False, 1
        )
    else:
        words = tl.load(mine, volatile=True)
        polls = 0
        began = index * 0
        ends = polls < 0
        while (tl.sum((words == _SENTINEL).to(tl.int32), axis=0) > 0) & (not ends):
            words = tl.load(mine, volatile=True)
            polls += 1
            if polls % _POLLS == 0:
                ends, began = out_of_patience(words, polls, began, watch_ptr)
        if ends:
            missing = words == _SENTINEL
            report(missing, index * 0 + rank, epoch, watch_ptr)
            words = tl.where(missing, _NAN, words)
    tl.debug_barrier()  # every warp reads the inbox for itself: all must have read before one clears
    # Here rather than behind the row's last barrier, where it cost a split row of one call 4 %.
    tl.store(mine, tl.full([SPLIT], _SENTINEL, tl.int32))
    return words.to(tl.float32, bitcast=True)


@triton.jit
def row_statistics(
    pieces, masks, H: tl.constexpr, eps, NORM: tl.constexpr, inbox, pid, part, SPLIT: tl.constexpr,
    rank=None, epoch=None, watch_ptr=None, SPIN: tl.constexpr = False,
):  # fmt: skip
    """(mean, rstd) of a row of H columns held by SPLIT programs, each in equally long `pieces`; the mean is 0 for
    RMSNorm. LayerNorm takes two passes over the registers, because E[h^2] - mean^2 would cancel; programs' parts are
    joined by Chan's formula."""
    P: tl.constexpr = H // SPLIT
    if NORM == 2:
        mean = 0.0
        rstd = 1.0
    else:
        mean = 0.0
        if NORM == 1:
            mean = tl.sum(total(pieces), axis=0) / P
        squares = ()
        for i in tl.static_range(len(pieces)):
            d = pieces[i]
            if NORM == 1:
                d = tl.where(masks[i], d - mean, 0.0)
            squares = squares + (d * d,)  # type: ignore[assignment]  # noqa: RUF005
        squares = tl.sum(total(squares), axis=0)
        if SPLIT > 1:
            if NORM == 1:
                means = exchange(mean, inbox, pid, part, SPLIT, rank, epoch, watch_ptr, SPIN)
                mean = tl.sum(means, axis=0) / SPLIT
                other = inbox + _INBOX_WORDS
                squares = tl.sum(exchange(squares, other, pid, part, SPLIT, rank, epoch, watch_ptr, SPIN), axis=0)
                squares += P * tl.sum((means - mean) * (means - mean), axis=0)
            else:
                squares = tl.sum(exchange(squares, inbox, pid, part, SPLIT, rank, epoch, watch_ptr, SPIN), axis=0)
        rstd = tl.rsqrt(squares / H + eps)
    return mean, rstd


@triton.jit
def total(pieces):
    """Their sum, element by element."""
    out = pieces[0]
    for i in tl.static_range(1, len(pieces)):
        out += pieces[i]
    return out


@triton.jit
def begin_row(
    s, residual, pre_bias, alpha, residual_out_ptr, row, cols, mask, H: tl.constexpr, POST: tl.constexpr,
    STORE: tl.constexpr = _AS_EVER,
):  # fmt: skip
    """h of a row (or a piece of one), stored in `residual_out` if there is one."""
    h = s
    if alpha is not None:
        h = alpha * h
    h += pre_bias
    if not POST:
        h += residual
    h = tl.where(mask, h, 0.0)
    if residual_out_ptr is not None:
        rounded = h.to(residual_out_ptr.dtype.element_ty)
        tl.store(residual_out_ptr + row * H + cols, rounded, mask=mask, cache_modifier=STORE)
    return h


@triton.jit
def end_row(
    h, mean, rstd, weight, bias, residual, y_ptr, row, cols, mask, H: tl.constexpr, POST: tl.constexpr,
    STORE: tl.constexpr = _AS_EVER,
):  # fmt: skip
    """Store y of a row (or a piece of one), and give it as it was stored, in float32."""
    n = (h - mean) * rstd * weight + bias
    if POST:
        n += residual
    y = n.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * H + cols, y, mask=mask, cache_modifier=STORE)
    return y.to(tl.float32)


@triton.jit
def store_statistics(mean, rstd, mean_ptr, rstd_ptr, row, NORM: tl.constexpr):
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd)
        if NORM == 1:
            tl.store(mean_ptr + row, mean)


@triton.jit
def finish_row(
    s, residual, pre_bias, weight, bias, alpha, eps, y_ptr, residual_out_ptr, mean_ptr, rstd_ptr,
    row, cols, mask, H: tl.constexpr, NORM: tl.constexpr, POST: tl.constexpr,
    inbox, pid, part, SPLIT: tl.constexpr, rank=None, epoch=None, watch_ptr=None, SPIN: tl.constexpr = False,
    q_ptr=None, scale_ptr=None, QUANT: tl.constexpr = None,
):  # fmt: skip
    """From the sum `s` to the outputs of one row. `rank` to SPIN are for a row that is split, the last three for one
    that is quantised, which is not."""
    h = begin_row(s, residual, pre_bias, alpha, residual_out_ptr, row, cols, mask, H, POST)
    mean, rstd = row_statistics((h,), (mask,), H, eps, NORM, inbox, pid, part, SPLIT, rank, epoch, watch_ptr, SPIN)
    y = end_row(h, mean, rstd, weight, bias, residual, y_ptr, row, cols, mask, H, POST)
    if QUANT is not None:
        quantise_row(y, mask, cols, row, q_ptr, scale_ptr, H, QUANT)
    if part == 0:
        store_statistics(mean, rstd, mean_ptr, rstd_ptr, row, NORM)
