"""Recognise: a gather of the rows that one of our operations gives each rank.

    y, ... = reduce_scatter_norm(...)                gathered = all-gather of y over the same ranks
    dx, ... = reduce_scatter_norm_backward(...)      gathered = all-gather of dx

What stands between are views that leave the rows in their order, or swap the two dimensions that they have (scattered
along the sequence, and gathered along the batch). Reads only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..facts import aten_ops as ops
from ..facts.checkpoint import recompute_tag
from ..facts.collectives import Collective, communicates_between
from ..facts.graph import argument, input_node, is_call, is_float, last_dim, permutation, same_shape, same_size, val
from ..facts.sizes import find_size
from .known import Known
from .streams import calls

aten = ops.aten
_SIZES = {aten.sym_size.int, aten.sym_numel.default}
#: Our operations that scatter, and whose first result are rows of a rank's own.
SCATTERING = ("tpfuse::reduce_scatter_norm", "tpfuse::reduce_scatter_norm_backward")


@dataclass(frozen=True)
class Gather:
    """`collective` gathers `rows`, the first result of `fused`, seen through `views`. swapped: the view in which they
    are [a, b, H], where they are gathered as [b, a, H]."""

    fused: fx.Node
    rows: fx.Node
    views: tuple[fx.Node, ...]
    collective: Collective
    swapped: fx.Node | None = None


def find_gathers(known: Known) -> list[Gather]:
    """In graph order: at most one of an operation, and none that another collective stands in front of."""
    found: list[Gather] = []
    taken: set[fx.Node] = set()
    for collective in known.collectives:
        gather = _gather(collective, known)
        if gather is not None and gather.fused not in taken:
            taken.add(gather.fused)
            found.append(gather)
    return found


def _gather(collective: Collective, known: Known) -> Gather | None:
    found = _first_result(collective)
    if found is None or not is_waited_for_alone(collective):
        return None
    node, views = found
    arrangement = arranged(node, views[::-1])
    if arrangement is None:
        return None
    like, order = arrangement
    if order not in ((), (1, 0, 2)) or (order and not _is_known(val(like).shape[1], known)):
        return None
    fused = input_node(node)
    if not any(calls(fused, name) for name in SCATTERING) or fused.kwargs.get("quant"):
        return None
    group = argument(fused, "group_name")
    ranks = known.resolve(group) if isinstance(group, str) else None
    if ranks is None or ranks != collective.ranks:
        return None
    if communicates_between(fused, collective.node):  # the gather would come before it
        return None
    if known.backward and not _tagged_alike(fused, collective.node):  # it is still to be split by these tags
        return None
    return Gather(fused, node, views, collective, like if order else None)


def _is_known(size: int | torch.SymInt, known: Known) -> bool:
    return isinstance(size, int) or find_size(known.graph, size) is not None


def gathered_rows(collective: Collective) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """(the first result of some operation, the views above it) where a plain gather gathers that, row after row."""
    found = _first_result(collective)
    order = arranged(found[0], found[1][::-1]) if found is not None else None
    return found if order is not None and order[1] == () else None


def _first_result(collective: Collective) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """The same, however the views arrange it."""
    if not is_plain_gather(collective):
        return None
    node, views = collective.input, list[fx.Node]()
    while is_call(node, ops.VIEWS | ops.COPIES_OF_VALUES) and is_float(node.args[0]):
        views.append(node)
        node = input_node(node)
    if node.target is not ops.operator.getitem or node.args[1] != 0:
        return None
    return node, tuple(views)


def is_plain_gather(collective: Collective) -> bool:
    plain = str(collective.node.target).endswith("all_gather_into_tensor.default")
    known = plain and not collective.problem and collective.wait is not None
    return known and is_float(argument(collective.node, "input"))


def is_waited_for_alone(collective: Collective) -> bool:
    """Whether of the unfinished result nothing is read but sizes."""
    return all(user is collective.wait or is_call(user, _SIZES) for user in collective.node.users)


def arranged(rows: fx.Node, views: Sequence[fx.Node]) -> tuple[fx.Node, tuple[int, ...]] | None:
    """(whose dimensions `rows`, [..., H], have behind these views; in which order those lie, () where in their own);
    None where the views do more. A dimension of size 1 has no place in an order."""
    like, order, flat = rows, list(range(val(rows).dim())), False
    for view in views:
        if is_call(view, ops.REORDERINGS):
            if flat:
                return None
            order = [order[dim] for dim in permutation(view)]
        elif not same_shape(view, input_node(view)):
            if not same_size(last_dim(view), last_dim(rows)):
                return None
            flat = bool(_moved(like, order))
            if not flat:
                like, order = view, list(range(val(view).dim()))
    if len(order) < 2 or order[-1] != len(order) - 1:
        return None
    return like, _moved(like, order)


def _moved(like: fx.Node, order: list[int]) -> tuple[int, ...]:
    shown = [dim for dim in order if not same_size(val(like).shape[dim], 1)]
    return () if shown == sorted(shown) else tuple(order)


def _tagged_alike(fused: fx.Node, gather: fx.Node) -> bool:
    """Whether an activation checkpoint treats both alike. An operation outside of any is tagged by us: it is saved."""
    if "ac_graph_id" not in fused.meta and "ac_graph_id" not in gather.meta:
        return "recompute" not in gather.meta
    return recompute_tag(fused) == recompute_tag(gather)


__all__ = [
    "SCATTERING",
    "Gather",
    "arranged",
    "find_gathers",
    "gathered_rows",
    "is_plain_gather",
    "is_waited_for_alone",
]
