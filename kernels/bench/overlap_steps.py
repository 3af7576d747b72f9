"""What a batch of `overlap.py` is made of: calls that are drawn, what a rank keeps on its device, and steps."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor

from ..compat import INTERPRETED
from .overlap_device import spin_kernel

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CALL_BYTES = 2 << 20  # the most that x of one call takes


@dataclass(frozen=True)
class Recipe:
    """What a kernel is compiled for. `kernel`: one_shot, two_shot, barrier, or, of 2 ranks, copied, exchanged, backward
    or backward_scattered: the backward of a norm by copies, of all rows or of scattered ones."""

    kernel: str
    hidden: int
    dtype: torch.dtype
    norm: str
    split: int = 1

    @property
    def scattered(self) -> bool:
        """Whether ranks may finish a half of the rows each."""
        return self.kernel in ("exchanged", "backward_scattered")


@dataclass(frozen=True)
class Call:
    """One call of a batch, equal on all ranks. `few`: with nine programs at most, so that each has many rows."""

    recipe: Recipe
    rows: int
    few: bool


@dataclass
class Ledger:
    """What one rank keeps on its device. `clock`: the number of the batch's first call; `tally`, `timer`: see
    `check_kernel`, `timer_kernel`."""

    clock: Tensor
    tally: Tensor
    timer: Tensor
    pool: dict[tuple[int, str], Tensor] = field(default_factory=dict)  # batches of one rank share memory

    @staticmethod
    def on(device: torch.device | str) -> Ledger:
        tally, timer = (torch.zeros(3, dtype=torch.int64, device=device) for _ in range(2))
        tally[1] = 1 << 40
        clock = torch.ones(1, dtype=torch.int32, device=device)
        return Ledger(clock.add_(0), tally, timer)  # add_ is loaded now

    def tensor(self, index: int, name: str, rows: int, recipe: Recipe) -> Tensor:
        """Memory for one tensor of the index-th call."""
        return self.room(index, name, rows, recipe.hidden, recipe.dtype)

    def room(self, index: int, name: str, rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
        room = self.pool.get((index, name))
        if room is None:
            most = (1 << 15) if INTERPRETED else CALL_BYTES
            room = self.pool[index, name] = torch.zeros(most, dtype=torch.int8, device=self.clock.device)
        return room[: rows * hidden * dtype.itemsize].view(dtype).view(rows, hidden)

    @property
    def wrong_rows(self) -> int:
        return int(self.tally[0])

    @property
    def first_wrong(self) -> int | None:
        """The number of the first wrong call, from 1."""
        return int(self.tally[1]) if self.wrong_rows else None


@dataclass(frozen=True)
class Step:
    """A kernel and its arguments. `run` and `load` as a `Launch` has them."""

    kernel: Any
    programs: int
    args: tuple
    settings: dict[str, Any]

    def run(self) -> None:
        self.kernel[(self.programs,)](*self.args, **self.settings)

    def load(self) -> None:
        if not INTERPRETED:
            self.kernel.warmup(*self.args, grid=(self.programs,), **self.settings)._init_handles()


@dataclass(frozen=True)
class HostStep:
    """What is no kernel of ours; nothing of it needs to be loaded."""

    run: Callable[[], Any]

    def load(self) -> None:
        pass


@dataclass(frozen=True)
class Bound:
    """One call on a rank's tensors: the steps that fill its inputs, the call, and the steps that check its results."""

    fill: list[Any]
    launch: Any
    check: list[Any]


@dataclass(frozen=True)
class Given:
    """x of a call as a rank has it: where it lies, what is filled with its numbers, by which steps before that, and the
    product that brings them into x when it is asked for, or None."""

    x: Tensor
    filled: Tensor
    fill: list[Any]
    product: Callable[[int, int], None] | None


def given(ledger: Ledger, index: int, call: Call, result: Tensor, own: Random, pause: Any) -> Given:
    """x as it is, a product, or a product in the memory of `result`; a rank's own affair. `pause`: a step that some
    products begin with, so that a rank falls behind within a call."""
    kind = own.choice(("as it is", "as it is", "product", "in place"))
    x = result if kind == "in place" else ledger.tensor(index, "x", call.rows, call.recipe)
    if kind == "as it is":
        return Given(x, x, [], None)
    factor, nan = ledger.tensor(index, "factor", call.rows, call.recipe), partial(x.fill_, float("nan"))
    slow = own.random() < 0.5

    def product(first: int, stop: int) -> None:
        if slow:
            pause.run()
        torch.mul(factor[first:stop], 1, out=x[first:stop])

    torch.mul(factor, 1, out=x), nan(), pause.load()  # all are loaded now
    return Given(x, factor, [HostStep(nan)], product)


def spin(ledger: Ledger, index: int, rank: int, most_ns: int) -> Any:
    """A step that lasts up to `most_ns`, rarely 16 times that."""
    if INTERPRETED:  # no clock there
        return HostStep(lambda: time.sleep(random.random() * 0.05))
    return Step(spin_kernel, 1, (ledger.clock, index, rank), {"MOST": most_ns, "num_warps": 1})
