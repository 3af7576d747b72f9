"""norm_backward in a graph that is split already: the collective by itself, and one local operator for the rest.

There is no kernel that does both, so the compiler is left what it can do with a collective: reduce in place where
nobody else reads the partial gradient, and start it early. What is sent, and in which order, stays.
"""

from __future__ import annotations

from torch import fx

from tpfuse._torch_private import group_size, operator_full_name

from ..facts import aten_ops as ops
from ..facts.graph import insert_call

c10d = ops.c10d
_KINDS = {"tpfuse::all_reduce_norm_backward": "all_reduce", "tpfuse::reduce_scatter_norm_backward": "reduce_scatter"}


def lower_backward(graph: fx.Graph) -> int:
    """Take every norm_backward of `graph` apart; how many there were."""
    found = [node for node in graph.nodes if operator_full_name(node.target) in _KINDS]
    for node in found:
        _lower(graph, node)
    return len(found)


def _lower(graph: fx.Graph, node: fx.Node) -> None:
    options = dict(node.kwargs)
    group, wanted = str(options.pop("group_name")), options.pop("want_sum")
    with graph.inserting_before(node):
        if _KINDS[operator_full_name(node.target)] == "all_reduce":
            pending = insert_call(graph, c10d.all_reduce.default, (node.args[0], "sum", group), like=node)
        else:
            given = (node.args[0], "sum", group_size(group), group)
            pending = insert_call(graph, c10d.reduce_scatter_tensor.default, given, like=node)
        total = insert_call(graph, ops.WAIT, (pending,), like=node)
        operator = ops.tpfuse.norm_backward.default
        local = insert_call(graph, operator, (total, *node.args[1:]), options, like=node)
    for user in list(node.users):
        index = _index(user)
        if wanted and index == 1:
            user.replace_all_uses_with(total)
            graph.erase_node(user)
        else:
            user.args = (local, index - (1 if wanted and index > 1 else 0))
    graph.erase_node(node)


def _index(user: fx.Node) -> int:
    index = user.args[1]
    assert isinstance(index, int)
    return index
