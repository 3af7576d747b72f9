"""By copy engines: the part of the peer is copied in chunks of rows, and programs take no part in sending. 2 ranks.

    chunk by chunk:       x of these rows there [, if the call has a `product`: multiplied first]
                          -> `_wait` for the peer's slot
                          -> send, in a stream of copies alone: the rows into the slot, a flag behind them
    then chunk by chunk:  behind the own send, `_wait` for the peer's flag
                          -> s = x + the peer's x, and rows are finished as `add_norm` does

For calls so large that links decide, and told that they may (`overlap`). A copy engine drives a link as fast as all
multiprocessors together would, so these are free to multiply later rows meanwhile, where the x of this call is a
product (`Call.product`).

**The contract.** One copy slot a rank, written by the peer's copies, read by the owner's `_finish`. A rank counts its
calls (`state[COPIES]`) and tells the peer when a call begins (`_begin`, the word READY of the peer's flags): everything
that it read of its slot before is read, because that stood earlier in the same stream. Every copy stands behind a wait
until the peer told this very call. Behind each chunk the count itself is copied to the chunk's flag, in the same
stream; a chunk is finished once its flag is not behind the own count. Counts only grow, so nothing is cleared, and a
captured graph may be replayed.

Waits stand in the caller's stream: a copy engine that a kernel stands in front of each time takes turns with it, and
stands still for longer than the copies of small chunks take.

**Why nobody waits for ever.** Few programs wait, so there is room for the kernels that a peer waits for: a grid of
programs that wait would keep the own sends from the device. And whatever order the steps of both streams are run in, a
wait for chunk i stands behind the own send of chunk i, which waits for nothing but the peer's beginning of this call.

A wait that is given up makes the rank dead (`timeout.py`). From then on its sends put NaN into the x that they send,
and all its results are NaN: a slot that is written too early or too late then holds the right numbers or NaN.
docs/kernels.md has the proof.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import OpError
from ..add_norm import on_device_of, quant_program
from ..call import NORMS, AddNormOut, Call
from ..compat import next_power_of_2, tl, triton
from ..device import finish_row, load_eps, load_row
from ..patience import POLLS, out_of_patience, report
from ..words import COPIES, COPY_FLAGS, POISON, peer
from .kernel import Kernel
from .operands import Launch, lies_ready, prepare
from .workspace import Workspace

READY = COPY_FLAGS - 1  # the last of the flags
#: Of x, from which on a call that may take this kernel does: there it is ahead behind every product measured.
FROM_BYTES = 32 << 20
_POLLS, _NAN, _COPIES = tl.constexpr(POLLS), tl.constexpr(POISON), tl.constexpr(COPIES)
_WAITING, _BLOCK = 8, 1024  # programs that wait in front of a send, and make words NaN where it comes to that


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


@triton.jit(do_not_specialize=["ready", "other"])
def _begin_kernel(state_ptr, peers_ptr, ready, other):
    count = tl.load(state_ptr + _COPIES) + 1
    tl.store(state_ptr + _COPIES, count)
    tl.atomic_xchg(peer(peers_ptr, other) + ready, count, sem="release", scope="sys")


@triton.jit(do_not_specialize=["first", "words", "other"])
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


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["eps_ptr"])
def _finish_kernel(
    x_ptr, residual_ptr, pre_bias_ptr, weight_ptr, bias_ptr, y_ptr, residual_out_ptr, sum_ptr, mean_ptr, rstd_ptr,
    eps_ptr, eps, weight_offset, alpha, slot_ptr, state_ptr, first,
    H: tl.constexpr, EL: tl.constexpr, NORM: tl.constexpr, POST: tl.constexpr,
    QUANT: tl.constexpr = None, q_ptr=None, scale_ptr=None,
):  # fmt: skip
    row = (tl.program_id(0) + first).to(tl.int64)
    cols = tl.arange(0, EL)
    mask = cols < H
    residual_row = residual_ptr
    if residual_ptr is not None:
        residual_row = residual_ptr + row * H
    residual, pre_bias, weight, bias = load_row(
        residual_row, pre_bias_ptr, weight_ptr, bias_ptr, weight_offset, cols, mask
    )
    own = tl.load(x_ptr + row * H + cols, mask=mask, other=0.0).to(tl.float32)
    theirs = tl.load(slot_ptr + row * H + cols, mask=mask, other=0.0).to(tl.float32)
    s = own + theirs  # of two ranks, in any order the same bits
    if tl.load(state_ptr + 1) != 0:
        s = tl.full([EL], _NAN, tl.int32).to(tl.float32, bitcast=True)
    if sum_ptr is not None:
        tl.store(sum_ptr + row * H + cols, s.to(sum_ptr.dtype.element_ty), mask=mask)
    finish_row(
        s, residual, pre_bias, weight, bias, alpha, load_eps(eps_ptr, eps), y_ptr, residual_out_ptr, mean_ptr, rstd_ptr,
        row, cols, mask, H, NORM, POST, None, 0, 0, 1, q_ptr=q_ptr, scale_ptr=scale_ptr, QUANT=QUANT,
    )  # fmt: skip


def chunks_of(rows: int) -> list[tuple[int, int]]:
    """[first, stop) of each chunk: a quarter, a half, a quarter. Both ranks cut alike, since they call with one shape.

    The link stands still until the first chunk is multiplied, and little is left to do while the last one travels; of
    each further chunk the kernels and waits take longer than it gains."""
    stops = (rows // 4, rows - rows // 4, rows)
    return [(first, stop) for first, stop in zip((0, *stops), stops, strict=False) if first < stop]


#: The stream of each workspace's copies. One each: in a shared one, copies of a group would wait behind another's.
_STREAMS: weakref.WeakKeyDictionary[Workspace, torch.cuda.Stream] = weakref.WeakKeyDictionary()


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
        self.main = torch.cuda.current_stream(device)
        found = _STREAMS.get(ws)
        self.copies = found if found is not None else _STREAMS.setdefault(ws, torch.cuda.Stream(device))
        self.sent: dict[int, torch.cuda.Event] = {}

    def __exit__(self, failed: type[BaseException] | None, *_: Any) -> None:
        """A call that raises leaves copies under way: until they are made its x must not be used for something else,
        nor may the count go on, which they send behind them."""
        if failed is not None:
            self.main.wait_stream(self.copies)

    def follow(self) -> None:
        self.copies.wait_stream(self.main)

    @contextmanager
    def sending(self, chunk: int) -> Iterator[None]:
        with torch.cuda.stream(self.copies):
            yield
            self.sent[chunk] = self.copies.record_event()

    def behind(self, chunk: int) -> None:
        """The caller's stream goes on once the chunk is sent."""
        self.main.wait_event(self.sent[chunk])


