"""The graph of a model family as the pass sees it, and what the pass did to it. One process, fake process group."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

import tpfuse
from tpfuse.passes.facts.groups import resolve_group
from tpfuse.passes.pipeline import PassOptions, fuse

from .families import BY_NAME, call_of, cut_model
from .graphs import fake_world


@dataclass(frozen=True)
class Traced:
    """graph: before the pass, a copy. report: what the pass did; several graphs where the model has graph breaks."""

    graphs: tuple[fx.GraphModule, ...]
    report: tpfuse.Report


class _Recorder:
    """Stands where the backend's pass stands, and keeps a copy of each graph before it is rewritten."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.reports: list[tpfuse.Report] = []

    def __call__(self, graph: fx.Graph) -> None:
        owner = graph.owning_module
        self.graphs.append(fx.GraphModule(owner, copy.deepcopy(owner.graph)))
        self.reports.append(fuse(owner.graph, resolve_group, PassOptions(strict=True)).report)

    def finish(self, graph: fx.Graph) -> None:
        """No family is checkpointed, so nothing waits for the forward half of a joint graph."""


class _Traced(Exception):
    pass


def trace_family(name: str, mode: str, world: int, whole: nn.Module, rank: int = 0) -> Traced:
    """Trace rank `rank`'s part of a family in one mode. Nothing runs and nothing is communicated."""
    with fake_world(world, rank):
        model = cut_model(BY_NAME[name], whole, rank, world)
        function, arguments, gradients = call_of(model, mode)
        with torch.set_grad_enabled(gradients):
            return trace(function, arguments, dynamic=mode == "dynamic")


def trace(function: Any, arguments: Mapping[str, Any], dynamic: bool = False) -> Traced:
    """`function(**arguments)` as one graph: a graph break raises."""
    from tpfuse import _torch_private as private
    from tpfuse.backend import _with_aot_eager
    from tpfuse.runtime import held_numbers, report_store

    recorder = _Recorder()

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        held_numbers.make_constant(gm)
        with held_numbers.until_compiled():
            _with_aot_eager(gm, inputs, recorder, {})
        raise private.raised_through_dynamo(_Traced())

    torch.compiler.reset()
    with contextlib.suppress(_Traced):
        torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic or None)(**arguments)
    return Traced(tuple(recorder.graphs), report_store.merge(recorder.reports))
