"""What a batch of `overlap.py` runs on the device beside its calls: inputs that follow from a count, checks of results
against them, delays, and planted faults. Triton device code."""

from __future__ import annotations

from ..compat import tl, triton
from ..words import CHANNELS, COPIES, COPY_FLAGS, SENTINEL

EPS = 1e-6
PLANTS = ("slot", "epoch", "flag", "copy")  # by their KIND in `plant_kernel`
_SENTINEL, _CHANNELS, _EPS = tl.constexpr(SENTINEL), tl.constexpr(CHANNELS), tl.constexpr(EPS)
_COPIES, _COPY_FLAGS = tl.constexpr(COPIES), tl.constexpr(COPY_FLAGS)


@triton.jit
def _value(call, who, at, SPAN: tl.constexpr):
    """A whole number from -SPAN to SPAN that follows from the call, the rank and the place, as float32."""
    h = (call * 40503 + who * 30011 + at * 2654435).to(tl.uint32)
    h = (h ^ (h >> 15)) * 739982445
    h = (h ^ (h >> 12)) * 695872825
    h = h ^ (h >> 15)
    return ((h >> 8).to(tl.int32) % (2 * SPAN + 1)).to(tl.float32) - SPAN


@triton.jit(do_not_specialize=["index", "rank", "first", "stop"])
def fill_kernel(x_ptr, residual_ptr, y_ptr, residual_out_ptr, clock_ptr, index, rank, first, stop, H: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """One row of a call's inputs; its outputs become NaN. The rank has the residual of rows [first, stop) alone."""
    row = tl.program_id(0)
    call = tl.load(clock_ptr) + index
    cols = tl.arange(0, BLOCK)
    mask = cols < H
    at = row * H + cols
    tl.store(x_ptr + at, _value(call, rank, at, 7).to(x_ptr.dtype.element_ty), mask=mask)
    owned, own = at - first * H, mask & (row >= first) & (row < stop)
    tl.store(residual_ptr + owned, _value(call, 99, at, 63).to(residual_ptr.dtype.element_ty), mask=own)
    nan = tl.full([BLOCK], float("nan"), tl.float32)
    tl.store(y_ptr + at, nan.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(residual_out_ptr + owned, nan.to(residual_out_ptr.dtype.element_ty), mask=own)


@triton.jit
def _tell(tally_ptr, wrong, call):
    bad = tl.sum(wrong.to(tl.int32), axis=0)
    if bad > 0:
        tl.atomic_add(tally_ptr, (bad > 0).to(tl.int64))
        tl.atomic_min(tally_ptr + 1, call.to(tl.int64))


@triton.jit
def _mark(tally_ptr, y, places):
    bits = y.to(tl.int32, bitcast=True)
    tl.atomic_add(tally_ptr + 2, tl.sum(bits.to(tl.int64) * places.to(tl.int64), axis=0))


@triton.jit(do_not_specialize=["index", "first", "stop"])
def check_kernel(y_ptr, residual_out_ptr, weight_ptr, clock_ptr, index, first, stop, tally_ptr, H: tl.constexpr,
                  BLOCK: tl.constexpr, WORLD: tl.constexpr, NORM: tl.constexpr, TOLERANCE: tl.constexpr):  # fmt: skip
    """One row of a call's results: y, and h of rows [first, stop). `tally` (int64): wrong rows, number of the first
    wrong call, a mark of all bits of y."""
    row = tl.program_id(0)
    call = tl.load(clock_ptr) + index
    cols = tl.arange(0, BLOCK)
    mask = cols < H
    at = row * H + cols
    h = _value(call, 99, at, 63)
    for q in tl.static_range(WORLD):
        h += _value(call, q, at, 7)
    h = tl.where(mask, h, 0.0)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    want = h
    if NORM == 0:
        want = h * tl.rsqrt(tl.sum(h * h, axis=0) / H + _EPS) * weight
    if NORM == 1:
        d = tl.where(mask, h - tl.sum(h, axis=0) / H, 0.0)
        want = d * tl.rsqrt(tl.sum(d * d, axis=0) / H + _EPS) * weight
    if NORM == 2:
        want = h * weight
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    own = mask & (row >= first) & (row < stop)
    h_there = tl.load(residual_out_ptr + at - first * H, mask=own, other=0.0).to(tl.float32)
    right = ((own == 0) | (h_there == h)) & (tl.abs(y - want) <= TOLERANCE * (tl.abs(want) + 0.01))
    _tell(tally_ptr, mask & (right == 0), call)  # a NaN is not right
    _mark(tally_ptr, y, cols + 1 + row + call)


@triton.jit
def _normed(call, at, mask, H: tl.constexpr, NORM: tl.constexpr):
    """(h of a row that a backward call gets, its mean, its rstd)."""
    h = tl.where(mask, _value(call, 98, at, 3), 0.0)
    mean = tl.sum(h, axis=0) * 0.0
    if NORM == 1:
        mean = tl.sum(h, axis=0) / H
    d = tl.where(mask, h - mean, 0.0)
    return h, mean, tl.rsqrt(tl.sum(d * d, axis=0) / H + _EPS)


@triton.jit
def _sum(call, at, WORLD: tl.constexpr):
    """Of what all ranks sent."""
    s = _value(call, 0, at, 7)
    for q in tl.static_range(1, WORLD):
        s += _value(call, q, at, 7)
    return s


@triton.jit(do_not_specialize=["index", "first"])
def fill_norm_kernel(h_ptr, mean_ptr, rstd_ptr, dweight_ptr, dbias_ptr, clock_ptr, index, first, H: tl.constexpr,
                     BLOCK: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """What a backward call gets besides the inputs of `fill_kernel`, of one row behind `first`; its gradients of
    vectors become NaN."""
    row = tl.program_id(0)
    call = tl.load(clock_ptr) + index
    cols = tl.arange(0, BLOCK)
    mask = cols < H
    h, mean, rstd = _normed(call, (row + first) * H + cols, mask, H, NORM)
    tl.store(h_ptr + row * H + cols, h.to(h_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    if row == 0:
        nan = tl.full([BLOCK], float("nan"), tl.float32)
        tl.store(dweight_ptr + cols, nan, mask=mask)
        tl.store(dbias_ptr + cols, nan, mask=mask)


@triton.jit(do_not_specialize=["index", "first", "stop"])
def check_dx_kernel(dx_ptr, total_ptr, weight_ptr, clock_ptr, index, first, stop, tally_ptr, H: tl.constexpr,
                    BLOCK: tl.constexpr, WORLD: tl.constexpr, NORM: tl.constexpr, TOLERANCE: tl.constexpr):  # fmt: skip
    """One row of a backward call's results: dx, and the sum of rows [first, stop). `tally`: as in `check_kernel`."""
    row = tl.program_id(0)
    call = tl.load(clock_ptr) + index
    cols = tl.arange(0, BLOCK)
    mask = cols < H
    at = row * H + cols
    s = tl.where(mask, _sum(call, at, WORLD), 0.0)
    h, mean, rstd = _normed(call, at, mask, H, NORM)
    n = tl.where(mask, h - mean, 0.0) * rstd
    g = s * tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    want = g - n * (tl.sum(g * n, axis=0) / H)
    if NORM == 1:
        want -= tl.sum(g, axis=0) / H
    want = want * rstd + _value(call, 99, at, 63)
    dx = tl.load(dx_ptr + at, mask=mask, other=0.0).to(tl.float32)
    own = mask & (row >= first) & (row < stop)
    total = tl.load(total_ptr + at - first * H, mask=own, other=0.0).to(tl.float32)
    right = ((own == 0) | (total == s)) & (tl.abs(dx - want) <= TOLERANCE * tl.abs(want) + 1e-4)
    _tell(tally_ptr, mask & (right == 0), call)
    _mark(tally_ptr, dx, cols + 1 + row + call)


@triton.jit(do_not_specialize=["index", "first", "stop"])
def check_vectors_kernel(dweight_ptr, dbias_ptr, mean_ptr, rstd_ptr, clock_ptr, index, first, stop, tally_ptr,
                         H: tl.constexpr, BLOCK: tl.constexpr, WORLD: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """Some columns of the gradients of weight and bias, which are sums over rows [first, stop); wrong ones count as one
    row. The order of the sum changes the first by a few roundings, and no bit of the second, of whole numbers."""
    call = tl.load(clock_ptr) + index
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < H
    of_weight = tl.zeros([BLOCK], tl.float32)
    of_bias = tl.zeros([BLOCK], tl.float32)
    size = tl.zeros([BLOCK], tl.float32)
    row = first
    while row < stop:
        at = row * H + cols
        s = _sum(call, at, WORLD)
        h = _value(call, 98, at, 3)
        if NORM == 1:
            h -= tl.load(mean_ptr + row - first)
        part = s * (h * tl.load(rstd_ptr + row - first))
        of_weight += part
        size += tl.abs(part)
        of_bias += s
        row += 1
    dweight = tl.load(dweight_ptr + cols, mask=mask, other=0.0)
    right = tl.abs(dweight - of_weight) <= 2e-5 * size + 1e-6
    if dbias_ptr is not None:
        right = right & (tl.load(dbias_ptr + cols, mask=mask, other=0.0) == of_bias)
    _tell(tally_ptr, mask & (right == 0), call)


@triton.jit
def _clock(after):
    """The device's timer in ns, read once the number `after` is there."""
    return tl.inline_asm_elementwise(
        "{ .reg .b64 t; mov.b64 t, $1; mov.u64 $0, %globaltimer; }", "=l,l", [after], dtype=tl.int64, is_pure=False,
        pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["index", "rank"])
def spin_kernel(clock_ptr, index, rank, MOST: tl.constexpr):
    """Lasts up to MOST ns, now and then sixteen times as long: another length each replay and on each rank."""
    call = tl.load(clock_ptr) + index
    begin = _clock(call.to(tl.int64))
    lasts = (_value(call, rank + 1000, index, 512) + 512.0) * (MOST / 1024.0)
    lasts = tl.where(_value(call, rank + 2000, index, 64) == 0, lasts * 16, lasts).to(tl.int64)
    now = begin
    while now - begin < lasts:
        now = _clock(now)


@triton.jit
def timer_kernel(timer_ptr, LOOKS: tl.constexpr):
    """Count backward steps of the device's timer: within a thread, and behind any time that was read before this
    kernel or program. `timer` (int64): the latest time, backward steps, the largest of them in ns."""
    steps = tl.zeros([], tl.int64)
    worst = tl.zeros([], tl.int64)
    latest = tl.load(timer_ptr, volatile=True)
    for i in range(LOOKS):  # noqa: B007
        now = _clock(latest)
        if now < latest:
            steps += 1
            worst = tl.maximum(worst, latest - now)
        latest = tl.maximum(latest, now)
    tl.atomic_max(timer_ptr, latest)
    if steps > 0:
        tl.atomic_add(timer_ptr + 1, steps)
        tl.atomic_max(timer_ptr + 2, worst)


@triton.jit(do_not_specialize=["slot_words", "words", "flags", "copies"])
def plant_kernel(
    buffer_ptr, state_ptr, slot_words, words, flags, copies, KIND: tl.constexpr, WORLD: tl.constexpr
):  # fmt: skip
    """A fault in this rank's memory. KIND 0, "slot": the call before did not clear its first `words` words. 1, "epoch":
    it did not advance the epoch. 2, "flag": the peers' flags are up before the peers have raised them. 3, "copy": those
    of chunks say that they were copied, and none was."""
    epoch = tl.load(state_ptr)
    slot = ((epoch & 3) + 2) % 3  # the call before's
    if KIND == 0:
        at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
        tl.store(buffer_ptr + slot * slot_words + at, tl.zeros([1024], tl.int32), mask=at < words)
    if KIND == 1:
        tl.debug_barrier()  # every warp has read the epoch
        before = (epoch & -4) - 4 + slot
        tl.store(state_ptr + 2 * tl.arange(0, _CHANNELS), tl.zeros([_CHANNELS], tl.int32) + before)
    if KIND == 2:
        at = tl.arange(0, _CHANNELS)
        for q in tl.static_range(WORLD):
            raised = buffer_ptr + flags + q * _CHANNELS + at
            tl.store(raised, tl.zeros([_CHANNELS], tl.int32) + ((epoch & -4) + 4))
    if KIND == 3:
        at = tl.arange(0, _COPY_FLAGS)
        count = tl.load(state_ptr + _COPIES) + 1
        ready = at == _COPY_FLAGS - 1  # the peer's slot
        tl.store(buffer_ptr + copies + at, tl.zeros([_COPY_FLAGS], tl.int32) + count, mask=ready == 0)