@dataclass(frozen=True)
class CopiedLaunch(Launch):
    """As `Launch`, of several kernels and copies; it leaves no record, since large calls do not need one."""

    call: Call
    ws: Workspace
    inputs: tuple
    scalars: tuple

    def run(self) -> tuple[AddNormOut, Tensor | None]:
        call, ws, x = self.call, self.ws, self.inputs[0]
        if not call.rows:
            return self.out, self.sum
        chunks = chunks_of(call.rows)
        words = x.view(-1).view(torch.int32)
        with on_device_of(x), _Beside(ws, x.device) if x.is_cuda else _InTurn() as beside:
            self._launch(self._beginning(), 1)
            for i, (first, stop) in enumerate(chunks):
                if call.product is not None:
                    call.product(first, stop)
                begin, end = first * call.row_words, stop * call.row_words
                self._launch(self._waiting(READY, begin, end - begin), _WAITING if x.is_cuda else 1)
                beside.follow()
                with beside.sending(i):
                    self._send(words, i, begin, end)
            for i, (first, stop) in enumerate(chunks):
                beside.behind(i)
                self._finish(i, first, stop)
        return self.out, self.sum

    def load(self) -> Any:
        """Compile and load the kernels; the last of them."""
        loaded = None
        with on_device_of(self.inputs[0]):
            for kernel, args, options in (self._beginning(), self._waiting(READY, 0, 4), self._finishing(0)):
                loaded = kernel.warmup(*args, grid=(1,), **options)
                loaded._init_handles()
        return loaded

    @property
    def _flags(self) -> int:
        return self.ws.copies_offset + self.ws.copy_words

    def _launch(self, step: tuple[Any, tuple, dict], programs: int) -> None:
        kernel, args, options = step
        kernel[(programs,)](*args, **options)

    def _beginning(self) -> tuple[Any, tuple, dict]:
        args = self.ws.state, self.ws.peers, self._flags + READY, 1 - self.ws.rank
        return _begin_kernel, args, {"num_warps": 1}

    def _waiting(self, flag: int, first: int, words: int) -> tuple[Any, tuple, dict]:
        x, awaited = self.inputs[0].view(-1).view(torch.int32), self.ws.buffer[self._flags + flag :]
        args = x, awaited, self.ws.state, self.ws.watch, first, words, 1 - self.ws.rank
        return _wait_kernel, args, {"BLOCK": _BLOCK, "num_warps": 4}

    def _send(self, x: Tensor, chunk: int, first: int, stop: int) -> None:
        there, at, flag = self.ws.remote, self.ws.copies_offset, self._flags + chunk
        assert there is not None, "refused without one"
        there[at + first : at + stop].copy_(x[first:stop], non_blocking=True)
        there[flag : flag + 1].copy_(self.ws.state[COPIES : COPIES + 1], non_blocking=True)

    def _finishing(self, first: int) -> tuple[Any, tuple, dict]:
        call, ws, out, at = self.call, self.ws, self.out, self.ws.copies_offset
        slot = ws.buffer[at : at + ws.copy_words].view(call.x.dtype)
        args = (
            *self.inputs, out.y, out.residual_out, self.sum, out.mean, out.rstd, *self.scalars, slot, ws.state, first
        )  # fmt: skip
        warps = max(4, min(16, next_power_of_2(call.hidden) // 512))
        constants = {"H": call.hidden, "EL": next_power_of_2(call.hidden), "NORM": NORMS[call.norm], "POST": call.post}
        return _finish_kernel, args, {**constants, **self.constants, **self.last, "num_warps": warps}

    def _finish(self, chunk: int, first: int, stop: int) -> None:
        self._launch(self._waiting(chunk, 0, 0), 1)
        self._launch(self._finishing(first), stop - first)


def copied(call: Call, ws: Workspace, split: int = 1, warps: int = 0, registers: int = 0) -> CopiedLaunch:
    """The call bound to this rank's operands, as `one_shot` has it. Both ranks must make the same call; whether its x
    is a product is a rank's own affair.

    Raises OpError where the workspace does not hold the call (`refusal`).
    """
    if said := refusal(call, ws, split):
        raise OpError(f"copied: {said}")
    call = call if lies_ready(call.x) else call.multiplied()  # else rows would be sent of a copy that was made before
    ready = prepare(call, multiply=False)
    return CopiedLaunch(
        None, 0, (), quant_program(call), ready.out, ready.sum, call, ws, ready.inputs, ready.scalars
    )  # fmt: skip


def refusal(call: Call, ws: Workspace, split: int) -> str:
    """Why the workspace does not hold the call; empty where it does."""
    if ws.world != 2:
        return f"{ws.world} ranks; allowed: 2"
    if ws.remote is None:
        return "the workspace has no copy slot, or none of the peer that this process can copy to"
    if (need := call.rows * call.row_words) > ws.copy_words:
        return f"{call.rows} rows take {4 * need:,} bytes of a copy slot; it has {4 * ws.copy_words:,}"
    return ""


def most_rows(call: Call, ws: Workspace) -> int:
    return 0 if ws.world != 2 or ws.remote is None else ws.copy_words // call.row_words


def _candidates(quads: int) -> list[tuple[int, int]]:
    """None: tables are measured without products, where another kernel is ahead."""
    return []


def _label(split: int, warps: int) -> str:
    return "copied"


KERNEL = Kernel(
    name="copied",
    worlds=range(2, 3),
    refusal=refusal,
    bind=copied,
    most_rows=most_rows,
    candidates=_candidates,
    label=_label,
    otherwise="one_shot",
)
