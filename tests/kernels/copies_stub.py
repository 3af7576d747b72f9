"""Stands for the kernels, copies and events of calls by copies where there is no GPU: what is asked for is noted, and
computed on the addresses that are given."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tpfuse.kernels.driver import Driver
from tpfuse.kernels.symmetric import copied, copies, exchanged, noted
from tpfuse.kernels.symmetric.workspace import Workspace, virtual_ranks
from tpfuse.kernels.words import COPIES

H, F32, ROW = 64, torch.float32, 64  # words of a row
SLOT_ROWS, EPS = 16, 1e-6
MAIN = 7  # the caller's stream


def tensor(address: int, *shape: int, dtype: torch.dtype = F32) -> Tensor:
    size = dtype.itemsize * torch.Size(shape).numel()
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(shape)


@dataclass
class Kernel:
    """`does` is what it computes, of its arguments with tensors as addresses, and the number of programs."""

    log: list[tuple]
    name: str
    arg_names: list[str]
    does: Callable[[tuple, int], None]

    def __hash__(self) -> int:
        return id(self)

    def __getitem__(self, grid: tuple) -> Callable:
        def run(*args: Any, stream: Any = None, **options: Any) -> Kernel:
            given = (*args, *(options.get(name) for name in self.arg_names[len(args) :]))
            addresses = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in given)
            self.log.append((self.name, grid[0], addresses))
            self.does(addresses, grid[0])
            return self

        return run


class Peer:
    """The other rank's buffer, which notes what is copied to it."""

    def __init__(self, buffer: Tensor, log: list[tuple]) -> None:
        self.buffer, self.log = buffer, log

    def data_ptr(self) -> int:
        return self.buffer.data_ptr()

    def __getitem__(self, words: slice) -> Any:
        def copy_(rows: Tensor, non_blocking: bool) -> None:
            self.log.append(("copy", self.buffer[words].data_ptr(), rows.data_ptr(), 4 * rows.numel(), "beside"))
            self.buffer[words] = rows

        return SimpleNamespace(copy_=copy_)


class Rank:
    """One rank; what its peer would send is put into its slot by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int = 0) -> None:
        self.log: list[tuple] = []
        here, there = virtual_ranks(2, "cpu", 4, 1 << 14)[:: -1 if number else 1]
        self.peer = there
        self.ws: Workspace = replace(
            here, copy_words=SLOT_ROWS * ROW, remote=Peer(there.buffer, self.log)  # type: ignore[arg-type]
        )
        self.slot = here.buffer[here.copies_offset :][: SLOT_ROWS * ROW].view(F32).view(SLOT_ROWS, H)
        kernels = ((copies, "_begin_kernel", self.begin), (copies, "_wait_kernel", lambda *_: None),
                   (copied, "_finish_kernel", self.finish), (exchanged, "_take_kernel", self.take))  # fmt: skip
        for module, name, does in kernels:
            stub = Kernel(self.log, name, list(getattr(module, name).arg_names), does)
            monkeypatch.setattr(module, name, stub)
        monkeypatch.setattr(copies._InTurn, "follow", lambda _: self.follow())
        monkeypatch.setattr(copies._InTurn, "sending", lambda _, chunk: self.sending(chunk))
        monkeypatch.setattr(copies._InTurn, "behind", lambda _, chunk: self.log.append(("wait", MAIN, f"sent {chunk}")))
        lane = SimpleNamespace(handles=lambda chunk: ("asked", "beside", f"sent {chunk}"))
        monkeypatch.setattr(noted, "lane_of", lambda ws, device: lane)
        monkeypatch.setattr(noted, "driver", lambda: Driver(self.copy, self.record, self.wait))  # type: ignore[arg-type]

    # -- what a first call is made of ---------------------------------------------------------------------------------

    def follow(self) -> None:
        self.log += [("record", "asked", MAIN), ("wait", "beside", "asked")]

    @contextmanager
    def sending(self, chunk: int) -> Iterator[None]:
        yield
        self.log.append(("record", f"sent {chunk}", "beside"))

    # -- what a noted one is made of ----------------------------------------------------------------------------------

    def copy(self, to: int, source: int, size: int, stream: Any) -> None:
        self.log.append(("copy", to, source, size, stream))
        ctypes.memmove(to, source, size)

    def record(self, event: Any, stream: Any) -> None:
        self.log.append(("record", event, stream))

    def wait(self, stream: Any, event: Any, flags: int) -> None:
        self.log.append(("wait", stream, event))

    # -- what kernels do ----------------------------------------------------------------------------------------------

    def begin(self, args: tuple, programs: int) -> None:
        self.ws.state[COPIES] += 1

    def finish(self, args: tuple, rows: int) -> None:
        x, residual, _, weight, _, y, hidden = args[:7]
        first = args[16]

        def at(address: int) -> Tensor:
            return tensor(address + 4 * H * first, rows, H)

        h = at(x) + at(args[14]) + at(residual)
        at(hidden).copy_(h)
        at(y).copy_(torch.nn.functional.rms_norm(h, (H,), tensor(weight, H), EPS))

    def take(self, args: tuple, programs: int) -> None:
        ctypes.memmove(args[1], args[0], 16 * args[3])
