"""Plan: which rewrite a site gets, which of its sums it pays, and why the others are left. Pure Python.

No FX and no torch.distributed here: a plan is decided from the recognised facts alone, which are equal on all ranks
of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..facts.checkpoint import ASTRIDE
from ..facts.graph import value
from ..facts.refusals import Code, Refusal, refused
from ..recognise.sites import Owed, Recognition, Site

#: Lets large calls begin with their product. Every rank names it or none does, as with `batch_invariant`: it decides
#: which kernel runs.
OVERLAP = "overlap_all_reduce_norm"
#: Every rewrite there is. `rewrites=` of `plan` switches them off one by one.
REWRITES = (
    "all_reduce_norm",
    "merge_all_reduces",
    "all_reduce_post_norm",
    "share_attention_group",
    "scatter_dense",
    "gather_full_tp",
    "reduce_scatter_norm",
    "norm_gather",
    "norm_backward",
    "quantised_outputs",
    OVERLAP,
)
#: Those that are used only where they are asked for by name.
OPT_IN = ("norm_backward", "quantised_outputs", OVERLAP)
DEFAULT_REWRITES = tuple(name for name in REWRITES if name not in OPT_IN)
READ_ALONE = (
    "the norm reads the sum of it and of another all-reduce, and its own sum, or what that was added up to before, is "
    "read besides the norm, so the two cannot be one"
)
NO_MERGE = Refusal(Code.MERGE_OFF, "the rewrite merge_all_reduces is switched off")


@dataclass(frozen=True)
class Plan:
    """The rewrite chosen for one site: `rewrite` is its name, `paid` the sums that the fused operation takes over."""

    site: Site
    rewrite: str
    paid: tuple[Owed, ...]
    post: bool


@dataclass(frozen=True)
class Decisions:
    """The plans in graph order, and for every all-reduce of a site that stays the reason."""

    plans: tuple[Plan, ...]
    refusals: tuple[tuple[Owed, Refusal], ...]


def plan(recognition: Recognition, rewrites: tuple[str, ...] = REWRITES) -> Decisions:
    """Decide every site."""
    plans: list[Plan] = []
    refusals: list[tuple[Owed, Refusal]] = []
    for site in recognition.sites:
        refusals += site.left
        if site.problem is not None:
            refusals += [(owed, site.problem) for owed in site.owed]
            continue
        if site.astride:
            refusals += [(owed, ASTRIDE) for owed in site.owed]
            continue
        paid, left = _paid_together(site, "merge_all_reduces" in rewrites)
        # The fused operation has one residual: a sum that stays by itself needs it in front of the norm.
        post = site.add_after is not None and not left and "all_reduce_post_norm" in rewrites
        plain = f"{paid[0].collective.kind}_norm"
        rewrite = "merge_all_reduces" if len(paid) > 1 else "all_reduce_post_norm" if post else plain
        if paid[0].collective.kind == "reduce_scatter":
            rewrite = plain
        if rewrite not in rewrites:
            refusals += [(owed, _switched_off(rewrite)) for owed in site.owed]
            continue
        refusals += left
        plans.append(Plan(site, rewrite, paid, post))
    return Decisions(tuple(plans), tuple(refusals))


def _paid_together(site: Site, merge: bool) -> tuple[tuple[Owed, ...], list[tuple[Owed, Refusal]]]:
    """The sums one fused operation can pay: the last one of all the rows, and those that may be added to it before."""
    whole = [owed for owed in site.owed if not owed.spread]
    last = whole[0]
    for owed in whole:
        if last.collective.node < owed.collective.node:
            last = owed
    paid: list[Owed] = [last]
    left: list[tuple[Owed, Refusal]] = []
    for owed in site.owed:
        if owed is last:
            continue
        scattered = "reduce_scatter" in (owed.collective.kind, last.collective.kind)
        refusal = _cannot_join(owed, last) if merge or scattered else NO_MERGE
        if refusal is not None:
            left.append((owed, refusal))
        else:
            paid.append(owed)
    if len(paid) > 1 and last.used_alone:
        reason = "the norm reads the sum of it and of another all-reduce, whose sum is read besides the norm"
        return (last,), left + [(owed, Refusal(Code.APART, reason, last.reader)) for owed in paid[1:]]
    return tuple(paid), left


def _switched_off(rewrite: str) -> Refusal:
    return Refusal(Code.SWITCHED_OFF, f"the rewrite {rewrite} is switched off")


def _cannot_join(owed: Owed, last: Owed) -> Refusal | None:
    problem = refused(Code.APART, _unlike(owed, last))
    if problem is None and owed.used_alone:
        return Refusal(Code.APART, READ_ALONE, owed.reader)
    fed = "the other all-reduce that the norm reads is computed from this one" if last.fed_by_others else ""
    return problem or refused(Code.APART, fed)


def _unlike(owed: Owed, last: Owed) -> str:
    a, b = owed.collective, last.collective
    if "reduce_scatter" in (a.kind, b.kind):
        return f"the norm reads the sum of it and of another {b.kind}; where rows are scattered, one alone is fused"
    if any(str(sent.dtype) == "torch.float16" for c in (a, b) if (sent := value(c.input)) is not None):
        return (
            "the norm reads the sum of two all-reduces in float16, and adding them up before they are summed over the"
            " ranks could overflow where each sum does not; in bfloat16 they become one"
        )
    if a.ranks != b.ranks:
        return f"the norm reads the sum of two all-reduces over different ranks, {list(a.ranks)} and {list(b.ranks)}"
    if a.reduce_op.lower() != b.reduce_op.lower():
        return f"the norm reads the sum of all-reduces with reduce ops {a.reduce_op!r} and {b.reduce_op!r}"
    dtypes = {str(tensor.dtype) for c in (a, b) if (tensor := value(c.input)) is not None}
    if (owed.added_wider or last.added_wider) and len(dtypes) == 1:
        return (
            f"the norm reads the sum of two all-reduces in {dtypes.pop()} that are added in a wider dtype; as one they "
            "would be rounded once more on every rank before they are sent; added in their own dtype they become one"
        )
    return ""
