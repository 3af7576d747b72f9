"""The words that ranks send each other, and the few that a rank keeps for itself. Constants, and Triton device code.

Values travel as 32-bit words (two 16-bit elements, or one float32), because a word is what the memory system stores and
loads in one piece: a reader sees all of it or none. `SENTINEL` marks a word nobody has written; a writer turns that one
pattern into zero. It reads as (-0.0, -0.0) in the 16-bit formats and as -4.6e-41 in float32.

A rank's own `state` begins with CHANNELS pairs of words: an epoch, and a dead mark, which is 0, or POISON once a kernel
of the rank gave up a wait. A program reads its pair in one load: what comes first in every call waits for one line of
memory, and no line is every program's. A word with the bits of POISON set is NaN, whatever the others are.
"""

from __future__ import annotations

from .compat import tl, triton

SENTINEL = -2147450880  # 0x80008000
POISON = 0x7FC07FC0  # NaN in every dtype: two of them in the 16-bit formats
CHANNELS = 256  # most programs of one call
MOST_RANKS = 8  # of one group: a watch has a word for each of them
MAX_SPLIT = 8  # most programs of one row
INBOX_WORDS = CHANNELS * MAX_SPLIT  # of each of the two sets of inboxes, which follow the pairs
INBOXES = 2 * CHANNELS
COPIES = INBOXES + 2 * INBOX_WORDS  # the count of the calls that copy engines made; four words, for alignment
STATE_WORDS = COPIES + 4
COPY_FLAGS = 256  # of one rank: a word for each chunk that is copied to it
EPOCHS, MARKS = slice(0, INBOXES, 2), slice(1, INBOXES, 2)  # of `state`

_SENTINEL, _CHANNELS = tl.constexpr(SENTINEL), tl.constexpr(CHANNELS)


@triton.jit
def as_words(ptr):
    """A pointer to elements as a pointer to 32-bit words."""
    return ptr.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def begin_call(state_ptr, pid):
    """(the epoch, the dead mark), in one load."""
    pair = tl.load(state_ptr.to(tl.pointer_type(tl.int64), bitcast=True) + pid)
    return pair.to(tl.int32), (pair >> 32).to(tl.int32)


@triton.jit
def advance_epoch(state_ptr, epoch, pid, programs):
    """The next epoch into every channel, each written by one program and read by the next kernel: all channels always
    agree, whatever the grid of a call, with no atomic and no last program to wait for. The slot is kept beside the
    count because 3 does not divide the 2^30 calls after which the count starts again. Marks are left alone: another
    program may be setting them."""
    channel = tl.arange(0, _CHANNELS) * programs + pid
    slot = slot_of(epoch) + 1
    after = count_of(epoch) + 4 + tl.where(slot == 3, 0, slot)
    tl.store(state_ptr + 2 * channel, tl.zeros([_CHANNELS], tl.int32) + after, mask=channel < _CHANNELS)


@triton.jit
def slot_of(epoch):
    """Which of the three slots this call uses: the epoch's low two bits."""
    return epoch & 3


@triton.jit
def count_of(epoch):
    """The number of this call, times 4, in wrapping 32-bit arithmetic: the epoch's high 30 bits."""
    return epoch & -4


@triton.jit
def as_sent(words, mark):
    """Words as they travel: 0 in place of the sentinel, and all of them NaN if the rank is dead. One selection, because
    the first thing that a call does waits for it."""
    return tl.where((words == _SENTINEL) | (mark != 0), mark, words)


@triton.jit
def load_words(ptr, at, width, mark):
    """Words of the own x as they travel."""
    return as_sent(tl.load(ptr + at, mask=at < width, other=0), mark)


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
def pack(elements, like_ptr, mark):
    """The reverse of `unpack`: each element rounded once to the dtype `like_ptr` points to, in words as they travel."""
    if like_ptr.dtype.element_ty == tl.float32:
        words = elements.to(tl.int32, bitcast=True)
    else:
        low, high = tl.split(elements.to(like_ptr.dtype.element_ty).reshape(elements.shape[0] // 2, 2))
        low = low.to(tl.int16, bitcast=True).to(tl.int32) & 65535
        words = (high.to(tl.int16, bitcast=True).to(tl.int32) << 16) | low
    return as_sent(words, mark)


@triton.jit
def peer(peers_ptr, q):
    """The base of rank q's symmetric buffer, whose address is the q-th of `peers`."""
    return tl.multiple_of(tl.load(peers_ptr + q).to(tl.pointer_type(tl.int32)), 16)


@triton.jit
def lanes_of(WORLD: tl.constexpr):
    """0, 1, ...: one for each rank, and more up to a power of two, which the length of a tensor must be."""
    LANES: tl.constexpr = WORLD if WORLD & (WORLD - 1) == 0 else 4 if WORLD < 4 else 8
    return tl.arange(0, LANES)


@triton.jit
def ranks_of(WORLD: tl.constexpr):
    """The ranks, for each lane of `lanes_of` one: the last rank once more where a lane is no rank's. Only for what may
    be done twice. A word that is pushed may not: the peer may have emptied it in between."""
    ranks = lanes_of(WORLD)
    if ranks.shape[0] > WORLD:
        ranks = tl.minimum(ranks, WORLD - 1)
    return ranks


@triton.jit
def other_ranks(peers_ptr, rank, WORLD: tl.constexpr):
    """The bases of ranks rank+1, rank+2, ... (mod WORLD), all loaded before the first store could delay them."""
    bases = (peer(peers_ptr, (rank + 1) % WORLD),)
    for i in tl.static_range(2, WORLD):
        bases = bases + (peer(peers_ptr, (rank + i) % WORLD),)  # type: ignore[assignment]  # noqa: RUF005
    return bases
