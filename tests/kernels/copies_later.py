"""A stream of copies beside the caller's, without a GPU: a thread makes them in turn, each some time after it was asked
for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from tpfuse.kernels.symmetric import copies
from tpfuse.kernels.symmetric.copied import copied

from .case_protocol import Call
from .protocol import Seat


class Later(copies._InTurn):
    """In the place of `copies._Beside`. What the caller's stream did is done when it is asked to follow."""

    thread: ThreadPoolExecutor

    def __init__(self) -> None:
        self.last: Future | None = None
        self.sent: dict[int, Future | None] = {}

    @contextmanager
    def sending(self, chunk: int) -> Iterator[None]:
        Remote.asked_by = self
        yield
        Remote.asked_by, self.sent[chunk] = None, self.last

    def behind(self, chunk: int) -> None:
        last = self.sent[chunk]
        assert last is not None
        last.result()


class Remote:
    """The peer's buffer."""

    asked_by: Later | None = None

    def __init__(self, words: torch.Tensor, seat: Seat, longest: float) -> None:
        self.words, self.seat, self.longest = words, seat, longest

    def __getitem__(self, at: slice) -> Remote:
        return Remote(self.words[at], self.seat, self.longest)

    def copy_(self, rows: torch.Tensor, non_blocking: bool) -> None:
        def copy(wait: float = self.seat.delay.random() * self.longest) -> None:
            time.sleep(wait)
            half = len(rows) // 2  # a peer may see some of the rows
            self.words[:half].copy_(rows[:half])
            time.sleep(wait / 4)
            self.words[half:].copy_(rows[half:])

        stream = Remote.asked_by
        assert stream is not None, "a copy outside the stream of copies"
        stream.last = Later.thread.submit(copy)


@contextmanager
def copied_later(seat: Seat, longest: float) -> Iterator[Seat]:
    """The seat with a workspace whose copies are made later, each by up to `longest` seconds."""
    in_turn: Any = copies._InTurn
    with ThreadPoolExecutor(1) as Later.thread:
        copies._InTurn = Later  # type: ignore[misc]
        yield replace(seat, ws=replace(seat.ws, remote=Remote(seat.ws.remote, seat, longest)))
    copies._InTurn = in_turn  # type: ignore[misc]


def wrong_without_the_slot(seat: Seat, calls: list[Call], between: Callable[[Call], object]) -> int:
    """Calls that leave all rows to both ranks, without the wait for the peer's slot, and with a second rank that is
    slow to read: how many results are wrong. `between`: what is done behind each."""
    receive, waiting = copies.Copies.receive, copies.Copies.waiting

    def late(self: Any, chunk: int) -> None:
        receive(self, chunk)
        time.sleep(0.03)  # longer than a loaded host keeps the other rank from running

    def without_the_slot(self: Any, flag: int, first: int, words: int) -> Any:
        return copies.Step(_Nothing(), (), {}) if flag == copies.READY else waiting(self, flag, first, words)

    copies.Copies.waiting = without_the_slot  # type: ignore[method-assign]
    if seat.ws.rank == 1:
        copies.Copies.receive = late  # type: ignore[method-assign]
    wrong = 0
    for call in calls:
        out, _ = copied(call.operands(seat.ws.rank), seat.ws).run()
        between(call)
        expected, _ = call.expected(2)
        wrong += not torch.allclose(out.y.double(), expected.y.double(), rtol=5e-2, atol=5e-2)
    return wrong


class _Nothing:
    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: None
