"""Recognise: a gather of the rows that one of our operations gives each rank.

    y, ... = reduce_scatter_norm(...)                gathered = all-gather of y over the same ranks
    dx, ... = reduce_scatter_norm_backward(...)      gathered = all-gather of dx

What stands between are views that leave the rows in their order. Reads only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from ..facts import aten_ops as ops
from ..facts.checkpoint import recompute_tag
from ..facts.collectives import Collective, communicates_between
from ..facts.graph import argument, input_node, is_call, is_float, last_dim, permutation, same_shape, same_size, val
from .known import Known
from .streams import calls

aten = ops.aten
_SIZES = {aten.sym_size.int, aten.sym_numel.default}
#: Our operations that scatter, and whose first result are rows of a rank's own.
SCATTERING = ("tpfuse::reduce_scatter_norm", "tpfuse::reduce_scatter_norm_backward")


@dataclass(frozen=True)
class Gather:
    """`collective` gathers `rows`, the first result of `fused`, seen through `views`."""

    fused: fx.Node
    rows: fx.Node
    views: tuple[fx.Node, ...]
    collective: Collective


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
    found = gathered_rows(collective)
    if found is None or not is_waited_for_alone(collective):
        return None
    node, views = found
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
    return Gather(fused, node, views, collective)


def gathered_rows(collective: Collective) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """(the first result of some operation, the views above it) where a plain gather gathers that, row after row."""
    if not is_plain_gather(collective):
        return None
    node, views = collective.input, list[fx.Node]()
    while is_call(node, ops.VIEWS | ops.COPIES_OF_VALUES) and is_float(node.args[0]):
        views.append(node)
        node = input_node(node)
    if node.target is not ops.operator.getitem or node.args[1] != 0 or not _keeps_rows(node, views[::-1]):
        return None
    return node, tuple(views)


def is_plain_gather(collective: Collective) -> bool:
    plain = str(collective.node.target).endswith("all_gather_into_tensor.default")
    known = plain and not collective.problem and collective.wait is not None
    return known and is_float(argument(collective.node, "input"))


def is_waited_for_alone(collective: Collective) -> bool:
    """Whether of the unfinished result nothing is read but sizes."""
    return all(user is collective.wait or is_call(user, _SIZES) for user in collective.node.users)


def _keeps_rows(rows: fx.Node, views: Sequence[fx.Node]) -> bool:
    """Whether `rows`, [..., H], are still in their order after these views: permuted and back at the most."""
    order = list(range(val(rows).dim()))
    for view in views:
        if is_call(view, ops.REORDERINGS):
            order = [order[dim] for dim in permutation(view)]
        elif not same_shape(view, input_node(view)):
            if order != sorted(order) or not same_size(last_dim(view), last_dim(rows)):
                return False
            order = list(range(val(view).dim()))
    return order == sorted(order) and len(order) > 1


def _tagged_alike(fused: fx.Node, gather: fx.Node) -> bool:
    """Whether an activation checkpoint treats both alike. An operation outside of any is tagged by us: it is saved."""
    if "ac_graph_id" not in fused.meta and "ac_graph_id" not in gather.meta:
        return "recompute" not in gather.meta
    return recompute_tag(fused) == recompute_tag(gather)


__all__ = ["SCATTERING", "Gather", "find_gathers", "gathered_rows", "is_plain_gather", "is_waited_for_alone"]
