"""A graph that is split holds by themselves again the collectives that no kernel does with what stands beside them:
gathers, reduce-scatters, and all collectives of gradients; but of two ranks that exchange rows by copies (`exchanges`)
the operation stays one. A norm that nothing but its gather was fused with is plain operations again, which the compiler
fuses with their neighbours.

That comes before the compiler's own passes on collectives, which then see each of these (and products before and behind
it, for PyTorch's async tensor parallelism) as in a graph of the program's. What is sent, and in which order, stays.
"""

from __future__ import annotations

import torch
from torch import fx

from tpfuse._torch_private import group_size, operator_full_name
from tpfuse.boundary_spec import OPERANDS

from ..facts import aten_ops as ops
from ..facts.graph import (
    GATHERS,
    ORIGIN,
    argument,
    input_node,
    insert_call,
    is_call,
    is_float,
    last_dim,
    row_major,
    same_size,
    val,
)
from ..recognise.gathers import SCATTERING
from ..verdict.runs import exchanges
from .lower import write_out_scattered
from .lower_backward import lower_backward
from .plain import spec_of, write_out

aten, c10d = ops.aten, ops.c10d
_SCATTER = c10d.reduce_scatter_tensor.default
_OURS = {f"{name}_gather" for name in (*SCATTERING, "tpfuse::rows_norm")}


def take_apart(graph: fx.Graph) -> int:
    """Put single collectives in the place of every operation that holds one without need; how many there were."""
    ours = [node for node in graph.nodes if operator_full_name(node.target) in _OURS]
    found = [node for node in ours if not exchanges(node)]
    for node in found:
        _take_apart(graph, node)
    written = set(graph.find_nodes(op="call_function", target=_SCATTER))
    count = len(found) + write_out_scattered(graph) + lower_backward(graph)
    for node in graph.find_nodes(op="call_function", target=_SCATTER):
        if node not in written:
            _unflatten(graph, node)
    return count


def _unflatten(graph: fx.Graph, scatter: fx.Node) -> None:
    """Scatter what the program does: our operations take rows in two dimensions, and the compiler looks for products
    behind the views that the program has."""
    flat, parts = input_node(scatter), argument(scatter, "group_size")
    if not is_call(flat, ops.VIEWS - ops.REORDERINGS) or not is_float(whole := input_node(flat)):
        return
    (wait,) = scatter.users
    shape, hidden = val(whole).shape, last_dim(flat)
    divides = same_size(shape[-1], hidden) and same_size(shape[0] % parts, 0)
    if len(shape) < 3 or val(flat).dim() != 2 or not divides or not row_major(whole):
        return
    with graph.inserting_before(scatter):
        pending = insert_call(graph, _SCATTER, (whole, *scatter.args[1:]), like=scatter)
        arrived = insert_call(graph, ops.WAIT, (pending,), like=wait)
        rows = insert_call(graph, aten.reshape.default, (arrived, [-1, hidden]), like=wait)
    wait.replace_all_uses_with(rows)
    for node in (wait, scatter):
        graph.erase_node(node)
    if not flat.users:
        graph.erase_node(flat)


def _take_apart(graph: fx.Graph, node: fx.Node) -> None:
    name, group = operator_full_name(node.target), argument(node, "group_name")
    operator = getattr(ops.tpfuse, name.partition("::")[2].removesuffix("_gather")).default
    last = len(node.meta["val"]) - 1
    with graph.inserting_before(node):
        options = dict(node.kwargs)
        swap = options.pop("swap", None)
        fused = insert_call(graph, operator, node.args, options, like=node)
        fused.meta |= {key: kept for key, kept in node.meta.items() if key not in fused.meta and key != GATHERS}
        rows = insert_call(graph, ops.operator.getitem, (fused, 0), like=node)
        sent = _swapped(graph, rows, swap) if isinstance(swap, (int, fx.Node)) else rows
        given = (sent, group_size(group), group)
        pending = insert_call(graph, c10d.all_gather_into_tensor.default, given, like=node)
        pending.meta[ORIGIN] = node.meta.get(GATHERS, pending.name)
        gathered = insert_call(graph, ops.WAIT, (pending,), like=pending)
    for user in list(node.users):
        # One reader of each result, as the steps behind this one expect: the rows may be read by themselves as well.
        instead = rows if user.args[1] == 0 else gathered
        if user.args[1] in (0, last):
            user.replace_all_uses_with(instead)
            graph.erase_node(user)
    node.replace_all_uses_with(fused, propagate_meta=False)
    graph.erase_node(node)
    if operator is ops.tpfuse.rows_norm.default:
        operands = {name: argument(fused, name) for name in OPERANDS}
        spec = spec_of(fused, operands)
        if spec is not None:
            write_out(graph, fused, operands, spec)


def _swapped(graph: fx.Graph, rows: fx.Node, swap: int | fx.Node) -> fx.Node:
    """[a * b, H] as [b * a, H]; `swap`: b."""
    count, hidden = (
        size if isinstance(size, int) else insert_call(graph, aten.sym_size.int, (rows, dim), like=rows)
        for dim, size in enumerate(val(rows).shape)
    )
    first: int | fx.Node
    if isinstance(count, int) and isinstance(swap, int):
        first = count // max(swap, 1)
    else:  # without a batch there are no rows, and nothing to divide them by
        some = insert_call(graph, torch.sym_max, (swap, 1), like=rows)
        first = insert_call(graph, ops.operator.floordiv, (count, some), like=rows)
    apart = insert_call(graph, aten.reshape.default, (rows, [first, swap, hidden]), like=rows)
    moved = insert_call(graph, aten.permute.default, (apart, [1, 0, 2]), like=rows)
    return insert_call(graph, aten.reshape.default, (moved, [count, hidden]), like=rows)
