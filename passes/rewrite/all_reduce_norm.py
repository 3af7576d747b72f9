"""Rewrite: put the planned operation into the graph and erase what it replaces.

The fused operation hands out every value of the boundary that the rest of the graph may need: the normed value, the
hidden states (residual stream), the all-reduced sum itself, and the norm's statistics. Nodes of the old chain that
something else still reads (backward reads a good many) stay, computed from those; everything else is erased, the
collective and its wait explicitly, because a dead all-reduce counts as a side effect and would run a second time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from heapq import heapify, heappop, heappush
from itertools import pairwise

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from tpfuse.boundary_spec import Options

from ..facts import aten_ops as ops
from ..facts.collectives import Collective
from ..facts.graph import (
    FINISHES,
    added,
    carry_meta,
    fake_result,
    input_node,
    insert_call,
    inserting_behind,
    is_call,
    region_between,
    same_shape,
    scaled,
    val,
)
from ..plan.sites import Plan
from ..recognise.sums import Step, Sum, decompose
from .replay import replay, sizes_of
from .scattered_rows import ScatteredRows
from .strides import hand_over

aten = ops.aten


@dataclass(frozen=True)
class _Wanted:
    """Which values of the boundary are still read once it is fused."""

    hidden: bool
    total: bool
    mean: bool
    rstd: bool
    dead: frozenset[fx.Node]


def apply(graph: fx.Graph, plan: Plan) -> None:
    """Fuse one boundary of `graph`. The graph stays runnable; a violated order is mended by `restore_order`."""
    site = plan.site
    waits = {owed.collective.result: owed.collective for owed in plan.paid}
    total = decompose(site.hidden, set(waits), set())
    wanted = _wanted(plan, total, waits)
    out = plan.site.out(plan.post)

    scale = _common_scale(total)
    rows = ScatteredRows.of(plan, total)
    anchor = max([site.hidden, *_operands(plan, total)])
    with inserting_behind(graph, anchor):
        # What is scattered is scattered as it is; the rows that arrive are put where the graph has them.
        partial = _partial(graph, total, scale, waits) if rows is None else rows.source
        vector, residual = _replicated(graph, total, waits, partial)
        if plan.post:
            residual = _residual_after(plan)
        if rows is not None and residual is not None:
            residual = rows.flat(graph, residual)
        fused = _insert_fused(graph, plan, wanted, partial, residual, vector, scale, out)
        _hand_out(graph, plan, wanted, fused, out, waits, rows)
    # The partitioner never recomputes a collective of its own accord, but knows one by its namespace only.
    fused.meta.setdefault("recompute", CheckpointPolicy.MUST_SAVE)
    _erase(graph, wanted.dead, waits)


# -- what is needed ---------------------------------------------------------------------------------------------------


def _wanted(plan: Plan, total: Sum, waits: dict[fx.Node, Collective]) -> _Wanted:
    """Which old values are read by anything but the old chain, and which nodes nobody reads any more."""
    norm, hidden = plan.site.norm, plan.site.hidden
    out = plan.site.out(plan.post)
    region = region_between(out, set(waits))
    dead: set[fx.Node] = set()
    read: set[fx.Node] = set()
    replaced = {out, hidden, norm.mean, norm.rstd, *waits}
    for node in sorted(region | set(waits), reverse=True):
        for user in node.users:
            if user.target is ops.operator.getitem and not user.users:
                dead.add(user)
        alive = [user for user in node.users if user not in dead]
        if node is out:
            dead.add(node)
        elif node in replaced:
            dead.add(node)
            if alive:
                read.add(node)
        elif not alive:
            dead.add(node)
    # Where the sum is the hidden state itself, `hidden` serves both.
    return _Wanted(
        hidden in read,
        any(wait in read for wait in waits if wait is not hidden),
        norm.mean in read,
        norm.rstd in read,
        frozenset(dead),
    )


def _operands(plan: Plan, total: Sum) -> list[fx.Node]:
    norm = plan.site.norm
    found = [term.leaf for term in total.replicated]
    found += [owed.collective.input for owed in plan.paid]
    found += [node for node in (norm.weight, norm.bias, norm.eps) if isinstance(node, fx.Node)]
    if plan.post:
        found.append(_residual_after(plan))
    # Steps are repeated on other tensors and bring their gates and symbolic sizes with them.
    found += [other for term in total.terms for step in term.steps for other in step.others]
    found += [
        term.joins for term in total.replicated if term.joins is not None and not same_shape(term.leaf, term.joins)
    ]
    return [node for node in found if node not in total.interior]


def _residual_after(plan: Plan) -> fx.Node:
    """The residual added behind the norm, as the graph has it now: an earlier rewrite may have replaced it."""
    left, right = input_node(plan.site.out(plan.post), 0), input_node(plan.site.out(plan.post), 1)
    return right if left is plan.site.norm.output else left


# -- the operands -----------------------------------------------------------------------------------------------------


def _common_scale(total: Sum) -> float:
    """The number all owed sums are multiplied by, if it is one number; the kernel applies it in float32."""
    scales = {term.scale for term in total.owed}
    return scales.pop() if len(scales) == 1 else 1.0


def _partial(graph: fx.Graph, total: Sum, scale: float, waits: dict[fx.Node, Collective]) -> fx.Node:
    """The tensor whose sum over the group is owed: sums are linear, so every step moves before the all-reduce."""
    partial: fx.Node | None = None
    for term in total.owed:
        collective = waits[term.leaf]
        node = replay(graph, term.steps, collective.input)
        if term.gates:
            # A gate of a wider dtype must not make the all-reduce send more bytes.
            node = _cast_like(graph, node, collective.input)
        factor = term.scale / scale
        if collective.reduce_op.lower() == "avg":
            factor /= len(collective.ranks)
        if factor != 1.0:
            node = insert_call(graph, aten.mul.Tensor, (node, factor), like=collective.node)
        if partial is not None:
            node = insert_call(graph, aten.add.Tensor, (partial, node), like=collective.node)
        partial = node
    assert partial is not None, "a site owes at least one sum"
    return partial


def _replicated(
    graph: fx.Graph, total: Sum, waits: dict[fx.Node, Collective], partial: fx.Node
) -> tuple[fx.Node | None, fx.Node | None]:
    """(a bias per hidden unit, the residual): everything that is added to the sums, each as one tensor or None."""
    vector = residual = None
    vectors = {term for term in total.replicated if term.is_row_vector_of(total.root)}
    for term in total.replicated:
        node, alone = term.leaf, len(vectors if term in vectors else set(total.replicated) - vectors) == 1
        if not alone or term.scale != 1.0 or any(not step.moves_only for step in term.steps):
            # What stands in front of the operation must be as exact as the graph was; the operation itself is.
            node = _widened(graph, node, total)
        if term in vectors:
            vector = added(graph, vector, scaled(graph, node, term.scale))
            continue
        if term.joins is not None and not same_shape(node, term.joins):
            # `joins` itself is about to go: what is owed tells its sizes, before, between and behind its steps.
            inputs = {collective.input for collective in waits.values()}
            owed = (*inputs, *sorted(region_between(partial, inputs)))
            sizes = sizes_of(graph, next((each for each in owed if same_shape(each, term.joins)), term.joins))
            node = insert_call(graph, aten.expand.default, (node, sizes), like=term.joins)
        residual = added(graph, residual, scaled(graph, replay(graph, term.steps, node), term.scale))
    return vector, residual


def _widened(graph: fx.Graph, node: fx.Node, total: Sum) -> fx.Node:
    """`node` in the widest dtype that the graph adds up in."""
    widest = reduce(torch.promote_types, (val(node).dtype for node in {*total.interior, total.root}))
    wider = torch.promote_types(val(node).dtype, widest)
    if wider == val(node).dtype:
        return node
    return insert_call(graph, ops.prims.convert_element_type.default, (node, wider), like=node)


# -- the operation ----------------------------------------------------------------------------------------------------


def _insert_fused(
    graph: fx.Graph,
    plan: Plan,
    wanted: _Wanted,
    partial: fx.Node,
    residual: fx.Node | None,
    vector: fx.Node | None,
    scale: float,
    out: fx.Node,
) -> fx.Node:
    norm, collective = plan.site.norm, plan.paid[0].collective
    eps_tensor, eps = (norm.eps, 0.0) if isinstance(norm.eps, fx.Node) else (None, float(norm.eps))
    hidden_dtype = val(plan.site.hidden).dtype if wanted.hidden else None
    options = Options(
        norm=norm.kind, eps=eps, weight_offset=norm.weight_offset, alpha=scale, post=plan.post,
        out_dtype=val(out).dtype, hidden_dtype=hidden_dtype, want_sum=wanted.total, stats=wanted.mean or wanted.rstd,
        group_name=collective.group_name,
    )  # fmt: skip
    operators = {"all_reduce": ops.tpfuse.all_reduce_norm, "reduce_scatter": ops.tpfuse.reduce_scatter_norm}
    fused = graph.call_function(
        operators[collective.kind].default,
        (partial, residual, vector, norm.weight, norm.bias, eps_tensor),
        options.arguments,
    )
    carry_meta(collective.node, fused)
    if FINISHES in collective.node.meta:
        fused.meta[FINISHES] = True
    fused.meta["val"] = fake_result(fused)
    return fused


def _hand_out(
    graph: fx.Graph,
    plan: Plan,
    wanted: _Wanted,
    fused: fx.Node,
    out: fx.Node,
    waits: dict[fx.Node, Collective],
    rows: ScatteredRows | None,
) -> None:
    """Point every reader of an old value at the fused operation's."""
    norm, hidden = plan.site.norm, plan.site.hidden
    index = 0

    def next_output() -> fx.Node:
        nonlocal index
        node = insert_call(graph, ops.operator.getitem, (fused, index), like=fused)
        index += 1
        return node

    def next_rows() -> fx.Node:
        return next_output() if rows is None else rows.placed(graph, next_output())

    chain = _view_chain(norm.source, hidden)
    placed = next_rows()
    normed = replay(graph, [Step(view) for view in chain], placed)
    hand_over(out, _cast_like(graph, normed, out))
    if wanted.hidden:
        hand_over(hidden, next_rows())
    if wanted.total:
        total = next_output()
        for wait, collective in waits.items():
            if wait is not hidden:
                shaped = _shaped_like(graph, total, collective.input) if rows is None else rows.arrived(graph, total)
                hand_over(wait, shaped)
    if wanted.mean or wanted.rstd:
        statistics: list[tuple[fx.Node | None, fx.Node]] = []
        if norm.kind == "layer_norm":
            statistics.append((norm.mean, next_output()))
        statistics.append((norm.rstd, next_output()))
        for old, new in statistics:
            if old is not None and old.users:
                if rows is not None:
                    new = rows.statistic(graph, new, placed)
                chosen = [Step(node) for node in chain if is_call(node, ops.SELECTIONS)]
                new = replay(graph, chosen, new)
                # Statistics may lack the last dimension; those of a single row may have none at all.
                if chain or val(old).dim() != val(new).dim():
                    sizes = [*sizes_of(graph, normed)[:-1], 1][: val(old).dim()]
                    new = insert_call(graph, aten.reshape.default, (new, sizes), like=old)
                hand_over(old, _cast_like(graph, new, old))


