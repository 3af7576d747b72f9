"""How a kernel gives up a wait: clock, limit, and what it leaves in the watch. Triton device code.

`symmetric/timeout.py` has the host's side and says what the words of a watch mean.
"""

from __future__ import annotations

from .compat import INTERPRETED, tl, triton
from .words import CHANNELS, POISON

GONE, MARK, LATE = 1, 2, 8  # words of the watch
POLLS = 32 if INTERPRETED else 16384

_TIMED, _POLLS = tl.constexpr(not INTERPRETED), tl.constexpr(POLLS)
_GONE, _MARK, _LATE = (tl.constexpr(word) for word in (GONE, MARK, LATE))
_CHANNELS, _NAN = tl.constexpr(CHANNELS), tl.constexpr(POISON)


@triton.jit
def _now(polls, words):
    """The time in units of 2^20 ns, once for each of `words` (int32). Interpreted code has no clock: there 32 polls are
    a unit."""
    if _TIMED:
        now = tl.inline_asm_elementwise(
            "{ .reg .b64 t; mov.u64 t, %globaltimer; shr.u64 t, t, 20; cvt.u32.u64 $0, t; mov.b64 t, {$1, $0}; }",
            "=&r,r", [words], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        now = words * 0 + polls // _POLLS
    return now


@triton.jit
def out_of_patience(words, polls, began, watch_ptr):
    """(whether the wait for `words` (int32) must end, when it began: like `words`). For every POLLS-th poll; `began`: 0
    at the first of these.

    Threads read the clock for themselves. The answer is one for all that the reduction joins, which is the program
    wherever `words` lie in several warps: all of them then leave the loop, whose barriers want every warp, at once."""
    now = _now(polls, words)
    began = tl.where(began == 0, now, began)
    limit = tl.load(watch_ptr, volatile=True)
    ends = (now - began >= limit) | (tl.load(watch_ptr + _GONE, volatile=True) != 0)
    return tl.sum(ends.to(tl.int32)) > 0, began


@triton.jit
def report(missing, source, epoch, watch_ptr):
    """Note that the words marked `missing`, which rank `source` had to send, did not come; set the rank's dead marks.
    Both of one shape."""
    stamp = ((epoch >> 2) & 0x3FFFFFFF) + 1
    zero = tl.zeros(missing.shape, tl.int32)
    tl.store(watch_ptr + _LATE + source, zero + stamp, mask=missing)
    tl.store(watch_ptr + _GONE + zero, zero + 1, mask=missing)
    first = tl.load((watch_ptr + _MARK).to(tl.pointer_type(tl.int64), bitcast=True)).to(tl.pointer_type(tl.int32))
    if tl.sum(missing.to(tl.int32)) > 0:
        tl.store(first + 2 * tl.arange(0, _CHANNELS), tl.full([_CHANNELS], _NAN, tl.int32))
