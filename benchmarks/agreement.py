"""What it costs that the ranks agree on a graph before its first run: a share of the compile time, and then nothing.

    python benchmarks/agreement.py [--layers 8] [--calls 2000] [--output benchmarks/results/agreement.json]

Two gloo ranks compile, with Inductor and empty caches, a stack whose every layer has a gate that moves in front of a
sum and two sums that become one, so each rank publishes its plan, digests the weights of the gates and waits for its
peer. `agreement_cpu_s` is the CPU time of that (words on what is sent, plans, digests, store), `compile_cpu_s` that of
the whole first call in the rank's own process, without the C++ compiler's. Waiting for the peer's compilation is no CPU
time; its seconds are in `agreement_s`. `call_us` is what `guard` adds to a later call: CPU time of a graph that does
nothing, with and without it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

TREE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TREE)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from machine import cpu_machine  # noqa: E402
from records import write  # noqa: E402
from torch import nn  # noqa: E402

from tests.ranks import run_processes  # noqa: E402

HIDDEN, ROWS = 256, 16
#: What is asked of the agreement: its share of the compile time.
SHARE = 0.01
RESULTS = Path(__file__).resolve().parent / "results" / "agreement.json"


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    c10d = torch.ops._c10d_functional
    return c10d.wait_tensor(c10d.all_reduce(x, "sum", dist.group.WORLD.group_name))


class Layer(nn.Module):
    """A parallel block with a gated second half: x + all_reduce(a) + gate * all_reduce(b), then a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.gate = nn.Linear(HIDDEN, 1)
        self.first, self.second = nn.Linear(HIDDEN, HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + all_reduce(self.first(h)) + torch.sigmoid(self.gate(h)) * all_reduce(self.second(h).relu())


class Stopwatch:
    """CPU and wall seconds inside the functions it wraps; in one called by another, they count once."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0
        self.depth = 0

    def wrap(self, owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            cpu, wall = time.thread_time(), time.monotonic()
            self.depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.cpu += time.thread_time() - cpu
                    self.wall += time.monotonic() - wall

        setattr(owner, name, timed)


def measure(rank: int, layers: int, calls: int) -> dict[str, float]:
    import tpfuse
    from tpfuse.passes.verdict.sent import Sent
    from tpfuse.runtime import guard

    torch.manual_seed(0)
    model = nn.Sequential(*[Layer() for _ in range(layers)], nn.RMSNorm(HIDDEN)).eval()
    x = torch.randn(ROWS, HIDDEN)
    watch = Stopwatch()
    ours = [(Sent, name) for name in ("__init__", "_by", "relied_on", "shapes")]
    for owner, name in (*ours, (guard, "records"), (guard, "with_values"), (guard.Ledger, "agree")):
        watch.wrap(owner, name)
    compiled = torch.compile(model, backend="tpfuse", options={"plan_timeout": 300.0})
    cpu, wall = time.process_time(), time.monotonic()
    with torch.no_grad():
        compiled(x)
    found = {"compile_cpu_s": time.process_time() - cpu, "compile_s": time.monotonic() - wall}
    found |= {"agreement_cpu_s": watch.cpu, "agreement_s": watch.wall}
    found["share"] = watch.cpu / found["compile_cpu_s"]
    report = tpfuse.reports()[-1]
    found["moved"] = sum(":" in (step.sends or "") for step in report.steps)

    def bare(x: torch.Tensor) -> torch.Tensor:
        return x

    guarded = guard.guard(bare, report, tpfuse.options.Options())
    guarded(x)
    found["call_us"] = (_each(guarded, x, calls) - _each(bare, x, calls)) * 1e6
    return found


def _each(function: Any, x: torch.Tensor, calls: int) -> float:
    """CPU seconds of a call: the least of five rounds."""
    rounds = []
    for _ in range(5):
        began = time.thread_time()
        for _ in range(calls):
            function(x)
        rounds.append((time.thread_time() - began) / calls)
    return min(rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    ranks = run_processes(2, measure, args.layers, args.calls, timeout=900)
    share = max(found["share"] for found in ranks)
    record = {"machine": cpu_machine(), "layers": args.layers, "inner": "inductor", "ranks": ranks, "share": share}
    write(args.output, record)
    print(f"agreement: {share:.3%} of the compile time, {max(f['call_us'] for f in ranks):.2f} us a later call")
    return 0 if share < SHARE else 1


if __name__ == "__main__":
    raise SystemExit(main())
