"""Time a boundary with the quantisation behind it: fused by tpfuse, left to Inductor by tpfuse, and Inductor alone.

    torchrun --nproc-per-node 2 benchmarks/quantised.py --out benchmarks/results/quantised.json
    python benchmarks/quantised.py --virtual 2         the kernels alone, of virtual ranks on one GPU

One compiled program a way: all-reduce, residual, RMSNorm and a chain of tests/quantisations.py; "boundary" is ours
without the chain. Microseconds a call, the medians of CUDA-graph replays of 12 calls in which all ways take turns.
Every way's quantised rows are first checked: bit for bit those of the y that it hands out.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import machine
from records import write_run

import tpfuse
from tests.passes.test_quantised import recognised
from tests.quantisations import SPELLINGS, same
from tpfuse.backend import tpfuse as tpfuse_backend
from tpfuse.kernels.bench.virtual import VirtualRanks, time_graphs
from tpfuse.kernels.call import Call
from tpfuse.kernels.symmetric.dispatch import bind, choose
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


class Behind:
    """A kernel's launch, and Inductor's quantisation of the y that it gives."""

    def __init__(self, launch: Any, quantise: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        self.launch, self.quantise = launch, quantise

    def run(self) -> None:
        self.quantise(self.launch.run()[0].y)


def measure_virtual(ranks: VirtualRanks, name: str, hidden: int, rows: int) -> list[dict]:
    """The same ways but the last, of the kernel that the table has for this size."""
    torch.compiler.reset()  # a program compiled for too many sizes runs eagerly
    torch.manual_seed(7)
    xs = [torch.randn(rows, hidden, device="cuda").bfloat16() for _ in range(ranks.world)]
    residual = torch.randn(rows, hidden, device="cuda").bfloat16()
    weight = torch.randn(hidden, device="cuda").bfloat16()
    how = recognised(SPELLINGS[name], torch.bfloat16)
    quantise = torch.compile(SPELLINGS[name], dynamic=False)

    def launches(quant: str) -> list[Any]:
        shared = {"norm": "rms_norm", "eps": 1e-6, "out_dtype": torch.bfloat16, "hidden_dtype": torch.bfloat16}
        calls = [Call(x, residual, None, weight, quant=quant, **shared) for x in xs]
        entry = choose(ranks.device_name, ranks.world, hidden, 2, rows)
        return ranks.bind(lambda ws: bind(entry, calls[ws.rank], ws))

    plain, fused = launches(""), launches(how.text())
    ranks.run(plain)
    quantise(plain[0].out.y)
    ways = {"boundary": plain, "fused": fused, "tpfuse + Inductor": [Behind(launch, quantise) for launch in plain]}
    ranks.run(fused)
    torch.cuda.synchronize()
    right = SPELLINGS[name](fused[0].out.y)
    made = fused[0].out.q, fused[0].out.scale.reshape(right[1].shape)
    wrong = {"fused": not all(same(a, b) for a, b in zip(made, right, strict=True))}
    times = time_graphs({way: ranks.capture(each) for way, each in ways.items()}, rounds=21)
    return [
        {"quantisation": name, "hidden": hidden, "rows": rows, "way": way, "us": round(us, 2),
         "of_boundary": round(us / times["boundary"][0], 3), "other_bits_than_eager": wrong.get(way, False)}
        for way, (us, _) in times.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN)
    parser.add_argument("--quantisation", nargs="+", choices=SPELLINGS, default=["float8_per_row", "int8_per_row"])
    parser.add_argument("--virtual", type=int, default=0, metavar="RANKS", help="so many ranks on one GPU")
    arguments = parser.parse_args()
    sizes = itertools.product(arguments.quantisation, arguments.hidden, arguments.rows)
    if arguments.virtual:
        ranks = VirtualRanks(arguments.virtual)
        setting, first, take = f"{arguments.virtual} {ranks.setting}", True, partial(measure_virtual, ranks)
    else:
        dist.init_process_group("nccl")
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
        setting, first, take = f"{dist.get_world_size()} linked GPUs", dist.get_rank() == 0, measure
    found: list[dict] = []
    with torch.no_grad():
        for size in sizes:
            here = take(*size)
            found += here
            if first:
                for record in here:
                    print(*record.values(), flush=True)
                if arguments.out:
                    write_run(arguments.out, machine(setting), found)


if __name__ == "__main__":
    main()
