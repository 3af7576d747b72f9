"""Many random calls queued behind each other while ranks fall behind at random, every result checked on the device.

A `Batch` is one rank's part of some fifty calls: first it fills the inputs of all of them, then it makes the calls,
then it checks all results. Between calls some ranks spin. A batch is a list of steps that need no host, so it can be
captured in a CUDA graph and replayed; replays differ, because the inputs follow from a count that lives on the device.

Where a kernel takes a product in place of x, some ranks give it one, which fills x when it is asked for.

x and residual are small whole numbers, so that their sums are exact in every dtype: h must be right bit for bit, and y
to a rounding. A word from any other call, rank or place is wrong.

`plant` puts a fault in, so that one can see that it would be found: "slot", "epoch", "flag" or "copy" (see
`plant_kernel`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..call import NORMS, AddNormOut
from ..call import Call as Operation
from ..compat import INTERPRETED, next_power_of_2
from ..symmetric.barrier import barrier
from ..symmetric.barrier import fits as barrier_fits
from ..symmetric.copied import KERNEL as COPIED
from ..symmetric.exchanged import exchanged
from ..symmetric.exchanged import refusal as exchange_refusal
from ..symmetric.one_shot import fits as one_shot_fits
from ..symmetric.one_shot import one_shot
from ..symmetric.two_shot import fits as two_shot_fits
from ..symmetric.two_shot import two_shot
from ..symmetric.workspace import Workspace
from .overlap_device import EPS, PLANTS, check_kernel, fill_kernel, plant_kernel, spin_kernel, timer_kernel

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CALL_BYTES = 2 << 20  # the most that x of one call takes


@dataclass(frozen=True)
class Recipe:
    """What a kernel is compiled for. `kernel`: one_shot, two_shot, barrier, or, of 2 ranks, copied or exchanged."""

    kernel: str
    hidden: int
    dtype: torch.dtype
    norm: str
    split: int = 1


RECIPES = (
    Recipe("one_shot", 520, F32, "rms_norm"),
    Recipe("one_shot", 1024, BF16, "rms_norm"),
    Recipe("one_shot", 1024, F32, "layer_norm", 2),
    Recipe("one_shot", 4096, BF16, "rms_norm"),
    Recipe("one_shot", 4096, BF16, "layer_norm", 4),
    Recipe("one_shot", 8192, BF16, "rms_norm", 8),
    Recipe("one_shot", 7168, F16, "none"),
    Recipe("two_shot", 1024, BF16, "rms_norm"),
    Recipe("two_shot", 4096, BF16, "layer_norm"),
    Recipe("two_shot", 2048, F32, "none"),
    Recipe("two_shot", 8192, F16, "rms_norm"),
    Recipe("barrier", 1024, BF16, "rms_norm"),
    Recipe("barrier", 4096, F32, "layer_norm"),
    Recipe("barrier", 8192, BF16, "rms_norm"),
    Recipe("barrier", 1024, BF16, "layer_norm"),
    Recipe("barrier", 4096, F16, "rms_norm"),
    Recipe("copied", 1024, BF16, "rms_norm"),
    Recipe("copied", 4096, F32, "layer_norm"),
    Recipe("copied", 7168, F16, "none"),
    Recipe("exchanged", 1024, BF16, "rms_norm"),
    Recipe("exchanged", 4096, F32, "layer_norm"),
    Recipe("exchanged", 7168, F16, "none"),
)
#: For the interpreter, which runs the programs of a split row in turn: none is split.
TINY_RECIPES = tuple(
    Recipe(kernel, hidden, dtype, norm)
    for kernel, hidden in (("one_shot", 64), ("two_shot", 128), ("barrier", 72), ("copied", 64), ("exchanged", 64))
    for dtype, norm in ((BF16, "rms_norm"), (F32, "layer_norm"))
)
ROWS = (0, 1, 1, 2, 3, 5, 8, 16, 33, 64, 150)


@dataclass(frozen=True)
class Call:
    """One call of a batch, equal on all ranks. `few`: with nine programs at most, so that each has many rows."""

    recipe: Recipe
    rows: int
    few: bool


def draw_calls(seed: int, count: int, recipes: Sequence[Recipe] = RECIPES, rows: Sequence[int] = ROWS) -> list[Call]:
    """Random calls; a call without rows among them now and then. `rows` that are exchanged are those of each rank."""
    pick = random.Random(f"calls {seed}")
    calls = []
    for _ in range(count):
        recipe = pick.choice(recipes)
        most = CALL_BYTES // (recipe.hidden * recipe.dtype.itemsize)
        some = [2 * n for n in rows] if recipe.kernel == "exchanged" else rows
        calls.append(Call(recipe, pick.choice([n for n in some if n <= most]), pick.random() < 0.4))
    return calls


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
        room = self.pool.get((index, name))
        if room is None:
            most = (1 << 15) if INTERPRETED else CALL_BYTES
            room = self.pool[index, name] = torch.zeros(most, dtype=torch.int8, device=self.clock.device)
        size = rows * recipe.hidden * recipe.dtype.itemsize
        return room[:size].view(recipe.dtype).view(rows, recipe.hidden)

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
class Batch:
    """One rank's steps, to be run in order, any number of times; all loaded before any runs, as `Launch` says."""

    steps: list[Any]
    calls: int

    def run(self) -> None:
        for step in self.steps:
            step.run()

    def load(self) -> None:
        for step in self.steps:
            step.load()


