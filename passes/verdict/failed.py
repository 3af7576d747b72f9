"""What is said of a graph that an internal error kept as it was. Reads only."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from tpfuse.report import Boundary, Report

from ..facts.collectives import Collective, ResolveGroup, find_collectives
from ..facts.refusals import Code, Refusal, refused
from .names import module_name
from .steps import dtype_and_hidden, find_steps


def report_of_failure(graph: fx.Graph, resolve: ResolveGroup, error: Exception) -> Report:
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
    boundary = Boundary("unknown", module, collective.kind, ranks, dtype=dtype, hidden=hidden)
    why = refused(Code.COLLECTIVE, collective.problem) or Refusal(Code.INTERNAL_ERROR, reason)
    return replace(boundary, reason=why.sentence, code=why.code.value)
