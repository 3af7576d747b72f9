"""Time a boundary with the quantisation behind it: fused by tpfuse, left to Inductor by tpfuse, and Inductor alone.

    torchrun --nproc-per-node 2 benchmarks/quantised.py --out benchmarks/results/quantised.json

One compiled program a way: all-reduce, residual, RMSNorm and a chain of tests/quantisations.py; "boundary" is ours
without the chain. Microseconds a call, the medians of CUDA-graph replays of 12 calls in which all ways take turns.
Every way's quantised rows are first checked: bit for bit those of the y that it hands out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import machine
from records import write

import tpfuse
from tests.quantisations import SPELLINGS, same
from tpfuse.backend import tpfuse as tpfuse_backend
from tpfuse.passes.plan.sites import DEFAULT_REWRITES, REWRITES

CALLS, ROUNDS = 12, 41
ROWS, HIDDEN = (1, 4, 8, 16, 32, 64, 128), (4096, 7168, 8192)
WAYS = {
    "boundary": (tpfuse_backend, {"rewrites": DEFAULT_REWRITES}),
    "fused": (tpfuse_backend, {"rewrites": REWRITES}),
    "tpfuse + Inductor": (tpfuse_backend, {"rewrites": DEFAULT_REWRITES}),
    "NCCL + Inductor": ("inductor", None),
}


def program(name: str, with_y: bool) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    quantise = SPELLINGS.get(name)

    def run(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        hidden = residual + funcol.all_reduce(x, "sum", dist.group.WORLD)
        y = torch.nn.functional.rms_norm(hidden, weight.shape, weight, 1e-6)
        made = () if quantise is None else quantise(y)
        return (hidden, *made, *([y] if with_y or quantise is None else []))

    return run


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            run()
    return graph


def timed(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, float]:
    """Median microseconds of a call of the slowest rank."""
    samples: dict[str, list[float]] = {way: [] for way in graphs}
    for _ in range(ROUNDS):
        for way, graph in graphs.items():
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            dist.barrier()
            torch.cuda.synchronize()
            began.record()
            graph.replay()
            ended.record()
            torch.cuda.synchronize()
            samples[way].append(began.elapsed_time(ended) * 1000 / CALLS)
    every: list[dict[str, float]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, {way: statistics.median(taken) for way, taken in samples.items()})
    return {way: round(max(each[way] for each in every), 2) for way in graphs}


def measure(name: str, hidden: int, rows: int) -> list[dict]:
    torch.manual_seed(dist.get_rank())
    x = torch.randn(rows, hidden, device="cuda").bfloat16()
    torch.manual_seed(7)
    residual = torch.randn(rows, hidden, device="cuda").bfloat16()
    weight = torch.randn(hidden, device="cuda").bfloat16()
    graphs, records, wrong = {}, {}, {}
    for way, (backend, options) in WAYS.items():
        torch.compiler.reset()
        chain = "" if way == "boundary" else name
        more = {} if options is None else {"options": options}
        checked = torch.compile(program(chain, True), backend=backend, fullgraph=True, dynamic=False, **more)
        _, *made, y = checked(x, residual, weight)
        if made:
            right = SPELLINGS[name](y)
            wrong[way] = not all(same(a, b) for a, b in zip(made, right, strict=True))
        if way == "fused":
            records["quantised"] = tpfuse.reports()[-1].boundaries[0].quantised
        run = torch.compile(program(chain, False), backend=backend, fullgraph=True, dynamic=False, **more)
        graphs[way] = captured(lambda run=run: run(x, residual, weight))
    times = timed(graphs)
    return [
        {"quantisation": name, "hidden": hidden, "rows": rows, "way": way, "us": us,
         "of_boundary": round(us / times["boundary"], 3), "other_bits_than_eager": wrong.get(way, False), **records}
        for way, us in times.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN)
    parser.add_argument("--quantisation", nargs="+", choices=SPELLINGS, default=["float8_per_row", "int8_per_row"])
    arguments = parser.parse_args()
    dist.init_process_group("nccl")
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    found: list[dict] = []
    with torch.no_grad():
        for name in arguments.quantisation:
            for hidden in arguments.hidden:
                for rows in arguments.rows:
                    here = measure(name, hidden, rows)
                    found += here
                    if dist.get_rank() == 0:
                        for record in here:
                            print(*record.values(), flush=True)
                        if arguments.out:
                            write(arguments.out, {"machine": machine("2 linked GPUs"), "records": found})


if __name__ == "__main__":
    main()
