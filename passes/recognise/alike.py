"""Find what looks like a norm in a spelling that is not recognised. Reads only.

What counts: a value of rows, multiplied or divided by a root of a statistic over the same rows' hidden units

    y = f(h) * g(sqrt(s(h)))      s: a reduction over the last dimension; f, g: row by row

in whatever operators; the same with a statistic over other dimensions, or over a part of the units; the same without a
root where the statistic is a measure of the units' size (the mean of their magnitudes or of a power of them, a
quantile), so that neither a softmax nor a scale by the largest unit counts; and any operator that is called a norm and
reads the rows. It is for the report, and for `strict`: nothing is rewritten on the strength of a likeness.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..facts import aten_ops as ops
from ..facts.collectives import is_collective
from ..facts.graph import last_dim, same_shape, same_size, tensor_inputs, val, value
from ..facts.others import called, is_called_norm

#: Operators that mix rows or units, by the beginning of their names, without underscores in front: a walk over row-wise
#: operators ends there.
ENDS = ("mm", "addmm", "bmm", "linear", "matmul", "convolution", "embedding", "scaled_dot_product", "softmax", "sort",
        "scaled_mm", "int_mm", "grouped_mm", "weight_int", "fft")  # fmt: skip
_PRODUCTS = ("mm", "matmul", "linear")
_ROOTS = ("sqrt", "rsqrt")
#: Reductions that hold a root.
_ROOTED = ("linalg_vector_norm", "norm", "std")
#: Reductions by their names, over whatever dimensions.
_REDUCTIONS = ("sum", "mean", "var", *_ROOTED)
#: Of rows in the order of their units; what is picked from them is a quantile.
_SORTS = ("sort", "median", "nanmedian", "kthvalue")
#: What a power's sum measures; a sum of exponentials, or of the units as they are, measures nothing.
_SIZES = ("abs", "pow", "square")
#: What makes a factor of a measure, besides a root.
_INVERSES = ("reciprocal", "pow", "exp")
#: From the least to the most telling. ORDER: rows in order. MEASURE: a statistic that measures the units' size. SCALE:
#: a root of a statistic, or what else is a factor for its rows.
_ROW, _ORDER, _STATISTIC, _MEASURE, _SCALE = range(5)
_LIMIT = 400


@dataclass(frozen=True)
class Alike:
    """`node`: where rows are scaled (or the operator that is called a norm); `statistic`: the reduction that they are
    scaled by (`root`: by a root of it), or None; `by_row`: whether that is over the hidden units of each row. `called`:
    the norm's name in the program, where nothing but that tells."""

    node: fx.Node
    statistic: fx.Node | None
    by_row: bool = True
    called: str = ""
    root: bool = True


def find_alike(result: fx.Node, recognised: Collection[fx.Node], ignored: Collection[fx.Node] = ()) -> Alike | None:
    """The first in graph order that reads `result` over row-wise operators; None where there is none.

    recognised: what recognised norms read; behind these they are the answer. ignored: nodes that are not looked at.
    """
    hidden = last_dim(result)
    if hidden is None:
        return None
    known: dict[fx.Node, Kind] = {result: (_ROW, None, False)}
    pending = list(result.users)
    heapq.heapify(pending)
    seen = set(pending)
    while pending and len(seen) < _LIMIT:
        node = heapq.heappop(pending)
        if node.op != "call_function" or node in ignored or is_collective(node):
            continue
        found = _what(node, known, hidden)
        if isinstance(found, Alike):
            return found
        if found is None:
            continue
        known[node] = found
        if node in recognised:
            continue
        for user in node.users:
            if user not in seen:
                seen.add(user)
                heapq.heappush(pending, user)
    return None


def is_end(node: fx.Node) -> bool:
    """Whether `node` mixes rows or units, hands them to a graph of its own, or makes indices of them. A cast to
    integers does not, for they may be cast back; nor does a comparison, a mask of the same rows; nor a complex one."""
    val = value(node)
    if _mixes(called(node)) or is_region(node):
        return True
    if val is None or val.dtype in ops.FLOATS or node.target in ops.CASTS | _REINTERPRETED:
        return False
    return not (val.dtype is torch.bool or val.dtype.is_complex) or not _keeps_shape(node)


def _mixes(name: str) -> bool:
    return name.lstrip("_").startswith(ENDS)


def is_region(node: fx.Node) -> bool:
    """Whether `node` calls graphs of their own: the branches of torch.cond, a nested compile region."""
    return any(isinstance(graph, fx.GraphModule) for graph in regions(node))


