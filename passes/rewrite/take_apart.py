"""A graph that is split holds gathers by themselves again: no kernel does one with what stands in front of it. A norm
that nothing but its gather was fused with is plain operations again, which the compiler fuses with their neighbours.

That comes before the compiler's own passes on collectives, which then see every gather (and products behind it, for
PyTorch's async tensor parallelism) as in a graph of the program's. What is sent, and in which order, stays.
"""

from __future__ import annotations

import torch
from torch import fx

from tpfuse._torch_private import group_size, operator_full_name
from tpfuse.boundary_spec import OPERANDS

from ..facts import aten_ops as ops
from ..facts.graph import GATHERS, ORIGIN, argument, insert_call, val
from ..recognise.gathers import SCATTERING
from .plain import spec_of, write_out

aten, c10d = ops.aten, ops.c10d
_OURS = {f"{name}_gather" for name in (*SCATTERING, "tpfuse::rows_norm")}


def take_apart(graph: fx.Graph) -> int:
    """Put an operation and a gather in the place of every operation that holds both; how many there were."""
    found = [node for node in graph.nodes if operator_full_name(node.target) in _OURS]
    for node in found:
        _take_apart(graph, node)
    return len(found)


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
