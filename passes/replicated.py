"""Whether the graph shows that a value differs between the ranks of a group. Reads only.

A factor may move in front of an all-reduce only if every rank multiplies by the same: g * sum(x) = sum(g * x). A
graph cannot prove that an input is the same everywhere; tensor parallelism itself rests on it (hidden states, and so
whatever scales them, are replicated). What a graph does show is where ranks part: random numbers, a rank's own rows,
sums not yet paid. Those are looked for here.
"""

from __future__ import annotations

import torch
from torch import fx

from tpfuse._torch_private import operator_schema

from . import aten_ops as ops
from .collectives import is_collective

#: Give every rank something of its own; all other collectives end with the same value on all ranks of their group.
_SCATTERING = ("reduce_scatter", "all_to_all", "tpfuse::cut_rows")


def differs_between_ranks(node: fx.Node) -> str:
    """A noun phrase that names why `node` may differ between ranks, or ''.

    Follows `node` towards the inputs, up to finished all-reduces and all-gathers: what those give out is replicated.
    """
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current in seen or current.op != "call_function" or (current.target is ops.WAIT and _replicates(current)):
            continue
        seen.add(current)
        if is_random(current):
            return (
                f"a random mask ({current.target}), which every rank draws for itself: the mask of a sum is the sum of"
                " masked parts only if all ranks drew the same; with dropout at 0, or in eval mode, this boundary fuses"
            )
        if any(word in _name(current) for word in _SCATTERING):
            return f"a value that differs between ranks ({current.target} gives each rank its own rows)"
        pending.extend(current.all_input_nodes)
    return ""


def is_random(node: fx.Node) -> bool:
    """Whether `node` draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _replicates(wait: fx.Node) -> bool:
    source = wait.args[0]
    return isinstance(source, fx.Node) and is_collective(source) and not any(w in _name(source) for w in _SCATTERING)


def _name(node: fx.Node) -> str:
    schema = operator_schema(node.target)
    return schema.name if schema is not None else ""


__all__ = ["differs_between_ranks", "is_random"]
