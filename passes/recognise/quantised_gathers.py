"""Recognise: rows that are gathered, and quantised behind the gather.

    rows = all-gather of own        q, s = a quantisation of these rows

A quantisation has a scale for each row, or for some columns of one, so every rank may as well quantise its own rows and
gather what that gives: the same bits, and half the bytes. What stands between the gather and the quantisation may move
rows about, join them and drop them, and leaves each of them whole. Reads only.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from tpfuse._torch_private import operator_schema

from ..facts import aten_ops as ops
from ..facts.collectives import Collective, is_collective
from ..facts.graph import argument, is_call, last_dim, permutation, same_size, value
from .gathers import gathered_rows, is_plain_gather
from .known import Known
from .quantised import Quantised, find_quantised
from .streams import TRIM_ROWS, calls

aten = ops.aten
#: The operations of ours that hand out quantised rows.
QUANTISING = ("tpfuse::all_reduce_norm", "tpfuse::reduce_scatter_norm", "tpfuse::rows_norm")
#: Views whose second argument is the new shape.
SIZED = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default}


@dataclass(frozen=True)
class QuantisedGather:
    """Own rows are gathered, and `quantised` behind the steps `between`.

    fused, rows: where what is gathered is the normed value `rows` of an operation of ours, row after row, seen through
    `views`: that operation can quantise it; else None. collectives: the gathers, one behind another where rows are
    gathered over two groups; those behind the first are among the steps. dead: what nobody reads any more once rows are
    quantised first, in graph order. reader: what reads the gathered rows as they are besides, or None.
    """

    fused: fx.Node | None
    rows: fx.Node
    views: tuple[fx.Node, ...]
    collectives: tuple[Collective, ...]
    between: tuple[fx.Node, ...]
    quantised: Quantised
    dead: tuple[fx.Node, ...]
    reader: fx.Node | None


def find_quantised_gathers(known: Known) -> list[QuantisedGather]:
    """In graph order."""
    gathers = {c.node: c for c in known.collectives if is_plain_gather(c) and readers(c.node) == [c.wait]}
    found: list[QuantisedGather] = []
    taken: set[fx.Node] = set()  # behind another one
    for collective in gathers.values():
        each = None if collective.node in taken else _gather(collective, gathers)
        if each is not None:
            taken.update(behind.node for behind in each.collectives)
            found.append(each)
    return found


def _gather(first: Collective, gathers: dict[fx.Node, Collective]) -> QuantisedGather | None:
    rows, views = gathered_rows(first) or (first.input, ())
    source = rows.args[0] if rows.target is ops.operator.getitem else None
    fused = source if isinstance(source, fx.Node) and any(calls(source, name) for name in QUANTISING) else None
    collectives, between, end = [first], list[fx.Node](), first.result
    while step := _step(end, gathers):
        collectives += [gathers[node] for node in step if node in gathers]
        between += step
        end = step[-1]
    quantised = find_quantised(end)
    if quantised is None:
        return None
    dead, reader = _left_behind(quantised)
    return QuantisedGather(fused, rows, views, tuple(collectives), tuple(between), quantised, dead, reader)


def _step(node: fx.Node, gathers: dict[fx.Node, Collective]) -> list[fx.Node]:
    """The nodes of the only step that reads `node`, its result last; none where that is no step of whole rows."""
    found = readers(node)
    if len(found) != 1:
        return []
    (user,) = found
    if user in gathers:
        return [user, gathers[user].result]
    if is_call(user, _SPLITS):
        return _joined(user, node)
    if calls(user, TRIM_ROWS):
        return [user]
    stays = is_call(user, ops.VIEWS | ops.SELECTIONS) and _leaves_columns(user, node)
    return [user] if stays else []


def _joined(split: fx.Node, node: fx.Node) -> list[fx.Node]:
    """The nodes of parts of rows that are joined in another order or along another dimension."""
    parts = list(split.users)
    joined = next(iter(parts[0].users), None) if parts else None
    if joined is None or not is_call(joined, aten.cat.default):
        return []
    given = joined.args[0]
    whole = isinstance(given, (list, tuple)) and {*given} == {*parts}
    alone = all(part.target is ops.operator.getitem and list(part.users) == [joined] for part in parts)
    stays = _leaves_columns(split, node) and _leaves_columns(joined, node)
    return [split, *parts, joined] if whole and alone and stays else []


def readers(node: fx.Node) -> list[fx.Node]:
    """What reads the values of `node`, and not only a size."""
    return [user for user in node.users if user.target is not aten.sym_size.int]


def _leaves_columns(node: fx.Node, source: fx.Node) -> bool:
    """Whether `node`, a step behind `source`, has the rows of it whole."""
    if is_call(node, ops.REORDERINGS):
        order = permutation(node)
        return order[-1] == len(order) - 1
    if is_call(node, ops.SELECTIONS | _SPLITS | {aten.cat.default}):
        first = value(source)
        dim = argument(node, "dim", 0)
        # The parts that are joined have as many dimensions as what they were split from.
        return first is not None and dim % first.dim() != first.dim() - 1
    return same_size(last_dim(node), last_dim(source))


def _left_behind(quantised: Quantised) -> tuple[tuple[fx.Node, ...], fx.Node | None]:
    """What nobody reads once q and scales come from elsewhere; and what goes on reading the rows, or None."""
    replaced = {*quantised.q, *quantised.scale}
    behind: dict[fx.Node, None] = {quantised.y: None}
    node = quantised.y.next
    while node.op != "root":
        of_sizes = node.target is aten.sym_size.int and node.args[0] is quantised.y
        if not of_sizes and any(parent in behind and parent not in replaced for parent in node.all_input_nodes):
            behind[node] = None
        node = node.next
    dead = set[fx.Node]()
    for node in reversed(behind):
        read = readers(node) if node is quantised.y else list(node.users)
        unread = bool(read) and all(user in dead for user in read)
        if node in replaced or (unread and _only_computes(node)):
            dead.add(node)
    if quantised.y in dead:
        return tuple(node for node in behind if node in dead), None
    alive = [node for node in behind if node not in dead and node is not quantised.y]
    return (), next((node for node in alive if node.target not in ops.VIEWS), alive[0])


def _only_computes(node: fx.Node) -> bool:
    if node.op != "call_function" or is_collective(node):
        return False
    schema = operator_schema(node.target)
    return node.target is ops.operator.getitem or node.target is ops.WAIT or not (schema is None or schema.is_mutable)


__all__ = ["QUANTISING", "SIZED", "QuantisedGather", "find_quantised_gathers", "readers"]
