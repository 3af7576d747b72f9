"""Measure boundary kernels, with virtual ranks on one GPU or with one process a GPU over real links.

Both kinds of ranks (`VirtualRanks`, `LinkedRanks`) bind, run and capture in the same way. Each call is checked against
float64 and for bitwise equality on all ranks before it is timed and after it was replayed. Times are microseconds a
call: medians of alternating CUDA-graph replays, of the slowest rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from ..add_norm import add_norm, add_norm_reference
from ..call import AddNormOut, Call
from ..symmetric.dispatch import Entry, bind, runs_exactly
from ..symmetric.operands import Launch
from ..symmetric.workspace import Workspace
from .table import name_of
from .virtual import time_graphs


@dataclass(frozen=True)
class Provider:
    """A name, and how to bind one call on one rank; None where it cannot take the call. What it binds has `run()`,
    `load()` and, once run, `out`; a true `drifts` says that replays sum in place what was summed before, a true
    `may_differ` that ranks need not hold equal bits; `refill()`, where it is not None, brings its input back."""

    name: str
    bind: Callable[[Call, Workspace], Any]


@dataclass(frozen=True)
class Record:
    """One provider at one size. `us` is None where it failed, and `note` says how."""

    world: int
    hidden: int
    rows: int
    provider: str
    us: float | None
    spread: float = 0.0
    note: str = ""
    programs: int = 0
    registers: int = 0
    spills: int = 0


class Functional:
    """The path without a symmetric-memory kernel: the group's own all-reduce, then the local kernel."""

    programs = 0

    def __init__(self, call: Call, group_name: str) -> None:
        self.call, self.group_name = call, group_name
        self.out: AddNormOut | None = None

    def load(self) -> None:
        self.run()

    def run(self) -> None:
        total = funcol.wait_tensor(torch.ops._c10d_functional.all_reduce(self.call.x, "sum", self.group_name))
        self.out = add_norm(replace(self.call, x=total))


class Empty:
    """A kernel that does nothing: what a launch costs by itself, with virtual ranks the fork and join as well."""

    def __init__(self) -> None:
        import triton

        @triton.jit
        def nothing():
            pass

        self.kernel = nothing

    def run(self) -> None:
        self.kernel[(1,)](num_warps=4)


def provider_of(entry: Entry, group_name: str = "") -> Provider:
    """What dispatch would run by `entry`, and nothing else in its place."""

    def exactly(call: Call, ws: Workspace) -> Any:
        if entry.kernel == "functional":
            return Functional(call, group_name)
        return bind(entry, call, ws) if runs_exactly(entry, call, ws) else None

    return Provider(name_of(entry), exactly)


def draw_operands(
    world: int, local: Iterable[int], hidden: int, rows: int, seed: int = 0
) -> tuple[dict[int, Call], AddNormOut]:
    """Fresh random operands of the `local` ranks (every process draws those of all), and the float64 truth."""
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).to(torch.bfloat16)

    xs = [draw(rows, hidden) for _ in range(world)]
    residual, weight = draw(rows, hidden), draw(hidden)
    total = torch.zeros(rows, hidden, device="cuda", dtype=torch.float64)
    for x in xs:
        total += x

    def call(x: Tensor, residual: Tensor, weight: Tensor) -> Call:
        return Call(x, residual, None, weight, norm="rms_norm", eps=1e-6, out_dtype=x.dtype, hidden_dtype=x.dtype)

    truth = add_norm_reference(call(total, residual.double(), weight.double()))
    calls = {rank: call(xs[rank], residual.clone(), weight) for rank in local}
    return calls, truth


def _poison(launches: list[Any]) -> None:
    """An output that nobody writes must not pass for right."""
    for launch in launches:
        if launch.out is not None:
            launch.out.y.fill_(float("nan"))
            launch.out.residual_out.fill_(float("nan"))


def _fingerprint(out: AddNormOut) -> tuple[int, ...]:
    """Equal on two ranks when their outputs are bitwise equal (and, but for a freak, only then)."""
    marks = []
    for t in (out.y, out.residual_out):
        assert t is not None
        bits = t.view(torch.int16).flatten().to(torch.int64)
        marks.append(int((bits * (torch.arange(bits.numel(), device=bits.device) % 8191 + 1)).sum()))
    return tuple(marks)


