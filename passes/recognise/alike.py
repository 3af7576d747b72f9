"""Find what looks like a norm in a spelling that is not recognised. Reads only.

What counts: a value of rows, multiplied or divided by a root of a statistic over the same rows' hidden units

    y = f(h) * g(sqrt(s(h)))      s: a reduction over the last dimension; f, g: row by row

in whatever operators; the same with a statistic over other dimensions, or over a part of the units; and any operator
that is called a norm and reads the rows. It is for the report, and for `strict`: nothing is rewritten on the strength
of a likeness.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import fx

from tpfuse._torch_private import operator_name

from ..facts import aten_ops as ops
from ..facts.collectives import is_collective
from ..facts.graph import last_dim, same_shape, same_size, tensor_inputs, val, value

#: Operators that mix rows or units, by the beginning of their names: a walk over row-wise operators ends there.
ENDS = ("mm", "addmm", "bmm", "linear", "matmul", "convolution", "embedding", "scaled_dot_product", "softmax", "sort",
        "_scaled_mm", "_int_mm", "grouped_mm")  # fmt: skip
_PRODUCTS = ("mm", "matmul", "linear")
_ROOTS = ("sqrt", "rsqrt")
#: Reductions that hold a root.
_ROOTED = ("linalg_vector_norm", "norm", "std")
#: Reductions by name: over whatever dimensions.
_REDUCTIONS = ("sum", "mean", "var", *_ROOTED)
_ROW, _STATISTIC, _ROOT = "row", "statistic", "root"
_LIMIT = 400


@dataclass(frozen=True)
class Alike:
    """`node`: where rows are scaled (or the operator that is called a norm); `statistic`: the reduction that they are
    scaled by a root of, or None; `by_row`: whether that is over the hidden units of each row. `called`: the norm's
    name in the program, where nothing but that tells."""

    node: fx.Node
    statistic: fx.Node | None
    by_row: bool = True
    called: str = ""


def find_alike(result: fx.Node, recognised: Collection[fx.Node], ignored: Collection[fx.Node] = ()) -> Alike | None:
    """The first in graph order that reads `result` over row-wise operators; None where there is none.

    recognised: what recognised norms read; behind these they are the answer. ignored: nodes that are not looked at.
    """
    hidden = last_dim(result)
    if hidden is None:
        return None
    known: dict[fx.Node, tuple[str, fx.Node | None]] = {result: (_ROW, None)}
    pending = list(result.users)
    heapq.heapify(pending)
    seen = set(pending)
    while pending and len(seen) < _LIMIT:
        node = heapq.heappop(pending)
        if node.op != "call_function" or node in ignored or is_collective(node):
            continue
        read = [known[parent] for parent in node.all_input_nodes if parent in known]
        found = _what(node, read, hidden)
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
    """Whether `node` mixes rows or units, hands them to a graph of its own, or makes something else than numbers of
    them; a cast to integers does not, for they may be cast back."""
    val = value(node)
    if _called(node).startswith(ENDS) or is_region(node):
        return True
    return val is not None and val.dtype not in ops.FLOATS and node.target not in ops.CASTS


def is_region(node: fx.Node) -> bool:
    """Whether `node` calls graphs of their own: the branches of torch.cond, a nested compile region."""
    return any(isinstance(graph, fx.GraphModule) for graph in regions(node))


def regions(node: fx.Node) -> list[object]:
    """The modules that `node` is given."""
    owner = node.graph.owning_module
    named = [n for n in node.all_input_nodes if n.op == "get_attr"]
    return [getattr(owner, str(n.target), None) for n in named] if owner is not None else []


def _called(node: fx.Node) -> str:
    """ "rsqrt" for aten.rsqrt.default; a plain function's own name."""
    return operator_name(node.target) or getattr(node.target, "__name__", str(node.target))


def _what(
    node: fx.Node, read: list[tuple[str, fx.Node | None]], hidden: object
) -> Alike | tuple[str, fx.Node | None] | None:
    """What `node` is, given what it reads: one more value of rows, a statistic of rows, a root of one, or the norm."""
    name = _called(node)
    statistics = [(kind, of) for kind, of in read if kind != _ROW]
    rooted = next((of for kind, of in statistics if kind == _ROOT), None)
    if len(statistics) == len(read):
        if is_end(node):
            return None
        kind, of = next(((kind, of) for kind, of in statistics if kind == _ROOT), statistics[0])
        return (_ROOT if _takes_root(node, name) else kind), of
    if _reduces(node, hidden, len(read)):
        return (_ROOT if name.startswith(_ROOTED) else _STATISTIC), node
    if "norm" in name and not name.startswith(_ROOTED):
        return Alike(node, None)
    if is_end(node):
        return None
    if value(node) is None:  # several results: rows, statistics of them, or both
        return (_ROW, None) if isinstance(node.meta.get("val"), (tuple, list)) else None
    if rooted is not None and node.target in ops.MULS | ops.DIVS | set(ops.IN_PLACE_TWINS):
        return Alike(node, rooted, same_size(last_dim(node), hidden) and _one_a_row(rooted, hidden))
    moved = node.target in ops.VIEWS | ops.SELECTIONS or _keeps_shape(node)
    return (_ROW, None) if moved or same_size(last_dim(node), hidden) else None


def _keeps_shape(node: fx.Node) -> bool:
    return any(same_shape(parent, node) for parent in tensor_inputs(node))


def _takes_root(node: fx.Node, name: str) -> bool:
    exponent = node.args[1] if len(node.args) > 1 else None
    return name.rstrip("_") in _ROOTS or (name.startswith("pow") and exponent in (0.5, -0.5))


def _reduces(node: fx.Node, hidden: Any, read: int) -> bool:
    """Whether `node` makes one number of every row, or one of several units by an operator that is called so."""
    result, inputs, name = value(node), tensor_inputs(node), _called(node)
    if node.target is ops.operator.getitem:
        inputs, name = tensor_inputs(inputs[0]), _called(inputs[0])
    if result is None or node.target in ops.SELECTIONS or not inputs or value(inputs[0]) is None:
        return False
    if name.startswith(_REDUCTIONS) and not same_size(result.numel(), val(inputs[0]).numel()):
        return True
    by_product = name.startswith(_PRODUCTS) and same_size(last_dim(node), 1)  # with a vector of ones, say
    if name.startswith(ENDS) and read < len(inputs) and not by_product:
        return False
    return _one_a_row(node, hidden)


def _one_a_row(node: fx.Node, hidden: Any) -> bool:
    """Whether `node` holds one number for each row of what it reads."""
    inputs = tensor_inputs(node)
    if node.target is ops.operator.getitem:
        inputs = tensor_inputs(inputs[0])
    read = val(inputs[0])
    return same_size(val(node).numel() * hidden, read.numel()) and not same_size(hidden, 1)
