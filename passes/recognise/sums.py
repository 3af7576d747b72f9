"""Write a value as a sum of terms, each a leaf followed by linear steps. Reads only.

Between the partial producer and the norm there may be views, casts, numbers, biases, replicated addends, gates, masks
and sums of rows. All of them are linear, so the value h that a norm reads is

    h = sum_i path_i(all_reduce(x_i)) + sum_j path_j(r_j)

with every path a chain of views, casts, choices and sums of rows, and multiplications. `decompose` finds the terms.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch
from torch import fx

from ..facts import aten_ops as ops
from ..facts.graph import input_node, is_call, is_float, is_number, last_dim, same_shape, same_size, val, value

#: Sums of real models have a handful of terms.
MAX_TERMS = 64
#: Below it, 1 / x is infinite.
_SMALL = sys.float_info.min


@dataclass(frozen=True)
class Step:
    """One operator on the way from a leaf to the sum: `node`, whose argument number `position` carries the value."""

    node: fx.Node
    position: int = 0

    @property
    def others(self) -> tuple[fx.Node, ...]:
        """What the operator reads besides the value: a gate, a mask, symbolic sizes."""
        carried = self.node.args[self.position]
        return tuple(parent for parent in self.node.all_input_nodes if parent is not carried)

    @property
    def is_gate(self) -> bool:
        return not is_call(self.node, ops.VIEWS | ops.SELECTIONS | ops.SPREADS | ops.ROW_SUMS | ops.CASTS)

    @property
    def moves_only(self) -> bool:
        """Whether the step computes nothing: a view, a choice of elements, a repetition of them."""
        return is_call(self.node, ops.VIEWS | ops.SELECTIONS | ops.PICKS | ops.SPREADS)

    @property
    def spreads(self) -> bool:
        """Whether there are more elements behind the step than before it."""
        return is_call(self.node, ops.SPREADS)

    @property
    def reshapes(self) -> bool:
        """Whether the step keeps every element and their order, so that a reshape leads back."""
        return is_call(self.node, ops.VIEWS - ops.REORDERINGS)


@dataclass(frozen=True)
class Term:
    """`leaf`, then `path` from the leaf towards the sum: the steps applied one after another.

    `scale` is the product of the numbers on the way; `owed` says that the leaf is a finished all-reduce which the
    fused operation could perform itself; `joins` is the addition the leaf enters by, to whose shape it broadcasts.
    """

    leaf: fx.Node
    path: tuple[Step, ...]
    scale: float
    owed: bool
    joins: fx.Node | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """What must be repeated on another tensor, in order. Casts are left out: the fused operation computes in
        float32 and rounds once, at the end."""
        return tuple(step for step in self.path if not is_call(step.node, ops.CASTS))

    @property
    def views(self) -> tuple[fx.Node, ...]:
        return tuple(step.node for step in self.steps if is_call(step.node, ops.VIEWS))

    @property
    def gates(self) -> tuple[Step, ...]:
        return tuple(step for step in self.path if step.is_gate)

    @property
    def spreads(self) -> bool:
        """Whether the leaf is repeated on the way: in front of its sum more would be sent, if it were sent alone."""
        return any(step.spreads for step in self.path)

    @property
    def only_reshapes(self) -> bool:
        """Whether the leaf's value can be had back from the sum's shape: no gate, no choice of rows, no new order."""
        return all(step.reshapes for step in self.steps)

    def stays_wider(self, at: fx.Node, root: fx.Node) -> bool:
        """Whether what the leaf has become at `at`, a node between it and `root`, is of a finer dtype than the leaf and
        is not rounded to the leaf's before somebody reads `root`."""
        dtype = val(self.leaf).dtype
        if not finer(val(at).dtype, dtype):
            return False
        casts = [step.node for step in self.path if at < step.node and is_call(step.node, ops.CASTS)]
        if any(not finer(val(cast).dtype, dtype) for cast in casts):
            return False
        return not all(is_call(user, ops.CASTS) and not finer(val(user).dtype, dtype) for user in root.users)

    def is_row_vector_of(self, root: fx.Node) -> bool:
        """Whether the leaf adds one number per hidden unit, the same in every row of `root`: a bias."""
        vector = value(self.leaf)
        return (
            vector is not None
            and vector.dim() == 1
            and not same_shape(self.leaf, root)
            and same_size(vector.shape[0], last_dim(root))
            and all(step.reshapes and same_size(last_dim(step.node), vector.shape[0]) for step in self.steps)
        )


def finer(one: torch.dtype, other: torch.dtype) -> bool:
    """Whether a dtype rounds less than another."""
    return torch.finfo(one).eps < torch.finfo(other).eps


