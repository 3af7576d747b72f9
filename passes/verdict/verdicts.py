"""One verdict for every collective: fused, or the sentence that says why not. Reads only."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from tpfuse.report import Boundary

from ..facts.collectives import Collective
from ..facts.refusals import Refusal
from ..plan.sites import Decisions, Plan
from ..recognise.norms import Norm
from ..recognise.sites import Recognition
from .names import boundary_kind, module_name
from .reach import Reached, reach
from .reasons import reason_for
from .steps import dtype_and_hidden


def verdicts(recognition: Recognition, decisions: Decisions) -> list[Boundary]:
    """Boundaries in graph order. To be called before the graph is rewritten."""
    plans = {owed.collective.node: plan for plan in decisions.plans for owed in plan.paid}
    refused: dict[fx.Node, Refusal] = {}
    for owed, refusal in decisions.refusals:
        refused.setdefault(owed.collective.node, refusal)  # the first norm's word counts
    sites: dict[fx.Node, list[Norm]] = {}
    for site in recognition.sites:
        for owed in (*site.owed, *(each for each, _ in site.left)):
            sites.setdefault(owed.collective.node, []).append(site.norm)
    norms_at = {norm.source: norm for norm in recognition.norms}
    norms_at |= {site.hidden: site.norm for site in recognition.sites}
    outputs = frozenset(norm.output for norm in recognition.norms)
    backward = recognition.backward
    return [
        _verdict(c, plans.get(c.node), refused.get(c.node), sites.get(c.node, []), norms_at, outputs, backward)
        for c in recognition.collectives
    ]


def _verdict(
    collective: Collective, plan: Plan | None, refused: Refusal | None, sites: Sequence[Norm],
    norms_at: dict[fx.Node, Norm], outputs: frozenset[fx.Node], gradients: frozenset[fx.Node],
) -> Boundary:  # fmt: skip
    """`sites`: the norms that could have taken the sum over, whose word `refused` is."""
    backward = collective.node in gradients
    reached = Reached() if backward else reach(collective.result, norms_at, gradients)
    norm = plan.site.norm if plan is not None else reached.norm if reached.product is None else None
    consumer = None if backward else (norm.output if norm is not None else collective.result)
    kind = boundary_kind(collective.node, consumer, outputs, gradients)
    dtype, hidden = dtype_and_hidden(collective.input)
    if refused is not None and _stands_before(reached, sites):
        refused = None
    why = None if plan is not None else reason_for(collective, refused, reached, gradients)
    return Boundary(
        kind=kind if norm is not None or not kind.endswith("final_norm") else "unknown",
        module=module_name(collective.node),
        collective=collective.kind,
        group=collective.ranks or (),
        norm=norm.kind if norm is not None else None,
        rewrite=plan.rewrite if plan is not None else None,
        fused=plan is not None,
        reason=why.sentence if why is not None else "",
        code=why.code.value if why is not None else "",
        direction="backward" if backward else "forward",
        feeds_norm=norm is not None or reached.feeds_norm,
        dtype=dtype,
        hidden=hidden,
    )


def _stands_before(reached: Reached, sites: Sequence[Norm]) -> bool:
    """Whether a norm in front of all of `sites` reads the sum over an operator that is not looked through: what is said
    of the sum is then said of that norm."""
    first = reached.norm
    if first is None or reached.obstacle is None or first in sites:
        return False
    return all(first.output < norm.output for norm in sites)
