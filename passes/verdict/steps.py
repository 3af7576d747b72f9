"""What a rewritten graph communicates, in order: the part of a plan that the ranks of a group share. Reads only."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from tpfuse._torch_private import operator_name
from tpfuse.report import Step

from ..facts.collectives import ResolveGroup
from ..facts.graph import GATHERS, argument, value
from ..recognise.streams import calls
from .accounting import performs
from .expression import FUSED, communicates, digest
from .names import module_name
from .runs import exchanges, runs_in_a_kernel
from .sent import Sent, communicating

#: What a fused operation is told that decides which kernel runs: a peer that was told otherwise would wait for ever.
_DECIDING = ("batch_invariant", "overlap")


def find_steps(graph: fx.Graph, resolve: ResolveGroup, original: fx.Graph | None = None) -> list[Step]:
    """One step for every collective of `graph`, in graph order: by itself or in a fused operation, of which one that
    gathers besides has two. `original`: what `graph` was before it was rewritten, where it was."""
    written = original or graph
    sent = Sent(communicating(written), written.owning_module, resolve)
    steps = []
    for node in graph.nodes:
        if not communicates(node):
            continue
        fused = next((name for name in FUSED if calls(node, f"tpfuse::{name}")), None)
        group = argument(node, "group_name")
        ranks = resolve(group) if isinstance(group, str) else None
        op = fused.removesuffix("_gather") if fused else operator_name(node.target)
        dtype, hidden = dtype_and_hidden(node.args[0] if node.args else None)
        kernel = exchanges(node) or (fused == "all_reduce_norm" and runs_in_a_kernel(group, node.args[0]))
        told = " ".join(name for name in _DECIDING if argument(node, name)) if kernel else ""
        if performs(node) is not None:
            more = sent.by(node), kernel, sent.relied_on(node), sent.shapes(node), told
            steps.append(Step(op, ranks or (), dtype, hidden, module_name(node), *more))
        if GATHERS in node.meta:
            gather, rows = "all_gather_into_tensor", sent.gathered_by(node)
            steps.append(Step(gather, ranks or (), *_of(node.meta["val"][-1]), module_name(node), rows))
    return steps


def with_late_steps(steps: list[Step], late: list[Step]) -> list[Step]:
    """The steps of a joint graph whose forward half was rewritten again, into `late`: where that changed what is sent,
    the first step of each group says so, with a digest of all of it."""
    if all(step.sends == f"#{i}" for i, step in enumerate(late)) and not any(step.kernel for step in late):
        return steps
    how = digest([f"{step.op} {step.sends} {step.kernel} {step.told}" for step in late])
    kernel = any(step.kernel for step in late)
    firsts = {step.group: i for i, step in reversed(list(enumerate(steps)))}
    return [
        replace(step, sends=f"{how}:{step.sends}", kernel=kernel or step.kernel) if firsts[step.group] == i else step
        for i, step in enumerate(steps)
    ]


def dtype_and_hidden(node: object) -> tuple[str, int | None]:
    """("float32", 4096), as far as they are known before the graph runs."""
    tensor = value(node)
    return ("", None) if tensor is None else _of(tensor)


def _of(tensor: torch.Tensor) -> tuple[str, int | None]:
    hidden = tensor.shape[-1] if tensor.dim() else None
    return str(tensor.dtype).removeprefix("torch."), hidden if isinstance(hidden, int) else None
