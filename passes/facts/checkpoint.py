"""Activation checkpointing: boundaries whose parts the partitioner treats differently. Reads only.

`torch.utils.checkpoint` inside a compiled model tags every node with what becomes of its value: recomputed in the
backward pass or saved, and in which checkpointed region. The partitioner splits the graph by these tags. A fused
operation is one node and has one tag, so at the joint stage it may only replace nodes that agree. Where they do not
(the usual case: one block's last all-reduce, and the next block's first norm), the partitioner must see the nodes
themselves; such a boundary is fused in the forward graph, once that has been split off.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from .refusals import Code, Refusal

#: The verdict on a boundary that waits for the forward graph.
ASTRIDE = Refusal(
    Code.ASTRIDE,
    "an activation checkpoint keeps some parts of this boundary and recomputes others, so it can only be fused in the "
    "forward graph, after the backward pass has been split off",
)


def recompute_tag(node: fx.Node) -> tuple[object, object]:
    """(the checkpoint's policy for `node`, its region), each None where there is none."""
    return node.meta.get("recompute"), node.meta.get("ac_graph_id")


def is_astride(nodes: Iterable[fx.Node]) -> bool:
    """Whether the partitioner treats some of `nodes` differently from others."""
    return len({recompute_tag(node) for node in nodes}) > 1


def is_checkpointed(graph: fx.Graph) -> bool:
    return any("recompute" in node.meta for node in graph.nodes)
