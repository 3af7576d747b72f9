"""Pay a sum over the whole group in factors, so that its second half is an ordinary boundary of the attention group.

    own rows of one dp replica of all_reduce(whole, x)  =  all_reduce(attention, reduce_scatter(dp, x))

With one rank in the attention group the reduce-scatter alone is left.

The ranks of the whole group are laid out dp slowest: whole = dp x attention. Selecting rows is linear, so a bias added
in between is added afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from . import aten_ops as ops
from .collectives import Collective, ResolveGroup, find_collectives
from .graph import insert_call, same_shape, value
from .stream import CUT_ROWS, calls, divides
from .sums import Term, decompose


@dataclass(frozen=True)
class Factored:
    """One all-reduce that was paid in factors: the old collective's name, and the last of the new collectives."""

    name: str
    last: fx.Node


def factor_sums(graph: fx.Graph, resolve: ResolveGroup, rank: int, names: dict[tuple[int, ...], str]) -> list[Factored]:
    """Factor every all-reduce that is followed by a cut over a dp group and by nothing else."""
    collectives = {c.result: c for c in find_collectives(graph, resolve) if c.kind == "all_reduce" and not c.problem}
    done = []
    for node in list(graph.nodes):
        if calls(node, CUT_ROWS):
            factored = _factor(graph, node, collectives, rank, names)
            if factored is not None:
                done.append(factored)
    return done


def _factor(
    graph: fx.Graph,
    cut: fx.Node,
    collectives: dict[fx.Node, Collective],
    rank: int,
    names: dict[tuple[int, ...], str],
) -> Factored | None:
    """Rewrite one `cut_rows(path(wait(all_reduce(x))) + bias...)`, if it is one."""
    source, parts, index = cut.args
    total = decompose(source, set(collectives), set())
    if len(total.owed) != 1 or not total.plain:
        return None
    (term,) = total.owed
    collective = collectives[term.leaf]
    groups = _factors(collective, parts, index, rank, names)
    vectors = total.replicated
    if groups is None or any(value(v.leaf).dim() != 1 for v in vectors) or term.scale != 1.0:
        return None
    inside = total.interior | {cut}
    if any(user not in inside for node in [term.leaf, *total.interior] for user in node.users if not _is_size(user)):
        return None
    flat = _flat_size(source)
    if flat is None or not divides(parts, flat) or not _is_flat_path(term):
        return None
    dp, attention = groups
    with graph.inserting_before(cut):
        partial = collective.input
        if value(partial).dim() != 2:
            partial = insert_call(graph, ops.aten.reshape.default, (partial, [-1, value(partial).shape[-1]]), like=cut)
        c10d = ops.c10d
        scattered = insert_call(
            graph, c10d.reduce_scatter_tensor.default, (partial, "sum", parts, dp), like=collective.node
        )
        out = insert_call(graph, ops.WAIT, (scattered,), like=collective.node)
        last = scattered
        if attention:
            last = insert_call(graph, c10d.all_reduce.default, (out, "sum", attention), like=collective.node)
            out = insert_call(graph, ops.WAIT, (last,), like=collective.node)
        for vector in vectors:
            leaf = vector.leaf
            if vector.scale != 1.0:
                leaf = insert_call(graph, ops.aten.mul.Tensor, (leaf, vector.scale), like=cut)
            out = insert_call(graph, ops.aten.add.Tensor, (out, leaf), like=cut)
        if value(out).dtype != value(cut).dtype:
            out = insert_call(graph, ops.prims.convert_element_type.default, (out, value(cut).dtype), like=cut)
    cut.replace_all_uses_with(out, propagate_meta=False)
    for dead in sorted({cut, *total.interior, term.leaf, collective.node}, reverse=True):
        for user in list(dead.users):
            if _is_size(user) and not user.users:
                graph.erase_node(user)
        if dead.users:
            raise RuntimeError(f"{dead} is still read after its sum was factored")
        graph.erase_node(dead)
    return Factored(collective.node.name, last)


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


def _flat_size(node: fx.Node) -> object:
    val = value(node)
    if val is None:
        return None
    rows = 1
    for size in val.shape[:-1]:
        rows = rows * size
    return rows


def _is_flat_path(term: Term) -> bool:
    """Whether the views on the way only regroup the leading dimensions, so that rows keep their order."""
    hidden = value(term.leaf).shape[-1]
    return all(
        view.target not in ops.REORDERINGS and (same_shape(view, view.args[0]) or value(view).shape[-1] == hidden)
        for view in term.views
    )


def _is_size(node: fx.Node) -> bool:
    return node.target is ops.aten.sym_size.int
