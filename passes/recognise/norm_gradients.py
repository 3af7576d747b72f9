"""Recognise: a gradient's collective, the backward of a norm that reads it, the addition of the residual's gradient.

    s = all-reduce or reduce-scatter of the gradient of a norm's output
    dx = backward of the norm (s) [+ the residual's gradient]

Where it stands is found by what it computes (rowwise.py), so no spelling is asked for. Reads only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tpfuse._torch_private import without_modes

from ..facts import aten_ops as ops
from ..facts.collectives import Collective
from ..facts.graph import (
    depends_on,
    input_node,
    is_call,
    is_float,
    is_number,
    last_dim,
    region_between,
    same_size,
    val,
    value,
)
from .known import Known
from .norms import Norm
from .rowwise import Rows
from .scattered import row_order, scattered_sum_problem
from .sums import Step, finer

_NEAR = 1e-9
#: How far above the operators that read a gradient the norm's statistics may stand.
_SEARCH = 8


@dataclass(frozen=True)
class Normed:
    """What the backward of a norm reads: the hidden states, the statistics where the graph has them, the weight; the
    bias, where the normed value is had back from `output`, what the norm gave."""

    kind: str
    hidden: fx.Node
    mean: fx.Node | None
    rstd: fx.Node | None
    weight: fx.Node | None
    bias: fx.Node | None
    weight_offset: float
    eps: float
    output: fx.Node


@dataclass(frozen=True)
class NormGradient:
    """`collective` finishes the gradient; after `steps` a norm's backward reads it. `out` is the gradient of the hidden
    states with `residuals` added; `weight` and `bias` are sums over this rank's rows, or None."""

    collective: Collective
    steps: tuple[Step, ...]
    norm: Normed
    out: fx.Node
    residuals: tuple[fx.Node, ...]
    weight: fx.Node | None
    bias: fx.Node | None

    @property
    def incoming(self) -> fx.Node:
        """The gradient as the norm's backward reads it."""
        return self.steps[-1].node if self.steps else self.collective.result

    @property
    def reads_output(self) -> bool:
        """Whether it is computed from what the norm gave, and not from the hidden states."""
        made = {node for node in (self.out, self.weight, self.bias) if node is not None}
        way = set[fx.Node]().union(*(region_between(node, {self.collective.result}) for node in made))
        read = {parent for node in way for parent in node.all_input_nodes} - way - {*self.residuals}
        return any(depends_on(node, {self.norm.output}) for node in read if node is not self.collective.result)


def find_norm_gradients(known: Known) -> tuple[list[NormGradient], dict[fx.Node, str]]:
    """(what was found, in graph order; why others are none, by the collective's node)."""
    norms = [read for norm in known.norms if (read := _read_by_backward(norm)) is not None]
    found: list[NormGradient] = []
    reasons: dict[fx.Node, str] = {}
    with without_modes():
        for collective in known.collectives:
            if collective.node not in known.backward or collective.kind not in ("all_reduce", "reduce_scatter"):
                continue
            gradient = _gradient(collective, norms, known.backward)
            if isinstance(gradient, NormGradient):
                found.append(gradient)
            elif gradient:
                reasons[collective.node] = gradient
    return found, reasons


# -- norms ------------------------------------------------------------------------------------------------------------


def _read_by_backward(norm: Norm) -> Normed | None:
    if norm.problem or not is_number(norm.eps):
        return None
    hidden = norm.source
    while is_call(hidden, ops.CASTS | (ops.VIEWS - ops.REORDERINGS)) and is_float(below := input_node(hidden)):
        if finer(val(below).dtype, val(hidden).dtype) or not same_size(last_dim(below), last_dim(hidden)):
            break
        hidden = below
    weight, bias = (None if vector is None else _base(vector) for vector in (norm.weight, norm.bias))
    eps, offset = float(norm.eps), norm.weight_offset
    return Normed(norm.kind, hidden, norm.mean, norm.rstd, weight, bias, offset, eps, norm.output)


def _base(vector: fx.Node) -> fx.Node:
    while is_call(vector, ops.CASTS | ops.VIEWS) and is_float(vector.args[0]):
        vector = input_node(vector)
    return vector


# -- one gradient -----------------------------------------------------------------------------------------------------


def _gradient(collective: Collective, norms: Sequence[Normed], backward: frozenset[fx.Node]) -> NormGradient | str:
    problem = collective.problem or (collective.kind == "reduce_scatter" and scattered_sum_problem(collective))
    if problem:
        return str(problem)
    if collective.reduce_op.lower() != "sum":
        return f"its reduce op is {collective.reduce_op!r}; in front of a norm's backward only 'sum' can be fused"
    steps = _steps(collective.result)
    if row_order(steps) is None or value(collective.result) is None or val(collective.result).dim() < 2:
        return ""
    incoming = steps[-1].node if steps else collective.result
    for norm in _near(incoming, norms):
        found = _of_norm(collective, steps, incoming, norm, backward)
        if found is not None:
            return found
    return ""


def _steps(result: fx.Node) -> tuple[Step, ...]:
    """The views behind a result, each read by the next alone."""
    steps: list[Step] = []
    node = result
    while len(node.users) == 1:
        (user,) = node.users
        if not is_call(user, ops.VIEWS) or not is_float(user):
            break
        steps.append(Step(user))
        node = user
    return tuple(steps)


