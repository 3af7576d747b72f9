"""Recognise: a norm of rows that are a rank's own, and the gather of what it gives, with no sum in front of it.

    y = norm(h)                       gathered = all-gather of y

The first norm of a sequence-parallel model whose embedding is whole on every rank, and of a block that is compiled by
itself. Between the two are views that keep the order of the rows, or a permutation that puts another dimension of them
first. Reads only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import fx

from ..facts import aten_ops as ops
from ..facts.checkpoint import ASTRIDE, is_astride, is_checkpointed
from ..facts.collectives import Collective, communicates_between
from ..facts.graph import (
    input_node,
    is_call,
    is_float,
    last_dim,
    region_between,
    same_size,
    val,
)
from ..facts.refusals import Code, Refusal, refused
from .gathers import arranged, is_plain_gather, is_waited_for_alone
from .known import Known
from .norms import Norm
from .sites import Site, site_problem
from .sums import decompose, finer


@dataclass(frozen=True)
class NormGather:
    """`collective` gathers what `norm` gives, seen through `views`, the last one first, which put the dimensions of its
    rows into this `order`; (): they keep theirs. `hidden` is what is normed, seen through `shapes`."""

    norm: Norm
    hidden: fx.Node
    shapes: tuple[fx.Node, ...]
    views: tuple[fx.Node, ...]
    order: tuple[int, ...]
    collective: Collective

    @property
    def operands(self) -> list[fx.Node]:
        """What one operation for both reads."""
        norm = self.norm
        return [node for node in (self.hidden, norm.weight, norm.bias, norm.eps) if isinstance(node, fx.Node)]

    @property
    def region(self) -> set[fx.Node]:
        """The nodes of the norm, and the views in front of it."""
        return region_between(self.norm.output, {self.hidden})


def find_norm_gathers(known: Known) -> tuple[list[NormGather], dict[fx.Node, Refusal]]:
    """(those that can be one operation, in graph order and at most one of a norm; why others cannot, by the gather)."""
    norms = {norm.output: norm for norm in known.norms if norm.output not in known.backward}
    waiting = _waiting(known)
    found: list[NormGather] = []
    reasons: dict[fx.Node, Refusal] = {}
    for collective in known.collectives if norms else ():
        gather = _gather(collective, norms, known.backward)
        if gather is None:
            continue
        problem = ASTRIDE if gather.norm.output in waiting else _problem(gather, known)
        if problem is not None:
            reasons[collective.node] = problem
        else:
            del norms[gather.norm.output]
            found.append(gather)
    return found, reasons


def _waiting(known: Known) -> set[fx.Node]:
    """Outputs of the norms that are to be fused with a sum once the graph is split."""
    if not known.backward or not is_checkpointed(known.graph):
        return set()
    return {site.norm.output for site in known.recognition.sites if site.astride and site.problem is None}


def _gather(collective: Collective, norms: Mapping[fx.Node, Norm], backward: Collection[fx.Node]) -> NormGather | None:
    if not is_plain_gather(collective) or not is_waited_for_alone(collective) or collective.node in backward:
        return None
    node, views = collective.input, list[fx.Node]()
    while node not in norms and is_call(node, ops.VIEWS) and is_float(node.args[0]):
        views.append(node)
        node = input_node(node)
    norm = norms.get(node)
    arrangement = None if norm is None else arranged(node, views[::-1])
    if norm is None or arrangement is None:
        return None
    like, order = arrangement
    if order and like is not node:  # seen in another shape first
        return None
    hidden, shapes = _unviewed(norm.source)
    return NormGather(norm, hidden, shapes, tuple(views), order, collective)


def _unviewed(source: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """(what is normed, before a cast that rounds nothing; the views that it is normed through)."""
    node, views = source, list[fx.Node]()
    while is_call(node, ops.CASTS | (ops.VIEWS - ops.REORDERINGS)) and is_float(below := input_node(node)):
        if finer(val(below).dtype, val(node).dtype) or not same_size(last_dim(below), last_dim(node)):
            break
        if not is_call(node, ops.CASTS):
            views.append(node)
        node = below
    return node, tuple(views[::-1])


def _problem(found: NormGather, known: Known) -> Refusal | None:
    """Why the two cannot be one operation, which stands where the norm begins."""
    norm, gather, begins = found.norm, found.collective.node, max(found.operands)
    problem = refused(Code.NORM, norm.problem) or site_problem(
        Site(norm, found.hidden, ()), decompose(found.hidden, set(), set()), ()
    )
    if problem is not None:
        return problem
    if known.backward and is_astride({*found.region, *found.views, gather}):  # it is still to be split by these tags
        return ASTRIDE
    if communicates_between(begins, gather):
        return Refusal(Code.APART, "another collective stands between the norm and the gather of its rows")
    if any(begins < node < gather for node in known.hazards.modes):
        said = "how operators work changes between the norm and the gather of its rows"
        return Refusal(Code.MOVES_PAST, said)
    touched = [*found.operands, *found.region, *found.views]
    written = known.hazards.write_to(touched, begins, found.collective.result)
    said = f"{written} writes in place to rows that are normed and gathered"
    return Refusal(Code.MOVES_PAST, said) if written else None


__all__ = ["NormGather", "find_norm_gathers"]
