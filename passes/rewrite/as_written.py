"""Fuse only what leaves everything that is sent as the program wrote it, in its order. Reads only.

Such a graph fits every peer that sends what its program wrote, fused or not: what the ranks of a group have that cannot
agree on more (`tpfuse.runtime.ballots`).
"""

from __future__ import annotations

from torch import fx

from ..facts.collectives import communicates_between
from ..facts.refusals import Code, Refusal
from ..plan.sites import Decisions, Plan
from ..plan.sites import plan as plan_sites
from ..recognise.sites import Recognition
from ..recognise.sums import decompose


def as_written(recognition: Recognition, rewrites: tuple[str, ...], why: str) -> Decisions:
    """The plans that change nothing of what is sent; the others are refused, with `why` in the reason."""
    decisions = plan_sites(recognition, tuple(name for name in rewrites if name != "merge_all_reduces"))
    kept: list[Plan] = []
    merged = Refusal(Code.AS_WRITTEN, f"it would be added to another all-reduce before it is sent, but {why}")
    refusals = [(owed, merged if r.code is Code.MERGE_OFF else r) for owed, r in decisions.refusals]
    for plan in decisions.plans:
        problem = _changes(plan)
        if problem:
            refusals += [(owed, Refusal(Code.AS_WRITTEN, f"{problem}, but {why}")) for owed in plan.paid]
        else:
            kept.append(plan)
    return Decisions(tuple(kept), tuple(refusals))


def _changes(plan: Plan) -> str:
    """What fusing would change of what is sent, or ''."""
    (owed,) = plan.paid
    if owed.collective.declared:
        return f"{owed.collective.declared} would no longer be what sums it up"
    total = decompose(plan.site.hidden, {owed.collective.result}, set())
    moves = owed.collective.kind != "reduce_scatter" and not total.owed[0].only_reshapes
    if owed.collective.reduce_op.lower() != "sum" or len(total.owed) > 1 or moves:
        return "it would be sent with what is done to it afterwards applied before"
    norm, residual = plan.site.norm, plan.site.residual_after if plan.post else None
    operands = [node for node in (norm.weight, norm.bias, norm.eps, residual) if isinstance(node, fx.Node)]
    # The fused operation stands behind the last of them.
    if communicates_between(owed.collective.node, max([plan.site.hidden, *operands])):
        return "it would be sent after a collective that follows it"
    return ""
