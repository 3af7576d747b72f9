"""norm_backward in a graph that is split already: the collective by itself, and one local operator for the rest.

There is no kernel that does both, so the compiler is left what it can do with a collective: reduce in place where
nobody else reads the partial gradient, and start it early. But of two ranks that send rows by copies all of it, and
the gather behind, is one operator (tpfuse/reduce_backward_ops.py), with the product in front. What is sent, and in
which order, stays.
"""

from __future__ import annotations

import torch
from torch import fx

from tpfuse._torch_private import (
    argument_names,
    auto_functionalized,
    group_size,
    operator_full_name,
)
from tpfuse.reduce_backward_ops import NAME

from ..facts import aten_ops as ops
from ..facts.graph import argument, carry_meta, insert_call, val
from ..verdict.runs import exchanges
from .empty import empty
from .overlap import find_product
from .own_rows import both_handed_out, own_rows

c10d = ops.c10d
SCATTERED = "tpfuse::reduce_scatter_norm_backward_gather"
_KINDS = {"tpfuse::all_reduce_norm_backward": "all_reduce", "tpfuse::reduce_scatter_norm_backward": "reduce_scatter"}


#: What the operator fills, in the order in which it lists them.
_FILLED = ("dx", "total", "dweight", "dbias")


def lower_backward(graph: fx.Graph) -> int:
    """Take every norm_backward of `graph` apart; how many there were."""
    ours = [node for node in graph.nodes if operator_full_name(node.target) in _KINDS]
    found = [node for node in ours if not exchanges(node)]
    for node in found:
        _lower(graph, node)
    return len(found)


def _lower(graph: fx.Graph, node: fx.Node) -> None:
    options = {name: value for name, value in node.kwargs.items() if name != "overlap"}
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


def lower_exchanges(graph: fx.Graph) -> int:
    """Give every exchange in the backward pass its results to fill; how many there were. One whose sizes are symbolic
    stays the functional operator."""
    names = "tpfuse::all_reduce_norm_backward", SCATTERED
    found = [node for node in graph.nodes if operator_full_name(node.target) in names and exchanges(node)]
    return sum(_lower_exchange(graph, node) for node in found)


def _lower_exchange(graph: fx.Graph, node: fx.Node) -> bool:
    fakes: list[torch.Tensor] = list(node.meta["val"])
    if not all(isinstance(size, int) for fake in fakes for size in fake.shape):
        return False
    wanted = [name for name in ("sum", "weight", "bias") if argument(node, f"want_{name}")]
    names = {"sum": "total", "weight": "dweight", "bias": "dbias"}
    scattered = operator_full_name(node.target) == SCATTERED
    results = ["own", *(names[each] for each in wanted), "dx"] if scattered else ["dx", *(names[w] for w in wanted)]
    read = {results[_index(user)]: user for user in node.users}
    x, *operands = (argument(node, each) for each in ("x", "h", "mean", "rstd", "weight", "residual"))
    group = str(argument(node, "group_name"))
    given = dict(zip(("h", "mean", "rstd", "weight", "residual"), operands, strict=True))
    product = find_product({"x": x, **given}, group)
    told = product.arguments if product is not None else {"factors": [x], "product": ""}
    kept = {each: argument(node, each) for each in ("norm", "eps", "weight_offset", "group_name")}
    with graph.inserting_before(node):
        by_name = dict(zip(results, fakes, strict=True))
        filled = [name for name in _FILLED if name in by_name]
        outputs = {name: empty(graph, by_name[name].shape, by_name[name], node) for name in filled}
        overload = getattr(ops.tpfuse, NAME).default
        known = {**told, **given, **outputs, **kept, "dtype": val(x).dtype, "scattered": scattered}
        arguments = {each: known.get(each) for each in argument_names(overload)}
        call = graph.call_function(auto_functionalized(), (overload,), arguments)
        carry_meta(node, call)
        call.meta["val"] = (None, *(by_name.get(name) for name in _FILLED))
        made = {}
        for name in filled:
            made[name] = graph.call_function(ops.operator.getitem, (call, 1 + _FILLED.index(name)))
            carry_meta(node, made[name])
            made[name].meta["val"] = by_name[name]
        if (own := read.get("own")) is not None:
            made["own"] = own_rows(graph, made["dx"], group, own, both_handed_out(own, read.get("dx")))
    for user in list(node.users):
        user.replace_all_uses_with(made[results[_index(user)]])
        graph.erase_node(user)
    graph.erase_node(node)
    if product is not None:
        product.erase(graph)
    return True


def _index(user: fx.Node) -> int:
    index = user.args[1]
    assert isinstance(index, int)
    return index