@dataclass(frozen=True)
class Sum:
    """`root` as a sum of terms; `interior` are the nodes between the leaves and the root, the root included.

    `problem` is empty, or one sentence on why the sum cannot be used; its terms are then no more than the owed leaves.
    """

    root: fx.Node
    terms: tuple[Term, ...]
    interior: frozenset[fx.Node]
    problem: str = ""

    @property
    def owed(self) -> tuple[Term, ...]:
        return tuple(term for term in self.terms if term.owed)

    @property
    def replicated(self) -> tuple[Term, ...]:
        return tuple(term for term in self.terms if not term.owed)

    @property
    def plain(self) -> bool:
        """Whether nothing but views, casts, numbers and additions stands between the leaves and the root."""
        return all(is_call(step.node, ops.VIEWS | ops.CASTS) for term in self.terms for step in term.path)

    @property
    def gates(self) -> tuple[fx.Node, ...]:
        """Every value that some term is multiplied by, each once."""
        return tuple(dict.fromkeys(node for term in self.terms for step in term.gates for node in step.others))


def decompose(root: fx.Node, owed: set[fx.Node], fixed: set[fx.Node]) -> Sum:
    """The terms of `root`.

    `owed`: results of all-reduces that may be taken apart; `fixed`: nodes to take as leaves whatever they are (the
    residual streams of norms already planned). A subtree without an owed leaf is one leaf.
    """
    reach = _Reach(owed, fixed)
    interior: set[fx.Node] = set()
    terms: list[Term] = []
    # (node, path to the root, scale, the addition it enters by, whether it is a leaf whatever it is)
    pending: list[tuple[fx.Node, tuple[Step, ...], float, fx.Node | None, bool]] = [(root, (), 1.0, None, False)]
    while pending:
        node, path, scale, joins, broadcast = pending.pop()
        if len(terms) == MAX_TERMS:
            # h = s + s; h = h + h; ... has twice the terms at every step.
            terms = [Term(leaf, (), 1.0, True) for leaf in _owed_below(root, owed - fixed, reach)]
            return Sum(root, tuple(terms), frozenset(), f"the norm reads a sum of more than {MAX_TERMS} terms")
        if node in owed and node not in fixed and not broadcast:
            terms.append(Term(node, path, scale, True, joins))
            continue
        if broadcast or (node in fixed and node is not root) or not reach(node):
            terms.append(Term(node, path, scale, False, joins))
            continue
        interior.add(node)
        inputs = reach.inputs(node)
        added = len(inputs) > 1
        for child, factor, step in reversed(inputs):
            if added and not same_shape(child, node):
                pending.append((child, path, scale * factor, node, True))
            else:
                below = path if step is None else (step, *path)
                pending.append((child, below, scale * factor, node if added else joins, False))
    return Sum(root, _joined(terms), frozenset(interior))


def _joined(terms: list[Term]) -> tuple[Term, ...]:
    """s + s is one term, 2 s: owed terms that differ in nothing but their scale, made one."""
    joined: list[Term] = []
    for term in terms:
        twin = next((i for i, t in enumerate(joined) if t.owed and t.leaf is term.leaf and t.steps == term.steps), None)
        if twin is None or not term.owed:
            joined.append(term)
        else:
            joined[twin] = replace(joined[twin], scale=joined[twin].scale + term.scale)
    return tuple(joined)


def _owed_below(root: fx.Node, owed: set[fx.Node], reach: _Reach) -> list[fx.Node]:
    """Every owed leaf of `root`, once."""
    found, pending, seen = [], [root], {root}
    while pending:
        node = pending.pop()
        if node in owed:
            found.append(node)
        elif reach(node):
            children = [child for child, _, _ in reach.inputs(node) if child not in seen]
            seen.update(children)
            pending += children
    return found


#: (input, the number it is multiplied by, the step to be repeated on it or None)
_Input = tuple[fx.Node, float, "Step | None"]


class _Reach:
    """Whether an owed leaf can be reached from a node over linear operators alone (memoised)."""

    def __init__(self, owed: set[fx.Node], fixed: set[fx.Node]):
        self.owed, self.fixed = owed, fixed
        self.known: dict[fx.Node, bool] = {}

    def __call__(self, node: fx.Node, depth: int = 64) -> bool:
        if node in self.known:
            return self.known[node]
        if node in self.owed:
            answer = True
        elif depth == 0:
            return False
        else:
            inputs = self.inputs(node, depth)
            answer = any(
                child not in self.fixed and (len(inputs) == 1 or same_shape(child, node)) and self(child, depth - 1)
                for child, _, _ in inputs
            )
        self.known[node] = answer
        return answer

    def inputs(self, node: fx.Node, depth: int = 64) -> list[_Input]:
        """The linear inputs of `node`; of a product, the one factor that carries an owed sum (two make no line)."""
        inputs = linear_inputs(node)
        if inputs:
            return inputs
        carrying: list[_Input] = [
            (child, 1.0, step)
            for child, step in gated_inputs(node)
            if child not in self.fixed and depth > 0 and self(child, depth - 1)
        ]
        return carrying if len(carrying) == 1 else []


