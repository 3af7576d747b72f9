"""What every kernel does to one row once it holds the sum: alpha, bias, residual, norm, outputs. Triton device code.

A row, or the part of a row that one program holds, is a float32 tensor of a power-of-two length with a mask; `cols`
are the columns of the whole row. What is absent is None, and so are an alpha of 1 and a weight offset of 0: what they
would need is not compiled.

Values travel between ranks as 32-bit words (two 16-bit elements, or one float32), because a word is what the memory
system stores and loads in one piece: a reader sees all of it or none. `SENTINEL` marks a word nobody has written; a
writer turns that one pattern into zero. It reads as (-0.0, -0.0) in the 16-bit formats and as -4.6e-41 in float32.
"""

from __future__ import annotations

from .compat import tl, triton
from .patience import POISON, POLLS, out_of_patience, report

RMS, LAYER, NONE = 0, 1, 2  # the kernels' NORM; NONE leaves h as it is
SENTINEL = -2147450880  # 0x80008000
_SENTINEL = tl.constexpr(SENTINEL)
_NAN, _POLLS = tl.constexpr(POISON), tl.constexpr(POLLS)
CHANNELS = 256  # most programs of one call
MAX_SPLIT = 8  # most programs of one row
INBOX_WORDS = CHANNELS * MAX_SPLIT  # of each of the two sets of inboxes
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
def exchange(value, inbox, pid, part, SPLIT: tl.constexpr, rank, epoch, watch_ptr):
    """The `value`s of the SPLIT programs that share a row (pids pid-part .. pid-part+SPLIT-1), as a tensor [SPLIT].

    Each program writes its value into the inbox of every program of the row and waits on its own, then makes it empty
    again. One program reads an inbox, and the next call writes it only after this kernel ended, so one slot is enough.
    A wait that is given up counts as one for the own `rank`, and brings NaN.
    """
    index = tl.arange(0, SPLIT)
    word = value.to(tl.int32, bitcast=True)
    word = tl.where(word == _SENTINEL, 0, word)
    tl.store(inbox + (pid - part + index) * SPLIT + part, tl.zeros([SPLIT], tl.int32) + word)
    mine = inbox + pid * SPLIT + index
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
    tl.store(mine, tl.full([SPLIT], _SENTINEL, tl.int32))
    return words.to(tl.float32, bitcast=True)


@triton.jit
def row_statistics(
    pieces, masks, H: tl.constexpr, eps, NORM: tl.constexpr, inbox, pid, part, SPLIT: tl.constexpr,
    rank=None, epoch=None, watch_ptr=None,
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
            squares = squares + (d * d,)  # noqa: RUF005 (Triton has no starred tuples)
        squares = tl.sum(total(squares), axis=0)
        if SPLIT > 1:
            if NORM == 1:
                means = exchange(mean, inbox, pid, part, SPLIT, rank, epoch, watch_ptr)
                mean = tl.sum(means, axis=0) / SPLIT
                other = inbox + _INBOX_WORDS
                squares = tl.sum(exchange(squares, other, pid, part, SPLIT, rank, epoch, watch_ptr), axis=0)
                squares += P * tl.sum((means - mean) * (means - mean), axis=0)
            else:
                squares = tl.sum(exchange(squares, inbox, pid, part, SPLIT, rank, epoch, watch_ptr), axis=0)
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
    """Store y of a row (or a piece of one)."""
    n = (h - mean) * rstd * weight + bias
    if POST:
        n += residual
    tl.store(y_ptr + row * H + cols, n.to(y_ptr.dtype.element_ty), mask=mask, cache_modifier=STORE)


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
    inbox, pid, part, SPLIT: tl.constexpr, rank=None, epoch=None, watch_ptr=None,
):  # fmt: skip
    """From the sum `s` to the outputs of one row. The last three are for a row that is split."""
    h = begin_row(s, residual, pre_bias, alpha, residual_out_ptr, row, cols, mask, H, POST)
    mean, rstd = row_statistics((h,), (mask,), H, eps, NORM, inbox, pid, part, SPLIT, rank, epoch, watch_ptr)
    end_row(h, mean, rstd, weight, bias, residual, y_ptr, row, cols, mask, H, POST)
    if part == 0:
        store_statistics(mean, rstd, mean_ptr, rstd_ptr, row, NORM)


