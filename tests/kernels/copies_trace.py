"""The steps that a call by copy engines asks for, each named by what its arguments say, without a GPU or a peer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from tpfuse.kernels.call import Call as Operation
from tpfuse.kernels.symmetric import copied, copies, exchanged
from tpfuse.kernels.symmetric.workspace import Workspace, virtual_ranks
from tpfuse.kernels.words import COPIES

from .copies_model import RULES, Call, Step, streams_of

HIDDEN, ROW = 64, 32  # elements and words of a row


class Trace:
    """`steps` are those of the model, and what puts them behind each other on a GPU: "follow" (copies behind the
    caller's stream), "sending" and "sent" around what copies do, "behind" (the caller's stream behind copies)."""

    def __init__(self, rank: int, slot_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[Step] = []
        self.call = 0
        ws = virtual_ranks(2, "cpu", 4, 1 << 14)[rank]
        self.slot = ws.copies_offset
        self.flags = self.slot + slot_rows * ROW
        self.ws: Workspace = replace(ws, copy_words=slot_rows * ROW, remote=_Peer(self))  # type: ignore[arg-type]
        for module in (copied, copies, exchanged):
            monkeypatch.setattr(module, "launch", self.launch)
        monkeypatch.setattr(copies._InTurn, "follow", lambda _: self.note("follow", 0))
        monkeypatch.setattr(copies._InTurn, "behind", lambda _, chunk: self.note("behind", chunk))
        monkeypatch.setattr(copies._InTurn, "sending", lambda _, chunk: self.sending(chunk))

    def run(self, kind: str, rows: int, pieces: list[tuple[int, int]]) -> None:
        """`pieces`: the rows of each call of the protocol; in exchanges those of either half."""
        self.kind, self.pieces, share = kind, pieces, rows // 2
        self.own, self.theirs = (0, 0) if kind == "copied" else (self.ws.rank * share, (1 - self.ws.rank) * share)
        x = torch.zeros(rows, HIDDEN, dtype=torch.bfloat16)
        call = Operation(x, x if kind == "copied" else x[:share].clone(), norm="rms_norm", eps=1e-5, out_dtype=x.dtype,
                         hidden_dtype=x.dtype, product=self.product)  # fmt: skip
        bound: Any = copied.copied(call, self.ws) if kind == "copied" else exchanged.exchanged(call, self.ws)
        self.x, self.y = x, bound.out.y if kind == "copied" else bound.gathered
        bound.run()

    def check(self) -> None:
        """Each stream's steps in the model's order, and behind those of the other one that they stand behind there."""
        calls = [Call(self.kind, len(self.chunks_of(stop - first))) for first, stop in self.pieces]
        streams = streams_of(calls, set(RULES))
        made = [step for step in streams.copies if step[0] != "half"]
        main = {name for name, _, _ in streams.main}
        assert [step for step in self.steps if step[0] in main] == streams.main
        assert [step for step in self.steps if step[0] in ("rows", "flag")] == made
        place = {step: i for i, step in enumerate(self.steps)}
        for step, many in streams.behind.items():
            if step in place:
                before = (streams.copies if step[0] == "await" else streams.main)[many - 1]
                assert place[before] < place[step], (before, step)
        for at, (name, call, chunk) in enumerate(self.steps):
            if name == "await":
                assert self.steps[at - 1] == ("behind", call, chunk)
            if name == "rows":
                names = "follow", "sending", "rows", "flag", "sent"
                around = [(name, call, chunk if name != "follow" else 0) for name in names]
                assert self.steps[at - 2 : at + 3] == around

    # -- what is asked for --------------------------------------------------------------------------------------------

    def product(self, first: int, stop: int) -> None:
        own = self.kind == "exchanged" and self.own <= first - self.begin < self.own + self.rows
        half = self.own if own else self.theirs
        self.note("multiply own" if own else "multiply", self.chunk(first - half - self.begin, stop - first))

    @contextmanager
    def sending(self, chunk: int) -> Iterator[None]:
        self.note("sending", chunk)
        yield
        self.note("sent", chunk)

    def copied(self, rows: torch.Tensor, words: slice) -> None:
        """Rows, or the count, to these words of the peer's buffer."""
        assert words.stop - words.start == rows.numel()
        if words.start >= self.flags:
            assert rows.data_ptr() == self.ws.state[COPIES:].data_ptr() and rows.numel() == 1
            return self.note("flag", words.start - self.flags)
        of_y = holds(self.y, rows.data_ptr())
        whole, half, room = (self.y, self.own, self.rows) if of_y else (self.x, self.theirs, 0)
        chunk = self.chunk_at(whole, half, rows.data_ptr(), rows.numel())
        assert words.start == self.slot + (room + self.chunks[chunk][0]) * ROW, "another place in the slot"
        return self.note("rows", chunk + of_y * len(self.chunks))

    def launch(self, step: copies.Step, programs: int, device: Any) -> None:
        kernel, args = step.kernel, step.args
        if kernel is copies._begin_kernel:
            self.call += 1
            self.note("begin", 0)
        elif kernel is copied._finish_kernel:
            self.finish(args, programs)
        elif kernel is exchanged._take_kernel:
            self.take(*args)
        elif (flag := word_of(args[1], self.ws.buffer) - self.flags) == copies.READY:
            address = args[0].data_ptr() + 4 * args[4]
            self.note("slot", self.chunk_at(self.x, self.theirs, address, args[5]))
        else:
            self.note("await", flag)

    def finish(self, args: tuple, programs: int) -> None:
        first = (self.own + (self.begin if self.kind == "exchanged" else 0)) * ROW
        assert (word_of(args[0], self.x), word_of(args[5], self.y)) == (first, first), "other rows"
        assert word_of(args[-3], self.ws.buffer) == self.slot, "x is not at the slot's beginning"
        self.note("finish", self.chunk(args[-1], programs))

    def take(self, taken: torch.Tensor, to: torch.Tensor, state: torch.Tensor, quads: int) -> None:
        chunk = self.chunk_at(self.y, self.theirs, to.data_ptr(), 4 * quads)
        place = self.slot + (self.rows + self.chunks[chunk][0]) * ROW
        assert word_of(taken, self.ws.buffer) == place, "another place in the slot"
        self.note("take", len(self.chunks) + chunk)

    # -- of which chunk that is ---------------------------------------------------------------------------------------

    @property
    def begin(self) -> int:
        return self.pieces[self.call - 1][0]

    @property
    def rows(self) -> int:
        first, stop = self.pieces[self.call - 1]
        return stop - first

    @property
    def chunks(self) -> list[tuple[int, int]]:
        return self.chunks_of(self.rows)

    def chunks_of(self, rows: int) -> list[tuple[int, int]]:
        return copies.chunks_of(rows) if self.kind == "copied" else exchanged.halves_of(rows)

    def chunk(self, first: int, rows: int) -> int:
        return self.chunks.index((first, first + rows))

    def chunk_at(self, whole: torch.Tensor, half: int, address: int, words: int) -> int:
        assert holds(whole, address)
        row = (address - whole.data_ptr()) // 4 // ROW
        return self.chunk(row - half - self.begin, words // ROW)

    def note(self, name: str, chunk: int) -> None:
        self.steps.append((name, self.call, chunk))


def word_of(t: torch.Tensor, whole: torch.Tensor) -> int:
    return (t.data_ptr() - whole.data_ptr()) // 4


def holds(whole: torch.Tensor, address: int) -> bool:
    return whole.data_ptr() <= address < whole.data_ptr() + whole.numel() * whole.itemsize


class _Peer:
    """The peer's buffer: what is copied to which words of it."""

    def __init__(self, trace: Trace, words: slice = slice(0, 0)) -> None:
        self.trace, self.words = trace, words

    def __getitem__(self, words: slice) -> _Peer:
        return _Peer(self.trace, words)

    def copy_(self, rows: torch.Tensor, non_blocking: bool) -> None:
        self.trace.copied(rows, self.words)
