"""The gather behind a fused reduce-scatter, in the same operation: of a norm's rows, or of the gradient behind it.

The operation hands out the gathered rows besides its other results. The two collectives keep their order, and nothing
stands between them, so what is sent is what the program sends, and no other rank need have the same graph.
"""

from __future__ import annotations

import torch
from torch import fx

from tpfuse._torch_private import operator_full_name

from ..facts import aten_ops as ops
from ..facts.graph import GATHERS, insert_call, inserting_behind, val
from ..facts.sizes import find_size
from ..recognise.gathers import Gather, find_gathers
from ..recognise.known import Known
from ..verdict.accounting import origin
from ..verdict.runs import may_exchange
from .replay import computed, reshaped, sizes_of

aten = ops.aten


def gather(known: Known, exchanges_alone: bool) -> dict[str, str]:
    """Take in every gather that can be; `exchanges_alone`: where two ranks will make one exchange of it and what is in
    front. Changes the graph. Returns, by the name of the program's gather, that of the collective in whose operation it
    is."""
    found = {}
    for each in find_gathers(known):
        if exchanges_alone and (each.swapped is not None or not may_exchange(each.fused)):
            continue
        found[origin(each.collective.node)] = origin(each.fused)
        take_in(known.graph, each)
    return found


def take_in(graph: fx.Graph, found: Gather) -> None:
    """Put an operation that gathers as well in the place of one and of the gather behind it."""
    old, collective = found.fused, found.collective
    name = operator_full_name(old.target).partition("::")[2]
    result = collective.result
    with inserting_behind(graph, old):
        operator = getattr(ops.tpfuse, f"{name}_gather").default
        options = dict(old.kwargs)
        if found.swapped is not None:
            options["swap"] = _known_size(graph, val(found.swapped).shape[1], old)
        fused = insert_call(graph, operator, old.args, options, like=old)
        fused.meta |= {key: kept for key, kept in old.meta.items() if key not in fused.meta}
        fused.meta[GATHERS] = origin(collective.node)
        count = len(old.meta["val"])
    old.replace_all_uses_with(fused, propagate_meta=False)
    graph.erase_node(old)
    with graph.inserting_before(collective.node):
        rows = insert_call(graph, ops.operator.getitem, (fused, count), like=result)
        if val(result).dim() != 2:
            own, *rest = sizes_of(graph, collective.input)
            every = computed(graph, ops.operator.mul, own, len(collective.ranks), result)
            rows = reshaped(graph, rows, [every, *rest], val(result).shape)
    result.replace_all_uses_with(rows, propagate_meta=False)
    for size in [user for user in collective.node.users if user is not result]:
        size.replace_input_with(collective.node, rows)
    for node in (result, collective.node, *found.views, found.rows):
        if not node.users:
            graph.erase_node(node)


def _known_size(graph: fx.Graph, size: int | torch.SymInt, like: fx.Node) -> int | fx.Node:
    """A size that is a number, or that an input of the graph has."""
    place = None if isinstance(size, int) else find_size(graph, size)
    return place.read(graph, like) if place is not None else size  # type: ignore[return-value]
