"""Pay a sum over the whole group in factors, so that its second half is an ordinary boundary of the attention group.

    own rows of one dp replica of all_reduce(whole, x)  =  all_reduce(attention, reduce_scatter(dp, x))

With one rank in the attention group the reduce-scatter alone is left. The ranks of the whole group are laid out dp
slowest: whole = dp x attention. Selecting rows is linear, so padding is cut off before the second half, and a bias
added in between is added afterwards.

All sums are factored first, because every layout is reached from there; `unfactor` takes that back where nothing came
of it and one collective is cheaper than two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ..facts import aten_ops as ops
from ..facts.collectives import Collective
from ..facts.graph import input_node, insert_call, inserting_behind, same_shape, scaled, val, value
from ..facts.refusals import Code, Refusal
from ..recognise.hazards import Hazards, Moving
from ..recognise.known import Known
from ..recognise.streams import CUT_ROWS, TRIM_ROWS, calls, divides, flat_rows
from ..recognise.sums import Term, decompose
from ..verdict.accounting import origin

c10d = ops.c10d


@dataclass(frozen=True)
class Factored:
    """One all-reduce that was paid in factors.

    name: the old collective's; group_name: of the whole group; partial: what is summed; parts, index: of the dp group;
    rows: how many of the share are no padding (None: all). second: the all-reduce over the attention group, or None
    where that has one rank; paid: the replica's rows of the sum; nodes: everything new, in graph order.
    """

    name: str
    group_name: str
    partial: fx.Node
    parts: int
    index: int
    rows: Any
    second: fx.Node | None
    paid: fx.Node
    nodes: tuple[fx.Node, ...]


def factor_sums(known: Known, rank: int, names: dict[tuple[int, ...], str], kept: dict[str, Refusal]) -> list[Factored]:
    """Factor every all-reduce that is followed by a cut over a dp group and by nothing else. What a write in place
    forbids is said in `kept`."""
    graph = known.graph
    collectives = {c.result: c for c in known.collectives if c.kind == "all_reduce" and not c.problem}
    cuts = [node for node in graph.nodes if calls(node, CUT_ROWS)]
    found = [_factor(graph, cut, collectives, rank, names, known.hazards, kept) for cut in cuts]
    factored = [one for one in found if one is not None]
    if factored:
        known.changed()
    return factored


def unfactor(graph: fx.Graph, factored: Factored) -> None:
    """Back to one all-reduce over the whole group and a cut."""
    with inserting_behind(graph, factored.paid):
        like = factored.nodes[0]
        node = insert_call(graph, c10d.all_reduce.default, (factored.partial, "sum", factored.group_name), like=like)
        node = insert_call(graph, ops.WAIT, (node,), like=like)
        node = _call(graph, CUT_ROWS, (node, factored.parts, factored.index), like)
        if factored.rows is not None:
            node = _call(graph, TRIM_ROWS, (node, factored.rows), like)
    factored.paid.replace_all_uses_with(node, propagate_meta=False)
    for dead in reversed(factored.nodes):
        graph.erase_node(dead)


def _factor(
    graph: fx.Graph,
    cut: fx.Node,
    collectives: dict[fx.Node, Collective],
    rank: int,
    names: dict[tuple[int, ...], str],
    hazards: Hazards,
    kept: dict[str, Refusal],
) -> Factored | None:
    """Rewrite one `cut_rows(path(wait(all_reduce(x))) + bias...)`, if it is one."""
    source, (parts, index) = input_node(cut), cut.args[1:]
    if not isinstance(parts, int) or not isinstance(index, int):
        return None
    total = decompose(source, set(collectives), set())
    if len(total.owed) != 1 or not total.plain:
        return None
    (term,) = total.owed
    collective = collectives[term.leaf]
    groups = _factors(collective, parts, index, rank, names)
    vectors = total.replicated
    if groups is None or any(val(v.leaf).dim() != 1 for v in vectors) or term.scale != 1.0:
        return None
    if value(source) is None or not divides(parts, flat_rows(source)) or not _is_flat_path(term):
        return None
    readers = [user for user in cut.users if not _is_size(user)]
    trim = readers[0] if len(readers) == 1 and calls(readers[0], TRIM_ROWS) else None
    end = trim if trim is not None else cut
    like = collective.node
    read = (collective.input, *(vector.leaf for vector in vectors))
    made = {like, term.leaf, *total.interior, cut} - {end}
    why = hazards.stays(Moving(like, read, (), made, end, end))
    if why:
        kept[origin(like)] = Refusal(Code.LAYOUT_STAYS, f"its sum is paid over the whole group: {why}")
        return None
    inside = total.interior | {cut}
    if any(user not in inside for node in [term.leaf, *total.interior] for user in node.users if not _is_size(user)):
        return None
    dp, attention = groups
    new: list[fx.Node] = []
    with inserting_behind(graph, end):
        partial = collective.input
        if val(partial).dim() != 2:
            partial = insert_call(graph, ops.aten.reshape.default, (partial, [-1, val(partial).shape[-1]]), like=cut)
        new.append(insert_call(graph, c10d.reduce_scatter_tensor.default, (partial, "sum", parts, dp), like=like))
        new.append(insert_call(graph, ops.WAIT, (new[-1],), like=like))
        if trim is not None:
            new.append(_call(graph, TRIM_ROWS, (new[-1], trim.args[1]), like))
        second = None
        if attention:
            second = insert_call(graph, c10d.all_reduce.default, (new[-1], "sum", attention), like=like)
            new += [second, insert_call(graph, ops.WAIT, (second,), like=like)]
        out = new[-1]
        for vector in vectors:
            leaf = scaled(graph, vector.leaf, vector.scale)
            out = insert_call(graph, ops.aten.add.Tensor, (out, leaf), like=cut)
        if val(out).dtype != val(cut).dtype:
            out = insert_call(graph, ops.prims.convert_element_type.default, (out, val(cut).dtype), like=cut)
    end.replace_all_uses_with(out, propagate_meta=False)
    rows = trim.args[1] if trim is not None else None
    name, group_name = origin(like), collective.group_name
    for dead in sorted({end, cut, *total.interior, term.leaf, collective.node}, reverse=True):
        for user in list(dead.users):
            if _is_size(user) and not user.users:
                graph.erase_node(user)
        if dead.users:
            raise RuntimeError(f"{dead} is still read after its sum was factored")
        graph.erase_node(dead)
    return Factored(name, group_name, partial, parts, index, rows, second, new[-1], tuple(new))


def _call(graph: fx.Graph, name: str, args: tuple, like: fx.Node) -> fx.Node:
    """A call of our operator `name` ("tpfuse::...")."""
    operator = getattr(ops.tpfuse, name.partition("::")[2]).default
    return insert_call(graph, operator, args, like=like)


def _factors(
    collective: Collective, parts: int, index: int, rank: int, names: dict[tuple[int, ...], str]
) -> tuple[str, str] | None:
    """The names of the dp and the attention group whose product the collective's group is, seen from `rank`."""
    whole = collective.ranks
    if len(whole) % parts:
        return None
    attn = len(whole) // parts
    own_dp, own_attn = divmod(whole.index(rank), attn)
    dp, attention = whole[own_attn::attn], whole[own_dp * attn : (own_dp + 1) * attn]
    if own_dp != index or dp not in names or (attn > 1 and attention not in names):
        return None
    return names[dp], names[attention] if attn > 1 else ""


def _is_flat_path(term: Term) -> bool:
    """Whether the views on the way only regroup the leading dimensions, so that rows keep their order."""
    hidden = val(term.leaf).shape[-1]
    return all(
        view.target not in ops.REORDERINGS and (same_shape(view, input_node(view)) or val(view).shape[-1] == hidden)
        for view in term.views
    )


def _is_size(node: fx.Node) -> bool:
    return node.target is ops.aten.sym_size.int
