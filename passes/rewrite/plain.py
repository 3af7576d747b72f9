"""A fused operation written out again: the collective, its wait, and the norm in plain operations.

For a group that cannot run it as one kernel. Inductor then makes one kernel of the norm and what is around it, and a
call costs the host no Python. What is computed is the operator's own formula, with the norm on the unrounded sum.

What a group can is decided from facts that are equal on all of its ranks and known before anybody met (`why_not`), and
what is sent is the same either way, in the same order.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tpfuse._torch_private import trace_on_fakes
from tpfuse.boundary_spec import BoundarySpec
from tpfuse.lean import plain_outputs

from ..facts.graph import carry_meta, value


def write_out(graph: fx.Graph, node: fx.Node, operands: dict[str, Any], spec: BoundarySpec) -> None:
    """Put plain operations in the place of a `tpfuse::all_reduce_norm`, which is erased."""
    given = {name: operand for name, operand in operands.items() if operand is not None}
    fakes = [value(operand) for operand in given.values()]
    traced = trace_on_fakes(lambda *tensors: plain_outputs(dict(zip(given, tensors, strict=True)), spec), fakes)
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