def what_is_wrong(ranks: Any, launches: list[Any], truth: AddNormOut) -> str:
    """Empty when every rank's outputs are right and bitwise equal; the same on all ranks."""

    def error(a: Tensor, b: Tensor | None) -> float:
        assert b is not None
        return ((a.double() - b).norm() / b.norm()).item()

    first = launches[0].out
    worst = max(error(first.y, truth.y), error(first.residual_out, truth.residual_out))
    answers = ranks.gather((worst, [_fingerprint(launch.out) for launch in launches]))
    worst = max(error for error, _ in answers)
    marks = {mark for _, each in answers for mark in each}
    if not worst < 6e-3:
        return f"error {worst:.1e}"
    return "" if len(marks) == 1 or getattr(launches[0], "may_differ", False) else "ranks differ"


def captures_of(hidden: int, rows: int) -> int:
    """How often each kernel is bound to new outputs, captured and timed. Calls of a few microseconds differ by less,
    from kernel to kernel, than one kernel does with outputs at other addresses: up to 7 %."""
    return 9 if hidden * rows <= 1 << 20 else 3


def measure(
    ranks: Any,
    hidden: int,
    rows: int,
    providers: list[Provider],
    done: Callable[[str], None] = lambda name: None,
    calls: int = 12,
) -> list[Record]:
    """Bind, check and time `providers` at one size; `done(name)` after each was captured. Collective with LinkedRanks,
    where every process must give the same providers."""
    operands, truth = draw_operands(ranks.world, ranks.local, hidden, rows, seed=rows + hidden)
    notes: dict[str, str] = {}
    bound: dict[str, list[Any]] = {}
    binds = {p.name: partial(ranks.bind, lambda ws, p=p: p.bind(operands[ws.rank], ws)) for p in providers}
    for provider in providers:
        try:
            bound[provider.name] = binds[provider.name]()
        except ValueError:
            done(provider.name)  # does not fit this size
    empty = Empty()
    empty.run()
    torch.cuda.synchronize()
    right: list[str] = []
    for name, launches in bound.items():
        _poison(launches)
        torch.cuda.synchronize()
        ranks.run(launches)
        torch.cuda.synchronize()
        if wrong := what_is_wrong(ranks, launches, truth):
            notes[name] = wrong
            done(name)
        else:
            right.append(name)
    # Providers take turns here as well, so that no one's outputs lie together.
    graphs: dict[str, list[Any]] = {name: [] for name in ("empty", *right)}
    kept: list[list[Any]] = []  # a graph does not hold the tensors that its calls fill
    for left in reversed(range(captures_of(hidden, rows))):
        graphs["empty"].append(ranks.capture([empty] * len(ranks.workspaces), calls))
        for name in right:
            # What is no Launch makes its outputs while it is captured.
            if left and isinstance(bound[name][0], Launch):
                kept.append(binds[name]())
                graphs[name].append(ranks.capture(kept[-1], calls))
            else:
                graphs[name].append(ranks.capture(bound[name], calls))
    for name in right:
        launches = bound[name]
        for launch in launches:  # the inputs, where another provider reduced in place
            if getattr(launch, "refill", None) is not None:
                launch.refill()
        _poison(launches)
        graphs[name][-1].replay()  # the outputs that are looked at may be this capture's own
        torch.cuda.synchronize()
        wrong = "" if getattr(launches[0], "drifts", False) else what_is_wrong(ranks, launches, truth)
        if wrong:
            notes[name] = f"after replay: {wrong}"
        done(name)
    times = time_graphs(graphs, calls, rounds=5, gather=ranks.gather)
    size = {"world": ranks.world, "hidden": hidden, "rows": rows}
    records = []
    for name, (median, spread) in times.items():
        resources = _resources(bound[name][0]) if name in bound else {}
        note = notes.pop(name, "")
        us, off = round(median, 3), round(spread, 3)
        records.append(Record(**size, provider=name, us=us, spread=off, note=note, **resources))
    return records + [Record(**size, provider=name, us=None, note=note) for name, note in notes.items()]


def _resources(launch: Any) -> dict[str, int]:
    compiled = launch.load() if getattr(launch, "kernel", None) is not None else None
    if compiled is None:
        return {}
    return {"programs": launch.programs, "registers": compiled.n_regs, "spills": compiled.n_spills}
