"""Ask without running: `explain` for a model, `fuse_graph` for a graph somebody else traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from . import _torch_private as private
from . import gather_ops as _gather_ops  # noqa: F401 (with all operators)
from . import ops as _ops  # noqa: F401  (the rewritten graphs call these operators)
from .declared import declarations
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
        if any(boundary.direction == "backward" for boundary in report.boundaries):
            note = "traced with gradients, so this is the training graph; under torch.no_grad() it is that of inference"
            report = dataclasses.replace(report, notes=[*report.notes, note])
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


#: What `fuse_graph` says of boundaries that it leaves because nobody said that the ranks are alike.
NOT_ASKED = (
    "fuse_graph cannot ask the other ranks whether they do the same to it; where the graphs of all ranks, their"
    " constants, gates and masks are alike, pass alike=True"
)


def fuse_graph(
    graph_module: fx.GraphModule,
    policy: SharingPolicy | None = None,
    *,
    strict: bool = False,
    alike: bool | None = None,
) -> Report:
    """Rewrite `graph_module` in place and say what was done.

    For graphs of make_fx, torch.export or another compiler's pipeline: aten operators and functional collectives,
    with `meta["val"]` on the nodes. Graphs that write in place are taken where the writes do not matter. The rewritten
    graph is for inference: gradients through a fused operation raise OpError, unless it happens to keep all they need.

    What stands for an output of the graph takes its name, so the signature of an exported program stays that of its
    graph (`report = fuse_graph(program.graph_module)`). A process that loads such a program imports tpfuse first: the
    graph calls its operators.

    Ranks do not compare what they decided, as they do under the backend, and one rank's graph does not show whether the
    others' are like it. `alike`: whether the caller vouches that they are, and that gates, masks, numbers and choices
    of rows in them are the same on every rank. False: what is sent stays as the graph has it, so a boundary is fused
    where nothing but an addition stands between its one sum and the norm; sums are not merged, no step moves in front
    of one, no layout changes. None: False where this process has peers (a process group of several ranks that is not
    a fake one); without any, one graph stands for all ranks, and they are alike.

    Raises: nothing for a graph that cannot be fused (the report says why); PlanError for anything but a GraphModule;
    PolicyError for anything but a policy, and where the graph's groups are not those of `policy`; with `strict=True`,
    FusionError for an internal error.
    """
    if not isinstance(graph_module, fx.GraphModule):
        raise PlanError(f"fuse_graph(graph_module={type(graph_module).__name__}): allowed: a torch.fx.GraphModule")
    if policy is not None and not isinstance(policy, SharingPolicy):
        raise PolicyError(f"fuse_graph(policy={policy!r}): allowed: a tpfuse.SharingPolicy, or None")
    if alike is None:
        alike = not _has_peers()
    options = PassOptions(strict=strict, policy=policy, as_written="" if alike else NOT_ASKED, declared=declarations())
    outcome = fuse(graph_module.graph, resolve_group, options)
    check_groups(outcome.report, policy)
    if outcome.graph is not graph_module.graph:
        _keep_output_names(graph_module.graph, outcome.graph)
        graph_module.graph = outcome.graph
        graph_module.recompile()
    return outcome.report


def _keep_output_names(before: fx.Graph, after: fx.Graph) -> None:
    """Give each output of `after` the name of the output of `before` in its place."""
    by_name = {node.name: node for node in after.nodes}
    named: set[fx.Node] = set()
    for old, new in zip(_outputs(before), _outputs(after), strict=True):
        if new.op != "placeholder" and new.name != old.name and new not in named:
            other = by_name.get(old.name)
            if other is not None:  # it was returned, and is still read
                other.name, by_name[new.name] = new.name, other
            new.name, by_name[old.name] = old.name, new
        named.add(new)


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    """What the graph returns, in order."""
    found: list[fx.Node] = []
    fx.map_arg(graph.output_node().args, found.append)
    return found


def _has_peers() -> bool:
    world = private.default_group()
    return world is not None and world.size() > 1 and dist.get_backend(world) != "fake"
