"""Many random calls queued behind each other while ranks fall behind at random, every result checked on the device.

A `Batch` is one rank's part of some fifty calls: first it fills the inputs of all of them, then it makes the calls,
then it checks all results. Between calls some ranks spin. A batch is a list of steps that need no host, so it can be
captured in a CUDA graph and replayed; replays differ, because the inputs follow from a count that lives on the device.

x and residual are small whole numbers, so that their sums are exact in every dtype: h must be right bit for bit, and y
to a rounding. A word from any other call, rank or place is wrong.

`plant` puts a fault in, so that one can see that it would be found: "slot", "epoch", "flag" or "copy" (see
`_plant_kernel`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..call import NORMS, AddNormOut
from ..call import Call as Operation
from ..compat import INTERPRETED, next_power_of_2, tl, triton
from ..symmetric.barrier import barrier
from ..symmetric.barrier import fits as barrier_fits
from ..symmetric.copied import KERNEL as COPIED
from ..symmetric.one_shot import fits as one_shot_fits
from ..symmetric.one_shot import one_shot
from ..symmetric.two_shot import fits as two_shot_fits
from ..symmetric.two_shot import two_shot
from ..symmetric.workspace import Workspace
from ..words import CHANNELS, COPIES, COPY_FLAGS, SENTINEL

EPS = 1e-6
PLANTS = ("slot", "epoch", "flag", "copy")
_SENTINEL, _CHANNELS, _EPS = tl.constexpr(SENTINEL), tl.constexpr(CHANNELS), tl.constexpr(EPS)
_COPIES, _COPY_FLAGS = tl.constexpr(COPIES), tl.constexpr(COPY_FLAGS)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CALL_BYTES = 2 << 20  # the most that x of one call takes


@dataclass(frozen=True)
class Recipe:
    """What a kernel is compiled for. `kernel`: one_shot, two_shot, barrier or copied (2 ranks only)."""

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
)
#: For the interpreter, which runs the programs of a split row in turn: none is split.
TINY_RECIPES = tuple(
    Recipe(kernel, hidden, dtype, norm)
    for kernel, hidden in (("one_shot", 64), ("two_shot", 128), ("barrier", 72), ("copied", 64))
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
    """Random calls; a call without rows among them now and then."""
    pick = random.Random(f"calls {seed}")
    calls = []
    for _ in range(count):
        recipe = pick.choice(recipes)
        most = CALL_BYTES // (recipe.hidden * recipe.dtype.itemsize)
        calls.append(Call(recipe, pick.choice([n for n in rows if n <= most]), pick.random() < 0.4))
    return calls


# -- device -----------------------------------------------------------------------------------------------------------


@triton.jit
def _value(call, who, at, SPAN: tl.constexpr):
    """A whole number from -SPAN to SPAN that follows from the call, the rank and the place, as float32."""
    h = (call * 40503 + who * 30011 + at * 2654435).to(tl.uint32)
    h = (h ^ (h >> 15)) * 739982445
    h = (h ^ (h >> 12)) * 695872825
    h = h ^ (h >> 15)
    return ((h >> 8).to(tl.int32) % (2 * SPAN + 1)).to(tl.float32) - SPAN


@triton.jit(do_not_specialize=["index", "rank"])
def _fill_kernel(x_ptr, residual_ptr, y_ptr, residual_out_ptr, clock_ptr, index, rank, H: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """One row of a call's inputs; its outputs become NaN."""
    row = tl.program_id(0)
    call = tl.load(clock_ptr) + index
    cols = tl.arange(0, BLOCK)
    mask = cols < H
    at = row * H + cols
    tl.store(x_ptr + at, _value(call, rank, at, 7).to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(residual_ptr + at, _value(call, 99, at, 63).to(residual_ptr.dtype.element_ty), mask=mask)
    nan = tl.full([BLOCK], float("nan"), tl.float32)
    tl.store(y_ptr + at, nan.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(residual_out_ptr + at, nan.to(residual_out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["index"])
def _check_kernel(y_ptr, residual_out_ptr, weight_ptr, clock_ptr, index, tally_ptr, H: tl.constexpr,
                  BLOCK: tl.constexpr, WORLD: tl.constexpr, NORM: tl.constexpr, TOLERANCE: tl.constexpr):  # fmt: skip
    """One row of a call's results. `tally` (int64): wrong rows, number of the first wrong call, a mark of all bits."""
    row = tl.program_id(0)
    call = tl.load(clock_ptr) + index
    cols = tl.arange(0, BLOCK)
    mask = cols < H
    at = row * H + cols
    h = _value(call, 99, at, 63)
    for q in tl.static_range(WORLD):
        h += _value(call, q, at, 7)
    h = tl.where(mask, h, 0.0)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    want = h
    if NORM == 0:
        want = h * tl.rsqrt(tl.sum(h * h, axis=0) / H + _EPS) * weight
    if NORM == 1:
        d = tl.where(mask, h - tl.sum(h, axis=0) / H, 0.0)
        want = d * tl.rsqrt(tl.sum(d * d, axis=0) / H + _EPS) * weight
    if NORM == 2:
        want = h * weight
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    right = (tl.load(residual_out_ptr + at, mask=mask, other=0.0).to(tl.float32) == h) & (
        tl.abs(y - want) <= TOLERANCE * (tl.abs(want) + 0.01)
    )
    bad = tl.sum((mask & (right == 0)).to(tl.int32), axis=0)  # a NaN is not right
    if bad > 0:
        tl.atomic_add(tally_ptr, (bad > 0).to(tl.int64))
        tl.atomic_min(tally_ptr + 1, call.to(tl.int64))
    bits = y.to(tl.int32, bitcast=True)
    tl.atomic_add(tally_ptr + 2, tl.sum(bits.to(tl.int64) * (cols + 1 + row + call).to(tl.int64), axis=0))


@triton.jit
def _clock(after):
    """The device's timer in ns, read once the number `after` is there."""
    return tl.inline_asm_elementwise(
        "{ .reg .b64 t; mov.b64 t, $1; mov.u64 $0, %globaltimer; }", "=l,l", [after], dtype=tl.int64, is_pure=False,
        pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["index", "rank"])
def _spin_kernel(clock_ptr, index, rank, MOST: tl.constexpr):
    """Lasts up to MOST ns, now and then sixteen times as long: another length each replay and on each rank."""
    call = tl.load(clock_ptr) + index
    begin = _clock(call.to(tl.int64))
    lasts = (_value(call, rank + 1000, index, 512) + 512.0) * (MOST / 1024.0)
    lasts = tl.where(_value(call, rank + 2000, index, 64) == 0, lasts * 16, lasts).to(tl.int64)
    now = begin
    while now - begin < lasts:
        now = _clock(now)


@triton.jit
def _timer_kernel(timer_ptr, LOOKS: tl.constexpr):
    """Count backward steps of the device's timer: within a thread, and behind any time that was read before this
    kernel or program. `timer` (int64): the latest time, backward steps, the largest of them in ns."""
    steps = tl.zeros([], tl.int64)
    worst = tl.zeros([], tl.int64)
    latest = tl.load(timer_ptr, volatile=True)
    for i in range(LOOKS):  # noqa: B007
        now = _clock(latest)
        if now < latest:
            steps += 1
            worst = tl.maximum(worst, latest - now)
        latest = tl.maximum(latest, now)
    tl.atomic_max(timer_ptr, latest)
    if steps > 0:
        tl.atomic_add(timer_ptr + 1, steps)
        tl.atomic_max(timer_ptr + 2, worst)


@triton.jit(do_not_specialize=["slot_words", "words", "flags", "copies"])
def _plant_kernel(
    buffer_ptr, state_ptr, slot_words, words, flags, copies, KIND: tl.constexpr, WORLD: tl.constexpr
):  # fmt: skip
    """A fault in this rank's memory. KIND 0, "slot": the call before did not clear its first `words` words. 1, "epoch":
    it did not advance the epoch. 2, "flag": the peers' flags are up before the peers have raised them. 3, "copy": those
    of chunks say that they were copied, and none was."""
    epoch = tl.load(state_ptr)
    slot = ((epoch & 3) + 2) % 3  # the call before's
    if KIND == 0:
        at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
        tl.store(buffer_ptr + slot * slot_words + at, tl.zeros([1024], tl.int32), mask=at < words)
    if KIND == 1:
        tl.debug_barrier()  # every warp has read the epoch
        before = (epoch & -4) - 4 + slot
        tl.store(state_ptr + 2 * tl.arange(0, _CHANNELS), tl.zeros([_CHANNELS], tl.int32) + before)
    if KIND == 2:
        at = tl.arange(0, _CHANNELS)
        for q in tl.static_range(WORLD):
            raised = buffer_ptr + flags + q * _CHANNELS + at
            tl.store(raised, tl.zeros([_CHANNELS], tl.int32) + ((epoch & -4) + 4))
    if KIND == 3:
        at = tl.arange(0, _COPY_FLAGS)
        count = tl.load(state_ptr + _COPIES) + 1
        ready = at == _COPY_FLAGS - 1  # the peer's slot
        tl.store(buffer_ptr + copies + at, tl.zeros([_COPY_FLAGS], tl.int32) + count, mask=ready == 0)


# -- host -------------------------------------------------------------------------------------------------------------


@dataclass
class Ledger:
    """What one rank keeps on its device. `clock`: the number of the batch's first call; `tally`, `timer`: see
    `_check_kernel`, `_timer_kernel`."""

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


def bind(call: Call, op: Operation, ws: Workspace) -> Any:
    """The recipe's kernel, or, where it does not fit the size, one that does."""
    recipe = call.recipe
    ws = replace(ws, max_blocks=min(ws.max_blocks, 9)) if call.few else ws
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
        names = ("x", "residual", "y", "residual_out")
        x, residual, y, residual_out = (ledger.tensor(index, name, rows, recipe) for name in names)
        weight = (1.0 + torch.arange(recipe.hidden, device=x.device) % 4 * 0.25).to(recipe.dtype)
        op = Operation(x, residual, None, weight, norm=recipe.norm, eps=EPS, out_dtype=recipe.dtype,
                       hidden_dtype=recipe.dtype, out=AddNormOut(y, residual_out, None, None))  # fmt: skip
        if own.random() < often:
            make.append(_spin(ledger, index, ws.rank, delay_ns))
        if plant and (index == 2 or plant != "epoch"):  # the others show only where a peer is late
            make.append(_planted(ws, plant, ws.world * rows * op.row_words))
        make.append(bind(call, op, ws))
        if rows:
            sizes = {"H": recipe.hidden, "BLOCK": next_power_of_2(recipe.hidden)}
            settings = {**sizes, "WORLD": ws.world, "NORM": NORMS[recipe.norm],
                        "TOLERANCE": 1e-5 if recipe.dtype == F32 else torch.finfo(recipe.dtype).eps}  # fmt: skip
            fill.append(Step(_fill_kernel, rows, (x, residual, y, residual_out, ledger.clock, index, ws.rank), sizes))
            check.append(Step(_check_kernel, rows, (y, residual_out, weight, ledger.clock, index, ledger.tally),
                               settings))  # fmt: skip
    after: list[Any] = [HostStep(lambda: ledger.clock.add_(len(calls)))]
    if not INTERPRETED:
        after.append(Step(_timer_kernel, 132, (ledger.timer,), {"LOOKS": 64, "num_warps": 1}))
    return Batch([*fill, *make, *check, *after], len(calls))


def _spin(ledger: Ledger, index: int, rank: int, most_ns: int) -> Any:
    if INTERPRETED:  # no clock there
        return HostStep(lambda: time.sleep(random.random() * 0.1))
    return Step(_spin_kernel, 1, (ledger.clock, index, rank), {"MOST": most_ns, "num_warps": 1})


def _planted(ws: Workspace, plant: str, words: int) -> Step:
    settings = {"KIND": PLANTS.index(plant), "WORLD": ws.world}
    programs = max(1, -(-words // 1024)) if plant == "slot" else 1
    return Step(_plant_kernel, programs, (
        ws.buffer, ws.state, ws.slot_words, words, ws.flags_offset, ws.copies_offset + ws.copy_words
    ), settings)  # fmt: skip
