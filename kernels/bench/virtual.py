"""Virtual ranks: one process and one device stand in for a whole group, one stream a rank.

The kernels get an array of buffer addresses exactly as from symmetric memory, all ranks' kernels run at once, and the
protocol is the real one. Traffic goes through the device's own memory, so times compare kernels with each other and say
nothing of a link's bandwidth. Three rules keep it from hanging: every kernel is loaded before the first launch, all
ranks' programs together fit on the device (`residency`), and no kernel is specialised on its rank.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..symmetric.operands import Launch
from ..symmetric.workspace import DEFAULT_SLOT_BYTES, Workspace, virtual_ranks
from ..words import CHANNELS

Bind = Callable[[Workspace], Any]


def programs_per_sm(compiled: Any, warps: int, device: torch.device | None = None) -> int:
    """How many programs of a compiled kernel one multiprocessor holds (registers, warps and shared memory)."""
    registers = -(-compiled.n_regs // 8) * 8
    by_registers = 65536 // (registers * 32) // warps if registers else 32
    by_shared = (200 * 1024) // max(compiled.metadata.shared + 1024, 1)
    return max(0, min(by_registers, 64 // warps, 32, by_shared))


class VirtualRanks:
    """`world` ranks on `device`, with their workspaces and streams."""

    setting = "virtual ranks on one GPU"

    def __init__(self, world: int, device: str = "cuda", slot_bytes: int = DEFAULT_SLOT_BYTES) -> None:
        self.world, self.local = world, tuple(range(world))
        self.device_name = "virtual " + torch.cuda.get_device_name(device)
        self.multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        workspaces = virtual_ranks(world, device, self.multiprocessors // world, slot_bytes)
        self.workspaces = [dataclasses.replace(ws, device_name=self.device_name) for ws in workspaces]
        self.streams = [torch.cuda.Stream(device) for _ in range(world)]
        torch.cuda.synchronize()

    def bind(self, bind: Bind) -> list[Launch]:
        """One loaded launch a rank, with as many programs as the device holds for all ranks together. `bind` may return
        None where the call does not fit the workspace; ValueError when it never does."""
        for per_sm in (4, 3, 2, 1):
            most = min(self.multiprocessors * per_sm // self.world, CHANNELS)
            launches = [bind(dataclasses.replace(ws, max_blocks=most)) for ws in self.workspaces]
            if None in launches:
                continue
            compiled = launches[0].load()
            if compiled is None or programs_per_sm(compiled, compiled.metadata.num_warps) >= per_sm:
                for launch in launches[1:]:
                    launch.load()
                return launches
        raise ValueError("does not fit")

    def run(self, launches: list[Any], before: Callable[[int], None] | None = None) -> None:
        """Launch one call on every rank's stream, between a fork from and a join to the current stream. `before(rank)`
        may put work on a rank's stream ahead of its kernel; only kernels that are loaded already: the first launch of
        one loads it, which waits for the kernels of other ranks, which wait for this rank."""
        current = torch.cuda.current_stream()
        for rank, (stream, launch) in enumerate(zip(self.streams, launches, strict=True)):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                if before is not None:
                    before(rank)
                launch.run()
        for stream in self.streams:
            current.wait_stream(stream)

    def gather(self, value: Any) -> list[Any]:
        """As `LinkedRanks.gather`: one process speaks for all ranks."""
        return [value]

    def capture(self, launches: list[Any], calls: int = 12) -> torch.cuda.CUDAGraph:
        """A graph of `calls` such calls in a row. Everything must be loaded: capture executes nothing."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                self.run(launches)
        torch.cuda.synchronize()
        return graph


def time_graphs(
    graphs: Mapping[str, torch.cuda.CUDAGraph | list[torch.cuda.CUDAGraph]],
    calls: int = 12,
    rounds: int = 7,
    replays: int = 5,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> dict[str, tuple[float, float]]:
    """Microseconds a call, (median, spread) over `rounds`; the graphs take turns, so that drift meets all alike, in
    another order each round, so that none always runs after the same one (every process draws the same orders). Several
    graphs of one name are captures of the same calls: each capture's median over the rounds counts, and of these the
    median. Spread: the distance between the quartiles of all times. `gather` hands out every process's value: the
    slowest one counts."""
    turns = [(name, g) for name, each in graphs.items() for g in (each if isinstance(each, list) else [each])]
    samples: list[list[float]] = [[] for _ in turns]
    order, draw = list(range(len(turns))), random.Random(0)
    for _, graph in turns:
        graph.replay()
    torch.cuda.synchronize()
    for _ in range(rounds):
        draw.shuffle(order)
        for turn in order:
            graph = turns[turn][1]
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graph.replay()  # still running when the clock starts: neither the host's launches nor a late peer count
            start.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            samples[turn].append(start.elapsed_time(end) * 1000 / replays / calls)
    captures: dict[str, list[list[float]]] = {name: [] for name in graphs}
    everyone = gather(samples)
    for turn, (name, _) in enumerate(turns):
        captures[name].append([max(each) for each in zip(*(ranks[turn] for ranks in everyone), strict=True)])
    out = {}
    for name, each in captures.items():
        quarters = statistics.quantiles([us for times in each for us in times], n=4)
        out[name] = (statistics.median(statistics.median(times) for times in each), quarters[2] - quarters[0])
    return out
