"""Recognise: collectives, norms, and the sites where a norm reads an owed sum. Reads the graph, changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from ..facts import aten_ops as ops
from ..facts.checkpoint import is_astride, is_checkpointed
from ..facts.collectives import Collective, communicates_between
from ..facts.graph import (
    depends_on,
    input_node,
    is_call,
    is_float,
    last_dim,
    region_between,
    same_shape,
    same_size,
    val,
    value,
    why_unusual,
)
from ..facts.refusals import Code, Refusal, refused
from .divergence import Parting, differs_between_ranks, find_partings, moved_by_number
from .hazards import Hazards
from .norms import Norm
from .range import overflow, rounded_more
from .scattered import rows_problem, scattered_sum_problem
from .sums import Sum, Term, decompose
from .terms import terms_problem

ONE_OF_TWO = "only one of the two could be had from a fused operation"


@dataclass(frozen=True)
class Owed:
    """One all-reduce a norm reads, with what decides whether it can be summed together with others.

    `reader`: what besides this norm's own addition reads this sum by itself, or what it was added up to on the way; in
    the forward pass where something there does; None where nothing does.
    `fed_by_others`: its partial input is computed from another of the site's sums, so that one must be paid first.
    `added_wider`: it is added up in a finer dtype than it is sent in, and not rounded to that again.
    `spread`: it has fewer rows than what the norm reads, and is repeated: it is sent with another sum or by itself.
    """

    collective: Collective
    reader: fx.Node | None
    fed_by_others: bool
    added_wider: bool = False
    spread: bool = False

    @property
    def used_alone(self) -> bool:
        return self.reader is not None


@dataclass(frozen=True)
class Site:
    """A norm over `hidden` = all-reduced sums + replicated addends; `problem` says why it cannot be fused, if so.

    `left`: sums that the norm reads as well and that have to be finished by themselves, each with the reason.
    `add_after` is the addition of a residual to the normed value (post-norm models), `residual_after` that residual.
    `astride`: in a graph that is still to be split into forward and backward, an activation checkpoint treats parts of
    the boundary differently.
    """

    norm: Norm
    hidden: fx.Node
    owed: tuple[Owed, ...]
    add_after: fx.Node | None = None
    residual_after: fx.Node | None = None
    problem: Refusal | None = None
    astride: bool = False
    left: tuple[tuple[Owed, Refusal], ...] = ()

    def out(self, post: bool) -> fx.Node:
        """The node whose value a fused operation computes; `post`: it takes in the addition behind the norm."""
        return self.add_after if post and self.add_after is not None else self.norm.output


@dataclass(frozen=True)
class Recognition:
    """All that was found in one graph, in graph order."""

    collectives: tuple[Collective, ...]
    norms: tuple[Norm, ...]
    sites: tuple[Site, ...]
    backward: frozenset[fx.Node] = field(default_factory=frozenset)


@dataclass
class _Known:
    """What is known of the graph when a norm is looked at.

    eligible: results of the all-reduces that are still owed. parting: where ranks differ. fixed: hidden states of
    sites before this one; unfused: of those whose sums cannot be. A later norm takes both as they are.
    """

    eligible: dict[fx.Node, Collective]
    hazards: Hazards
    parting: Parting
    fixed: set[fx.Node] = field(default_factory=set)
    unfused: set[fx.Node] = field(default_factory=set)


def recognise(
    graph: fx.Graph,
    collectives: Sequence[Collective],
    norms: Sequence[Norm],
    backward: frozenset[fx.Node],
    hazards: Hazards | None,
    training: bool = False,
) -> Recognition:
    """Pair up the collectives and norms of `graph` (`known.Known` finds all that is asked for here). `training`: a
    reduce-scatter is fused with its norm where it stands; in inference the layout of the rows is decided first.

    Sites come in graph order, and each all-reduce belongs to the first norm that reads it: later norms see the
    residual stream that this one hands on.
    """
    if hazards is None or not norms:
        return Recognition(tuple(collectives), (), (), backward)
    eligible = {c.result: c for c in collectives if c.kind == "all_reduce" and not c.problem}
    if training:
        scattered = (c for c in collectives if c.kind == "reduce_scatter" and c.node not in backward)
        eligible |= {c.result: c for c in scattered if not scattered_sum_problem(c)}
    known = _Known(eligible, hazards, find_partings(collectives))
    to_be_split = bool(backward) and is_checkpointed(graph)
    sites: list[Site] = []
    for norm in norms:
        site = _site(norm, known)
        if site is None:
            continue
        if to_be_split:
            site = replace(site, astride=is_astride(_replaced_by_fusing(site)))
        sites.append(site)
        if norm.problem:  # another norm may still take over the sums
            continue
        if site.problem:
            known.unfused.add(site.hidden)
        else:
            for owed in site.owed:  # paid once
                eligible.pop(owed.collective.result, None)
            known.fixed.add(site.hidden)
    return Recognition(tuple(collectives), tuple(norms), tuple(sites), backward)


# -- one site ---------------------------------------------------------------------------------------------------------


def _site(norm: Norm, known: _Known) -> Site | None:
    hidden = hidden_of(norm, set(known.eligible))
    site = _site_over(hidden, norm, known)
    if site is None or site.problem is None:
        return site
    # The norm of chosen rows is chosen from the norm of all: worth it where all of them are summed in any case.
    whole = _before_choice(hidden, site)
    wider = _site_over(whole, norm, known) if whole is not None else None
    return wider if wider is not None and wider.problem is None else site


def _before_choice(hidden: fx.Node, site: Site) -> fx.Node | None:
    """What the norm's rows are chosen from, where the sum of all of them is read as well."""
    if site.norm.source is not hidden or not any(owed.used_alone for owed in site.owed):
        return None
    node = hidden
    while is_call(node, ops.SELECTIONS):
        below, dim = input_node(node), node.args[1] if len(node.args) > 1 else 0
        count = val(below).dim()
        if not isinstance(dim, int) or dim % count == count - 1 or not same_size(last_dim(below), last_dim(node)):
            return None
        node = below
    return node if node is not hidden else None


