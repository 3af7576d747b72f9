"""The pass: a copy of the graph goes through `STEPS`, one after the other; the original stays if anything goes wrong.

    normalise → relayout → merge → norm_backward → fuse → norm_gather → settle → quantise → quantise_first →
    gather → account

Each step is given the graph and the `Context`, edits the graph, and answers with the verdicts that are new: boundaries
by the names of their collectives. What is known of the graph is found once for each version of it (`Context.known`): a
step that edited the graph says so, and what it `invalidates` is found anew when somebody asks for it.
"""

from __future__ import annotations

import logging
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import fx

from tpfuse._torch_private import copied
from tpfuse.declared import Declaration
from tpfuse.errors import FusionError
from tpfuse.policy import SharingPolicy
from tpfuse.report import Boundary, Report, Transfer

from .facts.collectives import ResolveGroup, is_collective
from .facts.declared import as_declared, as_functional
from .facts.group_names import with_group_names
from .facts.groups import names_of_groups, own_rank
from .facts.refusals import Code, Refusal
from .plan.sites import DEFAULT_REWRITES, OVERLAP, Decisions, plan
from .recognise.known import Known
from .recognise.norms import find_norms
from .recognise.sites import Recognition
from .rewrite.all_reduce_norm import apply, restore_order
from .rewrite.as_written import as_written
from .rewrite.gather import gather
from .rewrite.merge_backward import merge_all_reduces
from .rewrite.norm_backward import norm_backward
from .rewrite.norm_gather import norm_gather
from .rewrite.normalise import normalise
from .rewrite.quantise import quantise
from .rewrite.quantise_first import quantise_first
from .rewrite.relayout import Choice, relayout
from .rewrite.strides import settle_strides
from .rewrite.tell import tell
from .verdict import accounting
from .verdict.failed import report_of_failure
from .verdict.reasons import IN_BACKWARD
from .verdict.runs import EXCHANGED, LOCAL_KERNEL, NO_KERNEL, NOT_FUSED, exchanged, how_it_runs
from .verdict.steps import find_steps
from .verdict.subgraphs import collectives_inside
from .verdict.undeclared import undeclared
from .verdict.verdicts import verdicts

log = logging.getLogger(__name__)

#: The reason where an all-reduce was to be fused, until the layouts of its stream changed.
LAID_OUT_ANEW = Refusal(Code.LAYOUT_CHANGED, "its boundary was laid out anew, and no norm follows it any more")