def scattered(call: Call, op: Operation, ws: Workspace) -> bool:
    """Whether each rank finishes its half of the rows, and has their residual and h alone."""
    return call.recipe.kernel == "exchanged" and call.rows > 0 and not exchange_refusal(op, ws)


def takes_products(call: Call, op: Operation, ws: Workspace) -> bool:
    return scattered(call, op, ws) or (call.recipe.kernel == "copied" and COPIED.fits(op, ws, 1))


def multiply(factor: Tensor, x: Tensor, first: int, stop: int) -> None:
    """A product for `Operation`, by one."""
    torch.mul(factor[first:stop], 1, out=x[first:stop])


def bind(call: Call, op: Operation, ws: Workspace) -> Any:
    """The recipe's kernel, or, where it does not fit the size, one that does."""
    recipe = call.recipe
    ws = replace(ws, max_blocks=min(ws.max_blocks, 9)) if call.few else ws
    if scattered(call, op, ws):
        return exchanged(op, ws)
    if recipe.kernel == "copied" and COPIED.fits(op, ws, 1):
        return COPIED.bind(op, ws, 1, 0, 0)
    if recipe.kernel == "two_shot" and two_shot_fits(op, ws):
        return two_shot(op, ws)
    if "shot" in recipe.kernel and one_shot_fits(op, ws, recipe.split):
        return one_shot(op, ws, recipe.split)
    if "shot" in recipe.kernel and one_shot_fits(op, ws, 1):
        return one_shot(op, ws)
    if not barrier_fits(op, ws):
        raise ValueError(f"{call} does not fit")
    return barrier(op, ws)


def make_batch(ws: Workspace, ledger: Ledger, calls: Sequence[Call], seed: int, *, plant: str = "",
               delay_ns: int = 16_000, often: float = 0.15) -> Batch:  # fmt: skip
    """One rank's part of `calls`. `seed`: of where this rank spins, for up to `delay_ns` (rarely 16 times that), in
    `often` of the gaps between calls. `plant`: the fault, if this rank is to have one."""
    own = random.Random(f"delays {seed} {ws.rank}")
    fill: list[Any] = []
    make: list[Any] = []
    check: list[Any] = []
    for index, call in enumerate(calls):
        recipe, rows = call.recipe, call.rows
        x, y, residual, residual_out = (
            ledger.tensor(index, name, rows, recipe) for name in ("x", "y", "residual", "residual_out")
        )
        weight = (1.0 + torch.arange(recipe.hidden, device=x.device) % 4 * 0.25).to(recipe.dtype)
        op = Operation(x, residual, None, weight, norm=recipe.norm, eps=EPS, out_dtype=recipe.dtype,
                       hidden_dtype=recipe.dtype, out=AddNormOut(y, residual_out, None, None))  # fmt: skip
        first, stop = 0, rows
        if scattered(call, op, ws):
            first, stop = ws.rank * rows // 2, (ws.rank + 1) * rows // 2
            residual, residual_out = residual[: stop - first], residual_out[: stop - first]
            op = replace(op, residual=residual, out=AddNormOut(y, residual_out, None, None))
        filled = x
        if takes_products(call, op, ws) and own.random() < 0.5:  # a rank's own affair
            filled = ledger.tensor(index, "factor", rows, recipe)
            fill.append(HostStep(partial(x.fill_, float("nan"))))
            op = replace(op, product=partial(multiply, filled, x))
            op.multiplied(), x.fill_(0)  # both are loaded now
        if own.random() < often:
            make.append(_spin(ledger, index, ws.rank, delay_ns))
        if plant and (index == 2 or plant != "epoch"):  # the others show only where a peer is late
            make.append(_planted(ws, plant, ws.world * rows * op.row_words))
        make.append(bind(call, op, ws))
        if rows:
            sizes = {"H": recipe.hidden, "BLOCK": next_power_of_2(recipe.hidden)}
            settings = {**sizes, "WORLD": ws.world, "NORM": NORMS[recipe.norm],
                        "TOLERANCE": 1e-5 if recipe.dtype == F32 else torch.finfo(recipe.dtype).eps}  # fmt: skip
            fill.append(Step(fill_kernel, rows, (
                filled, residual, y, residual_out, ledger.clock, index, ws.rank, first, stop
            ), sizes))  # fmt: skip
            check.append(Step(check_kernel, rows, (
                y, residual_out, weight, ledger.clock, index, first, stop, ledger.tally
            ), settings))  # fmt: skip
    after: list[Any] = [HostStep(lambda: ledger.clock.add_(len(calls)))]
    if not INTERPRETED:
        after.append(Step(timer_kernel, 132, (ledger.timer,), {"LOOKS": 64, "num_warps": 1}))
    return Batch([*fill, *make, *check, *after], len(calls))


def _spin(ledger: Ledger, index: int, rank: int, most_ns: int) -> Any:
    if INTERPRETED:  # no clock there
        return HostStep(lambda: time.sleep(random.random() * 0.1))
    return Step(spin_kernel, 1, (ledger.clock, index, rank), {"MOST": most_ns, "num_warps": 1})


def _planted(ws: Workspace, plant: str, words: int) -> Step:
    settings = {"KIND": PLANTS.index(plant), "WORLD": ws.world}
    programs = max(1, -(-words // 1024)) if plant == "slot" else 1
    return Step(plant_kernel, programs, (
        ws.buffer, ws.state, ws.slot_words, words, ws.flags_offset, ws.copies_offset + ws.copy_words
    ), settings)  # fmt: skip
