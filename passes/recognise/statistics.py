"""The statistics of written-out norms, in every spelling. Reads only.

What a norm divides by is one number a row: a mean of squares, a variance, or a sum of squares that a factor sqrt(H)
elsewhere makes a mean of. On its way it may lose and regain its dimension of size 1, be expanded, cast, or be written
as a product of each row with itself (einsum, matmul) or as the square of `vector_norm`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..facts import aten_ops as ops
from ..facts.graph import (
    argument,
    input_node,
    is_call,
    is_float,
    is_number,
    last_dim,
    permutation,
    same_shape,
    same_size,
    strip,
    val,
    value,
)

aten = ops.aten

#: Leave the value as it is, up to rounding.
TRANSPARENT = ops.CASTS | {aten.alias.default, aten.detach.default, aten.clone.default}
_EXPANSIONS = {aten.expand.default, aten.expand_as.default}
_VECTOR_NORMS = {aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim}


@dataclass(frozen=True)
class Moments:
    """kind: of norm. centred: what is scaled. source: what is normalised. mean: its node (LayerNorm). total: whether
    the statistic is the sum over the row, not the mean. problem: why it cannot be fused, or ''."""

    kind: str
    centred: fx.Node
    source: fx.Node
    mean: fx.Node | None = None
    problem: str = ""
    total: bool = False


# -- the same numbers in another shape --------------------------------------------------------------------------------


def keeps_order(node: Any) -> bool:
    """Whether `node` gives the elements of its input in the same order, in whatever shape."""
    if is_call(node, _EXPANSIONS):
        return same_shape(node, input_node(node))
    if not is_call(node, ops.VIEWS):
        return False
    if not is_call(node, ops.REORDERINGS):
        return True
    before, after = value(node.args[0]), value(node)
    if before is None or after is None:
        return False
    moved = [dim for dim in permutation(node) if not same_size(before.shape[dim], 1)]
    return moved == sorted(moved)


def strip_views(node: Any) -> Any:
    """Walk from `node` towards the inputs over casts, copies and views that keep the order of elements."""
    while (is_call(node, TRANSPARENT) or keeps_order(node)) and is_float(node) and is_float(node.args[0]):
        node = node.args[0]
    return node


def strip_rows(node: Any) -> Any:
    """The same of one number a row, which may be expanded over the row as well."""
    while True:
        node = strip_views(node)
        if not repeats_over_rows(node):
            return node
        node = node.args[0]


def repeats_over_rows(node: Any) -> bool:
    """Whether `node` expands one number a row along the row."""
    if not is_call(node, _EXPANSIONS):
        return False
    narrow, wide = value(node.args[0]), value(node)
    if narrow is None or wide is None or narrow.dim() != wide.dim() or not wide.dim():
        return False
    return same_size(narrow.shape[-1], 1) and all(map(same_size, narrow.shape[:-1], wide.shape[:-1]))


def one_a_row(node: fx.Node, source: fx.Node) -> bool:
    """Whether `node` broadcasts over `source` as one number for each of its rows."""
    if repeats_over_rows(node):
        node = input_node(node)
    numbers, rows = value(node), value(source)
    if numbers is None or rows is None or numbers.dim() != rows.dim():
        return False
    if not rows.dim():
        return True  # a single number is a row by itself
    return same_size(numbers.shape[-1], 1) and all(map(same_size, numbers.shape[:-1], rows.shape[:-1]))


# -- what is reduced --------------------------------------------------------------------------------------------------


def moments(statistic: fx.Node) -> Moments | None:
    """What `statistic` is of, if it is a mean of squares, a sum of squares, or a variance."""
    return _squares(statistic) or _variance(statistic)


def mean_of(node: fx.Node) -> tuple[fx.Node, str] | None:
    """(the value averaged, problem) if `node` averages over dimensions: mean, or a sum divided by the size."""
    node = strip_rows(node)
    if is_call(node, aten.mean.dim):
        return input_node(node), _dims_problem(node)
    if not is_call(node, ops.DIVS | ops.MULS) or len(node.args) < 2:
        return None
    divided, factor = strip_rows(node.args[0]), node.args[1]
    summed = _summed_by_einsum(divided)
    if summed is not None:
        return (summed, "") if _divides_by(node, factor, last_dim(summed)) else None
    if not is_call(divided, aten.sum.dim_IntList):
        return None
    size = last_dim(input_node(divided))
    return (input_node(divided), _dims_problem(divided)) if _divides_by(node, factor, size) else None


def vector_norm(node: Any) -> fx.Node | None:
    """x, if `node` is the Euclidean norm of its rows as one operator."""
    if not is_call(node, _VECTOR_NORMS):
        return None
    order = argument(node, "ord", argument(node, "p"))
    return input_node(node) if order in (2, None) and not _dims_problem(node) else None


def root_of(node: Any) -> fx.Node | None:
    """The radicand, if `node` is a square root."""
    if is_call(node, aten.sqrt.default) or (is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == 0.5):
        return input_node(node)
    return None


def _squares(statistic: fx.Node) -> Moments | None:
    found = _sum_of_squares(statistic)
    return moments_of_squares(*found) if found is not None else None


def moments_of_squares(root: fx.Node | None, problem: str = "", total: bool = True) -> Moments | None:
    """Of the squares of `root`: RMSNorm's statistic, or LayerNorm's where `root` is `v - mean(v)`."""
    if root is None:
        return None
    source = strip(root, TRANSPARENT)
    if subtracts_value(source):
        mean = strip_rows(source.args[1])
        inner = mean_of(mean)
        each = inner is not None and (inner[1] or one_a_row(input_node(source, 1), source))
        if inner is not None and each and _same_rows(inner[0], source.args[0]):
            return Moments("layer_norm", source, strip(source.args[0], TRANSPARENT), mean, problem or inner[1], total)
    return Moments("rms_norm", source, source, None, problem, total)


def _same_rows(one: fx.Node, other: Any) -> bool:
    """Whether two nodes are views of one value with the same last dimension, as einsum makes of what it reads."""
    return strip_views(one) is strip_views(other) and same_size(last_dim(one), last_dim(other))


def _sum_of_squares(node: Any) -> tuple[fx.Node, str, bool] | None:
    """(x, problem, whether it is the sum rather than the mean) if `node` is a sum or mean of the squares of x."""
    node = strip_rows(node)
    if is_call(node, {aten.mean.dim, aten.sum.dim_IntList}):
        squared = _squared(input_node(node))
        if squared is None or not same_size(last_dim(squared), last_dim(input_node(node))):
            return None
        return squared, _dims_problem(node), is_call(node, aten.sum.dim_IntList)
    if is_call(node, aten.bmm.default):
        row, column = input_node(node, 0), input_node(node, 1)
        root = strip_views(row)
        line = is_float(row) and same_size(val(row).shape[1], 1) and same_size(val(column).shape[2], 1)
        whole = line and same_size(last_dim(row), last_dim(root)) and strip_views(column) is root
        return (root, "", True) if whole else None
    if is_call(node, aten.einsum.default):
        root = _multiplied_with_itself(node)
        return (root, "", True) if root is not None else None
    if is_call(node, ops.DIVS | ops.MULS) and len(node.args) > 1 and not _multiplies_values(node):
        found = _sum_of_squares(node.args[0])
        divided = found is not None and found[2] and _divides_by(node, node.args[1], last_dim(found[0]))
        return (found[0], found[1], False) if found is not None and divided else None
    root = strip_rows(_squared(node))
    below = vector_norm(root)
    if below is not None:
        return below, "", True
    radicand = root_of(root)
    return _sum_of_squares(radicand) if radicand is not None else None


def _multiplied_with_itself(node: fx.Node) -> fx.Node | None:
    """x, if an einsum that is still whole adds up the squares of x over its last dimension."""
    equation, operands = node.args[:2]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    read, _, given = equation.replace(" ", "").partition("->")
    one, _, other = read.partition(",")
    alike = one == other == f"{given}{one[-1:]}" and one[-1:].isalpha() and one[-1] not in given
    return strip_views(operands[0]) if alike and operands[0] is operands[1] else None


def _summed_by_einsum(node: Any) -> fx.Node | None:
    """x, if an einsum that is still whole adds up x over its last dimension."""
    if not is_call(node, aten.einsum.default) or not isinstance(node.args[1], (list, tuple)) or len(node.args[1]) != 1:
        return None
    read, _, given = str(node.args[0]).replace(" ", "").partition("->")
    last, summed = read[-1:], node.args[1][0]
    whole = last.isalpha() and last not in given and read == f"{given}{last}"
    return summed if whole and isinstance(summed, fx.Node) else None


def _multiplies_values(node: fx.Node) -> bool:
    return is_call(node, ops.MULS) and isinstance(node.args[1], fx.Node)


def _squared(node: Any) -> fx.Node | None:
    node = strip(node, TRANSPARENT)
    if is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == 2:
        return input_node(node)
    if is_call(node, aten.square.default):
        return input_node(node)
    if is_call(node, ops.MULS) and len(node.args) > 1 and isinstance(node.args[1], fx.Node):
        left, right = (strip(a, TRANSPARENT) for a in node.args[:2])
        if left is right:
            return input_node(node)
        if strip_views(left) is strip_views(right):
            return strip_views(left)
    return None


def _variance(statistic: fx.Node) -> Moments | None:
    """var(x) from `var_mean` or `var`, uncorrected: LayerNorm's statistic. The centred value is `x - mean`."""
    node = strip_rows(statistic)
    pair = input_node(node) if node.target is ops.operator.getitem and node.args[1] == 0 else None
    if is_call(node, aten.var.correction) or is_call(node, aten.var.dim):
        reduction = node
    elif is_call(pair, aten.var_mean.correction):
        reduction = pair
    else:
        return None
    correction = argument(reduction, "correction")
    if is_call(reduction, aten.var.dim):
        correction = 1 if argument(reduction, "unbiased", True) else 0
    problem = _dims_problem(reduction)
    if correction != 0:
        problem = problem or f"the norm's variance is corrected by {1 if correction is None else correction}, not 0"
    source = strip(input_node(reduction), TRANSPARENT)
    for candidate in through_casts(input_node(reduction), source):
        for user in candidate.users:
            if subtracts_value(user) and user.args[0] is candidate:
                mean = strip_rows(user.args[1])
                from_pair = mean.target is ops.operator.getitem and mean.args == (pair, 1)
                averaged = None if from_pair else mean_of(mean)
                problem = problem or (averaged[1] if averaged else "")
                each = problem or one_a_row(input_node(user, 1), user)
                if each and (from_pair or (averaged is not None and strip(averaged[0], TRANSPARENT) is source)):
                    return Moments("layer_norm", user, source, mean, problem)
    return None


