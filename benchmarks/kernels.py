"""Time the boundary kernels: virtual ranks on one GPU, or one process a GPU over real links.

    python benchmarks/kernels.py --worlds 2 4 8 --hidden 4096 --out results.json      virtual ranks
    torchrun --nproc-per-node 2 benchmarks/kernels.py --out results.json              linked GPUs, the world is N
    ... --hidden 4096 --rows 1 64                                                     a slice of it
    python benchmarks/kernels.py --plot results.json [more.json] picture.png

For each (world, hidden, rows): every way to run each of our kernels, what dispatch picks, and the baselines of
providers.py, each checked against float64 before and after it is timed (see tpfuse.kernels.bench.measure). "floor" is
what no implementation can beat: the longest of the smallest exchange that our kernels can make (latency), the bytes
that must cross a link, and the bytes that must move through the GPU's own memory, at rates measured in the same run.

Kernels are compiled first, by several processes side by side. What was measured is saved after every size.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import plots
from machine import machine
from providers import baselines
from records import write_run

from tpfuse.kernels.bench.linked import LinkedRanks
from tpfuse.kernels.bench.measure import Provider, Record, draw_operands, measure, provider_of
from tpfuse.kernels.bench.table import candidates
from tpfuse.kernels.bench.virtual import VirtualRanks, time_graphs
from tpfuse.kernels.symmetric.dispatch import default_table
from tpfuse.kernels.symmetric.one_shot import one_shot
from tpfuse.kernels.symmetric.workspace import DEFAULT_SLOT_BYTES

ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
HIDDEN = (2048, 4096, 7168, 8192)
MOST_VIRTUAL_ROWS = 512  # past that, ranks on one device only measure its memory


def slot_bytes(world: int, hidden: int, rows: int) -> int:
    """Room for every kernel at the largest size: a one-shot's slot holds all ranks' rows, a two-shot's its own."""
    return max(DEFAULT_SLOT_BYTES, max(world, 2) * (rows + world) * hidden * 2)


def providers(ranks: Any, hidden: int, rows: int) -> list[Provider]:
    linked = isinstance(ranks, LinkedRanks)
    ways = candidates(ranks.device_name, ranks.world, hidden, rows, linked)
    group_name = ranks.group_name if linked else ""
    return [*baselines(ranks), *(provider_of(entry, group_name) for entry in ways)]


def rates(ranks: Any) -> dict[str, float]:
    """What the floor is made of, measured here: the smallest exchange (us), the copy bandwidth of the device's memory
    and of a link (bytes/us)."""
    ops, _ = draw_operands(ranks.world, ranks.local, 64, 1)
    smallest = ranks.bind(lambda ws: one_shot(ops[ws.rank], ws))
    source = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copy = torch.cuda.CUDAGraph()
    with torch.cuda.graph(copy):
        target.copy_(source)
    times = time_graphs({"smallest": ranks.capture(smallest)}, gather=ranks.gather)
    times |= time_graphs({"copy": copy}, calls=1, gather=ranks.gather)
    measured = {"latency_us": times["smallest"][0], "memory_bytes_per_us": 2 * source.numel() / times["copy"][0]}
    if isinstance(ranks, LinkedRanks):
        measured["link_bytes_per_us"] = ranks.link_bytes_per_us()
    return measured


def floor_us(rate: dict[str, float], world: int, hidden: int, rows: int) -> float:
    """A rank reads x and residual and writes y and the new residual; 2 (N-1)/N of x must leave it."""
    payload = rows * hidden * 2
    sharing = 1 if "link_bytes_per_us" in rate else world  # virtual ranks share one memory
    local = 4 * payload * sharing / rate["memory_bytes_per_us"]
    link = 2 * (world - 1) / world * payload / rate["link_bytes_per_us"] if "link_bytes_per_us" in rate else 0.0
    return max(rate["latency_us"], local, link)


def measure_all(ranks: Any, hiddens: list[int], rows_list: list[int], save: Any) -> None:
    rate = rates(ranks)
    for hidden in hiddens:
        for rows in rows_list:
            torch.compiler.reset()  # Dynamo gives up after a few shapes of one function
            records = measure(ranks, hidden, rows, providers(ranks, hidden, rows))
            floor = round(floor_us(rate, ranks.world, hidden, rows), 3)
            records.append(Record(ranks.world, hidden, rows, "floor", floor))
            save(records, rate)


