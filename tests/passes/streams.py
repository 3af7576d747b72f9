"""Residual streams over a mesh of dp replicas × attn ranks, traced for every rank and run on all of them at once.

A program is a function of (mesh, *tensors) that says what one rank does, with the collectives that `parallelize` or a
sequence-parallel model would write; `check` rewrites it for every rank and compares the numbers.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.distributed._local_tensor import LocalTensor

import tpfuse
from tpfuse.parallel.rows import cut_rows, trim_rows
from tpfuse.passes.facts.groups import resolve_group
from tpfuse.passes.pipeline import PassOptions, fuse
from tpfuse.passes.plan.sites import DEFAULT_REWRITES
from tpfuse.passes.verdict.accounting import performs

from ..graphs import fake_world, on_ranks, trace

HIDDEN = 8
c10d = torch.ops._c10d_functional


@dataclass(frozen=True)
class Mesh:
    """One rank of a mesh, and what it can do there.

    names: of its groups, "attention", "dp" and "whole". dp_fastest: the other order of the ranks than a policy has.
    """

    dp: int
    attn: int
    rank: int = 0
    names: dict[str, str] = field(default_factory=dict)
    dp_fastest: bool = False

    @property
    def size(self) -> int:
        return self.dp * self.attn

    def members(self, kind: str) -> list[int]:
        if kind == "whole":
            return list(range(self.size))
        fastest = self.dp if self.dp_fastest else self.attn
        if (kind == "dp") == self.dp_fastest:
            first = self.rank - self.rank % fastest
            return list(range(first, first + fastest))
        return list(range(self.rank % fastest, self.size, fastest))

    def on(self, rank: int) -> Mesh:
        """The same mesh seen from `rank`, with process groups: all ranks create them in one order."""
        seen = replace(self, rank=rank)
        names = {}
        for kind in ("attention", "dp", "whole"):
            for members in dict.fromkeys(tuple(replace(self, rank=r).members(kind)) for r in range(self.size)):
                group = dist.new_group(list(members))
                if rank in members:
                    names[kind] = group.group_name
        return replace(seen, names=names)

    def all_reduce(self, x: Tensor, over: str = "attention") -> Tensor:
        return c10d.wait_tensor(c10d.all_reduce(x.contiguous(), "sum", self.names[over]))

    def reduce_scatter(self, x: Tensor, over: str = "attention") -> Tensor:
        ranks = len(self.members(over))
        return c10d.wait_tensor(c10d.reduce_scatter_tensor(x.contiguous(), "sum", ranks, self.names[over]))

    def all_gather(self, x: Tensor, over: str = "attention") -> Tensor:
        ranks = len(self.members(over))
        return c10d.wait_tensor(c10d.all_gather_into_tensor(x.contiguous(), ranks, self.names[over]))

    def cut(self, x: Tensor, over: str = "attention") -> Tensor:
        """This rank's rows of x, flattened."""
        members = self.members(over)
        return cut_rows(x.reshape(-1, x.shape[-1]), len(members), members.index(self.rank))

    def own_rows(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A block that every rank has whole, on its own rows."""
        rows = x.numel() // x.shape[-1]
        return trim_rows(self.all_gather(block(self.cut(x))), rows).view(x.shape)

    def all_rows(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A block that is cut over the whole mesh, on the rows of every replica."""
        gathered = self.all_gather(x.reshape(-1, x.shape[-1]), "dp")
        return self.cut(self.all_reduce(block(gathered), "whole"), "dp").view(x.shape)


Program = Callable[..., Sequence[Tensor]]


def rewritten(
    program: Program, mesh: Mesh, given: Sequence[Any], policy: tpfuse.SharingPolicy, dynamic: bool = False,
    rewrites: tuple[str, ...] = DEFAULT_REWRITES,
) -> tuple[list[fx.GraphModule], list[fx.GraphModule], list[tpfuse.Report]]:  # fmt: skip
    """(graphs before, graphs after, reports), one of each for every rank. `given`: a list holds one tensor per rank."""
    before, after, reports = [], [], []
    for rank in range(mesh.size):
        with fake_world(mesh.size, rank):
            here = mesh.on(rank)
            own = [each[rank] if isinstance(each, list) else each for each in given]
            run = partial(_as_rank, program, here)
            before.append(trace(run, *own, dynamic=dynamic, decompose=False))
            outcome = fuse(before[-1].graph, resolve_group, PassOptions(rewrites, policy=policy, strict=True))
            after.append(fx.GraphModule(before[-1], outcome.graph))
            reports.append(outcome.report)
    return before, after, reports


def _as_rank(program: Program, mesh: Mesh, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(program(mesh, *tensors))


def run_together(graphs: Sequence[fx.GraphModule], mesh: Mesh, given: Sequence[Any]) -> list[list[Tensor]]:
    """Run every rank's graph, in step, on copies of what is given. They are one graph but for the names of groups and
    the rows that are a rank's own; each rank cuts the rows that its graph says."""
    given = copy.deepcopy(given)
    together = copy.deepcopy(graphs[0])
    for nodes in zip(*(graph.graph.nodes for graph in (together, *graphs)), strict=True):
        assert len({node.target for node in nodes if node.op == "call_function"}) <= 1, "ranks part"
        if nodes[0].target is torch.ops.tpfuse.cut_rows.default:
            nodes[0].target = _cut_on_ranks([node.args[2] for node in nodes[1:]])
    together.recompile()
    with fake_world(mesh.size):
        mesh.on(0)
        return on_ranks(together, mesh.size, *given)


def _cut_on_ranks(indices: list[int]) -> Callable[..., LocalTensor]:
    def cut_on_ranks(x: Tensor, parts: int, _: int) -> LocalTensor:
        local = getattr(x, "_local_tensors", dict.fromkeys(range(len(indices)), x))
        return LocalTensor({rank: cut_rows(local[rank], parts, index) for rank, index in enumerate(indices)})

    return cut_on_ranks


def check(
    program: Program, mesh: Mesh, given: Sequence[Any], policy: tpfuse.SharingPolicy, dynamic: bool = False
) -> tuple[tpfuse.Report, Counter]:
    """Rewrite the program and compare the numbers on all ranks. Returns rank 0's report, and the collectives of its
    rewritten graph."""
    before, after, reports = rewritten(program, mesh, given, policy, dynamic)
    want, got = run_together(before, mesh, given), run_together(after, mesh, given)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10, msg=lambda text: f"{text}\n{after[0].graph}")
    executed = collectives(after[0])
    assert reports[0].collectives_after == sum(executed.values())
    return reports[0], executed


def collectives(graph: fx.GraphModule) -> Counter:
    """How many collectives of each kind the graph performs, fused operations included."""
    found: Counter = Counter()
    for node in graph.graph.nodes:
        kind = performs(node)
        if kind is not None:
            found[kind] += 1
    return found


def inputs(mesh: Mesh, *shape: int) -> list[Any]:
    """(hidden states [*shape, H] of each replica, a vector per rank that makes sums partial, the norms' weight)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    replicas = [draw(*shape, HIDDEN) for _ in range(mesh.dp)]
    x = [replicas[replace(mesh, rank=r).members("dp").index(r)] for r in range(mesh.size)]
    return [x, [draw(HIDDEN) for _ in range(mesh.size)], draw(HIDDEN) + 2]


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def mix(x: Tensor, vector: Tensor, dim: int = -1) -> Tensor:
    """What stands for a block: it mixes units, or rows where `dim` says so, and nothing can be moved through it."""
    return torch.tanh(x.flip(dim) * vector)
