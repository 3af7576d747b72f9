"""Collectives inside the graphs that a graph calls: branches of `cond`, checkpointed blocks, nested compile regions.

The pass does not look into them. Their boundaries would be right, but what a branch returns is agreed with the operator
that calls it and with its other branches; so they are listed, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from tpfuse.report import Boundary

from ..facts.collectives import ResolveGroup, find_collectives
from ..facts.refusals import Code


def collectives_inside(graph: fx.Graph, resolve: ResolveGroup) -> list[Boundary]:
    """One verdict for every collective of the graph modules that `graph` refers to, however deep."""
    return [
        Boundary(
            "unknown",
            "",
            collective.kind,
            collective.ranks or (),
            reason=f"it is inside the subgraph {name!r} of a higher-order operator, and subgraphs are left as they are",
            code=Code.SUBGRAPH.value,
        )
        for name, inner in _subgraphs(graph, "", set())
        for collective in find_collectives(inner, resolve)
    ]


def _subgraphs(graph: fx.Graph, path: str, seen: set[fx.Graph]) -> Iterator[tuple[str, fx.Graph]]:
    owner = graph.owning_module
    for node in graph.nodes:
        if owner is None or node.op not in ("get_attr", "call_module"):
            continue
        inner: object = owner
        for part in str(node.target).split("."):
            inner = getattr(inner, part, None)
        if isinstance(inner, fx.GraphModule) and inner.graph not in seen:
            seen.add(inner.graph)
            yield f"{path}{node.target}", inner.graph
            yield from _subgraphs(inner.graph, f"{path}{node.target}.", seen)