def load_all(world: int, hiddens: list[int], rows_list: list[int]) -> None:
    """Compile what `measure_all` will run, into Triton's and Inductor's caches; launches nothing that waits."""
    ranks = VirtualRanks(world, slot_bytes=slot_bytes(world, max(hiddens), max(rows_list)))
    whole = dataclasses.replace(ranks.workspaces[0], max_blocks=ranks.multiprocessors)
    for hidden in hiddens:
        for rows in rows_list:
            torch.compiler.reset()
            ops, _ = draw_operands(world, (0,), hidden, rows)
            for provider in providers(ranks, hidden, rows):
                for ws in (ranks.workspaces[0], whole):
                    launch = provider.bind(ops[0], ws)
                    if launch is not None:
                        launch.load()


def compile_side_by_side(worlds: list[int], hiddens: list[int], rows_list: list[int], limit: float) -> None:
    """One process for each (world, hidden)."""
    commands = [
        [sys.executable, __file__, "--load", "--worlds", str(world), "--hidden", str(hidden), "--rows",
         *map(str, rows_list)]
        for world in worlds for hidden in hiddens
    ]  # fmt: skip
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    running = [subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) for command in commands]
    for process in running:
        try:
            process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()


class Results:
    """Collects records and saves them after each size, so that a run that is cut short leaves what it measured."""

    def __init__(self, path: Path | None, setting: str, speaks: bool, note: str = "") -> None:
        self.path, self.setting, self.speaks, self.note = path, setting, speaks, note
        self.records: list[Record] = []

    def __call__(self, records: list[Record], rate: dict[str, float]) -> None:
        self.records += records
        if not self.speaks:
            return
        line(records)
        if self.path:
            described = machine(self.setting) | {"rates": {name: round(value, 3) for name, value in rate.items()}}
            described["table"] = f"{default_table().note} ({default_table().digest})"  # what "dispatched" ran by
            described |= {"note": self.note} if self.note else {}
            write_run(self.path, described, self.records)


def line(records: list[Record]) -> None:
    """One line a size: the floor, then everything that ran, from the fastest."""
    first = records[0]
    timed = sorted((r for r in records if r.us is not None), key=lambda r: r.us or 0.0)
    print(f"N={first.world} hidden {first.hidden} rows {first.rows} |",
          "  ".join(f"{r.provider} {r.us:.1f}" for r in timed),
          *(f"!! {r.provider}: {r.note}" for r in records if r.note), flush=True)  # fmt: skip


def run_linked(arguments: argparse.Namespace) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank), timeout=datetime.timedelta(seconds=90))
    world = dist.get_world_size()
    ranks = LinkedRanks(slot_bytes=slot_bytes(world, max(arguments.hidden), max(arguments.rows)))
    if rank == 0 and not arguments.no_compile:
        compile_side_by_side([world], arguments.hidden, arguments.rows, arguments.limit)
    dist.barrier()
    results = Results(arguments.out, ranks.setting, rank == 0, arguments.note)
    measure_all(ranks, arguments.hidden, arguments.rows, results)
    dist.destroy_process_group()


def run_virtual(arguments: argparse.Namespace) -> None:
    rows_list = [rows for rows in arguments.rows if rows <= MOST_VIRTUAL_ROWS]
    results = Results(arguments.out, VirtualRanks.setting, True, arguments.note)
    if not arguments.no_compile:
        compile_side_by_side(arguments.worlds, arguments.hidden, rows_list, arguments.limit)
    for world in arguments.worlds:
        ranks = VirtualRanks(world, slot_bytes=slot_bytes(world, max(arguments.hidden), max(rows_list)))
        measure_all(ranks, arguments.hidden, rows_list, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4, 8], help="numbers of virtual ranks")
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--note", default="", help="what else to say of the machine in the results file")
    parser.add_argument(
        "--plot", type=Path, nargs="+", metavar="FILE", help="draw results files; the last is the picture"
    )
    parser.add_argument("--limit", type=float, default=120, help="seconds for compiling")
    parser.add_argument("--no-compile", action="store_true", help="caches are warm: do not compile side by side first")
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"  # one hardware queue a stream; read when CUDA starts
    if arguments.plot:
        if len(arguments.plot) < 2:
            parser.error("--plot: results, and the picture")
        plots.kernels(arguments.plot[:-1], arguments.plot[-1])
        return
    default_table()  # a bad TPFUSE_DISPATCH_TABLE is to be heard of now
    if arguments.load:
        load_all(arguments.worlds[0], arguments.hidden, arguments.rows)
    elif "LOCAL_RANK" in os.environ:
        run_linked(arguments)
    else:
        run_virtual(arguments)


if __name__ == "__main__":
    main()
