"""Ask without running: `explain` for a model, `fuse_graph` for a graph somebody else traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from . import _torch_private as private
from . import ops as _ops  # noqa: F401  (the rewritten graphs call these operators)
from .errors import PlanError, PolicyError, TPFuseError
from .parallel.recorded_policy import check_groups, with_recorded_policy
from .passes.facts.groups import resolve_group
from .passes.pipeline import PassOptions, fuse
from .policy import SharingPolicy
from .report import Report
from .runtime.endings import surroundings, with_surroundings


class _Explained(Exception):
    """Carries the report out of the compiler, before anything could run."""

    def __init__(self, report: Report):
        super().__init__("explained")
        self.report = report


def explain(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    dynamic: bool | None = None,
) -> Report:
    """What the backend would do to `model(*args, **kwargs)`, and why.

    Traces with fake tensors and runs no collective and no kernel, so one rank may call it alone. Stops at the first
    graph break and says so in the report's notes.

    Raises OptionError and PolicyError for options that the backend would refuse, and with `strict` FusionError for an
    internal error.
    """
    from .backend import trace_report
    from .options import parse_options

    parsed = parse_options(options, mode)
    model = getattr(model, "_orig_mod", model)  # what torch.compile(model) wraps

    def report_and_stop(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        around = surroundings(gm)
        try:
            stated = with_recorded_policy(parsed, gm)
            report = trace_report(gm, example_inputs, stated)
            check_groups(report, stated.policy, stated.ranks)
        except TPFuseError as error:
            raise private.raised_through_dynamo(error) from error.__cause__
        report = with_surroundings(report, around)
        if around.ending is not None:
            note = "what follows the graph break was not looked at"
            report = dataclasses.replace(report, notes=[*report.notes, note])
        raise private.raised_through_dynamo(_Explained(report))

    args = args if isinstance(args, (list, tuple)) else (args,)

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    try:
        torch.compile(call, backend=report_and_stop, dynamic=dynamic)(*args, **dict(kwargs or {}))
    except _Explained as explained:
        return explained.report
    return Report(notes=["nothing was compiled: the model has no operation that Dynamo could put into a graph"])


def fuse_graph(graph_module: fx.GraphModule, policy: SharingPolicy | None = None, *, strict: bool = False) -> Report:
    """Rewrite `graph_module` in place and say what was done.

    For graphs of make_fx, torch.export or another compiler's pipeline: aten operators and functional collectives,
    with `meta["val"]` on the nodes. Graphs that write in place are taken where the writes do not matter. The rewritten
    graph is for inference: gradients through a fused operation raise OpError, unless it happens to keep all they need.

    Ranks do not compare what they decided, as they do under the backend: the caller vouches that the graphs of all
    ranks are alike, and that gates, masks, numbers and choices of rows in them are the same on every rank.

    Raises: nothing for a graph that cannot be fused (the report says why); PlanError for anything but a GraphModule;
    PolicyError for anything but a policy, and where the graph's groups are not those of `policy`; with `strict=True`,
    FusionError for an internal error.
    """
    if not isinstance(graph_module, fx.GraphModule):
        raise PlanError(f"fuse_graph(graph_module={type(graph_module).__name__}): allowed: a torch.fx.GraphModule")
    if policy is not None and not isinstance(policy, SharingPolicy):
        raise PolicyError(f"fuse_graph(policy={policy!r}): allowed: a tpfuse.SharingPolicy, or None")
    outcome = fuse(graph_module.graph, resolve_group, PassOptions(strict=strict, policy=policy))
    check_groups(outcome.report, policy)
    if outcome.graph is not graph_module.graph:
        graph_module.graph = outcome.graph
        graph_module.recompile()
    return outcome.report
