"""One verdict for every collective: fused, or the sentence that says why not. Reads only."""

from __future__ import annotations

from collections import deque

from torch import fx

from tpfuse.report import Boundary

from ..facts import aten_ops as ops
from ..facts.collectives import Collective, is_collective
from ..facts.graph import depends_on, same_shape, value
from ..plan.sites import Decisions, Plan
from ..recognise.norms import Norm
from ..recognise.sites import Recognition
from ..recognise.sums import gated_inputs, linear_inputs
from .names import boundary_kind, module_name
from .steps import dtype_and_hidden

#: What may stand between an all-reduce and a norm for the norm to count as fed by it: everything that works row by
#: row. Matrix products and collectives end the way.
_ENDS = ("mm", "addmm", "bmm", "linear", "matmul", "convolution", "embedding", "scaled_dot_product", "softmax", "sort")


def verdicts(recognition: Recognition, decisions: Decisions) -> list[Boundary]:
    """Boundaries in graph order. To be called before the graph is rewritten."""
    plans = {owed.collective.node: plan for plan in decisions.plans for owed in plan.paid}
    refused: dict[fx.Node, str] = {}
    for owed, reason in decisions.refusals:
        refused.setdefault(owed.collective.node, reason)  # the first norm's word counts
    norms_at = {norm.source: norm for norm in recognition.norms}
    norms_at |= {site.hidden: site.norm for site in recognition.sites}
    outputs = frozenset(norm.output for norm in recognition.norms)
    backward = recognition.backward
    return [
        _verdict(c, plans.get(c.node), refused.get(c.node, ""), norms_at, outputs, c.node in backward, bool(backward))
        for c in recognition.collectives
    ]


def _verdict(
    collective: Collective, plan: Plan | None, refused: str, norms_at: dict[fx.Node, Norm], outputs: frozenset[fx.Node],
    backward: bool, training: bool,
) -> Boundary:  # fmt: skip
    reached = _Reached() if backward else _reach(collective.result, norms_at)
    norm = plan.site.norm if plan is not None else reached.norm if reached.product is None else None
    consumer = None if backward else (norm.output if norm is not None else collective.result)
    dtype, hidden = dtype_and_hidden(collective.input)
    return Boundary(
        kind=boundary_kind(collective.node, consumer, outputs),
        module=module_name(collective.node),
        collective=collective.kind,
        group=collective.ranks or (),
        norm=norm.kind if norm is not None else None,
        rewrite=plan.rewrite if plan is not None else None,
        fused=plan is not None,
        reason="" if plan is not None else _reason(collective, refused, reached, backward, training),
        direction="backward" if backward else "forward",
        feeds_norm=norm is not None,
        dtype=dtype,
        hidden=hidden,
    )


class _Reached:
    """Where the result of a collective goes: the first norm, what stood in the way of it, the graph's end.

    `product`: an operator that mixes units or rows, reads the result, and has a say in what that norm reads: the sum
    has to be finished before, so the norm is not fed by it (an embedding whose residual ends in a later norm).
    """

    def __init__(self) -> None:
        self.norm: Norm | None = None
        self.obstacle: fx.Node | None = None
        self.product: fx.Node | None = None
        self.returned = False


def _reach(start: fx.Node, norms_at: dict[fx.Node, Norm], limit: int = 400) -> _Reached:
    """Follow `start` forwards over row-wise operators."""
    reached = _Reached()
    ends: list[fx.Node] = []
    seen = {start}
    pending: deque[tuple[fx.Node, fx.Node | None]] = deque([(start, None)])
    while pending and len(seen) < limit:
        node, obstacle = pending.popleft()
        if node in norms_at:
            reached.norm, reached.obstacle = norms_at[node], obstacle
            reached.product = next((end for end in ends if depends_on(node, {end})), None)
            return reached
        for user in node.users:
            if user.op == "output":
                reached.returned = True
                continue
            if user in seen:
                continue
            if is_collective(user) or _ends(user):
                ends.append(user)
                continue
            seen.add(user)
            linear = any(child is node for child, *_ in [*linear_inputs(user), *gated_inputs(user)])
            in_the_way = None if linear else user
            pending.append((user, obstacle or in_the_way))
    return reached


def _ends(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", str(node.target))
    val = value(node)
    return any(name.startswith(word) for word in _ENDS) or (val is not None and val.dtype not in ops.FLOATS)


def _spreads(node: fx.Node, result: fx.Node) -> bool:
    """Whether `node` repeats what it reads along a dimension that `result` does not have."""
    if value(node) is None or value(result) is None or value(node).dim() <= value(result).dim():
        return False
    return any(value(n) is not None and not same_shape(n, node) for n in node.all_input_nodes)


def _reason(collective: Collective, refused: str, reached: _Reached, backward: bool, training: bool) -> str:
    if collective.problem:
        return collective.problem
    if refused and reached.product is None:
        return refused
    if backward:
        return "it belongs to the backward pass, where no norm follows it and no other all-reduce is added to it alone"
    if collective.kind == "reduce_scatter" and training and reached.norm is not None and reached.product is None:
        return "it is a reduce-scatter in a training graph; those are fused with their norm in inference graphs only"
    if collective.kind != "all_reduce":
        return f"it is no all-reduce before a norm, and no rewrite applies to this {collective.kind}"
    if reached.product is not None:
        return (
            f"{reached.product.target} in {module_name(reached.product) or 'the graph'} reads the all-reduced value "
            "before any norm does, so the sum has to be finished by itself"
        )
    if reached.norm is not None:
        if reached.obstacle is not None and _spreads(reached.obstacle, collective.result):
            return (
                f"{reached.obstacle.target} spreads the all-reduced value over another dimension before the norm; more "
                "would be sent if the sum were taken afterwards, so it is finished first"
            )
        if reached.obstacle is not None:
            return (
                f"{reached.obstacle.target} stands between the all-reduce and the norm; only views, casts, additions, "
                "multiplications and sums of rows are looked through"
            )
        return reached.norm.problem or "the norm that reads it takes over another all-reduce"
    if reached.returned:
        return (
            "the all-reduced value is returned from the graph before any norm: the norm of the next block is in another"
            " compiled graph; compile the whole model instead of each block"
        )
    return "no norm reads the all-reduced value"
