"""The pass: recognise, plan, rewrite, on a copy of the graph; the original stays if anything goes wrong."""

from __future__ import annotations

import copy
import logging
import time
import traceback
import warnings
from dataclasses import dataclass, replace

from torch import fx

from tpfuse.report import Report

from .collectives import ResolveGroup, find_collectives
from .plan import REWRITES, plan
from .recognise import recognise
from .rewrite import apply, restore_order
from .verdicts import verdicts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassOptions:
    """What the pass is told besides the graph. `strict` raises internal errors instead of keeping the old graph."""

    rewrites: tuple[str, ...] = REWRITES
    strict: bool = False


@dataclass(frozen=True)
class Outcome:
    """The graph to use from here on (the given one where nothing was fused), its report, and the seconds it took."""

    graph: fx.Graph
    report: Report
    seconds: float


def fuse(graph: fx.Graph, resolve: ResolveGroup, options: PassOptions | None = None) -> Outcome:
    """Fuse every boundary of `graph` that can be fused. `graph` itself is never changed."""
    options = options or PassOptions()
    began = time.perf_counter()
    try:
        changed, report = _fuse(graph, resolve, options)
    except Exception as error:
        if options.strict:
            raise
        warnings.warn(
            f"tpfuse left a graph as it was because of an internal error:\n{traceback.format_exc()}", stacklevel=2
        )
        changed, report = graph, _report_of_failure(graph, resolve, error)
    seconds = time.perf_counter() - began
    log.info("%s (%.3f s)", report.summary(), seconds)
    return Outcome(changed, report, seconds)


def _fuse(graph: fx.Graph, resolve: ResolveGroup, options: PassOptions) -> tuple[fx.Graph, Report]:
    recognition = recognise(graph, resolve)
    decisions = plan(recognition, options.rewrites)
    report = Report(
        verdicts(recognition, decisions), len(recognition.norms), collectives_after=len(recognition.collectives)
    )
    if not decisions.plans:
        return graph, report
    # A second recognition on the copy costs less than carrying every node over by hand.
    changed = copy.deepcopy(graph)
    for chosen in plan(recognise(changed, resolve), options.rewrites).plans:
        apply(changed, chosen)
    restore_order(changed)
    changed.lint()
    fused_ops = len(decisions.plans)
    left = len(report.boundaries) - sum(len(chosen.paid) for chosen in decisions.plans)
    return changed, replace(report, collectives_after=left + fused_ops)


def _report_of_failure(graph: fx.Graph, resolve: ResolveGroup, error: Exception) -> Report:
    """Verdicts without recognition, for a graph the recogniser itself stumbled over."""
    from tpfuse.report import Boundary

    reason = f"an internal error of tpfuse kept the whole graph as it was ({type(error).__name__}: {error})"
    try:
        collectives = find_collectives(graph, resolve)
    except Exception:
        collectives = []
    boundaries = [
        Boundary("unknown", "", c.kind, c.ranks or (), reason=c.problem or reason, feeds_norm=False)
        for c in collectives
    ]
    return Report(boundaries, 0, len(boundaries), [reason])
