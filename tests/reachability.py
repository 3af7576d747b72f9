"""Which all-reduces feed a norm, found by slow walks over the graph. The recogniser's judge: shares no code with it.

Row-wise is what torch itself tags as pointwise, plus views, casts, reductions over the last dimension and sums of whole
rows. A norm is the inverse square root of a reduction over the hidden dimension. An all-reduce feeds a norm if the
norm's input is made of its result by row-wise operators, and of no other way: where something that mixes units (a
matrix product, another all-reduce) stands on a second way, the sum has to be finished before that norm's input can
exist.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

_VIEWS = {
    "view", "reshape", "_unsafe_view", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice", "select", "expand",
    "clone", "alias", "detach", "contiguous", "convert_element_type", "_to_copy", "copy", "lift_fresh_copy",
}  # fmt: skip
_REDUCTIONS = {"mean", "var_mean", "var"}
_INVERSE_ROOTS = {"rsqrt", "sqrt"}


def feeding_all_reduces(graph: fx.Graph, hidden: int) -> set[str]:
    """Names of the forward all-reduces of `graph` that feed a norm over `hidden` units."""
    found: set[str] = set()
    for source in _norm_inputs(graph, hidden):
        direct, stops = _row_wise_ancestors(source)
        for wait in direct:
            others = (direct | stops) - {wait}
            if not any(wait in _ancestors(other) for other in others):
                found.add(wait.args[0].name)
    return found


def _norm_inputs(graph: fx.Graph, hidden: int) -> Iterator[fx.Node]:
    """The inputs of reductions over `hidden` units whose result, plus something, is put under a root."""
    for node in graph.nodes:
        if _name(node) not in _INVERSE_ROOTS or any(str(a.target).startswith("tangents") for a in _ancestors(node)):
            continue
        pending = list(node.all_input_nodes)
        while pending:
            current = pending.pop()
            if _name(current) in _REDUCTIONS:
                if current.args[0].meta["val"].shape[-1] == hidden:
                    yield current.args[0]
            elif _is_pointwise(current) or _name(current) in {*_VIEWS, "getitem"}:
                pending.extend(current.all_input_nodes)


def _row_wise_ancestors(source: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
    """(waits of all-reduces `source` is made of row by row, the other nodes where the row-wise ways begin)."""
    waits, stops, seen, pending = set(), set(), set(), [source]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if _name(node) == "wait_tensor" and _name(node.args[0]) == "all_reduce":
            waits.add(node)
        elif _is_pointwise(node) or _name(node) in {*_VIEWS, *_REDUCTIONS, "getitem"} or _adds_rows(node):
            pending.extend(node.all_input_nodes)
        else:
            stops.add(node)
    return waits, stops


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen, pending = set(), [node]
    while pending:
        for parent in pending.pop().all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                pending.append(parent)
    return seen


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _adds_rows(node: fx.Node) -> bool:
    if _name(node) != "sum" or len(node.args) < 2:
        return False
    return -1 not in node.args[1] and node.args[0].meta["val"].dim() - 1 not in node.args[1]


def _name(node: object) -> str:
    if getattr(node, "op", "") != "call_function":
        return ""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[-1] if schema is not None else getattr(node.target, "__name__", "")
