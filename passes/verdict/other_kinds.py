"""What is said of a collective that is no all-reduce and that no rewrite took: what it is a part of. Reads only."""

from __future__ import annotations

from torch import fx

from ..facts import aten_ops as ops
from ..facts.collectives import Collective, is_collective
from ..facts.graph import argument, input_node, is_call
from ..facts.refusals import Code, Refusal
from .names import place
from .reach import Reached

_ONE = "the two are an all-reduce in two steps, and written as one all_reduce it is fused with a norm that reads it"


def no_rewrite(collective: Collective, reached: Reached) -> Refusal:
    """`reached`: where its result goes."""
    twin = _other_half(collective)
    if twin is not None and collective.kind == "reduce_scatter":
        said = f"{place(twin)} gathers what it scatters again, with nothing computed in between: {_ONE}"
    elif twin is not None:
        said = f"it gathers again what {place(twin)} scattered, with nothing computed in between: {_ONE}"
    elif collective.kind == "all_gather" and reached.feeds_norm:
        said = (
            "a norm reads what it gathers, and no rewrite fuses a gather in front of its norm; where what is gathered "
            "is added up, an all_reduce in its place is fused"
        )
    else:
        to = f": it goes into {place(reached.ends[0])}" if reached.ends and not reached.feeds_norm else ""
        said = f"it is no all-reduce before a norm, and no rewrite applies to this {collective.kind}{to}"
    return Refusal(Code.NO_REWRITE, said)


def _other_half(collective: Collective) -> fx.Node | None:
    """The gather of what a reduce-scatter gives, or the reverse, over the same group."""
    if collective.kind == "reduce_scatter":
        node = collective.result
        while len(node.users) == 1 and is_call(next(iter(node.users)), ops.COPIES_OF_VALUES):
            node = next(iter(node.users))
        halves = [user for user in node.users if _is(user, "all_gather")]
        return halves[0] if len(node.users) == 1 and halves and _alike(halves[0], collective.node) else None
    if collective.kind != "all_gather":
        return None
    node = collective.input
    while is_call(node, ops.COPIES_OF_VALUES) or node.target is ops.WAIT:
        node = input_node(node)
    return node if _is(node, "reduce_scatter") and _alike(node, collective.node) else None


def _is(node: fx.Node, kind: str) -> bool:
    return is_collective(node) and kind in str(node.target)


def _alike(one: fx.Node, other: fx.Node) -> bool:
    return argument(one, "group_name") == argument(other, "group_name")


__all__ = ["no_rewrite"]