def _site_over(hidden: fx.Node, norm: Norm, known: _Known) -> Site | None:
    owed = known.eligible
    if hidden in known.fixed:
        return None
    left: list[tuple[Owed, Refusal]] = []
    while True:
        waits = set(owed) - {alone.collective.result for alone, _ in left}
        total = decompose(hidden, waits, known.fixed | (known.unfused - {hidden}))
        if not total.owed:
            return None
        site = Site(norm, hidden, tuple(_owed(term, total, owed) for term in _one_term_each(total)))
        stuck = _stuck(site, total, known.parting)
        if not stuck or len(stuck) == len(site.owed):
            break
        left += stuck
    sent = max(owed[term.leaf].node for term in total.owed)
    add_after, residual_after = _add_after(norm, total, sent)
    site = replace(site, add_after=add_after, residual_after=residual_after, left=tuple(left))
    problem = (
        refused(Code.NORM, norm.problem)
        or refused(Code.BETWEEN, total.problem)
        or site_problem(site, total, stuck)
        or refused(Code.MOVES_PAST, _hazard(site, total, known.hazards))
    )
    return replace(site, problem=problem)


def hidden_of(norm: Norm, owed: set[fx.Node]) -> fx.Node:
    """The residual stream's node: the norm's source without the views and casts on top that keep its last dimension."""
    node = norm.source
    while node not in owed and is_call(node, ops.VIEWS | ops.CASTS) and isinstance(node.args[0], fx.Node):
        below = node.args[0]
        if not is_float(below) or not same_size(last_dim(below), last_dim(node)):
            break
        if is_call(node, ops.REORDERINGS):  # may move rows about; the hidden states are taken above it
            break
        node = below
    return node


def _replaced_by_fusing(site: Site) -> set[fx.Node]:
    results = {owed.collective.result for owed in site.owed}
    nodes = region_between(site.add_after or site.norm.output, results) | results
    return nodes | {owed.collective.node for owed in site.owed}


