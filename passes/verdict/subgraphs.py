"""Collectives inside the graphs that a graph calls: branches of `cond`, bodies of loops, nested compile regions.

The pass does not look into them. Their boundaries would be right, but what a branch returns is agreed with the operator
that calls it and with its other branches; so they are listed, with the reason: the operator, and where it stands.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from tpfuse.report import Boundary

from ..facts import aten_ops as ops
from ..facts.collectives import Collective, ResolveGroup, find_collectives
from ..facts.others import called
from ..facts.refusals import Code
from ..recognise.norms import Norm, find_norms
from .names import module_name, place
from .reach import Reached, reach
from .steps import dtype_and_hidden

#: The nodes that call a graph, outermost first.
_Callers = tuple[fx.Node, ...]


def collectives_inside(graph: fx.Graph, resolve: ResolveGroup) -> list[Boundary]:
    """One verdict for every collective of the graph modules that `graph` refers to, however deep."""
    return [
        _verdict(collective, name, callers)
        for name, inner, callers in _subgraphs(graph, "", set(), ())
        for collective in find_collectives(inner, resolve)
    ]


def _verdict(collective: Collective, name: str, callers: _Callers) -> Boundary:
    norm, reached, outside = _norm_behind(collective.result, callers)
    where = f"the graph {name!r} of {place(callers[-1])}" if callers else f"the graph {name!r}, which no operator calls"
    around = any(word in called(caller) for caller in callers for word in ("while_loop", "scan"))
    if reached.feeds_norm and (around or not outside):  # what a loop's body hands out, its next round reads
        remedy = "called as plain code (a loop of Python, a region without its wrapper) the sum and its norm are fused"
    else:
        remedy = "where the sum is only handed out, it can be taken behind that operator, in the graph of its norm"
    dtype, hidden = dtype_and_hidden(collective.input)
    return Boundary(
        "unknown",
        module_name(collective.node),
        collective.kind,
        collective.ranks or (),
        norm=norm.kind if norm is not None else None,
        reason=f"it stands in {where}, and nothing is fused inside such graphs or across their edges; {remedy}",
        code=Code.SUBGRAPH.value,
        feeds_norm=norm is not None or reached.feeds_norm,
        dtype=dtype,
        hidden=hidden,
    )


def _norm_behind(result: fx.Node, callers: _Callers) -> tuple[Norm | None, Reached, bool]:
    """The norm that reads `result`, in its own graph or, where that returns it, in one that calls it; what is known of
    that way; and whether it leads out of the graph."""
    reached = reach(result, {norm.source: norm for norm in find_norms(result.graph)})
    if reached.feeds_norm or not callers:
        return (reached.norm if reached.feeds_norm else None), reached, False
    returned = [i for i, output in enumerate(_outputs(result.graph)) if output in reached.returned]
    for user in callers[-1].users:
        if user.target is ops.operator.getitem and user.args[1] in returned:
            norm, further, _ = _norm_behind(user, callers[:-1])
            if further.feeds_norm:
                return norm, further, True
    return None, reached, True


def _outputs(graph: fx.Graph) -> list[object]:
    returned = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    return list(returned) if isinstance(returned, (list, tuple)) else [returned]


def _subgraphs(
    graph: fx.Graph, path: str, seen: set[fx.Graph], callers: _Callers
) -> Iterator[tuple[str, fx.Graph, _Callers]]:
    owner = graph.owning_module
    for node in graph.nodes:
        if owner is None or node.op not in ("get_attr", "call_module"):
            continue
        inner: object = owner
        for part in str(node.target).split("."):
            inner = getattr(inner, part, None)
        if isinstance(inner, fx.GraphModule) and inner.graph not in seen:
            seen.add(inner.graph)
            calls = [node] if node.op == "call_module" else list(node.users)[:1]
            yield f"{path}{node.target}", inner.graph, (*callers, *calls)
            yield from _subgraphs(inner.graph, f"{path}{node.target}.", seen, (*callers, *calls))
