"""An in-place `dist.all_reduce` in the form that the recogniser reads.

torch.export keeps the write that the user wrote:

    y = mm(...)                        y = mm(...)
    s = wait(all_reduce(y))       →    s = wait(all_reduce(y))
    z = copy_(y, s)                    (readers of z read s)

The copy may go where nobody can tell: y is a temporary that nothing reads behind the copy but the copy's own readers,
and s is read by the copy alone, so that it can be written to in y's place.
"""

from __future__ import annotations

from torch import fx

from tpfuse._torch_private import operator_schema, storage_identity

from ..facts import aten_ops as ops
from ..facts.graph import same_shape, same_strides, val, value


def drop_copies(graph: fx.Graph) -> None:
    """Let readers of `copy_(temporary, source)` read the source. Changes `graph`."""
    copies = [node for node in graph.nodes if node.target is ops.aten.copy_.default]
    if not copies:
        return
    sharing = _by_storage(graph)
    for copy in copies:
        if _can_go(copy, sharing):
            copy.replace_all_uses_with(copy.args[1], propagate_meta=False)
            graph.erase_node(copy)


def _by_storage(graph: fx.Graph) -> dict[int, list[fx.Node]]:
    """The nodes whose values live in one storage, in graph order."""
    sharing: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        tensor = value(node)
        identity = storage_identity(tensor) if tensor is not None else None
        if identity is not None:
            sharing.setdefault(identity, []).append(node)
    return sharing


def _can_go(copy: fx.Node, sharing: dict[int, list[fx.Node]]) -> bool:
    target, source = copy.args[:2]
    if not isinstance(target, fx.Node) or not isinstance(source, fx.Node):
        return False
    if value(target) is None or value(source) is None or value(copy) is None:
        return False
    old, new = val(target), val(source)
    if (old.dtype, old.device) != (new.dtype, new.device) or not same_shape(target, source):
        return False
    if not same_strides(target, source) or list(source.users) != [copy]:
        return False
    schema = operator_schema(target.target)
    if target.op != "call_function" or schema is None or any(r.alias_info is not None for r in schema.returns):
        return False
    identity = storage_identity(old)
    same_memory = sharing.get(identity, []) if identity is not None else []
    if not same_memory or same_memory[0] is not target:
        return False  # a view, or an operator that handed out its input
    readers = {user for node in same_memory if node < copy for user in node.users} - {copy}
    return all(reader < copy for reader in readers)
