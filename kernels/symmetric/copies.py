"""Rows sent by copy engines, beside a stream of kernels: the steps that calls of 2 ranks are made of.

    begin      tell the peer that this call began
    ready      wait until the peer's call began; a dead rank's rows become NaN
    send       in a stream of copies alone: rows into the peer's slot, and behind them the count of calls into a flag
    receive    behind the own send of a chunk: wait for the peer's flag

**The contract.** One copy slot a rank, written by the peer's copies, read by the owner's kernels. A rank counts its
calls (`state[COPIES]`) and tells the peer when a call begins (the word READY of the peer's flags): everything that it
read of its slot before is read, because that stood earlier in the same stream. Every copy stands behind a wait until
the peer told this very call. Behind each chunk the count itself is copied to the chunk's flag, in the same stream; what
was received is read once its flag is not behind the own count. Counts only grow, so nothing is cleared, and a captured
graph may be replayed. They wrap: a call begins by moving flags up that nobody used for 2^30 calls, or they would look
raised after as many more.

**Why nobody waits for ever.** Few programs wait, so there is room for the kernels that a peer waits for: a grid of
programs that wait would keep the own sends from the device. And whatever order the steps of both streams are run in, a
wait for chunk i stands behind the own send of chunk i, which waits for nothing but the peer's beginning of this call
and what the peer sent before its own chunk i.

Waits stand in the caller's stream: a copy engine that a kernel stands in front of each time takes turns with it, and
stands still for longer than the copies of small chunks take.

A wait that is given up makes the rank dead (`timeout.py`). From then on what it sends is NaN, and so are its results: a
slot that is written too early or too late then holds the right numbers or NaN. docs/kernels.md has the proof.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..add_norm import on_device_of
from ..compat import tl, triton
from ..patience import POLLS, out_of_patience, report
from ..words import COPIES, COPY_FLAGS, POISON, peer
from .operands import NAMES, launch_again
from .workspace import Workspace

READY = COPY_FLAGS - 1  # the last of the flags
#: Of x, from which on a call that may be made by copies is: there they are ahead behind every product measured.
FROM_BYTES = 32 << 20
#: How many ranks such a call has.
RANKS = 2
X, Y = NAMES.index("x"), NAMES.index("y")
_POLLS, _NAN, _COPIES = tl.constexpr(POLLS), tl.constexpr(POISON), tl.constexpr(COPIES)
_WAITING, _BLOCK = 8, 1024  # programs that wait in front of a send, and make words NaN where it comes to that
_BEGIN: dict[str, Any] = {"FLAGS": COPY_FLAGS, "num_warps": 1}
_WAIT: dict[str, Any] = {"BLOCK": _BLOCK, "num_warps": 4}


@triton.jit
def _waited(flag, least, mark, source, watch_ptr):
    """Wait until the word `flag` is not behind `least` (in wrapping arithmetic); whether the wait was given up, or the
    rank is dead (`mark`) and does not wait."""
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    zero = tl.zeros([1], tl.int32)
    began = zero
    polls = 0
    ends = mark != 0
    while (seen - least < 0) & (not ends):
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        polls += 1
        if polls % _POLLS == 0:
            ends, began = out_of_patience(zero, polls, began, watch_ptr)
    if ends & (mark == 0):
        report(zero + (seen - least) < 0, zero + source, least << 2, watch_ptr)
    return ends


@triton.jit(do_not_specialize=["ready", "other"], do_not_specialize_on_alignment=["flags_ptr"])
def _begin_kernel(state_ptr, flags_ptr, peers_ptr, ready, other, FLAGS: tl.constexpr):
    count = tl.load(state_ptr + _COPIES) + 1
    tl.store(state_ptr + _COPIES, count)
    at = tl.arange(0, FLAGS)
    chunk = at < FLAGS - 1  # not the last one, READY, which the peer may be writing
    flags = tl.load(flags_ptr + at, mask=chunk, other=0)
    tl.store(flags_ptr + at, tl.zeros([FLAGS], tl.int32) + count - 1, mask=chunk & (count - flags > (1 << 30)))
    tl.debug_barrier()
    tl.atomic_xchg(peer(peers_ptr, other) + ready, count, sem="release", scope="sys")


@triton.jit(do_not_specialize=["first", "words", "other"], do_not_specialize_on_alignment=["flag_ptr"])
def _wait_kernel(x_ptr, flag_ptr, state_ptr, watch_ptr, first, words, other, BLOCK: tl.constexpr):
    """Wait until the flag is not behind this call. A dead rank's `words` words of x from `first` on become NaN."""
    mark = tl.load(state_ptr + 1)
    gone = _waited(flag_ptr, tl.load(state_ptr + _COPIES), mark, other, watch_ptr)
    if gone:
        block = tl.program_id(0) * BLOCK
        while block < words:
            at = block + tl.arange(0, BLOCK)
            tl.store(x_ptr + first + at, tl.full([BLOCK], _NAN, tl.int32), mask=at < words)
            block += tl.num_programs(0) * BLOCK


