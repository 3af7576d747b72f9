"""Waiting for what peers pushed: the one thing that Triton and PTX spell differently.

`receive_sum` adds up the words that every rank put at the same place of its part of a slot. A word that still holds
SENTINEL has not arrived. Two ways to wait, chosen by the kernel's constant SPIN:

* portable (False): the whole program loads, counts sentinels with a reduction, and loads again until there are none.
  Runs in Triton's interpreter. Costs a block-wide reduction a round, and one more load at the end.
* PTX (True): each thread waits for its own 16 bytes of every rank, with all loads in flight.

Either gives up as `watch` says.
"""

from __future__ import annotations

from ..compat import tl, triton
from ..patience import POLLS, out_of_patience, report
from ..spin import QUAD, QUAD_REGISTERS, constraints, spin_ptx
from ..words import MOST_RANKS, POISON, SENTINEL, ranks_of, unpack

_SENTINEL, _POISON, _POLLS = tl.constexpr(SENTINEL), tl.constexpr(POISON), tl.constexpr(POLLS)


# By the number of ranks. Two ranks have one peer. More ranks read one peer twice, in place of the own part: the number
# of sources and the order of the sum stay constants.
_SOURCES = (0, 1, 1, *range(3, MOST_RANKS + 1))
_SPINS = tl.constexpr(tuple(spin_ptx(n) if n else "" for n in _SOURCES))
_REGISTERS = tl.constexpr(tuple(constraints(n) if n else "" for n in _SOURCES))
_INTS = tl.constexpr(tuple((tl.int32,) * (4 * n) for n in _SOURCES))
_INTS1 = tl.constexpr((tl.int32,) * 4)


@triton.jit
def _quad(words, q: tl.constexpr):
    """The q-th source's four tensors [W/4] interleaved into [W]; each thread keeps the words it loaded."""
    left = tl.join(words[4 * q], words[4 * q + 2])
    right = tl.join(words[4 * q + 1], words[4 * q + 3])
    return tl.join(left, right).reshape(4 * words[4 * q].shape[0])


@triton.jit
def _poll(here, mask, source, epoch, watch_ptr):
    """Portable: the words at `here`, which rank `source` sends, once there; POISON for those that never come."""
    words = tl.load(here, mask=mask, other=0, volatile=True)
    polls = 0
    began = words * 0
    ends = polls < 0
    while (tl.sum((words == _SENTINEL).to(tl.int32)) > 0) & (not ends):
        words = tl.load(here, mask=mask, other=0, volatile=True)
        polls += 1
        if polls % _POLLS == 0:
            ends, began = out_of_patience(words, polls, began, watch_ptr)
    if ends:
        missing = words == _SENTINEL
        report(missing, source, epoch, watch_ptr)
        words = tl.where(missing, _POISON, words)
    return words


@triton.jit
def receive(base, W: tl.constexpr, width, source, SHARE: tl.constexpr, epoch, watch_ptr, SPIN: tl.constexpr):
    """The W words at `base` (`width` of them real), once they have arrived. What lies past `width` means nothing. Word
    i comes from rank source + i // SHARE, SHARE being a multiple of 4."""
    if SPIN:
        at = tl.arange(0, W // 4) * 4
        at = tl.where(at < width, at, 0)
        here = (base + at).to(tl.int64)
        sent = tl.inline_asm_elementwise(
            QUAD, QUAD_REGISTERS, [here, watch_ptr.to(tl.int64), epoch, source + at // SHARE], _INTS1, False, 1
        )
        words = _quad(sent, 0)
    else:
        at = tl.arange(0, W)
        words = _poll(base + at, at < width, source + at // SHARE, epoch, watch_ptr)
    return words


@triton.jit
def receive_block(base, N: tl.constexpr, stride, W: tl.constexpr, width, epoch, watch_ptr, SPIN: tl.constexpr):
    """The W words of each of N ranks, whose pieces lie `stride` words apart, as `receive` gives them: [N, W]. (Of
    `ranks_of` them, where N is no power of two.)"""
    source = ranks_of(N)[:, None]
    if SPIN:
        at = tl.arange(0, W // 4) * 4
        at = tl.where(at < width, at, 0)
        here = (base + source * stride + at[None, :]).to(tl.int64)
        quads = tl.inline_asm_elementwise(
            QUAD, QUAD_REGISTERS, [here, watch_ptr.to(tl.int64), epoch, source], _INTS1, False, 1
        )
        left, right = tl.join(quads[0], quads[2]), tl.join(quads[1], quads[3])
        words = tl.join(left, right).reshape(source.shape[0], W)
    else:
        at = tl.arange(0, W)[None, :]
        words = _poll(base + source * stride + at, at < width, source + at * 0, epoch, watch_ptr)
    return words


@triton.jit
def receive_sum(own, base, W: tl.constexpr, width, stride, rank, like_ptr, epoch, watch_ptr, WORLD: tl.constexpr,
                SPIN: tl.constexpr):  # fmt: skip
    """The sum over ranks, float32, of the W words at `base + q * stride` (`width` of them real; `own` in place of the
    own rank's) as elements of the dtype `like_ptr` points to. Added in rank order on every rank, so that all ranks hold
    bitwise equal results (for two ranks any order is the same)."""
    other = (rank + 1) % WORLD
    if SPIN:
        at = tl.arange(0, W // 4) * 4
        at = tl.where(at < width, at, 0)
        first = (base + at).to(tl.int64)
        spare = (base + other * stride + at).to(tl.int64)
        step = (stride * 4).to(tl.int64)
        watch = watch_ptr.to(tl.int64)
        if WORLD == 2:
            words = receive(base + other * stride, W, width, other, W, epoch, watch_ptr, SPIN)
            acc = unpack(own, like_ptr) + unpack(words, like_ptr)
        else:
            words = tl.inline_asm_elementwise(
                _SPINS[WORLD], _REGISTERS[WORLD], [first, spare, step, rank, watch, epoch], _INTS[WORLD], False, 1
            )
            acc = unpack(tl.where(rank == 0, own, _quad(words, 0)), like_ptr)
            for q in tl.static_range(1, WORLD):
                acc += unpack(tl.where(rank == q, own, _quad(words, q)), like_ptr)
    else:
        at = tl.arange(0, W)
        for q in tl.static_range(WORLD):
            theirs = at < tl.where(rank == q, 0, width)  # nobody sends the own words
            peers = _poll(base + q * stride + at, theirs, at * 0 + q, epoch, watch_ptr)
            part = unpack(tl.where(rank == q, own, peers), like_ptr)
            if q == 0:
                acc = part
            else:
                acc += part
    return acc


@triton.jit
def clear_one(base, W: tl.constexpr, width):
    """Empty what `receive` read, once every warp of the program has read it."""
    at = tl.arange(0, W)
    tl.store(base + at, tl.full([W], _SENTINEL, tl.int32), mask=at < width)


@triton.jit
def clear(base, W: tl.constexpr, width, stride, rank, WORLD: tl.constexpr):
    """Empty what `receive_sum` read, once every warp of the program has read it."""
    for i in tl.static_range(1, WORLD):
        clear_one(base + ((rank + i) % WORLD) * stride, W, width)
