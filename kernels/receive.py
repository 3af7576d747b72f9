"""Waiting for what peers pushed: the one thing that Triton and PTX spell differently.

`receive_sum` adds up the words that every rank put at the same place of its part of a slot. A word that still holds
SENTINEL has not arrived. Two ways to wait, chosen by the kernel's constant SPIN:

* portable (False): the whole program loads, counts sentinels with a reduction, and loads again until there are none.
  Runs in Triton's interpreter. Costs a block-wide reduction a round, and one more load at the end.
* PTX (True): each thread waits for its own 16 bytes of every rank, with all loads in flight.
"""

from __future__ import annotations

from .compat import tl, triton
from .device import SENTINEL, unpack

_SENTINEL = tl.constexpr(SENTINEL)


def _spin_ptx(sources: int) -> str:
    """PTX that loads 4 words from each of `sources` ranks until no word is SENTINEL.

    Outputs $0 ... $(4 * sources - 1). One source: its input is the address. Several: the address of source 0, the
    address to use in place of the own rank's, bytes between sources, own rank. A label inside braces is local, so the
    text may appear several times in a kernel.
    """
    n = 4 * sources
    lines = ["{", ".reg .pred p;", f".reg .b64 a<{sources}>;"]
    if sources == 1:
        lines.append(f"mov.b64 a0, ${n};")
    else:
        for s in range(sources):
            lines.append(f"mad.lo.s64 a{s}, ${n + 2}, {s}, ${n};")
            lines.append(f"setp.eq.s32 p, ${n + 3}, {s};")
            lines.append(f"selp.b64 a{s}, ${n + 1}, a{s}, p;")
    lines.append("AGAIN:")
    for s in range(sources):
        out = ", ".join(f"${4 * s + i}" for i in range(4))
        lines.append(f"ld.volatile.global.v4.b32 {{{out}}}, [a{s}];")
    lines.append(f"setp.eq.s32 p, $0, {SENTINEL};")
    lines += [f"setp.eq.or.s32 p, ${i}, {SENTINEL}, p;" for i in range(1, n)]
    return "\n".join([*lines, "@p bra AGAIN;", "}"])


def _constraints(sources: int) -> str:
    # outputs are written before the inputs are used for the last time: "&" keeps their registers apart
    return ",".join(["=&r"] * (4 * sources) + (["l"] if sources == 1 else ["l", "l", "l", "r"]))


# Two ranks have one peer. More ranks read one peer twice, in place of the own part: the number of sources and the
# order of the sum stay constants.
_SPIN1, _SPIN4, _SPIN8 = (tl.constexpr(_spin_ptx(n)) for n in (1, 4, 8))
_REGS1, _REGS4, _REGS8 = (tl.constexpr(_constraints(n)) for n in (1, 4, 8))
_INT = tl.int32
_INTS1, _INTS4, _INTS8 = (tl.constexpr((_INT,) * (4 * n)) for n in (1, 4, 8))


@triton.jit
def _quad(words, q: tl.constexpr):
    """The q-th source's four tensors [W/4] interleaved into [W]; each thread keeps the words it loaded."""
    left = tl.join(words[4 * q], words[4 * q + 2])
    right = tl.join(words[4 * q + 1], words[4 * q + 3])
    return tl.join(left, right).reshape(4 * words[4 * q].shape[0])


@triton.jit
def receive(base, W: tl.constexpr, width, SPIN: tl.constexpr):
    """The W words at `base` (`width` of them real), once they have arrived. What lies past `width` means nothing."""
    if SPIN:
        at = tl.arange(0, W // 4) * 4
        here = (base + tl.where(at < width, at, 0)).to(tl.int64)
        words = _quad(tl.inline_asm_elementwise(_SPIN1, _REGS1, [here], _INTS1, False, 1), 0)
    else:
        at = tl.arange(0, W)
        words = tl.load(base + at, mask=at < width, other=0, volatile=True)
        while tl.sum((words == _SENTINEL).to(tl.int32), axis=0) > 0:
            words = tl.load(base + at, mask=at < width, other=0, volatile=True)
    return words


@triton.jit
def receive_block(base, N: tl.constexpr, stride, W: tl.constexpr, width, SPIN: tl.constexpr):
    """`receive` for N pieces that lie `stride` words apart: [N, W]."""
    if SPIN:
        at = tl.arange(0, W // 4) * 4
        at = tl.where(at < width, at, 0)
        here = (base + tl.arange(0, N)[:, None] * stride + at[None, :]).to(tl.int64)
        quads = tl.inline_asm_elementwise(_SPIN1, _REGS1, [here], _INTS1, False, 1)
        left, right = tl.join(quads[0], quads[2]), tl.join(quads[1], quads[3])
        words = tl.join(left, right).reshape(N, W)
    else:
        at = tl.arange(0, W)[None, :]
        here = base + tl.arange(0, N)[:, None] * stride + at
        words = tl.load(here, mask=at < width, other=0, volatile=True)
        while tl.sum((words == _SENTINEL).to(tl.int32)) > 0:
            words = tl.load(here, mask=at < width, other=0, volatile=True)
    return words


@triton.jit
def receive_sum(own, base, W: tl.constexpr, width, stride, rank, like_ptr, WORLD: tl.constexpr, SPIN: tl.constexpr):
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
        if WORLD == 2:
            acc = unpack(own, like_ptr) + unpack(receive(base + other * stride, W, width, SPIN), like_ptr)
        else:
            if WORLD == 4:
                words = tl.inline_asm_elementwise(_SPIN4, _REGS4, [first, spare, step, rank], _INTS4, False, 1)
            else:
                words = tl.inline_asm_elementwise(_SPIN8, _REGS8, [first, spare, step, rank], _INTS8, False, 1)
            acc = unpack(tl.where(rank == 0, own, _quad(words, 0)), like_ptr)
            for q in tl.static_range(1, WORLD):
                acc += unpack(tl.where(rank == q, own, _quad(words, q)), like_ptr)
    else:
        at = tl.arange(0, W)
        mask = at < width
        missing = 1
        while missing > 0:
            missing = 0
            for q in tl.static_range(WORLD):
                peers = tl.load(base + q * stride + at, mask=mask & (rank != q), other=0, volatile=True)
                missing += tl.sum((peers == _SENTINEL).to(tl.int32), axis=0)
        for q in tl.static_range(WORLD):
            peers = tl.load(base + q * stride + at, mask=mask & (rank != q), other=0, volatile=True)
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
