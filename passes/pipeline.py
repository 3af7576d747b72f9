"""The pass: recognise, plan, rewrite, on a copy of the graph; the original stays if anything goes wrong."""

from __future__ import annotations

import copy
import logging
import time
import traceback
import warnings
from dataclasses import dataclass, replace

from torch import fx

from tpfuse.errors import FusionError
from tpfuse.policy import SharingPolicy
from tpfuse.report import Boundary, Report

from .facts.collectives import Collective, ResolveGroup, find_collectives, is_collective
from .facts.graph import use_positions
from .facts.groups import MeshGroups, mesh_groups, names_of_groups, own_rank
from .plan.sites import REWRITES, Decisions, plan
from .recognise.hazards import Hazards
from .recognise.norms import find_norms
from .recognise.sites import Recognition, recognise
from .recognise.streams import calls
from .rewrite.all_reduce_norm import apply, restore_order
from .rewrite.as_written import as_written
from .rewrite.chain import Moved
from .rewrite.merge_backward import merge_all_reduces
from .rewrite.normalise import drop_copies
from .rewrite.relayout import Choice, relayout
from .verdict import accounting
from .verdict.accounting import origin
from .verdict.names import module_name
from .verdict.runs import NO_KERNEL, how_it_runs
from .verdict.steps import dtype_and_hidden, find_steps
from .verdict.subgraphs import collectives_inside
from .verdict.verdicts import verdicts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassOptions:
    """What the pass is told besides the graph.

    strict: raise FusionError for an internal error instead of keeping the old graph. policy: how the model was cut,
    where that is known; equal on all ranks. ranks: of the whole TP group, where they are known. batch_invariant: what
    every fused operation is told. split: the graph is the forward half of one that was split; the other half reads its
    outputs. as_written: where not empty, every rank goes on sending what the program wrote, for this reason: a boundary
    is fused only where that changes nothing before its collective.
    """

    rewrites: tuple[str, ...] = REWRITES
    strict: bool = False
    policy: SharingPolicy | None = None
    ranks: tuple[int, ...] | None = None
    batch_invariant: bool = False
    split: bool = False
    as_written: str = ""


@dataclass(frozen=True)
class Outcome:
    """The graph to use from here on (the given one where nothing was fused), its report, and the seconds it took.

    `names`: of the collectives' nodes in the given graph, in the order of the report's verdicts.
    """

    graph: fx.Graph
    report: Report
    seconds: float
    names: tuple[str, ...] = ()


def fuse(graph: fx.Graph, resolve: ResolveGroup, options: PassOptions | None = None) -> Outcome:
    """Fuse every boundary of `graph` that can be fused. `graph` itself is never changed."""
    options = options or PassOptions()
    began = time.perf_counter()
    try:
        changed, report = _fuse(graph, resolve, options)
    except Exception as error:
        changed, report = graph, _report_of_failure(graph, resolve, error)
        if options.strict:
            raise FusionError(
                f"strict=True, and an internal error of tpfuse keeps a graph as it was:\n{report}"
            ) from error
        warnings.warn(
            f"tpfuse left a graph as it was because of an internal error:\n{traceback.format_exc()}", stacklevel=2
        )
    seconds = time.perf_counter() - began
    log.info("%s (%.3f s)", report.summary(), seconds)
    return Outcome(changed, report, seconds, tuple(node.name for node in graph.nodes if is_collective(node)))


def _fuse(graph: fx.Graph, resolve: ResolveGroup, options: PassOptions) -> tuple[fx.Graph, Report]:
    inner = collectives_inside(graph, resolve)
    if not any(is_collective(node) for node in graph.nodes):
        steps = find_steps(graph, resolve)
        return graph, Report(inner, len(find_norms(graph)), len(steps) + len(inner), steps=steps)
    changed = copy.deepcopy(graph)
    use_positions(changed)
    drop_copies(changed)
    recognition = recognise(changed, resolve)
    before = verdicts(recognition, _decide(recognition, options))
    names = [collective.node.name for collective in recognition.collectives]
    written = accounting.transfers(changed, resolve)
    mesh = _mesh(options.policy, options.ranks)

    accounting.mark(recognition.collectives)
    moved = _relayout(changed, resolve, options, inference=not recognition.backward)
    # Recognising again costs less than carrying every node over by hand, and the layouts may have changed.
    decisions = _decide(recognise(changed, resolve), options)
    boundaries = _after(before, names, moved, decisions)
    for chosen in decisions.plans:
        apply(changed, chosen)
    merged = _merge(changed, resolve, options) if recognition.backward and not options.as_written else {}
    boundaries = _with_merges(boundaries, names, merged)
    if not decisions.plans and not moved.verdicts and "" not in merged.values():
        boundaries = accounting.account(boundaries, names, written, written, mesh, {})
        steps = find_steps(graph, resolve)
        return graph, Report(boundaries + inner, len(recognition.norms), len(steps) + len(inner), steps=steps)
    restore_order(changed)
    if options.batch_invariant:
        for node in changed.nodes:
            if calls(node, "tpfuse::all_reduce_norm"):
                node.update_kwarg("batch_invariant", True)
    changed.lint()
    performed = accounting.transfers(changed, resolve)
    boundaries = accounting.account(boundaries, names, written, performed, mesh, moved.layouts)
    steps = find_steps(changed, resolve, graph)
    return changed, Report(boundaries + inner, len(recognition.norms), len(steps) + len(inner), steps=steps)