@triton.jit
def as_words(ptr):
    """A pointer to elements as a pointer to 32-bit words."""
    return ptr.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def peer(peers_ptr, q):
    """The base of rank q's symmetric buffer, whose address is the q-th of `peers`."""
    return tl.multiple_of(tl.load(peers_ptr + q).to(tl.pointer_type(tl.int32)), 16)


@triton.jit
def other_ranks(peers_ptr, rank, WORLD: tl.constexpr):
    """The bases of ranks rank+1, rank+2, ... (mod WORLD), all loaded before the first store could delay them."""
    bases = (peer(peers_ptr, (rank + 1) % WORLD),)
    for i in tl.static_range(2, WORLD):
        bases = bases + (peer(peers_ptr, (rank + i) % WORLD),)  # noqa: RUF005 (Triton has no starred tuples)
    return bases


@triton.jit
def is_dead(mark):
    """Whether the rank gave up a wait in an earlier call; `mark`: its dead mark."""
    return mark != _SENTINEL


@triton.jit
def load_words(ptr, at, width, mark):
    """Words of the own x as they travel: no word is a sentinel; NaN if the rank is dead."""
    words = tl.load(ptr + at, mask=at < width, other=0)
    words = tl.where(is_dead(mark), _NAN, words)
    return tl.where(words == _SENTINEL, 0, words)


@triton.jit
def interleave(low, high):
    """[..., W] and [..., W] as [..., 2 W], taking turns."""
    if len(low.shape) == 1:
        both = tl.join(low, high).reshape(2 * low.shape[0])
    else:
        both = tl.join(low, high).reshape(low.shape[0], 2 * low.shape[1])
    return both


@triton.jit
def unpack(words, like_ptr):
    """Words as float32 elements, in memory order; `like_ptr` points to the elements' dtype."""
    if like_ptr.dtype.element_ty == tl.float32:
        elements = words.to(tl.float32, bitcast=True)
    else:
        if like_ptr.dtype.element_ty == tl.bfloat16:
            low = (words << 16).to(tl.float32, bitcast=True)
            high = (words & -65536).to(tl.float32, bitcast=True)
        else:
            low = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        elements = interleave(low, high)
    return elements


@triton.jit
def pack(elements, like_ptr):
    """The reverse of `unpack`: each element rounded once to the dtype `like_ptr` points to; never a sentinel."""
    if like_ptr.dtype.element_ty == tl.float32:
        words = elements.to(tl.int32, bitcast=True)
    else:
        low, high = tl.split(elements.to(like_ptr.dtype.element_ty).reshape(elements.shape[0] // 2, 2))
        low = low.to(tl.int16, bitcast=True).to(tl.int32) & 65535
        words = (high.to(tl.int16, bitcast=True).to(tl.int32) << 16) | low
    return tl.where(words == _SENTINEL, 0, words)


@triton.jit
def slot_of(epoch):
    """Which of the three slots this call uses: the epoch's low two bits."""
    return epoch & 3


@triton.jit
def count_of(epoch):
    """The number of this call, times 4, in wrapping 32-bit arithmetic: the epoch's high 30 bits."""
    return epoch & -4


@triton.jit
def advance_epoch(state_ptr, epoch, pid, programs, CHANNELS: tl.constexpr):
    """The next epoch into every channel, each written by one program and read by the next kernel: all channels always
    agree, whatever the grid of a call, with no atomic and no last program to wait for. The slot is kept beside the
    count because 3 does not divide the 2^30 calls after which the count starts again."""
    channel = tl.arange(0, CHANNELS) * programs + pid
    slot = slot_of(epoch) + 1
    after = count_of(epoch) + 4 + tl.where(slot == 3, 0, slot)
    tl.store(state_ptr + channel, tl.zeros([CHANNELS], tl.int32) + after, mask=channel < CHANNELS)
