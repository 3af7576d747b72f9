"""Runs random programs (`own_programs`) on ranks and compares each rank's outputs and gradients with float64."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

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

    eps = torch.finfo(drawn.dtype).eps
    exact, eager = outcome(torch.float64), outcome(drawn.dtype)
    rounded = outcome(torch.float64, rounding=eps / 2)
    ours = outcome(drawn.dtype, compiled=True)
    reports = [*tpfuse.reports()[before:], *traced]
    found["rewrites"].update(str(b.rewrite) for report in reports for b in report.boundaries)
    found["apart"] += any("graphs that differ here" in b.reason for report in reports for b in report.boundaries)
    worst = 0.0
    for index, (e, base, moved, got) in enumerate(zip(exact, eager, rounded, ours, strict=True)):
        if not base.isfinite().all():
            continue
        size = float(e.norm()) or 1.0
        error, allowed, once = (float((t - e).norm()) / size for t in (got, base, moved))
        worst = max(worst, error / (allowed + eps + once))
        if not error <= SLACK * (allowed + eps + once):
            found["wrong"].setdefault(drawn.seed, []).append((index, error, allowed, once))
        elif drawn.dtype is torch.float32:
            found["ratios"].append((error + eps) / (allowed + eps))
    found["shares"].append(worst)
