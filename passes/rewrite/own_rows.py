"""Of rows that one operation has of all ranks, those of this rank: a view of them, or, where the graph returns both, a
copy. Results that share no memory in the program must share none here: a caller may change one of them in place, and
what is kept for the backward pass is one of them."""

from __future__ import annotations

from torch import fx

from tpfuse._torch_private import group_rank, group_size

from ..facts import aten_ops as ops
from ..facts.graph import insert_call, val

aten = ops.aten


def own_rows(graph: fx.Graph, gathered: fx.Node, group_name: str, like: fx.Node, apart: bool) -> fx.Node:
    """`like`: the own rows as they were. apart: whether as a copy."""
    sizes = [group_size(group_name), -1, val(like).shape[-1]]
    parts = insert_call(graph, aten.reshape.default, (gathered, sizes), like=like)
    own = insert_call(graph, aten.select.int, (parts, 0, group_rank(group_name)), like=like)
    return insert_call(graph, aten.clone.default, (own,), like=like) if apart else own


def both_handed_out(*nodes: fx.Node | None) -> bool:
    return all(node is not None and _handed_out(node) for node in nodes)


def _handed_out(node: fx.Node) -> bool:
    """Whether the graph returns it, or a view of it."""
    return any(user.op == "output" or (_shares(user) and _handed_out(user)) for user in node.users)


def _shares(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    shares = schema is not None and any(result.alias_info is not None for result in schema.returns)
    return shares or node.target in (aten._unsafe_view.default, ops.operator.getitem)  # one of several views
