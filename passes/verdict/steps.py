"""What a rewritten graph communicates, in order: the part of a plan that the ranks of a group share. Reads only."""

from __future__ import annotations

from torch import fx

from tpfuse._torch_private import operator_schema
from tpfuse.report import Step

from ..facts.collectives import ResolveGroup, is_collective
from ..facts.graph import argument, last_dim, value
from ..recognise.streams import calls
from .names import module_name

#: The fused operators that communicate: one collective each.
FUSED = ("all_reduce_norm", "reduce_scatter_norm")


def find_steps(graph: fx.Graph, resolve: ResolveGroup) -> list[Step]:
    """One step for every collective and every fused operation of `graph`, in graph order."""
    steps = []
    for node in graph.nodes:
        fused = next((name for name in FUSED if calls(node, f"tpfuse::{name}")), None)
        if fused is None and not is_collective(node):
            continue
        group = argument(node, "group_name")
        ranks = resolve(group) if isinstance(group, str) else None
        op = fused or operator_schema(node.target).name.split("::")[-1]
        dtype, hidden = dtype_and_hidden(node.args[0] if node.args else None)
        steps.append(Step(op, ranks or (), dtype, hidden, module_name(node)))
    return steps


def dtype_and_hidden(node: object) -> tuple[str, int | None]:
    """("float32", 4096), as far as they are known before the graph runs."""
    tensor = value(node)
    if tensor is None:
        return "", None
    hidden = last_dim(node) if tensor.dim() else None
    return str(tensor.dtype).removeprefix("torch."), hidden if isinstance(hidden, int) else None
