"""A fused operation written out again: the collective, its wait, and the norm in plain operations.

For what no kernel of ours does as one: an all-reduce of a group that cannot use symmetric memory, a reduce-scatter, a
norm of rows that were gathered. Inductor then makes one kernel of the norm and what is around it, and a call costs the
host no Python. What is computed is the operator's own formula, with the norm on the unrounded sum.

What a group can is decided from facts that are equal on all of its ranks and known before anybody met (`why_not`), and
what is sent is the same either way, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from tpfuse._torch_private import argument_names, operator_full_name, trace_on_fakes
from tpfuse.boundary_spec import OPERANDS, BoundarySpec
from tpfuse.lean import plain_outputs

from ..facts.graph import argument, carry_meta, same_size, value


def write_out(graph: fx.Graph, node: fx.Node, operands: dict[str, Any], spec: BoundarySpec) -> None:
    """Put plain operations in the place of one of our operators, which is erased."""
    name = operator_full_name(node.target).partition("::")[2]
    given = {name: operand for name, operand in operands.items() if operand is not None}
    fakes = [value(operand) for operand in given.values()]
    traced = trace_on_fakes(lambda *tensors: plain_outputs(name, dict(zip(given, tensors, strict=True)), spec), fakes)
    copies: dict[fx.Node, Any] = {}
    incoming = iter(given.values())
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                copies[inner] = next(incoming)
            elif inner.op == "output":
                results = fx.map_arg(inner.args[0], copies.__getitem__)
            else:
                copies[inner] = graph.node_copy(inner, copies.__getitem__)
                carry_meta(node, copies[inner])
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)


def spec_of(node: fx.Node, operands: dict[str, Any]) -> BoundarySpec | None:
    """What one of our operators is told; None where some of it is only known when the graph runs."""
    fakes = {name: value(operand) for name, operand in operands.items()}
    if any(fakes[name] is None and operands[name] is not None for name in OPERANDS):
        return None
    options = {name: argument(node, name) for name in argument_names(node.target) if name not in (*OPERANDS, "swap")}
    if any(not isinstance(option, (str, float, int, bool, torch.dtype, type(None))) for option in options.values()):
        return None
    return BoundarySpec(**options, operands=tuple(None if (t := fakes[name]) is None else t.dtype for name in OPERANDS))


def rows_divide(shape: Sequence[Any], ranks: int) -> bool:
    """Whether the rows of a value divide by the ranks for certain, so that none is padded before they are scattered."""
    return same_size(math.prod(shape[:-1]) % ranks, 0)