class Step(NamedTuple):
    """A kernel, its arguments and its options; what it is compiled for, where that is known (`key_of`); and which of
    its arguments are tensors of the call, each with its place in NAMES, or behind them q and scale."""

    kernel: Any
    args: tuple
    options: dict[str, Any]
    key: tuple | None = None
    of_call: tuple[tuple[int, int], ...] = ()

    def load(self) -> Any:
        """The kernel, compiled and loaded."""
        loaded = self.kernel.warmup(*self.args, grid=(1,), **self.options)
        loaded._init_handles()
        return loaded


def launch(step: Step, programs: int, device: torch.device) -> None:
    launch_again(step.kernel, programs, step.args, step.options, device.index, step.key)


@dataclass(frozen=True)
class Lane:
    """The stream of a workspace's copies, and the events by which it and the callers' streams wait for each other. An
    event may be recorded again at once: who was told to wait for it waits for what it was then."""

    stream: torch.cuda.Stream
    asked: torch.cuda.Event
    sent: dict[int, torch.cuda.Event] = field(default_factory=lambda: defaultdict(torch.cuda.Event))

    def handles(self, chunk: int) -> tuple[int, int, int]:
        """As the driver knows them: `asked`, the stream, and the event behind this chunk. Events were recorded before,
        or they have no handle yet."""
        return self.asked.cuda_event, self.stream.cuda_stream, self.sent[chunk].cuda_event


#: One each: in a shared stream, copies of a group would wait behind another's.
_LANES: weakref.WeakKeyDictionary[Workspace, Lane] = weakref.WeakKeyDictionary()


def lane_of(ws: Workspace, device: torch.device) -> Lane:
    found = _LANES.get(ws)
    return found or _LANES.setdefault(ws, Lane(torch.cuda.Stream(device), torch.cuda.Event()))


class _InTurn:
    """Without a GPU: everything in the order in which it is asked for."""

    def __enter__(self) -> _InTurn:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: Any) -> None:
        return None

    def follow(self) -> None:
        return None

    @contextmanager
    def sending(self, chunk: int) -> Iterator[None]:
        yield

    def behind(self, chunk: int) -> None:
        return None


class _Beside(_InTurn):
    """The stream of copies, beside the caller's."""

    def __init__(self, ws: Workspace, device: torch.device) -> None:
        self.main = torch.cuda.current_stream(device.index)
        self.lane = lane_of(ws, device)

    def __exit__(self, failed: type[BaseException] | None, *_: Any) -> None:
        """A call that raises leaves copies under way: until they are made its x must not be used for something else,
        nor may the count go on, which they send behind them."""
        if failed is not None:
            self.main.wait_stream(self.lane.stream)

    def follow(self) -> None:
        self.lane.asked.record(self.main)
        self.lane.stream.wait_event(self.lane.asked)

    @contextmanager
    def sending(self, chunk: int) -> Iterator[None]:
        torch.cuda.set_stream(self.lane.stream)  # at a fraction of the cost of torch.cuda.stream
        try:
            yield
            self.lane.sent[chunk].record(self.lane.stream)
        finally:
            torch.cuda.set_stream(self.main)

    def behind(self, chunk: int) -> None:
        """The caller's stream goes on once the chunk is sent."""
        self.main.wait_event(self.lane.sent[chunk])