def linear_inputs(node: fx.Node) -> list[_Input]:
    """The inputs of an operator that is linear whatever they hold; [] for others.

    Additions and multiplications by a number need no step of their own: the factor says all. Views and casts do.
    In-place operators are left to their own: they never count as linear here.
    """
    if node.op != "call_function" or node.target in ops.IN_PLACE_TWINS:
        return []
    args = node.args
    if node.target in ops.VIEWS | ops.SELECTIONS | ops.SPREADS | ops.CASTS:
        return [(args[0], 1.0, Step(node))] if args and isinstance(args[0], fx.Node) and is_float(node) else []
    if node.target in ops.ROW_SUMS:
        return [(input_node(node), 1.0, Step(node))] if _adds_whole_rows(node) else []
    if node.target in ops.COPIES:
        # copy(destination, source) is the source, in the destination's shape and dtype.
        source = args[1] if len(args) > 1 else None
        return [(source, 1.0, None)] if isinstance(source, fx.Node) and same_shape(node, source) else []
    if node.target is ops.aten.neg.default:
        return [(input_node(node), -1.0, None)] if is_float(node) else []
    if len(args) < 2:
        return []
    left, right = args[:2]
    if node.target in ops.ADDS or node.target in ops.SUBS:
        alpha = node.kwargs.get("alpha", 1)
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node) and is_number(alpha)) or not is_float(node):
            return []
        sign = -alpha if node.target in ops.SUBS else alpha
        # A side that would have to be broadcast may be a leaf, never a sum that is still owed: `_Reach` sees to it.
        return [(left, 1.0, None), (right, float(sign), None)]
    if node.target in ops.MULS and is_number(right) and isinstance(left, fx.Node):
        return [(left, float(right), None)]
    if node.target in ops.MULS and is_number(left) and isinstance(right, fx.Node):
        return [(right, float(left), None)]
    if node.target in ops.DIVS and is_number(right) and abs(right) > _SMALL and isinstance(left, fx.Node):
        return [(left, 1.0 / right, None)]
    return []


def _adds_whole_rows(node: fx.Node) -> bool:
    """Whether a sum or a mean over dimensions leaves the last one as it is, and the dtype."""
    rows = node.args[0] if node.args else None
    dims = node.args[1] if len(node.args) > 1 else None
    if not (isinstance(rows, fx.Node) and isinstance(dims, (list, tuple)) and dims and is_float(rows)):
        return False
    count = val(rows).dim()
    kept = all(isinstance(dim, int) and -count <= dim < count and dim % count != count - 1 for dim in dims)
    return kept and is_float(node) and val(node).dtype == val(rows).dtype


def gated_inputs(node: fx.Node) -> list[tuple[fx.Node, Step]]:
    """The inputs in which `node` is linear while its others are held: factors of a product, a masked value, rows that
    are added up with weights, rows in an order that a table tells.

    Of a product only inputs of the node's own shape: a sum is never broadcast before it is paid, that would send more.
    """
    if node.op != "call_function" or node.target in ops.IN_PLACE_TWINS or not is_float(node):
        return []
    if node.target is ops.aten.bmm.default:
        return _weighted_rows(node)
    positions: tuple[int, ...]
    if node.target in ops.MULS:
        positions = (0, 1)
    elif node.target in ops.DIVS or (node.target is ops.aten.masked_fill.Scalar and node.args[2:] == (0,)):
        positions = (0,)
    elif node.target is ops.aten.where.self:
        positions = tuple(p for p in (1, 2) if _is_zero(node.args[3 - p]))
    elif node.target in ops.PICKS and _keeps_rows_whole(node):
        positions = (0,)
    else:
        return []
    factors = [(node.args[position], Step(node, position)) for position in positions]
    return [(factor, step) for factor, step in factors if is_float(factor) and same_shape(factor, node)]


def _keeps_rows_whole(node: fx.Node) -> bool:
    """Whether what is put elsewhere are whole rows: a cyclic shift of windows, a permutation of tokens."""
    rows, table = node.args[:2]
    count = val(rows).dim() if is_float(rows) else 0  # type: ignore[arg-type]
    if node.target is ops.aten.roll.default:
        dims = node.args[2] if len(node.args) > 2 else ()
        return bool(dims) and all(isinstance(dim, int) and dim % count != count - 1 for dim in dims)  # type: ignore
    told = [at for at, index in enumerate(table) if index is not None]  # type: ignore[arg-type]
    return bool(told) and all(at < count - 1 and val(table[at]).dtype is not torch.bool for at in told)  # type: ignore


def _weighted_rows(node: fx.Node) -> list[tuple[fx.Node, Step]]:
    """Rows that are added up with a weight each, as an einsum over top-k experts is: the product with one vector for
    each matrix. Linear in the matrices, and fewer rows have to be summed over the ranks."""
    left, right = node.args[:2]
    if not is_float(left) or not is_float(right):
        return []
    if same_size(val(right).shape[2], 1) and not same_size(val(left).shape[1], 1):
        return [(left, Step(node, 0))]
    if same_size(val(left).shape[1], 1) and not same_size(val(right).shape[2], 1):
        return [(right, Step(node, 1))]
    return []


def _is_zero(node: object) -> bool:
    """Whether a node is a constant tensor of zeros."""
    if is_call(node, {ops.aten.full.default, ops.aten.full_like.default}):
        return bool(node.args[1] == 0)
    return is_call(node, ops.aten.scalar_tensor.default) and bool(node.args[0] == 0)
