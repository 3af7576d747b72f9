"""Random programs (own_programs.py) traced by make_fx, a tenth of the time that Dynamo and AOTAutograd take.

The graph is a joint one, as AOTAutograd gives it: outputs and gradients of inputs and tangents. What is made of it, how
the ranks agree on it and what they fall back to is the pass's and the guard's own; symbolic numbers are not drawn.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from tpfuse._torch_private import inductor_decompositions, joint_graph_clean_up
from tpfuse.backend import DIFFER, resolve_group
from tpfuse.options import parse_options
from tpfuse.passes.pipeline import PassOptions, fuse
from tpfuse.passes.plan.sites import REWRITES as ALL_REWRITES
from tpfuse.report import Report
from tpfuse.runtime.ballots import Place
from tpfuse.runtime.guard import guard

from .own_parts import Block, inputs, tangents
from .own_programs import Drawn

#: All but the one that programs have nothing for.
REWRITES = tuple(name for name in ALL_REWRITES if name != "quantised_outputs")


@dataclass(frozen=True)
class PlainAOTInput:
    """Which input a placeholder is, as AOTAutograd says it."""

    idx: int


def results(drawn: Drawn, model: Block, rank: int, dtype: torch.dtype, reports: list[Report]) -> list[Tensor]:
    """As `own_parts.results`, of the traced and rewritten program; `reports` gets the reports on it."""
    found, call = [], None
    for x, numbers in inputs(drawn, rank, dtype):
        weights = tangents(model(x, *numbers)) if drawn.train else []
        held = [*model.parameters(), *model.buffers()]
        if call is None:
            traced = _trace(drawn, model, [x, *held, *weights], numbers)
            call = _guarded(drawn, traced, reports)
        found += [t for t in call(x, *held, *weights) if t is not None]
    return [t.detach().double() for t in found]


def _trace(drawn: Drawn, model: Block, args: list[Tensor], numbers: tuple) -> fx.GraphModule:
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    count = 1 + len(params) + len(buffers)

    def joint(x, *rest):
        held = dict(zip([*params, *buffers], rest, strict=False))
        out = list(functional_call(model, held, (x, *numbers)))
        if not drawn.train:
            return out
        wanted = [t for t in out if t.requires_grad]
        learned = [x, *(held[name] for name in params)]
        return [*out, *torch.autograd.grad(wanted, learned, rest[count - 1 :], allow_unused=True)]

    mode = "symbolic" if drawn.two_calls else "fake"
    with torch.set_grad_enabled(drawn.train):
        traced = make_fx(joint, decomposition_table=inductor_decompositions(), tracing_mode=mode)(*args)
    for index, node in enumerate(traced.graph.find_nodes(op="placeholder")):
        if index < count:
            node.meta["desc"] = PlainAOTInput(index)
        node.name = node.target = f"primals_{index + 1}" if index < count else f"tangents_{index + 1 - count}"
    traced.graph.eliminate_dead_code()
    traced.recompile()
    joint_graph_clean_up(traced)
    return traced


def _guarded(drawn: Drawn, traced: fx.GraphModule, reports: list[Report]):
    def compiled(as_written: str = ""):
        graph = copy.deepcopy(traced)
        options = PassOptions(rewrites=REWRITES, strict=True, as_written=as_written)
        outcome = fuse(graph.graph, resolve_group, options)
        reports.append(outcome.report)
        module = fx.GraphModule(graph, outcome.graph)

        def call(*args):
            with torch.no_grad():
                return module(*args)

        return call, outcome.report

    options = parse_options({"plan_timeout": 120.0})
    call, report = compiled()
    return guard(call, report, options, lambda: compiled(DIFFER), Place(drawn.seed))
