"""Where a graph's inputs have a symbolic size. Reads only, but for `Place.read`.

A size is read off an input, since any other value that has it may be what a rewrite is about to take away; not off an
incoming gradient, since the forward pass has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from . import aten_ops as ops
from .backward import is_incoming_gradient
from .graph import insert_call, same_size


@dataclass(frozen=True)
class Place:
    """An input of the graph that is a number (dim None), or that has it as its size number `dim`."""

    node: fx.Node
    dim: int | None = None

    def read(self, graph: fx.Graph, like: fx.Node) -> fx.Node:
        """A node that is the number, inserted where `graph` inserts now."""
        if self.dim is None:
            return self.node
        return insert_call(graph, ops.aten.sym_size.int, (self.node, self.dim), like=like)


def find_size(graph: fx.Graph, size: torch.SymInt, of_tensor: bool = False) -> Place | None:
    """The first input of `graph` that is `size` or has it; of_tensor: that has it. None where no input does."""
    return next((place for place in _places(graph, of_tensor) if same_size(_number(place), size)), None)


def _places(graph: fx.Graph, of_tensor: bool) -> Iterator[Place]:
    for node in graph.find_nodes(op="placeholder"):
        if is_incoming_gradient(node):
            continue
        known = node.meta.get("val")
        if isinstance(known, torch.SymInt) and not of_tensor:
            yield Place(node)
        elif isinstance(known, torch.Tensor):
            yield from (Place(node, dim) for dim, one in enumerate(known.shape) if isinstance(one, torch.SymInt))


def _number(place: Place) -> torch.SymInt:
    known = place.node.meta["val"]
    return known if place.dim is None else known.shape[place.dim]