def _near(incoming: fx.Node, norms: Sequence[Normed]) -> Iterable[Normed]:
    """The norms whose statistics or hidden states are read beside the gradient, nearest first."""
    below: list[fx.Node] = [incoming]
    seen = {incoming}
    for _ in range(_SEARCH):
        below = [user for node in below for user in node.users if user not in seen and user.op == "call_function"]
        seen.update(below)
    level = [parent for node in seen - {incoming} for parent in node.all_input_nodes if parent not in seen]
    above: dict[fx.Node, int] = {}
    for distance in range(_SEARCH):
        above.update((node, distance) for node in level if node not in above)
        level = [parent for node in level for parent in node.all_input_nodes if parent not in above]
    found = [(above[mark], i) for i, norm in enumerate(norms) if (mark := norm.rstd or norm.hidden) in above]
    return [norms[i] for _, i in sorted(found)]


def _of_norm(
    collective: Collective, steps: tuple[Step, ...], incoming: fx.Node, norm: Normed, backward: frozenset[fx.Node]
) -> NormGradient | None:
    rows = Rows(incoming)
    if rows.problem or rows.kind(norm.hidden) != "full":
        return None
    gradient, formula = rows.random(incoming), _formula(rows, norm)
    if gradient is None or formula is None:
        return None
    dx, dweight, dbias = formula(gradient)
    reached = _evaluate(rows, incoming, backward)
    outs = [
        (node, read)
        for node in reached
        if node.users and rows.kind(node) == "full" and (read := _residuals(rows, node, dx, reached)) is not None
    ]
    weight = next((node for node in reached if _is(rows, node, "vector", dweight)), None)
    bias = next((node for node in reached if _is(rows, node, "vector", dbias)), None)
    for out, read in reversed(outs):
        found = NormGradient(collective, steps, norm, out, read, weight, bias)
        if not _read_elsewhere(found, {node for node, _ in outs}):
            return found
    return None


def _formula(rows: Rows, norm: Normed) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None:
    """dy -> (dx, dweight, dbias), with the values of hidden states, statistics and weight given to `rows`."""
    h = rows.random(norm.hidden)
    if h is None:
        return None
    if norm.eps > 0:  # a row of which eps is no small part, or another eps would not be told apart
        h[0] *= norm.eps**0.5
    mean = h.mean(-1, keepdim=True) if norm.kind == "layer_norm" else None
    centred = h if mean is None else h - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps)
    for node, numbers in ((norm.mean, mean), (norm.rstd, rstd)):
        if node is not None and numbers is not None:
            if rows.kind(node) not in ("row", "flat"):
                return None
            rows.known[node] = numbers
    factor: Tensor | float = 1.0
    if norm.weight is not None:
        weight = rows.random(norm.weight)
        if weight is None or rows.kind(norm.weight) != "vector":
            return None
        factor = weight
    factor = factor + norm.weight_offset
    if norm.bias is not None and norm.bias not in rows.known:
        rows.random(norm.bias)
    n = centred * rstd

    def backward(dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g = dy * factor
        dx = g - n * (g * n).mean(-1, keepdim=True)
        if mean is not None:
            dx = dx - g.mean(-1, keepdim=True)
        return dx * rstd, (dy * n).sum(0, keepdim=True), dy.sum(0, keepdim=True)

    return backward


def _evaluate(rows: Rows, incoming: fx.Node, backward: frozenset[fx.Node]) -> dict[fx.Node, frozenset[fx.Node]]:
    """The nodes computed row by row from the gradient, in graph order, and which other given values each reads."""
    reached: dict[fx.Node, frozenset[fx.Node]] = {incoming: frozenset()}
    residuals: set[fx.Node] = set()
    pending = sorted(incoming.users)
    seen = set(pending)
    while pending:
        node = pending.pop(0)
        others = [parent for parent in node.all_input_nodes if parent not in reached]
        for other in others:
            given = other in rows.known if other in backward else rows.value(other) is not None
            if not given and not depends_on(other, {incoming}) and rows.random(other) is not None:
                residuals.add(other)
        if node.op != "call_function" or rows.value(node) is None:
            continue
        read = frozenset(other for other in others if other in residuals)
        reached[node] = read.union(*(reached[parent] for parent in node.all_input_nodes if parent in reached))
        pending += [user for user in node.users if user not in seen]
        seen.update(node.users)
        pending.sort()
    return reached


def _residuals(
    rows: Rows, node: fx.Node, dx: Tensor, reached: dict[fx.Node, frozenset[fx.Node]]
) -> tuple[fx.Node, ...] | None:
    """What `node` adds to the norm's gradient; None where it is something else."""
    numbers = rows.known[node]
    read = sorted(reached[node])
    if numbers is None or any(rows.kind(other) != "full" for other in read):
        return None
    expected = dx
    for other in read:
        added = rows.known[other]
        if added is None:
            return None
        expected = expected + added
    return tuple(read) if _close(numbers, expected) else None


def _is(rows: Rows, node: fx.Node, kind: str, expected: Tensor) -> bool:
    numbers = rows.known[node]
    return numbers is not None and rows.kind(node) == kind and _close(numbers, expected)


def _close(numbers: Tensor, expected: Tensor) -> bool:
    """Row by row: a row of small hidden states has a far larger gradient than the others."""
    if numbers.shape != expected.shape:
        return False
    return bool(((numbers - expected).norm(dim=-1) <= _NEAR * expected.norm(dim=-1)).all().item())


def _read_elsewhere(found: NormGradient, outs: set[fx.Node]) -> bool:
    """Whether something else reads a gradient that stands on the way to `out`."""
    result = {found.collective.result}
    way = region_between(found.out, result)
    return any(user not in way and user.users for node in way & outs - {found.out} for user in node.users)


__all__ = ["NormGradient", "Normed", "find_norm_gradients"]
