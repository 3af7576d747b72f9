"""Many random calls queued behind each other while ranks fall behind at random, every result checked on the device.

A `Batch` is one rank's part of some fifty calls: first it fills the inputs of all of them, then it makes the calls,
then it checks all results. Between calls and in products some ranks spin. A batch is a list of steps that need no host,
so it can be captured in a CUDA graph and replayed; replays differ, because the inputs follow from a count that lives on
the device.

Where a kernel takes a product in place of x, some ranks give it one, which fills x when it is asked for; of some, x
lies in the memory of the result.

x and residual are small whole numbers, so that their sums are exact in every dtype: h must be right bit for bit, and y
to a rounding. A word from any other call, rank or place is wrong. Calls of the backward pass: `overlap_backward.py`.

`plant` puts a fault in, so that one can see that it would be found: "slot", "epoch", "flag" or "copy" (see
`plant_kernel`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..call import NORMS, AddNormOut
from ..call import Call as Operation
from ..compat import INTERPRETED, next_power_of_2
from ..symmetric.barrier import barrier
from ..symmetric.barrier import fits as barrier_fits
from ..symmetric.copied import KERNEL as COPIED
from ..symmetric.copies import RANKS
from ..symmetric.exchanged import exchanged
from ..symmetric.exchanged import refusal as exchange_refusal
from ..symmetric.one_shot import fits as one_shot_fits
from ..symmetric.one_shot import one_shot
from ..symmetric.two_shot import fits as two_shot_fits
from ..symmetric.two_shot import two_shot
from ..symmetric.workspace import Workspace
from .overlap_backward import bind_backward
from .overlap_device import EPS, PLANTS, check_kernel, fill_kernel, plant_kernel, timer_kernel
from .overlap_steps import BF16, CALL_BYTES, F16, F32, Bound, Call, HostStep, Ledger, Recipe, Step, given, spin

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
    Recipe("backward", 1024, BF16, "rms_norm"),
    Recipe("backward", 4096, F32, "layer_norm"),
    Recipe("backward", 7168, F16, "rms_norm"),
    Recipe("backward_scattered", 1024, BF16, "layer_norm"),
    Recipe("backward_scattered", 4096, F32, "rms_norm"),
    Recipe("backward_scattered", 8192, BF16, "rms_norm"),
)
#: For the interpreter, which runs the programs of a split row in turn: none is split.
TINY_RECIPES = tuple(
    Recipe(kernel, hidden, dtype, norm)
    for kernel, hidden in (("one_shot", 64), ("two_shot", 128), ("barrier", 72), ("copied", 64), ("exchanged", 64),
                           ("backward", 64), ("backward_scattered", 64))
    for dtype, norm in ((BF16, "rms_norm"), (F32, "layer_norm"))
)  # fmt: skip
#: Which of them no other kernel can stand in for.
BACKWARD = "backward", "backward_scattered"
ROWS = (0, 1, 1, 2, 3, 5, 8, 16, 33, 64, 150)


def usable(recipes: Sequence[Recipe], ws: Workspace) -> list[Recipe]:
    """Those of which the workspace takes calls, the same on all ranks."""
    copies = ws.world == RANKS and ws.remote is not None
    return [recipe for recipe in recipes if copies or recipe.kernel not in BACKWARD]


def draw_calls(seed: int, count: int, recipes: Sequence[Recipe] = RECIPES, rows: Sequence[int] = ROWS) -> list[Call]:
    """Random calls; a call without rows among them now and then. `rows` that are scattered are those of each rank."""
    pick = random.Random(f"calls {seed}")
    calls = []
    for _ in range(count):
        recipe = pick.choice(recipes)
        most = CALL_BYTES // (recipe.hidden * recipe.dtype.itemsize)
        some = [2 * n for n in rows] if recipe.scattered else rows
        calls.append(Call(recipe, pick.choice([n for n in some if n <= most]), pick.random() < 0.4))
    return calls


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


def launch_of(call: Call, op: Operation, ws: Workspace) -> Any:
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
        pause = spin(ledger, index, ws.rank, delay_ns)
        bound = (bind_backward if call.recipe.kernel in BACKWARD else bind)(ws, ledger, index, call, own, pause)
        fill += bound.fill
        if own.random() < often:
            make.append(pause)
        if plant and (index == 2 or plant != "epoch"):  # the others show only where a peer is late
            words = call.rows * call.recipe.hidden * call.recipe.dtype.itemsize // 4
            make.append(_planted(ws, plant, ws.world * words))
        make.append(bound.launch)
        check += bound.check
    after: list[Any] = [HostStep(lambda: ledger.clock.add_(len(calls)))]
    if not INTERPRETED:
        after.append(Step(timer_kernel, 132, (ledger.timer,), {"LOOKS": 64, "num_warps": 1}))
    return Batch([*fill, *make, *check, *after], len(calls))


def bind(ws: Workspace, ledger: Ledger, index: int, call: Call, own: random.Random, pause: Any) -> Bound:
    """A call of an operation of the forward pass."""
    recipe, rows = call.recipe, call.rows
    y, residual, residual_out = (
        ledger.tensor(index, name, rows, recipe) for name in ("y", "residual", "residual_out")
    )
    weight = (1.0 + torch.arange(recipe.hidden, device=y.device) % 4 * 0.25).to(recipe.dtype)
    op = Operation(ledger.tensor(index, "x", rows, recipe), residual, None, weight, norm=recipe.norm, eps=EPS,
                   out_dtype=recipe.dtype, hidden_dtype=recipe.dtype,
                   out=AddNormOut(y, residual_out, None, None))  # fmt: skip
    first, stop = 0, rows
    if scattered(call, op, ws):
        first, stop = ws.rank * rows // 2, (ws.rank + 1) * rows // 2
        residual, residual_out = residual[: stop - first], residual_out[: stop - first]
        op = replace(op, residual=residual, out=AddNormOut(y, residual_out, None, None))
    filled, fill = op.x, []
    if takes_products(call, op, ws):
        x = given(ledger, index, call, y, own, pause)
        op, filled, fill = replace(op, x=x.x, product=x.product), x.filled, x.fill
    launch = launch_of(call, op, ws)
    if not rows:
        return Bound(fill, launch, [])
    sizes = {"H": recipe.hidden, "BLOCK": next_power_of_2(recipe.hidden)}
    settings = {**sizes, "WORLD": ws.world, "NORM": NORMS[recipe.norm],
                "TOLERANCE": 1e-5 if recipe.dtype == F32 else torch.finfo(recipe.dtype).eps}  # fmt: skip
    filling = Step(fill_kernel, rows, (
        filled, residual, y, residual_out, ledger.clock, index, ws.rank, first, stop
    ), sizes)  # fmt: skip
    checking = Step(check_kernel, rows, (
        y, residual_out, weight, ledger.clock, index, first, stop, ledger.tally
    ), settings)  # fmt: skip
    return Bound([*fill, filling], launch, [checking])


def _planted(ws: Workspace, plant: str, words: int) -> Step:
    settings = {"KIND": PLANTS.index(plant), "WORLD": ws.world}
    programs = max(1, -(-words // 1024)) if plant == "slot" else 1
    return Step(plant_kernel, programs, (
        ws.buffer, ws.state, ws.slot_words, words, ws.flags_offset, ws.copies_offset + ws.copy_words
    ), settings)  # fmt: skip