def _decide(recognition: Recognition, options: PassOptions) -> Decisions:
    if options.as_written:
        return as_written(recognition, options.rewrites, options.as_written)
    return plan(recognition, options.rewrites)


def _mesh(policy: SharingPolicy | None, ranks: tuple[int, ...] | None) -> MeshGroups | None:
    rank = own_rank()
    if policy is None or rank is None:
        return None
    return mesh_groups(policy.tp_size, policy.dp_size, rank, names_of_groups(), ranks)


def _relayout(graph: fx.Graph, resolve: ResolveGroup, options: PassOptions, inference: bool) -> Moved:
    rank = own_rank()
    if rank is None or options.split or options.as_written or Hazards(graph).writes:
        return Moved()
    policy = options.policy
    residual, rows = ("auto", None) if policy is None else (policy.residual, policy.max_rows)
    choice = Choice(residual, rows, options.rewrites, inference)
    return relayout(graph, resolve, rank, names_of_groups(), choice)


def _after(before: list[Boundary], names: list[str], moved: Moved, decisions: Decisions) -> list[Boundary]:
    """The verdicts on the original collectives, once layouts were changed and boundaries fused."""
    fused = {origin(owed.collective.node): chosen for chosen in decisions.plans for owed in chosen.paid}
    refused = {origin(owed.collective.node): reason for owed, reason in decisions.refusals}
    boundaries = []
    for boundary, name in zip(before, names, strict=True):
        rewrite, done, reason = moved.verdicts.get(name, (None, False, boundary.reason))
        runs = NO_KERNEL if done else ""
        if name in fused:
            rewrite, done, reason, runs = rewrite or fused[name].rewrite, True, "", how_it_runs(fused[name])
        elif not done and rewrite is None:
            anew = "its boundary was laid out anew, and no norm follows it any more"
            reason = moved.kept.get(name) or reason or refused.get(name) or anew
        verdict = dict(fused=done, rewrite=rewrite, reason=reason, runs=runs, demanded=name in moved.demanded)
        boundaries.append(replace(boundary, **verdict))
    return boundaries


def _merge(graph: fx.Graph, resolve: ResolveGroup, options: PassOptions) -> dict[str, str]:
    return merge_all_reduces(graph, resolve) if "merge_all_reduces" in options.rewrites else {}


def _with_merges(boundaries: list[Boundary], names: list[str], merged: dict[str, str]) -> list[Boundary]:
    """The verdicts once the backward pass's all-reduces were merged; `merged`: name -> '' or why not."""
    return [
        replace(boundary, fused=True, rewrite="merge_all_reduces", reason="")
        if merged.get(name) == ""
        else replace(boundary, reason=merged.get(name, boundary.reason))
        for boundary, name in zip(boundaries, names, strict=True)
    ]


def _report_of_failure(graph: fx.Graph, resolve: ResolveGroup, error: Exception) -> Report:
    """Verdicts without recognition, for a graph the recogniser itself stumbled over."""
    reason = f"an internal error of tpfuse kept the whole graph as it was ({type(error).__name__}: {error})"
    try:
        boundaries = [_without_recognition(collective, reason) for collective in find_collectives(graph, resolve)]
        steps = find_steps(graph, resolve)
    except Exception:
        boundaries, steps = [], []
    return Report(boundaries, 0, len(boundaries), [reason], steps)


def _without_recognition(collective: Collective, reason: str) -> Boundary:
    dtype, hidden = dtype_and_hidden(collective.input)
    module, ranks = module_name(collective.node), collective.ranks or ()
    reason = collective.problem or reason
    return Boundary("unknown", module, collective.kind, ranks, reason=reason, dtype=dtype, hidden=hidden)
