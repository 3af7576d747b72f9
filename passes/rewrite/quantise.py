"""Rewrite: a fused boundary hands out its normed value quantised as well.

    [y, h] = all_reduce_norm(...);  q, s = a chain on y     becomes     [y, h, q, s] = all_reduce_norm(..., quant=...)

Chains that are equal become one. What else reads y goes on reading it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from tpfuse.quantisation import Quantisation

from ..facts import aten_ops as ops
from ..facts.graph import argument, fake_result, insert_call, inserting_behind, same_shape, same_size, val
from ..recognise.quantised import SYMBOLIC, Quantised, find_quantised
from ..recognise.quantisers import ROUNDED, rounding_of
from ..recognise.streams import calls
from ..verdict.names import module_name

aten = ops.aten
_OURS = ("tpfuse::all_reduce_norm", "tpfuse::reduce_scatter_norm", "tpfuse::rows_norm")


def quantise(graph: fx.Graph) -> tuple[dict[fx.Node, str], list[str]]:
    """Let every fused operation quantise whose normed value is quantised: what each of them hands out, in words, and
    sentences on what stays behind one."""
    found: dict[fx.Node, str] = {}
    notes: list[str] = []
    for fused in [node for node in graph.nodes if any(calls(node, name) for name in _OURS)]:
        y = next((user for user in fused.users if user.target is ops.operator.getitem and user.args[1] == 0), None)
        quantised = None if y is None or argument(fused, "quant", "") else find_quantised(y)
        if quantised is None:
            notes += [f"{_named(fused)}: {name} {ROUNDED}" for name in dict.fromkeys(_rounds(y))]
            continue
        known = sizes_known(quantised)
        if known:
            _apply(graph, fused, quantised)
            found[fused] = str(quantised.how)
        stays = quantised.left if known else SYMBOLIC
        if stays:
            notes.append(f"{_named(fused)}: {stays}")
    return found, notes


def _named(fused: fx.Node) -> str:
    return module_name(fused) or "a boundary"


def _rounds(y: fx.Node | None) -> Iterator[str]:
    """The operators that round `y`, or a view of it, and keep its dtype."""
    for user in y.users if y is not None else ():
        if name := rounding_of(user):
            yield name
        elif user.target in ops.VIEWS:
            yield from _rounds(user)


def _apply(graph: fx.Graph, fused: fx.Node, quantised: Quantised) -> None:
    made = handed_out(graph, fused, quantised.y, quantised.how)
    with inserting_behind(graph, max(made)):
        for each, nodes in zip(made, (quantised.q, quantised.scale), strict=True):
            for node in nodes:
                node.replace_all_uses_with(shaped(graph, each, node), propagate_meta=False)
    _erase_unread(graph, [*quantised.q, *quantised.scale])


def handed_out(graph: fx.Graph, fused: fx.Node, y: fx.Node, how: Quantisation) -> tuple[fx.Node, fx.Node]:
    """(q, scale) of `fused`, which quantises its normed value `y` so from now on, if it did not before."""
    if not argument(fused, "quant", ""):
        fused.update_kwarg("quant", how.text())
        fused.meta["val"] = fake_result(fused)
    last = len(fused.meta["val"]) - 1
    taken = {user.args[1]: user for user in fused.users if user.target is ops.operator.getitem}
    with inserting_behind(graph, y):
        for at in (last - 1, last):
            if at not in taken:
                taken[at] = insert_call(graph, ops.operator.getitem, (fused, at), like=fused)
    return taken[last - 1], taken[last]


def shaped(graph: fx.Graph, made: fx.Node, node: fx.Node) -> fx.Node:
    """`made` in the shape of `node`, whose place it takes."""
    if same_shape(made, node):
        return made
    return insert_call(graph, aten.reshape.default, (made, _sizes(graph, made, node)), like=node)


def _erase_unread(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Erase these, and what only they read, up to what communicates or comes from outside."""
    open_ = sorted(nodes, reverse=True)
    while open_:
        node = open_.pop(0)
        if node.users or node.op != "call_function" or any(calls(node, name) for name in _OURS):
            continue
        inputs = node.all_input_nodes
        graph.erase_node(node)
        open_ = sorted({*open_, *(parent for parent in inputs if not parent.users)}, reverse=True)


def sizes_known(quantised: Quantised) -> bool:
    """Whether `shaped` can be told the sizes of all that the quantisation gives."""
    return all(_plan_of(quantised.y, node) is not None for node in (*quantised.q, *quantised.scale))


def _plan_of(y: fx.Node, node: fx.Node) -> list[int | tuple[str, int]] | None:
    """Each size of `node`: a number, the dimension of y that has it, or -1 once; None where that does not do."""
    plan: list[Any] = []
    for size in val(node).shape:
        if isinstance(size, int):
            plan.append(size)
            continue
        dim = next((i for i, own in enumerate(val(y).shape) if same_size(own, size)), None)
        plan.append(-1 if dim is None else ("dim", dim))
    return plan if plan.count(-1) <= 1 else None


def _sizes(graph: fx.Graph, made: fx.Node, node: fx.Node) -> list[int | fx.Node]:
    plan = _plan_of(made, node)
    assert plan is not None, SYMBOLIC
    return [
        size if isinstance(size, int) else insert_call(graph, aten.sym_size.int, (made, size[1]), like=node)
        for size in plan
    ]
