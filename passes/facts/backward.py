"""Which part of a joint graph is the backward pass. Reads only."""

from __future__ import annotations

from torch import fx


def backward_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of a joint graph that are computed from the incoming gradients."""
    backward: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if str(node.target).startswith("tangents"):
                backward.add(node)
        elif node.op != "output" and any(parent in backward for parent in node.all_input_nodes):
            backward.add(node)
    return backward