def _one_term_each(total: Sum) -> list[Term]:
    seen: dict[fx.Node, Term] = {}
    for term in total.owed:
        seen.setdefault(term.leaf, term)
    return list(seen.values())


def _owed(term: Term, total: Sum, owed: dict[fx.Node, Collective]) -> Owed:
    collective = owed[term.leaf]
    others = {other.leaf for other in total.owed} - {term.leaf}
    inside = set(total.interior)
    # A node between this sum and the total that something else reads is a use of this sum by itself, too.
    read = {term.leaf, *_between(term.leaf, inside)} - {total.root}
    reader = min((user for node in read for user in node.users if user not in inside), default=None)
    added_wider = term.joins is not None and term.stays_wider(term.joins, total.root)
    return Owed(collective, reader, depends_on(collective.input, others), added_wider, term.spreads)


def _between(leaf: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = [leaf]
    while pending:
        for user in pending.pop().users:
            if user in inside and user not in found:
                found.add(user)
                pending.append(user)
    return found


def _add_after(norm: Norm, total: Sum, sent: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The residual addition behind the norm, if the normed value goes there and nowhere else, and the residual is there
    before anything is sent after `sent`, the last of the sums: of two norms that are added up the later one adds."""
    if total.replicated or len(norm.output.users) != 1:
        return None, None
    (user,) = norm.output.users
    if not is_call(user, ops.ADDS) or len(user.args) < 2 or user.kwargs.get("alpha", 1) != 1:
        return None, None
    left, right = user.args[:2]
    residual = right if left is norm.output else left
    if not isinstance(residual, fx.Node) or residual is norm.output:
        return None, None
    if not (same_shape(residual, user) and same_shape(norm.output, user) and same_shape(user, total.root)):
        return None, None
    if not is_float(residual) or not is_float(user):
        return None, None
    if depends_on(residual, {term.leaf for term in total.owed}) or communicates_between(sent, residual):
        return None, None
    return user, residual


# -- what stands in the way -------------------------------------------------------------------------------------------


def site_problem(site: Site, total: Sum, stuck: Sequence[tuple[Owed, Refusal]]) -> Refusal | None:
    """Why the site cannot be fused whatever the plan, or None. `stuck`: as of `_stuck`."""
    hidden, norm = site.hidden, site.norm
    leaves = {term.leaf for term in total.owed}
    problem = refused(Code.VALUES, _values_problem(site, total)) or terms_problem(hidden, norm, total)
    if problem is not None:
        return problem
    if stuck:
        return stuck[0][1]
    for term in total.replicated:
        if depends_on(term.leaf, leaves):
            said = f"a value that is added before the norm ({term.leaf.target}) is itself computed from the all-reduced"
            mean = "where it is the mean of the rows' units, nn.LayerNorm in its place is fused"
            return Refusal(Code.DEPENDS, f"{said} sum; {mean}")
    for role, vector in (("weight", norm.weight), ("bias", norm.bias)):
        if vector is None:
            continue
        if value(vector) is None or not same_size(last_dim(vector), last_dim(hidden)):
            return Refusal(Code.NORM, f"the norm's {role} is not one value per hidden unit")
        if depends_on(vector, leaves):
            return Refusal(Code.DEPENDS, f"the norm's {role} is computed from the all-reduced sum")
    if isinstance(norm.eps, fx.Node) and depends_on(norm.eps, leaves):
        return Refusal(Code.DEPENDS, "the norm's eps is computed from the all-reduced sum")
    return None


def _stuck(site: Site, total: Sum, parting: Parting) -> list[tuple[Owed, Refusal]]:
    """The sums whose gates and selections may not move before the all-reduce, each with the reason."""
    leaves = {term.leaf for term in total.owed}
    by_leaf = {owed.collective.result: owed for owed in site.owed}
    found: dict[fx.Node, tuple[Owed, Refusal]] = {}
    for term in total.owed:
        owed = by_leaf[term.leaf]
        if owed.collective.kind == "reduce_scatter":
            refusal = refused(Code.BETWEEN, rows_problem(term, total))
        else:
            refusal = _spread_alone(owed, site.owed)
            refusal = refusal or _step_problem(term, owed, leaves, parting)
            refusal = refusal or refused(Code.ROUNDING, rounded_more(term, total.root))
        if refusal is not None:
            found.setdefault(term.leaf, (owed, refusal))
    return list(found.values())


def _spread_alone(owed: Owed, others: Sequence[Owed]) -> Refusal | None:
    """Repeated rows are sent only where a sum of all the rows is sent with them, and does not wait for theirs."""
    alone = owed.spread and (owed.fed_by_others or all(other.spread for other in others))
    return refused(Code.SPREADS, "the all-reduced value is repeated before the norm" if alone else "")


def _step_problem(term: Term, owed: Owed, leaves: set[fx.Node], parting: Parting) -> Refusal | None:
    for gate, at in ((gate, step.node) for step in term.gates for gate in step.others):
        if depends_on(gate, leaves):
            said = "the all-reduced sum is multiplied by a value that is itself computed from that sum"
            return Refusal(Code.DEPENDS, said, at)
        what = differs_between_ranks(gate, owed.collective.ranks, parting)
        if what:
            return Refusal(Code.RANKS, f"the all-reduced sum is multiplied by {what}")
    if numbered := moved_by_number((node for step in term.steps for node in step.others), parting):
        return Refusal(Code.RANKS, numbered)
    overflows = overflow(term)
    if overflows:
        return Refusal(Code.ROUNDING, overflows)
    if owed.used_alone and not term.only_reshapes:
        step = next(step for step in term.steps if not step.reshapes)
        return Refusal(
            Code.USED_TWICE,
            f"{step.node.target} stands between the all-reduce and the norm, and the sum before it is read as well; "
            f"{ONE_OF_TWO}",
            step.node,
            owed.reader,
        )
    return None


def _values_problem(site: Site, total: Sum) -> str:
    """Whether every tensor that the fused operation reads or gives is a plain one, on one device."""
    norm, hidden = site.norm, site.hidden
    out = site.add_after if site.add_after is not None else norm.output
    named = [("the hidden states", hidden), ("the normed value", out), ("the norm's input", norm.source)]
    named += [("the all-reduce's input", owed.collective.input) for owed in site.owed]
    named += [("a value that is added before the norm", term.leaf) for term in total.replicated]
    vectors = (("the norm's weight", norm.weight), ("the norm's bias", norm.bias))
    named += [(what, node) for what, node in (*vectors, ("the residual", site.residual_after)) if node is not None]
    stream = value(hidden)
    device = stream.device if stream is not None else None
    for what, node in named:
        problem = why_unusual(node, what)
        if problem:
            return problem
        if val(node).device != device:
            return f"{what} is on {val(node).device}, and the hidden states are on {device}"
    if isinstance(norm.eps, fx.Node) and value(norm.eps) is None:
        return "the norm's eps is computed in the graph and is no tensor"
    if val(hidden).dim() == 0:
        return "the hidden states are a single number and have no dimension to normalise"
    for node in total.interior:
        if any("val" not in parent.meta for parent in node.all_input_nodes):
            return f"an input of {node.target} has no fake value (meta['val'])"
    if not same_shape(out, norm.source):
        return "the normed value has another shape than what is normalised"
    return ""


def _hazard(site: Site, total: Sum, hazards: Hazards) -> str:
    """What stands between the all-reduce and the norm that reads may not be moved past."""
    norm = site.norm
    read = [owed.collective.input for owed in site.owed]
    read += [*(term.leaf for term in total.replicated), *total.gates]
    read += [node for node in (norm.weight, norm.bias, norm.eps, site.residual_after) if isinstance(node, fx.Node)]
    paid = {owed.collective.result for owed in site.owed}
    out = site.add_after if site.add_after is not None else norm.output
    return hazards.problem(read, paid, {*total.interior, site.hidden}, out, max(out, norm.output))


__all__ = ["Owed", "Recognition", "Site", "recognise"]
