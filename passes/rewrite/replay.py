"""Repeat what a graph does to one value on another one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from ..facts import aten_ops as ops
from ..facts.graph import function_of, insert_call, is_call, val
from ..facts.sizes import Place, find_size
from ..recognise.sums import Step

aten = ops.aten


def replay(graph: fx.Graph, steps: Sequence[Step], node: fx.Node) -> fx.Node:
    """Repeat `steps` on `node`, one after the other."""
    for step in steps:
        old = step.node
        args = (*old.args[: step.position], node, *old.args[step.position + 1 :])
        viewed = is_call(old, {aten.view.default, aten._unsafe_view.default})
        target = aten.reshape.default if viewed else function_of(old)
        node = insert_call(graph, target, args, dict(old.kwargs), like=old)
    return node


def sizes_of(graph: fx.Graph, node: fx.Node) -> list[int | fx.Node]:
    """The sizes of `node`, with a node for each symbolic one: of an input of the graph that has it, where there is one,
    because `node` itself may be about to go."""
    found: list[int | fx.Node] = []
    for dim, size in enumerate(val(node).shape):
        place = None if isinstance(size, int) else find_size(graph, size) or Place(node, dim)
        found.append(size if place is None else place.read(graph, node))
    return found
