"""A stream of copies beside the caller's, without a GPU: a thread makes them in turn, each some time after it was asked
for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from tpfuse.kernels.symmetric import copies

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