def _view_chain(source: fx.Node, hidden: fx.Node) -> list[fx.Node]:
    """The views and choices of rows that lead from `hidden` to the norm's source, in the order in which they apply."""
    chain: list[fx.Node] = []
    while source is not hidden:
        if is_call(source, (ops.VIEWS - ops.COPIES_OF_VALUES) | ops.SELECTIONS):
            chain.append(source)
        source = input_node(source)
    return chain[::-1]


def _cast_like(graph: fx.Graph, node: fx.Node, old: fx.Node) -> fx.Node:
    if val(node).dtype == val(old).dtype:
        return node
    return insert_call(graph, ops.prims.convert_element_type.default, (node, val(old).dtype), like=old)


def _shaped_like(graph: fx.Graph, node: fx.Node, like: fx.Node) -> fx.Node:
    if same_shape(node, like):
        return node
    return insert_call(graph, aten.reshape.default, (node, sizes_of(graph, like)), like=like)


def _erase(graph: fx.Graph, dead: frozenset[fx.Node], waits: dict[fx.Node, Collective]) -> None:
    for node in sorted(dead, reverse=True):
        if not node.users:
            graph.erase_node(node)
    for wait, collective in waits.items():
        if wait not in dead or collective.node.users:
            raise RuntimeError(f"{collective.node} is still read after its boundary was fused")
        graph.erase_node(collective.node)


# -- order ------------------------------------------------------------------------------------------------------------


def restore_order(graph: fx.Graph) -> None:
    """Sort the graph so that every node stands after its inputs, moving as little as possible.

    Needed where a reader of the sum stood before the last operand of the fused operation. The order of nodes that
    were in order already does not change, so collectives keep their order on every rank. (Inductor's own
    `stable_topological_sort` keeps it less: of two nodes that waited for one, what reads the first may come before the
    second.)
    """
    if all(parent < node for node in graph.nodes for parent in node.all_input_nodes):
        return
    position = {node: i for i, node in enumerate(graph.nodes)}
    missing = {node: len(node.all_input_nodes) for node in graph.nodes}
    ready = [(position[node], node) for node, count in missing.items() if count == 0]
    heapify(ready)
    order: list[fx.Node] = []
    while ready:
        _, node = heappop(ready)
        order.append(node)
        for user in node.users:
            missing[user] -= 1
            if missing[user] == 0:
                heappush(ready, (position[user], user))
    if len(order) != len(position):
        raise RuntimeError("the rewritten graph has a cycle")
    for before, node in pairwise(order):
        before.append(node)
