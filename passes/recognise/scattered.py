"""Sums that a reduce-scatter pays in front of a norm: each rank adds and normalises the rows it gets. Reads only.

Nothing moves in front of such a sum: what is scattered stays what the program scatters, and only what each rank does to
its own rows afterwards becomes one operation. So nothing that is read there has to be the same on other ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..facts import aten_ops as ops
from ..facts.collectives import Collective
from ..facts.graph import argument, input_node, is_call, last_dim, permutation, same_shape, same_size, val, why_unusual
from .sums import Step, Sum, Term

aten = ops.aten


def scattered_sum_problem(collective: Collective) -> str:
    """Why a reduce-scatter cannot become a part of an operation on its rows, or ''."""
    if collective.problem:
        return collective.problem
    if not str(collective.node.target).endswith("reduce_scatter_tensor.default"):
        return f"it is written as {collective.node.target}; only the functional reduce_scatter_tensor can be fused"
    if collective.reduce_op.lower() != "sum":
        return f"its reduce op is {collective.reduce_op!r}; of reduce-scatters only 'sum' can be fused"
    if collective.wait is None or any(user is not collective.wait for user in collective.node.users):
        return "its result is waited for more than once, or never"
    source = argument(collective.node, "input")
    problem = why_unusual(collective.wait, "its result") or why_unusual(source, "its input")
    if problem:
        return problem
    given, got = val(source), val(collective.wait)
    if given.dim() < 2 or given.dtype != got.dtype or not same_size(given.shape[-1], got.shape[-1]):
        return "what it scatters are no rows"
    return ""


def rows_problem(term: Term, total: Sum) -> str:
    """Why the rows of a scattered sum cannot be added to and normalised where they arrive, or ''."""
    if any(not step.moves_only for step in term.steps):
        step = next(step for step in term.steps if not step.moves_only)
        return f"{step.node.target} stands between the reduce-scatter and the norm"
    if row_order(term.steps) is None or not same_size(last_dim(term.leaf), last_dim(total.root)):
        return "the scattered rows are chosen from or rearranged before the norm, by more than one permutation"
    placed = term.steps[-1].node if term.steps else term.leaf
    if not same_shape(placed, total.root):
        return "the scattered rows are repeated before the norm"
    for other in total.replicated:
        joins = other.joins or total.root
        if not other.is_row_vector_of(total.root) and not same_shape(other.leaf, joins):
            return "a value is broadcast over the rows when it is added before the norm"
    return ""


def row_order(steps: Sequence[Step]) -> tuple[int, ...] | None:
    """By which permutation scattered rows become hidden states: () where they keep their order; None where they do not
    become them by a permutation of all dimensions but the last."""
    found = [step.node for step in steps if step.reshapes or is_call(step.node, ops.REORDERINGS)]
    if len(found) < len(steps):
        return None
    moves = [node for node in found if is_call(node, ops.REORDERINGS)]
    if not moves:
        keeps = all(same_size(last_dim(node), last_dim(input_node(node))) for node in found)
        return () if keeps else None
    if len(moves) > 1 or any(node not in moves and not same_shape(node, input_node(node)) for node in found):
        return None
    (move,) = moves
    order = permutation(move)
    return tuple(order) if order[-1:] == [len(order) - 1] else None


__all__ = ["row_order", "rows_problem", "scattered_sum_problem"]