def subtracts_value(node: fx.Node) -> bool:
    """Whether `node` is one value minus another, once."""
    if not is_call(node, ops.SUBS) or len(node.args) < 2 or node.kwargs.get("alpha", 1) != 1:
        return False
    return all(isinstance(side, fx.Node) for side in node.args[:2])


def through_casts(node: fx.Node, source: fx.Node) -> Iterator[fx.Node]:
    """`source` and every cast of it, `node` first."""
    yield node
    pending = [source]
    while pending:
        current = pending.pop()
        if current is not node:
            yield current
        pending.extend(user for user in current.users if is_call(user, TRANSPARENT))


def _divides_by(node: fx.Node, factor: object, size: Any) -> bool:
    """Whether dividing (or multiplying) by `factor` divides by `size`, a number or a symbol."""
    if is_call(node, ops.DIVS) and isinstance(factor, fx.Node):
        return same_size(factor.meta.get("val"), size)
    if not is_number(factor) or not isinstance(size, int) or not size or not factor:
        return False
    return math.isclose(factor if is_call(node, ops.DIVS) else 1 / factor, size, rel_tol=1e-6)


def _dims_problem(reduction: fx.Node) -> str:
    dims = argument(reduction, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    if dims is not None and not all(isinstance(d, int) for d in dims):
        return "the dimensions that the norm runs over are computed in the graph"
    val = value(reduction.args[0])
    rank = val.dim() if val is not None else 0
    if dims is None or [d % rank if rank else d for d in dims] != [rank - 1]:
        return f"the norm runs over dimensions {list(dims) if dims is not None else 'all'}, not over the last one only"
    return ""


__all__ = [
    "TRANSPARENT",
    "Moments",
    "keeps_order",
    "mean_of",
    "moments",
    "moments_of_squares",
    "one_a_row",
    "repeats_over_rows",
    "root_of",
    "strip_rows",
    "strip_views",
    "through_casts",
    "vector_norm",
]
