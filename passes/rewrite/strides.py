"""Strides behind a fused boundary.

A fused operation gives compact rows. Where the value that it replaces lay in memory in another way (a residual stream
that begins as the transposed output of a convolution hands its order on to everything that is added to it), the values
computed from it lie in another way as well. Most operators do not care, and their fake values are computed anew. What
does care gets a copy with the strides it was traced with: the graph's outputs, which are its contract with the caller,
operators of other libraries, collectives, and whatever reads strides or writes in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tpfuse._torch_private import operator_schema, tensor_leaves

from ..facts import aten_ops as ops
from ..facts.graph import fake_result, insert_call, inserting_behind, same_strides, strides_agree, value

aten = ops.aten

#: Metadata of a node that took another's place: the value that its readers were traced with, strides included.
WAS = "tpfuse_was"
#: Read strides, or are only right for some.
_EXACT = {
    "aten::as_strided",
    "aten::as_strided_copy",
    "aten::as_strided_scatter",
    "aten::sym_stride",
    "aten::sym_storage_offset",
    "aten::view_as_complex",
    "aten::view_as_real",
    "aten::unfold",
    "prims::as_strided",
    "prims::as_strided_scatter",
}
_VIEWS = {aten.view.default, aten._unsafe_view.default}


def hand_over(old: fx.Node, new: fx.Node) -> None:
    """Let every reader of `old` read `new`, and remember where the two lie in memory in different ways."""
    if old.users and value(old) is not None and not same_strides(old, new):
        new.meta[WAS] = value(old)
    old.replace_all_uses_with(new, propagate_meta=False)


def settle_strides(graph: fx.Graph, at_once: bool) -> None:
    """Follow the new strides through `graph`, which is in order, to where they must not be seen.

    `at_once`: at the first reader, as in a graph that writes in place, where a copy for a view would not do.
    """
    was: dict[fx.Node, Any] = {}
    restored: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        mark = node.meta.pop(WAS, None)
        changed = [parent for parent in node.all_input_nodes if parent in was]
        if changed:
            if not at_once and _any_strides_do(node):
                before = node.meta.get("val")
                node.meta["val"] = _computed_anew(node)
                if mark is None and not _same_places(before, node.meta["val"]):
                    mark = before
            else:
                for parent in changed:
                    if parent not in restored:
                        restored[parent] = _as_it_was(graph, parent, was[parent])
                    node.replace_input_with(parent, restored[parent])
        if mark is not None:
            was[node] = mark


def _any_strides_do(node: fx.Node) -> bool:
    """Whether `node` computes the same whatever the strides of what it reads."""
    if node.op != "call_function":
        return False
    if node.target is ops.operator.getitem:
        return True
    schema = operator_schema(node.target)
    if schema is None or schema.is_mutable or schema.name in _EXACT:
        return False
    # Our own operators bring what they read into order themselves.
    return getattr(node.target, "namespace", "") in ("aten", "prims", "tpfuse")


def _computed_anew(node: fx.Node) -> Any:
    if node.target in _VIEWS:
        node.target = aten.reshape.default  # a view that was one may need a copy now
    return fake_result(node)


def _same_places(before: Any, after: Any) -> bool:
    pairs = zip(tensor_leaves(before), tensor_leaves(after), strict=True)
    return all(a.layout is not torch.strided or strides_agree(a, b) for a, b in pairs)


def _as_it_was(graph: fx.Graph, node: fx.Node, before: torch.Tensor) -> fx.Node:
    """`node`'s value with the strides of `before`, where a dense tensor has such."""
    order = sorted(range(before.dim()), key=lambda dim: -_hint(before.stride(dim)))
    back = sorted(range(before.dim()), key=order.__getitem__)
    with inserting_behind(graph, node):
        moved = insert_call(graph, aten.permute.default, (node, order), like=node)
        kept = {"memory_format": torch.contiguous_format}
        moved = insert_call(graph, aten.clone.default, (moved,), kept, like=node)
        return insert_call(graph, aten.permute.default, (moved, back), like=node)


def _hint(stride: Any) -> int:
    """A stride as a number; of a symbolic one the size it was traced with."""
    return stride if isinstance(stride, int) else int(getattr(stride.node, "hint", None) or 1)
