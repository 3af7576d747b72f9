"""Write a value as a sum of terms, each a leaf followed by linear steps. Reads only.

Between the partial producer and the norm there may be views, casts, scalars, biases and replicated addends. All of
them are linear, so the value h that a norm reads is

    h = sum_i path_i(all_reduce(x_i)) + sum_j path_j(r_j)

with every path a chain of views, casts and multiplications by numbers. `decompose` finds the terms.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from . import aten_ops as ops
from .graph import is_call, is_number, same_shape, value


@dataclass(frozen=True)
class Term:
    """`leaf`, then `path` from the leaf towards the sum: the nodes applied one after another.

    `scale` is the product of the numbers on the way; `owed` says that the leaf is a finished all-reduce which the
    fused operation could perform itself; `joins` is the addition the leaf enters by, to whose shape it broadcasts.
    """

    leaf: fx.Node
    path: tuple[fx.Node, ...]
    scale: float
    owed: bool
    joins: fx.Node | None = None

    @property
    def views(self) -> tuple[fx.Node, ...]:
        """The views on the path, in the order in which they apply. Casts are left out: the fused operation computes
        in float32 and rounds once, at the end."""
        return tuple(node for node in self.path if is_call(node, ops.VIEWS))


@dataclass(frozen=True)
class Sum:
    """`root` as a sum of terms; `interior` are the nodes between the leaves and the root, the root included."""

    root: fx.Node
    terms: tuple[Term, ...]
    interior: frozenset[fx.Node]

    @property
    def owed(self) -> tuple[Term, ...]:
        return tuple(term for term in self.terms if term.owed)

    @property
    def replicated(self) -> tuple[Term, ...]:
        return tuple(term for term in self.terms if not term.owed)


def decompose(root: fx.Node, owed: set[fx.Node], fixed: set[fx.Node]) -> Sum:
    """The terms of `root`.

    `owed`: results of all-reduces that may be taken apart; `fixed`: nodes to take as leaves whatever they are (the
    residual streams of norms already planned). A subtree without an owed leaf is one leaf.
    """
    reach = _Reach(owed, fixed)
    interior: set[fx.Node] = set()
    terms: list[Term] = []

    def walk(node: fx.Node, path: tuple[fx.Node, ...], scale: float, joins: fx.Node | None) -> None:
        if node in owed and node not in fixed:
            terms.append(Term(node, path, scale, True, joins))
            return
        if (node in fixed and node is not root) or not reach(node):
            terms.append(Term(node, path, scale, False, joins))
            return
        interior.add(node)
        inputs = linear_inputs(node)
        for child, factor, is_step in inputs:
            if len(inputs) > 1 and not same_shape(child, node):
                terms.append(Term(child, path, scale * factor, False, node))
            else:
                walk(child, (node, *path) if is_step else path, scale * factor, node if len(inputs) > 1 else joins)

    walk(root, (), 1.0, None)
    return Sum(root, tuple(terms), frozenset(interior))


class _Reach:
    """Whether an owed leaf can be reached from a node over linear operators alone (memoised)."""

    def __init__(self, owed: set[fx.Node], fixed: set[fx.Node]):
        self.owed, self.fixed, self.known = owed, fixed, {}

    def __call__(self, node: fx.Node, depth: int = 64) -> bool:
        if node in self.known:
            return self.known[node]
        if node in self.owed:
            answer = True
        elif depth == 0:
            return False
        else:
            inputs = linear_inputs(node)
            answer = any(
                child not in self.fixed and (len(inputs) == 1 or same_shape(child, node)) and self(child, depth - 1)
                for child, _, _ in inputs
            )
        self.known[node] = answer
        return answer


def linear_inputs(node: fx.Node) -> list[tuple[fx.Node, float, bool]]:
    """(input, factor, whether the step itself must be repeated on that input) of a linear operator; [] for others.

    Additions and multiplications by a number need no step of their own: the factor says all. Views and casts do.
    In-place operators are left to their own: they never count as linear here.
    """
    if node.op != "call_function" or node.target in ops.IN_PLACE_TWINS:
        return []
    args = node.args
    if node.target in ops.VIEWS or node.target in ops.CASTS:
        return [(args[0], 1.0, True)] if args and isinstance(args[0], fx.Node) and _is_float(node) else []
    if node.target in ops.COPIES:
        # copy(destination, source) is the source, in the destination's shape and dtype.
        source = args[1]
        return [(source, 1.0, False)] if isinstance(source, fx.Node) and same_shape(node, source) else []
    if node.target is ops.aten.neg.default:
        return [(args[0], -1.0, False)]
    if len(args) < 2:
        return []
    left, right = args[:2]
    if node.target in ops.ADDS or node.target in ops.SUBS:
        alpha = node.kwargs.get("alpha", 1)
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node) and is_number(alpha)) or not _is_float(node):
            return []
        sign = -alpha if node.target in ops.SUBS else alpha
        # A side that would have to be broadcast may be a leaf, never a sum that is still owed: `_Reach` sees to it.
        return [(left, 1.0, False), (right, float(sign), False)]
    if node.target in ops.MULS and is_number(right) and isinstance(left, fx.Node):
        return [(left, float(right), False)]
    if node.target in ops.MULS and is_number(left) and isinstance(right, fx.Node):
        return [(right, float(left), False)]
    if node.target in ops.DIVS and is_number(right) and right != 0 and isinstance(left, fx.Node):
        return [(left, 1.0 / right, False)]
    return []


def _is_float(node: fx.Node) -> bool:
    val = value(node)
    return val is not None and val.dtype in ops.FLOATS