@dataclass(frozen=True)
class PassOptions:
    """What the pass is told besides the graph.

    strict: raise FusionError for an internal error instead of keeping the old graph. policy: how the model was cut,
    where that is known; equal on all ranks. ranks: of the whole TP group, where they are known. batch_invariant: what
    every fused operation is told. split: the graph is the forward half of one that was split; the other half reads its
    outputs. as_written: where not empty, every rank goes on sending what the program wrote, for this reason: a boundary
    is fused only where that changes nothing before its collective. declared: other tools' all-reduces.
    """

    rewrites: tuple[str, ...] = DEFAULT_REWRITES
    strict: bool = False
    policy: SharingPolicy | None = None
    ranks: tuple[int, ...] | None = None
    batch_invariant: bool = False
    split: bool = False
    as_written: str = ""
    declared: tuple[Declaration, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The graph to use from here on (the given one where nothing was fused), its report, and the seconds it took.

    `names`: of the collectives' nodes in the given graph, in the order of the report's verdicts (of what stands for
    declared ones).
    """

    graph: fx.Graph
    report: Report
    seconds: float
    names: tuple[str, ...] = ()


def fuse(graph: fx.Graph, resolve: ResolveGroup, options: PassOptions | None = None) -> Outcome:
    """Fuse every boundary of `graph` that can be fused. `graph` itself is never changed."""
    options = options or PassOptions()
    began = time.perf_counter()
    plain = graph
    try:
        plain, left = as_functional(with_group_names(graph), options.declared)
        changed, report = _through_steps(plain, resolve, options)
        changed = graph if changed is plain else changed
        if plain is not graph:
            as_declared(changed)
        notes = [*report.notes, *left, *undeclared(graph, options.declared, resolve)]
        report = replace(report, notes=notes)
    except Exception as error:
        changed, report = graph, report_of_failure(plain, resolve, error)
        if options.strict:
            said = "strict=True, and an internal error of tpfuse keeps a graph as it was"
            raise FusionError(f"{said}:\n{report}") from error
        warnings.warn(
            f"tpfuse left a graph as it was because of an internal error:\n{traceback.format_exc()}", stacklevel=2
        )
    seconds = time.perf_counter() - began
    log.info("%s (%.3f s)", report.summary(), seconds)
    return Outcome(changed, report, seconds, tuple(node.name for node in plain.nodes if is_collective(node)))


# -- the way of a graph -----------------------------------------------------------------------------------------------


#: New verdicts, by the name of the collective's node in the graph as it came.
Verdicts = dict[str, Boundary]


@dataclass
class Context:
    """What the steps share about one graph.

    known: facts about the graph as it is now. boundaries: the verdicts so far, in the order of the collectives of the
    graph as it came. written: what that communicated, by collective; norms: how many it had. layouts: in which layout
    rows stay whose collectives vanished. notes: sentences about the whole graph. edited: whether the running step
    changed the graph. rewritten: whether a step before it put something in the place of a collective.
    """

    known: Known
    options: PassOptions
    boundaries: Verdicts = field(default_factory=dict)
    written: Mapping[str, tuple[Transfer, ...]] = field(default_factory=dict)
    norms: int = 0
    layouts: Mapping[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    edited: bool = False
    rewritten: bool = False
    _decided: tuple[Recognition, Decisions] | None = None

    @property
    def decisions(self) -> Decisions:
        """What is planned for the graph as it is now."""
        recognition = self.known.recognition
        if self._decided is None or self._decided[0] is not recognition:
            self._decided = recognition, _decide(recognition, self.options)
        return self._decided[1]


@dataclass(frozen=True)
class Step:
    """One step. `rewrite`: its name among the options' rewrites, without which it does not run; '': it always runs.
    `invalidates`: the facts that may not hold any more once it edited the graph."""

    run: Callable[[fx.Graph, Context], Verdicts]
    rewrite: str = ""
    invalidates: tuple[str, ...] = Known.FACTS


def _through_steps(graph: fx.Graph, resolve: ResolveGroup, options: PassOptions) -> tuple[fx.Graph, Report]:
    inner = collectives_inside(graph, resolve)
    if not any(is_collective(node) for node in graph.nodes):
        steps = find_steps(graph, resolve)
        return graph, Report(inner, len(find_norms(graph)), len(steps) + len(inner), steps=steps)
    changed = copied(graph)
    changed.owning_module = graph.owning_module  # whose graphs it calls
    context = Context(Known(changed, resolve, options.split), options)
    for step in STEPS:
        if step.rewrite and step.rewrite not in options.rewrites:
            continue
        context.edited = False
        context.boundaries |= step.run(changed, context)
        if context.edited:
            context.known.changed(*step.invalidates)
    changed, original = (changed, graph) if context.rewritten else (graph, None)
    steps = find_steps(changed, resolve, original)
    boundaries = [*context.boundaries.values(), *inner]
    return changed, Report(boundaries, context.norms, len(steps) + len(inner), context.notes, steps)


def _normalise(graph: fx.Graph, context: Context) -> Verdicts:
    """Write calls the way the recognisers read them, and say what is to be said of the graph as the program wrote it;
    that a boundary is fused is said once it is."""
    normalise(graph)
    recognition = context.known.recognition
    accounting.mark(recognition.collectives)
    context.norms = len(recognition.norms)
    context.written = accounting.transfers(graph, context.known.resolve)
    names = [collective.node.name for collective in recognition.collectives]
    found = verdicts(recognition, context.decisions)
    return {name: replace(boundary, fused=False, rewrite=None) for name, boundary in zip(names, found, strict=True)}


def _relayout(graph: fx.Graph, context: Context) -> Verdicts:
    """Lay the rows of the residual streams out anew where that sends less."""
    options, known, rank = context.options, context.known, own_rank()
    if rank is None or options.split:
        return {}
    if options.as_written:
        return {
            name: _left(boundary, Refusal(Code.AS_WRITTEN, f"the rows keep their layout: {options.as_written}"))
            for name, boundary in context.boundaries.items()
            if boundary.collective == "reduce_scatter" and boundary.feeds_norm
        }
    policy = options.policy
    residual, rows = ("auto", None) if policy is None else (policy.residual, policy.max_rows)
    choice = Choice(residual, rows, options.rewrites, inference=not known.backward)
    moved = relayout(known, rank, names_of_groups(), choice)
    context.layouts, context.notes = moved.layouts, moved.notes
    context.rewritten = bool(moved.verdicts)
    found: Verdicts = {}
    for name, boundary in context.boundaries.items():
        if name in moved.verdicts:
            rewrite, done, why = moved.verdicts[name]
            runs = NO_KERNEL if done else NOT_FUSED
            found[name] = replace(_left(boundary, why), rewrite=rewrite, fused=done, runs=runs.sentence)
        elif name in moved.kept:
            found[name] = _left(boundary, moved.kept[name])
        if name in moved.demanded:
            found[name] = replace(found.get(name, boundary), demanded=True)
    return found


def _fuse(graph: fx.Graph, context: Context) -> Verdicts:
    """Put a fused operation in the place of every boundary that has a plan."""
    decisions = context.decisions
    refusals = {accounting.origin(owed.collective.node): refusal for owed, refusal in decisions.refusals}
    found: Verdicts = {}
    for chosen in decisions.plans:
        runs = how_it_runs(chosen, OVERLAP in context.options.rewrites)
        for owed in chosen.paid:
            name = accounting.origin(owed.collective.node)
            boundary = _left(context.boundaries[name], None)
            rewrite = boundary.rewrite or chosen.rewrite
            found[name] = replace(boundary, rewrite=rewrite, fused=True, runs=runs.sentence, kernel=runs.kernel)
    for name, boundary in context.boundaries.items():
        if name not in found and not (boundary.fused or boundary.rewrite or boundary.reason):
            found[name] = _left(boundary, refusals.get(name) or LAID_OUT_ANEW)
    for chosen in decisions.plans:
        apply(graph, chosen)
    context.edited = bool(decisions.plans)
    context.rewritten |= context.edited
    return found


def _norm_gather(graph: fx.Graph, context: Context) -> Verdicts:
    """Put one operation in the place of a norm and of the gather of its rows, where no sum was fused with the norm."""
    known = context.known
    if not (known.backward or context.options.split):
        return {}
    restore_order(graph)
    norms, left = norm_gather(known)
    context.edited = bool(norms)
    found = _told(context, left | dict.fromkeys(norms), "norm_gather", runs=LOCAL_KERNEL.sentence)
    return {name: replace(b, norm=norms.get(name, b.norm)) for name, b in found.items()}


def _merge(graph: fx.Graph, context: Context) -> Verdicts:
    """Make the backward pass's all-reduces one where their sums are added up."""
    if not context.known.backward or context.options.as_written:
        return {}
    return _told(context, merge_all_reduces(context.known), "merge_all_reduces")


def _norm_backward(graph: fx.Graph, context: Context) -> Verdicts:
    """Put one operation in the place of a gradient's collective and the norm's backward that reads it."""
    options, known = context.options, context.known
    if not known.backward or not known.norms:
        return {}
    boundaries = context.boundaries.items()
    found = {name: _left(b, IN_BACKWARD) for name, b in boundaries if not b.fused and b.code == IN_BACKWARD.code.value}
    outcome = norm_backward(known, bool(options.as_written))
    told = _told(context, outcome, "norm_backward", runs=LOCAL_KERNEL.sentence)
    context.edited = any(boundary.fused for boundary in told.values())
    return found | told


def _told(context: Context, outcome: Mapping[str, Refusal | None], rewrite: str, runs: str = "") -> Verdicts:
    """What `rewrite` says of collectives, by name: None of those it took, or why not."""
    found: Verdicts = {}
    for name, why in outcome.items():
        boundary = context.boundaries.get(name)
        if boundary is None or (why is not None and boundary.fused):
            continue  # one that a rewrite before this one put there, or took
        found[name] = _left(boundary, why)
        if why is None:
            found[name] = replace(found[name], fused=True, rewrite=rewrite, runs=runs)
            context.rewritten = True
    return found


def _settle(graph: fx.Graph, context: Context) -> Verdicts:
    """Put what the steps inserted in order, and tell it what the whole graph is told."""
    if context.rewritten:
        restore_order(graph)
        settle_strides(graph, at_once=bool(context.known.hazards.writes))
        tell(graph, context.options.batch_invariant, OVERLAP in context.options.rewrites)
        graph.lint()
        context.edited = True
    return {}


def _quantise(graph: fx.Graph, context: Context) -> Verdicts:
    """Let fused boundaries hand out their normed values quantised, where the graph quantises them."""
    if not context.rewritten:
        return {}
    done, notes = quantise(graph)
    context.notes = [*context.notes, *notes]
    context.edited = bool(done)
    if done:
        graph.lint()
    words = {accounting.origin(node): how for node, how in done.items()}
    return {name: replace(b, quantised=words[name]) for name, b in context.boundaries.items() if name in words}


def _quantise_first(graph: fx.Graph, context: Context) -> Verdicts:
    """Quantise own rows in front of their gather, where the graph quantises the gathered ones."""
    options, known = context.options, context.known
    if known.backward or options.split or options.as_written:
        return {}
    found, notes = quantise_first(known, context.boundaries)
    context.notes = [*context.notes, *notes]
    context.edited = any(boundary.quantised for boundary in found.values())
    context.rewritten |= context.edited
    return found


def _gather(graph: fx.Graph, context: Context) -> Verdicts:
    """Put the gathers of what fused operations give each rank into these operations."""
    known, trained = context.known, context.known.backward or context.options.split
    if not context.rewritten or not (trained or OVERLAP in context.options.rewrites):
        return {}
    both = gather(known, exchanges_alone=not trained)
    taken = {name: of for name, of in both.items() if {name, of} <= context.boundaries.keys()}
    context.edited = True
    graph.lint()
    boundaries = {name: (_left(context.boundaries[name], None), context.boundaries[of]) for name, of in taken.items()}
    found = {
        name: replace(boundary, fused=True, rewrite=of.rewrite, norm=of.norm, runs=of.runs)
        for name, (boundary, of) in boundaries.items()
    }
    told = context.boundaries | found
    by_copies = [name for name in exchanged(graph) if name in told]
    return found | {name: replace(told[name], runs=EXCHANGED.sentence, kernel=True) for name in by_copies}


def _account(graph: fx.Graph, context: Context) -> Verdicts:
    """What every boundary sent and sends now, and how its rows lie."""
    performed = accounting.transfers(graph, context.known.resolve) if context.rewritten else context.written
    layouts = context.layouts if context.rewritten else {}
    mesh = accounting.mesh_of(context.options.policy, context.options.ranks)
    names, boundaries = list(context.boundaries), list(context.boundaries.values())
    accounted = accounting.account(boundaries, names, context.written, performed, mesh, layouts)
    return dict(zip(names, accounted, strict=True))


def _left(boundary: Boundary, why: Refusal | None) -> Boundary:
    """The boundary with the reason why it is not fused; None: it is, or nothing is to be said."""
    if why is None:
        return replace(boundary, reason="", code="")
    return replace(boundary, reason=why.sentence, code=why.code.value)


STEPS = (
    Step(_normalise),
    Step(_relayout),
    Step(_merge, rewrite="merge_all_reduces"),
    Step(_norm_backward, rewrite="norm_backward"),
    Step(_fuse),
    Step(_norm_gather, rewrite="norm_gather"),
    Step(_settle),
    Step(_quantise, rewrite="quantised_outputs"),
    Step(_quantise_first, rewrite="quantised_outputs"),
    Step(_gather),
    Step(_account, invalidates=()),
)


# -- what the steps ask -----------------------------------------------------------------------------------------------


def _decide(recognition: Recognition, options: PassOptions) -> Decisions:
    if options.as_written:
        return as_written(recognition, options.rewrites, options.as_written)
    return plan(recognition, options.rewrites)
