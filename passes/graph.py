"""Small helpers over FX graphs: reading arguments by name, fake values, and new nodes that carry their metadata."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tpfuse._torch_private import tensor_leaves

from . import aten_ops as ops

#: Metadata a new node takes from the node it replaces, so that activation checkpointing, stack traces and module
#: names survive. "val" is not among them: the new node's own value is computed.
CARRIED_META = (
    "recompute",
    "ac_graph_id",
    "has_backward_hook",
    "nn_module_stack",
    "fwd_nn_module_stack",
    "stack_trace",
    "source_fn_stack",
    "fwd_source_fn_stack",
    "seq_nr",
    "partitioner_tag",
    "mutation_region_id",
    "from_node",
    "custom",
)


def value(node: Any) -> torch.Tensor | None:
    """The fake tensor `node` stands for, or None when it has none (or is no single tensor)."""
    if not isinstance(node, fx.Node):
        return None
    val = node.meta.get("val")
    if val is None:
        val = node.meta.get("tensor_meta") if isinstance(node.meta.get("tensor_meta"), torch.Tensor) else None
    return val if isinstance(val, torch.Tensor) else None


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """The argument called `name` in the schema of `node.target`, wherever it was written."""
    if name in node.kwargs:
        return node.kwargs[name]
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return default
    for position, parameter in enumerate(schema.arguments):
        if parameter.name == name:
            if position < len(node.args):
                return node.args[position]
            return parameter.default_value if parameter.has_default_value() else default
    return default


def is_call(node: Any, targets: Any) -> bool:
    """Whether `node` calls one of `targets` (a set, or one operator); in-place forms count as their twin."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    target = ops.IN_PLACE_TWINS.get(node.target, node.target)
    return target in targets if isinstance(targets, (set, frozenset, dict, tuple)) else target is targets


def is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def last_dim(node: fx.Node) -> Any:
    """The size of the last dimension, or None for a scalar or a node without a tensor value."""
    val = value(node)
    return val.shape[-1] if val is not None and val.dim() > 0 else None


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes surely have equal shapes; an undecidable symbolic comparison counts as no."""
    va, vb = value(a), value(b)
    if va is None or vb is None or va.dim() != vb.dim():
        return False
    return all(same_size(x, y) for x, y in zip(va.shape, vb.shape, strict=True))


def same_size(x: Any, y: Any) -> bool:
    """Whether two sizes are equal for certain. Never adds a guard: an answer must not narrow the compiled graph."""
    if isinstance(x, int) and isinstance(y, int):
        return x == y
    nx, ny = getattr(x, "node", None), getattr(y, "node", None)
    ex = nx.expr if nx is not None else x
    ey = ny.expr if ny is not None else y
    return ex == ey


def strip(node: Any, targets: set[Any]) -> Any:
    """Walk from `node` towards the inputs while it is one of `targets` (unary operators)."""
    while is_call(node, targets) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def insert_call(
    graph: fx.Graph, target: Callable[..., Any], args: tuple, kwargs: dict | None = None, *, like: fx.Node
) -> fx.Node:
    """Insert a call at the graph's insertion point, with its fake value computed and `like`'s metadata carried."""
    node = graph.call_function(target, args, kwargs or {})
    carry_meta(like, node)
    node.meta["val"] = fake_result(node)
    return node


def carry_meta(source: fx.Node, target: fx.Node) -> None:
    for key in CARRIED_META:
        if key in source.meta:
            target.meta[key] = source.meta[key]


def fake_result(node: fx.Node) -> Any:
    """What `node` returns for the fake values of its arguments (runs under their fake mode; no real work)."""

    def fake(arg: fx.Node) -> Any:
        return arg.meta["val"]

    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), fake)
    mode = next((v.fake_mode for v in tensor_leaves((args, kwargs)) if hasattr(v, "fake_mode")), None)
    if mode is None:
        return node.target(*args, **kwargs)
    with mode:
        return node.target(*args, **kwargs)


def depends_on(node: fx.Node, sources: set[fx.Node]) -> bool:
    """Whether `node` is computed from any of `sources`. Looks only at nodes that stand after the first source."""
    if not sources:
        return False
    first = min(sources)
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in sources:
            return True
        if current in seen or current < first:
            continue
        seen.add(current)
        stack.extend(current.all_input_nodes)
    return False