def regions(node: fx.Node) -> list[object]:
    """The modules that `node` is given."""
    owner = node.graph.owning_module
    named = [n for n in node.all_input_nodes if n.op == "get_attr"]
    return [getattr(owner, str(n.target), None) for n in named] if owner is not None else []


#: Other names for the same bits.
_REINTERPRETED = {ops.aten.view.dtype, ops.aten.view_as_complex.default, ops.aten.view_as_real.default}

#: What a node is, the reduction it comes from, and whether over a root.
Kind = tuple[int, "fx.Node | None", bool]


def _what(node: fx.Node, known: Mapping[fx.Node, Kind], hidden: object) -> Alike | Kind | None:
    """What `node` is, given what it reads: one more value of rows, a statistic of rows, a factor for them, or the
    norm."""
    name, read = called(node), [known[parent] for parent in node.all_input_nodes if parent in known]
    strongest = max(read, key=lambda kind: kind[0])
    kind, of, root = strongest
    if all(each[0] != _ROW for each in read):
        if is_end(node):
            return None
        if kind == _ORDER:
            return (_MEASURE, node, False) if _one_a_row(node, hidden) else strongest
        if _takes_root(node, name):
            return _SCALE, of, True
        return (_SCALE, of, root) if kind == _MEASURE and name.startswith(_INVERSES) else strongest
    if name.startswith(_SORTS):
        return _ORDER, None, False
    if _reduces(node, hidden, len(read)):
        rooted = name.startswith(_ROOTED)
        return _SCALE if rooted else _MEASURE if _measures(node, name) else _STATISTIC, node, rooted
    if is_called_norm(node):
        return Alike(node, None)
    if is_end(node):
        return None
    if value(node) is None:  # several results: rows, statistics of them, or both
        return (_ROW, None, False) if isinstance(node.meta.get("val"), (tuple, list)) else None
    if of is not None and _scales(node, known):
        return Alike(node, of, same_size(last_dim(node), hidden) and _one_a_row(of, hidden), root=root)
    moved = node.target in ops.VIEWS | ops.SELECTIONS or _keeps_shape(node)
    return (_ROW, None, False) if moved or same_size(last_dim(node), hidden) else None


def _scales(node: fx.Node, known: Mapping[fx.Node, Kind]) -> bool:
    """Whether `node` multiplies rows by a factor for each of them, or divides them by it or by a measure of them."""
    kinds = [known[arg][0] if isinstance(arg, fx.Node) and arg in known else _ROW for arg in node.args]
    if _SCALE in kinds:
        return node.target in ops.MULS | ops.DIVS | set(ops.IN_PLACE_TWINS)
    return kinds[1:2] == [_MEASURE] and node.target in ops.DIVS | {ops.aten.div_.Tensor}


def _measures(node: fx.Node, name: str) -> bool:
    """Whether a reduction measures the size of what it adds up."""
    (first, *_) = [*tensor_inputs(node), node]
    while first.target in ops.CASTS and first.all_input_nodes:
        first = first.all_input_nodes[0]
    squared = first.target in ops.MULS and len(first.args) > 1 and first.args[0] is first.args[1]
    return name.startswith(("sum", "mean")) and (squared or called(first).startswith(_SIZES))


def _keeps_shape(node: fx.Node) -> bool:
    return any(same_shape(parent, node) for parent in tensor_inputs(node))


def _takes_root(node: fx.Node, name: str) -> bool:
    exponent = node.args[1] if len(node.args) > 1 else None
    return name.rstrip("_") in _ROOTS or (name.startswith("pow") and exponent in (0.5, -0.5))


def _reduces(node: fx.Node, hidden: Any, read: int) -> bool:
    """Whether `node` makes one number of every row, or one of several units by an operator that is called so."""
    result, inputs, name = value(node), tensor_inputs(node), called(node)
    if node.target is ops.operator.getitem:
        inputs, name = tensor_inputs(inputs[0]), called(inputs[0])
    if result is None or node.target in ops.SELECTIONS or not inputs or value(inputs[0]) is None:
        return False
    if name.startswith(_REDUCTIONS) and not same_size(result.numel(), val(inputs[0]).numel()):
        return True
    by_product = name.startswith(_PRODUCTS) and same_size(last_dim(node), 1)  # with a vector of ones, say
    if _mixes(name) and read < len(inputs) and not by_product:
        return False
    return _one_a_row(node, hidden)


def _one_a_row(node: fx.Node, hidden: Any) -> bool:
    """Whether `node` holds one number for each row of what it reads."""
    inputs = tensor_inputs(node)
    if node.target is ops.operator.getitem:
        inputs = tensor_inputs(inputs[0])
    read = val(inputs[0])
    return same_size(val(node).numel() * hidden, read.numel()) and not same_size(hidden, 1)
