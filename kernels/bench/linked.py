"""One rank of a group of linked GPUs, one process a GPU, with the harness interface of `virtual.VirtualRanks`.

The workspace is the one that the group's calls use (`groups.workspace_of`), so what is measured here is what runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ...errors import OpError
from ..rendezvous import why_not, workspace_of
from ..symmetric.workspace import DEFAULT_SLOT_BYTES

Bind = Callable[[Any], Any]


class LinkedRanks:
    """This process's rank of `group`, whose processes run the same calls in the same order. Collective.

    `copies`: of 2 ranks, with a copy slot (kernels/symmetric/copied.py).

    Raises OpError where the group's ranks cannot address each other's memory.
    """

    setting = "linked GPUs, one process each"

    def __init__(self, group: Any = None, slot_bytes: int = DEFAULT_SLOT_BYTES, copies: bool = False) -> None:
        self.group = group if group is not None else dist.group.WORLD
        assert self.group is not None  # a process group has been set up
        self.group_name = self.group.group_name
        self.world, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.local = (self.rank,)
        device = torch.device("cuda", torch.cuda.current_device())
        workspace = workspace_of(self.group_name, device, slot_bytes, copies)
        if workspace is None:
            raise OpError(f"group {self.group_name}: {why_not(self.group_name, device)}")
        self.workspaces = [workspace]
        self.device_name = torch.cuda.get_device_name(device)

    def bind(self, bind: Bind) -> list[Any]:
        """This rank's launch, loaded. ValueError when it does not fit."""
        launch = bind(self.workspaces[0])
        if launch is None:
            raise ValueError("does not fit")
        launch.load()
        return [launch]

    def run(self, launches: list[Any]) -> None:
        launches[0].run()

    def capture(self, launches: list[Any], calls: int = 12) -> torch.cuda.CUDAGraph:
        """A graph of `calls` such calls in a row."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # NCCL's own thread asks for events while this one captures
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(calls):
                self.run(launches)
        torch.cuda.synchronize()
        return graph

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order; on all ranks."""
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value, group=self.group)
        return out

    def link_bytes_per_us(self, megabytes: int = 64) -> float:
        """What one link direction carries when every rank copies to its neighbour at once. Collective."""
        whole, handle = self.workspaces[0].owner
        words = min(megabytes << 18, self.workspaces[0].stage_words * 2)
        # The stages: nobody's words at rest, and not waited for.
        start = self.workspaces[0].slots_end
        neighbour = handle.get_buffer((self.rank + 1) % self.world, (whole.numel(),), torch.int32)
        target = neighbour[start : start + words]
        source = torch.empty(words, dtype=torch.int32, device=whole.device)
        target.copy_(source)
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            dist.barrier(self.group)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            target.copy_(source)  # under way when the clock starts, at every rank
            begin.record()
            for _ in range(4):
                target.copy_(source)
            end.record()
            end.synchronize()
            times.append(max(self.gather(begin.elapsed_time(end) * 1000 / 4)))
        return words * 4 / sorted(times)[len(times) // 2]
