"""Repeat what a graph does to one value on another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from ..facts import aten_ops as ops
from ..facts.fakes import call_on_fakes
from ..facts.graph import function_of, insert_call, is_call, same_size, val
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


def computed(
    graph: fx.Graph, function: Callable[[Any, int], Any], size: int | fx.Node, by: int, like: fx.Node
) -> int | fx.Node:
    """A product or quotient, `function(size, by)`, of a size as `sizes_of` gives it."""
    if isinstance(size, int):
        return function(size, by)
    return size if by == 1 else insert_call(graph, function, (size, by), like=like)


def sizes_of(graph: fx.Graph, node: fx.Node) -> list[int | fx.Node]:
    """The sizes of `node`, with a node for each symbolic one: of an input of the graph that has it, where there is one,
    because `node` itself may be about to go."""
    found: list[int | fx.Node] = []
    for dim, size in enumerate(val(node).shape):
        place = None if isinstance(size, int) else find_size(graph, size) or Place(node, dim)
        found.append(size if place is None else place.read(graph, node))
    return found


def reshaped(graph: fx.Graph, node: fx.Node, sizes: Sequence[int | fx.Node], shape: Sequence[Any]) -> fx.Node:
    """Compact rows in these sizes, which are `shape`: symbolic ones that were multiplied and divided again do not look
    like themselves."""
    made = insert_call(graph, aten.reshape.default, (node, list(sizes)), like=node)
    if not all(map(same_size, val(made).shape, shape)):
        made.meta["val"] = call_on_fakes(aten.new_empty.default, (val(node), shape), {}, [val(node)])
    return made
