"""How much of the compile time is ours, and whether it grows linearly with the number of layers.

    python benchmarks/compile_time.py [--layers 2 8 32 80] [--repeats 3] [--output benchmarks/results/compile_time.json]
    python benchmarks/compile_time.py --layers 80 --against ../another/checkout     the two by turns, and their ratio

A Llama-like decoder stack, cut over eight ranks of which only this one exists (fake process group: tracing and
rewriting see what a real rank sees, and nothing is sent). Forward graph, inference. Each depth is compiled by Inductor
in a process of its own with an empty cache, after a warm-up that loads the compiler's modules; medians of three such
processes. Times are CPU seconds, so that other work on the machine matters little; the C++ compiler's are in the total.
Two parts are ours: the pass (recognise, plan, rewrite), and what the backend does around it (copy of the graph, cache
key, report). Both shares count the garbage collections that fall into them. The growth does not: a collection walks
over everything the compiler holds, so what it costs is not the pass's doing, and in which code it falls is chance; its
seconds stand in a column of their own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import cpu_machine
from records import write

WORLD = 8
HIDDEN, HEADS, INTERMEDIATE, TOKENS = 256, 8, 512, 16
#: What is asked of the passes: their share of the compile time, and how much dearer a layer may be in a deep model.
SHARE, GROWTH = 0.05, 1.5
TREE = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "compile_time.json"


def decoder(layers: int) -> Any:
    """This rank's part of the stack: plain modules with a functional all-reduce behind each row-wise matrix."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed import _functional_collectives as funcol

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input_norm = nn.RMSNorm(HIDDEN)
            self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN // WORLD, bias=False)
            self.o_proj = nn.Linear(HIDDEN // WORLD, HIDDEN, bias=False)
            self.post_norm = nn.RMSNorm(HIDDEN)
            self.gate_up = nn.Linear(HIDDEN, 2 * INTERMEDIATE // WORLD, bias=False)
            self.down_proj = nn.Linear(INTERMEDIATE // WORLD, HIDDEN, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (
                part.unflatten(-1, (HEADS // WORLD, -1)).transpose(1, 2)
                for part in self.qkv(self.input_norm(x)).chunk(3, -1)
            )
            attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            attended = self.o_proj(attended.transpose(1, 2).flatten(2))
            x = x + funcol.all_reduce(attended, "sum", dist.group.WORLD)
            gate, up = self.gate_up(self.post_norm(x)).chunk(2, -1)
            return x + funcol.all_reduce(self.down_proj(nn.functional.silu(gate) * up), "sum", dist.group.WORLD)

    return nn.Sequential(*[Layer() for _ in range(layers)], nn.RMSNorm(HIDDEN)).bfloat16().eval()


class Stopwatch:
    """Adds up the CPU seconds inside the functions it wraps; a function that calls itself counts once. `collecting`:
    how many of them the garbage collector took."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.collecting = 0.0
        self.depth = 0
        gc.callbacks.append(self._collected)

    def _collected(self, phase: str, _: dict[str, int]) -> None:
        if self.depth > 0:
            now = time.process_time()
            self.collecting += now if phase == "stop" else -now

    def wrap(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            self.depth += 1
            try:
                return fn(*args, **kwargs)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    self.seconds += time.process_time() - began

        return timed


def cpu_seconds() -> float:
    """Of this process and of the finished ones it started."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def measure(layers: int) -> dict[str, Any]:
    """Compile one depth in this process and say where the time went."""
    import torch
    import torch.distributed as dist
    from torch._inductor import compile_fx
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import tpfuse
    from tpfuse import backend

    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    x = torch.randn(1, TOKENS, HIDDEN, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.compile(decoder(1), backend=backend.tpfuse)(x)  # loads the compiler's modules
        torch.compiler.reset()
        # A full garbage collection walks over everything torch has loaded, and which code it interrupts is chance.
        gc.collect()
        gc.freeze()

        whole, inductor, passes = Stopwatch(), Stopwatch(), Stopwatch()
        compile_fx.compile_fx = inductor.wrap(compile_fx.compile_fx)
        backend.FusionPass.__call__ = passes.wrap(backend.FusionPass.__call__)
        model = decoder(layers)
        began = cpu_seconds()
        torch.compile(model, backend=whole.wrap(backend.tpfuse))(x)
        total = cpu_seconds() - began
    report = tpfuse.reports()[-1]
    dist.destroy_process_group()
    return {
        "layers": layers,
        "boundaries": len(report.boundaries),
        "fused": len(report.fused),
        "total_s": round(total, 3),
        "passes_s": round(passes.seconds, 4),
        "collecting_s": round(passes.collecting, 4),
        "around_s": round(whole.seconds - inductor.seconds, 4),
    }


def in_fresh_process(layers: int, tree: Path = TREE) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        environment["PYTHONPATH"] = str(tree)
        command = [sys.executable, str(tree / "benchmarks" / "compile_time.py"), "--one", str(layers)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def conclude(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether the passes keep under their share at every depth, and cost the same for every layer."""
    shares = {row["layers"]: (row["passes_s"] + row["around_s"]) / row["total_s"] for row in rows}
    deep = [row for row in rows if row["layers"] >= 8] or rows
    per_layer = [(row["passes_s"] - row["collecting_s"]) / row["layers"] for row in deep]
    growth = per_layer[-1] / per_layer[0]
    return {
        "compared_layers": [deep[0]["layers"], deep[-1]["layers"]],
        "largest_share": round(max(shares.values()), 4),
        "under_share": max(shares.values()) < SHARE,
        "growth_per_layer": round(growth, 2),
        "linear": growth <= GROWTH,
        "all_fused": all(row["fused"] == row["boundaries"] == 2 * row["layers"] for row in rows),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["layers  fused    total s  passes s  of it gc  around s  share  passes ms/layer without gc"]
    for row in rows:
        total, passes, around, collecting = (row[k] for k in ("total_s", "passes_s", "around_s", "collecting_s"))
        lines.append(
            f"{row['layers']:>6} {row['fused']:>6} {total:>10.1f} {passes:>9.3f} {collecting:>9.3f} {around:>9.3f}"
            f" {(passes + around) / total:>6.1%} {1000 * (passes - collecting) / row['layers']:>27.2f}"
        )
    return "\n".join(lines)


def against(other: Path, all_layers: list[int], repeats: int) -> dict[str, Any]:
    """This tree and another one by turns: the medians of both, and what this one takes of the other's pass time."""
    rows = []
    for layers in all_layers:
        print(f"compiling {layers} layers on both trees ...", file=sys.stderr, flush=True)
        pairs = [(in_fresh_process(layers, other), in_fresh_process(layers)) for _ in range(repeats)]
        before, now = (medians(list(runs)) for runs in zip(*pairs, strict=True))
        row: dict[str, Any] = {"layers": layers, "before": before, "now": now}
        row["ratio"] = round(now["passes_s"] / before["passes_s"], 3)
        row["ratio_without_gc"] = round(
            (now["passes_s"] - now["collecting_s"]) / (before["passes_s"] - before["collecting_s"]), 3
        )
        rows.append(row)
    return {"machine": cpu_machine(), "repeats": repeats, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 32, 80])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--against", type=Path, help="another checkout, compiled by turns with this one")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one)))
        return 0
    if arguments.against is not None:
        document = against(arguments.against.resolve(), arguments.layers, arguments.repeats)
        write(arguments.output.with_name("compile_time_against.json"), document)
        for row in document["rows"]:
            print(f"{row['layers']} layers: {row['ratio']} of the pass time ({row['ratio_without_gc']} without gc)")
        return 0
    rows = []
    for layers in arguments.layers:
        print(f"compiling {layers} layers ...", file=sys.stderr, flush=True)
        rows.append(medians([in_fresh_process(layers) for _ in range(arguments.repeats)]))
    verdict = conclude(rows)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write(
        arguments.output,
        {"machine": cpu_machine(), "repeats": arguments.repeats, "rows": rows, "verdict": verdict},
    )
    print(table(rows))
    small, linear = ("yes" if verdict[key] else "NO" for key in ("under_share", "linear"))
    print(f"share under {SHARE:.0%}: {small} (largest {verdict['largest_share']:.1%})")
    few, many = verdict["compared_layers"]
    print(f"linear: {linear} (a layer of {many} costs {verdict['growth_per_layer']} x a layer of {few})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
