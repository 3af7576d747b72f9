"""Runs random programs (`own_programs`) on ranks and compares each rank's outputs and gradients with float64."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

import tpfuse
from tpfuse.backend import tpfuse as backend
from tpfuse.runtime.ballots import Ledger

from . import own_traced
from .own_parts import block, groups, results
from .own_programs import draw
from .training_faults import planted

#: A single program's error is noise around its bound, which is the unfused graph's error, a rounding of the output, and
#: one more rounding of each partial sum: what moves in front of a sum rounds them. Wrong numbers are far above it.
SLACK = 4.0
#: A bound this large says nothing: the unfused graph has no right digit, and errors do not add up any more. Such a
#: program is judged in float32.
NO_DIGIT = 0.25


def run(
    rank: int,
    world: int,
    seeds: Sequence[int],
    folder: str,
    short: bool,
    agree: bool = True,
    inner: str = "aot_eager",
    fault: str = "",
) -> dict:
    """What came out of the programs `seeds` on this rank: `wrong`, by seed; how often each rewrite was seen;
    errors in float32 as multiples of the unfused graph's, one rounding added to both; the largest share that a tensor
    of a program has of its bound.

    inner: "aot_eager", "inductor", or "traced", which goes without torch.compile (own_traced.py).
    agree: False makes every ballot a yes, whatever the ranks bring. folder: where the seed at hand is written down, so
    that one that hangs can be told, and a line for each program that is done. fault: one of training_faults.py.
    """
    if not agree:
        Ledger.agree = lambda self, plans, timeout, place=None: True
    names = groups(rank, world)
    total = empty()
    for seed in seeds:
        Path(folder, f"rank{rank}").write_text(str(seed))
        drawn, found = draw(seed, short), empty()
        began, cpu = time.monotonic(), time.process_time()
        try:
            with planted(fault):
                _one(drawn, rank, world, names, inner, found)
        except Exception as error:
            raise RuntimeError(f"a program failed on rank {rank}:\n{drawn}") from error
        found["seconds"], found["cpu_seconds"] = time.monotonic() - began, time.process_time() - cpu
        add(total, found)
        with open(Path(folder, f"done{rank}"), "a") as lines:
            lines.write(json.dumps({"seed": seed, **found}) + "\n")
    return total


def empty() -> dict:
    counts = {"seconds": 0.0, "cpu_seconds": 0.0, "apart": 0}
    return {"wrong": {}, "rewrites": Counter(), "ratios": [], "shares": [], **counts}


def add(total: dict, found: dict) -> None:
    """Put what came out of one program to what came out of others."""
    for name, value in found.items():
        if name in ("wrong", "rewrites"):
            total[name].update(value)
        elif name in total:
            total[name] += value


def _one(drawn, rank: int, world: int, names: list[str], inner: str, found: dict) -> None:
    torch._dynamo.reset()
    before = len(tpfuse.reports())
    traced: list[tpfuse.Report] = []

    def outcome(dtype, compiled=False, rounding=0.0):
        model = block(drawn, rank, world, names, dtype, rounding)
        call = model
        if compiled and inner == "traced":
            return own_traced.results(drawn, model, rank, dtype, traced)
        if compiled:
            options = {"inner": inner, "plan_timeout": 120.0, "rewrites": own_traced.REWRITES}
            # The function, for trees that are not installed: there the backend's name is not known.
            call = torch.compile(model, backend=backend, dynamic=drawn.dynamic or None, options=options)
        return results(drawn, model, call, rank, dtype)

    exact = outcome(torch.float64)

    def compared(dtype: torch.dtype) -> list[tuple[int, float, float, float]]:
        """Of each finite tensor its place, and the errors of ours, of the unfused graph, and of one more rounding."""
        eager, rounded = outcome(dtype), outcome(torch.float64, rounding=torch.finfo(dtype).eps / 2)
        found = []
        for index, (e, *others) in enumerate(zip(exact, outcome(dtype, compiled=True), eager, rounded, strict=True)):
            size = float(e.norm()) or 1.0
            if others[1].isfinite().all():
                found.append((index, *(float((t - e).norm()) / size for t in others)))
        return found

    dtype, errors = drawn.dtype, compared(drawn.dtype)
    bound = torch.tensor(max((allowed + once for _, _, allowed, once in errors), default=0.0))
    dist.all_reduce(bound, dist.ReduceOp.MAX)  # ranks go the same way
    if bound > NO_DIGIT and dtype is not torch.float32:
        dtype = torch.float32
        errors = compared(dtype)
    eps = torch.finfo(dtype).eps
    reports = [*tpfuse.reports()[before:], *traced]
    found["rewrites"].update(str(b.rewrite) for report in reports for b in report.boundaries)
    found["apart"] += any("graphs that differ here" in b.reason for report in reports for b in report.boundaries)
    worst = 0.0
    for index, error, allowed, once in errors:
        worst = max(worst, error / (allowed + eps + once))
        if not error <= SLACK * (allowed + eps + once):
            found["wrong"].setdefault(drawn.seed, []).append((index, error, allowed, once))
        elif dtype is torch.float32:
            found["ratios"].append((error + eps) / (allowed + eps))
    found["shares"].append(worst)
