"""Which part of a joint graph is the backward pass. Reads only."""

from __future__ import annotations

from torch import fx


def is_incoming_gradient(node: fx.Node) -> bool:
    """Whether `node` is an input that only the backward pass of a joint graph has."""
    return node.op == "placeholder" and str(node.target).startswith("tangents")


def backward_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of a joint graph that are computed from the incoming gradients."""
    backward: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if is_incoming_gradient(node):
                backward.add(node)
        elif node.op != "output" and any(parent in backward for parent in node.all_input_nodes):
            backward.add(node)
    return backward