class Copies:
    """The steps of one call, whose x is `words` (int32, flat)."""

    def __init__(self, ws: Workspace, words: Tensor) -> None:
        self.ws, self.words = ws, words
        self._flags = ws.copies_offset + ws.copy_words
        self._count = ws.state[COPIES : COPIES + 1]
        self._beside: _InTurn = _InTurn()

    def __enter__(self) -> Copies:
        if self.words.is_cuda:
            self._beside = _Beside(self.ws, self.words.device)
        self._beside.__enter__()
        return self

    def __exit__(self, *failed: Any) -> None:
        self._beside.__exit__(*failed)

    def begin(self) -> None:
        self.launch(self.beginning(), 1)

    def ready(self, first: int, stop: int) -> None:
        """Before these words of x are sent."""
        self.launch(self.waiting(READY, first, stop - first), _WAITING if self.words.is_cuda else 1)

    def send(self, chunk: int, words: Tensor, at: int, of_call: int = X) -> None:
        """`words`, which the caller's stream has finished, into the peer's slot from word `at` on. `of_call`: of which
        of the call's tensors they are a part, by its place in NAMES."""
        there, flag = self.ws.remote, self._flags + chunk
        assert there is not None, "refused without one"
        at += self.ws.copies_offset
        self._beside.follow()
        with self._beside.sending(chunk):
            there[at : at + words.numel()].copy_(words, non_blocking=True)
            there[flag : flag + 1].copy_(self._count, non_blocking=True)

    def receive(self, chunk: int) -> None:
        self._beside.behind(chunk)
        self.launch(self.waiting(chunk, 0, 0), 1)

    def launch(self, step: Step, programs: int) -> None:
        launch(step, programs, self.words.device)

    def beginning(self) -> Step:
        flags = self.ws.buffer[self._flags :]
        args = self.ws.state, flags, self.ws.peers, self._flags + READY, 1 - self.ws.rank
        return Step(_begin_kernel, args, _BEGIN, (_begin_kernel, flags.get_device()))

    def waiting(self, flag: int, first: int, words: int) -> Step:
        awaited = self.ws.buffer[self._flags + flag :]
        args = self.words, awaited, self.ws.state, self.ws.watch, first, words, 1 - self.ws.rank
        key = (_wait_kernel, awaited.get_device(), self.words.data_ptr() % 16)
        return Step(_wait_kernel, args, _WAIT, key, ((0, X),))


#: Finishes rows [first, stop) of a call of the protocol.
Finish = Callable[[int, int], None]


@dataclass(frozen=True)
class InCalls:
    """Rows of x that are sent and finished in one call of the protocol, or in several where the slot holds fewer.
    x: [rows, H], contiguous; product: as `Call.product`, or None where x is there. `parts`: of how many equal parts of
    x a rank finishes one; `most_chunks`: how often rows are finished in a call, at most."""

    ws: Workspace
    x: Tensor
    product: Callable[[int, int], None] | None
    parts: ClassVar[int]
    most_chunks: ClassVar[int]

    def run(self, finishing: Callable[[int, int], Finish], by: Copies | None = None) -> None:
        """`finishing(start, stop)`: for a call on these rows of a part, what finishes some of them, from `start` on.
        `by`: what makes the steps."""
        rows, calls = len(self.x) // self.parts, self.calls
        with on_device_of(self.x), by or Copies(self.ws, self.words) as copies:
            for i in range(calls):
                start, stop = rows * i // calls, rows * (i + 1) // calls
                self.call(copies, start, stop, finishing(start, stop))

    def call(self, copies: Copies, start: int, stop: int, finish: Finish) -> None:
        raise NotImplementedError

    @property
    def words(self) -> Tensor:
        """x as `Copies` takes it."""
        words: Tensor = self.x.view(-1).view(torch.int32)
        return words

    @property
    def calls(self) -> int:
        return -(-(len(self.x) // self.parts) // (self.ws.copy_words // (self.parts * self.row)))

    @property
    def chunks(self) -> int:
        """How often rows are finished, at most."""
        return self.most_chunks * self.calls

    @property
    def row(self) -> int:
        """Words of a row."""
        return self.x.shape[1] * self.x.element_size() // 4

    def multiply(self, first: int, stop: int) -> None:
        if self.product is not None:
            self.product(first, stop)

    def send(self, copies: Copies, chunks: list[tuple[int, int]], at: int) -> None:
        """Rows of x from `at` on, chunk by chunk, to the beginning of the peer's slot; multiplied before."""
        for i, (first, last) in enumerate(chunks):
            self.multiply(at + first, at + last)
            begin, end = (at + first) * self.row, (at + last) * self.row
            copies.ready(begin, end)
            copies.send(i, copies.words[begin:end], first * self.row)


def slot(ws: Workspace, first: int, dtype: torch.dtype) -> Tensor:
    """The own copy slot from word `first` on."""
    return ws.buffer[ws.copies_offset + first : ws.copies_offset + ws.copy_words].view(dtype)


def chunks_of(rows: int) -> list[tuple[int, int]]:
    """[first, stop) of each chunk: a quarter, a half, a quarter. Both ranks cut alike, since they call with one shape.

    The link stands still until the first chunk is multiplied, and little is left to do while the last one travels; of
    each further chunk the kernels and waits take longer than it gains."""
    stops = (rows // 4, rows - rows // 4, rows)
    return [(first, stop) for first, stop in zip((0, *stops), stops, strict=False) if first < stop]


def refusal(words: int, ws: Workspace) -> str:
    """Why the workspace takes no calls of so many words; empty where it does."""
    if ws.world != RANKS:
        return f"{ws.world} ranks; allowed: {RANKS}"
    if ws.remote is None:
        return "the workspace has no copy slot, or none of the peer that this process can copy to"
    if words > ws.copy_words:
        return f"rows of {4 * words:,} bytes; its copy slot has {4 * ws.copy_words:,}"
    return ""
