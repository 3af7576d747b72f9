"""Stages written over a scattered residual stream: SCATTERED → TP_ATTN_FULL (share_attention_group), or fused in place.

reduce-scatter, + own residual, norm, all-gather  →  all-reduce, + residual, norm
reduce-scatter, + own residual, norm              →  one operation (reduce_scatter_norm)
"""

from __future__ import annotations

import torch
from torch import fx

from ..facts import aten_ops as ops
from ..facts.graph import (
    FINISHES,
    fake_result,
    insert_call,
    inserting_behind,
    last_dim,
    region_between,
    row_major,
    same_shape,
    same_size,
    val,
)
from ..facts.refusals import Code, Refusal
from ..plan.layouts import TP_ATTN_FULL
from ..recognise.scattered import row_order
from ..recognise.streams import StreamStage, divides
from ..verdict.accounting import origin
from .chain import Chain
from .replay import sizes_of

aten, c10d = ops.aten, ops.c10d


def replicate(chain: Chain, stage: StreamStage) -> None:
    """The same sums, unscattered: the all-reduce this writes is fused with its norm like any other afterwards."""
    norm, addend, graph = stage.norm, stage.addend, chain.graph
    with inserting_behind(graph, norm.output):
        reduced = (addend.source, "sum", addend.collective.group_name)
        node = insert_call(graph, c10d.all_reduce.default, reduced, like=addend.collective.node)
        node.meta[FINISHES] = True
        chain.moved.verdicts[origin(addend.collective.node)] = ("share_attention_group", False, None)
        chain.moved.layouts[origin(addend.collective.node)] = TP_ATTN_FULL
        replacements = {addend.leaf: insert_call(graph, ops.WAIT, (node,), like=addend.leaf)}
        for term in stage.residuals:
            replacements[term.leaf] = chain.full_of(term.leaf, stage)
        hidden = _cloned(chain, stage.hidden, replacements, set(stage.total.interior))
        chain.full[stage.hidden] = hidden
        between = region_between(norm.output, {stage.hidden}) - {stage.hidden}
        y = _cloned(chain, norm.output, {stage.hidden: hidden}, between)
        for gather in stage.gathers:
            gather.result.replace_all_uses_with(chain.shaped(y, gather.result), propagate_meta=False)
            chain.replaced |= {gather.result, gather.node}
            said = "the residual stream is kept replicated over the group, so nothing is left to gather"
            changed = Refusal(Code.LAYOUT_CHANGED, said)
            chain.moved.verdicts[origin(gather.node)] = ("share_attention_group", False, changed)
            chain.moved.layouts[origin(gather.node)] = TP_ATTN_FULL
        if chain.alive(norm.output):
            norm.output.replace_all_uses_with(chain.cut(y, norm.output), propagate_meta=False)
    chain.replaced |= {addend.collective.node, addend.collective.result}


def _cloned(chain: Chain, out: fx.Node, replacements: dict[fx.Node, fx.Node], inside: set[fx.Node]) -> fx.Node:
    """Copy the nodes `inside` that lead to `out`, reading `replacements`; views with sizes are not among them."""
    known = dict(replacements)
    for node in sorted(inside | {out}):
        if any(parent in known for parent in node.all_input_nodes):
            copied = chain.graph.node_copy(node, lambda n: known.get(n, n))
            copied.meta["val"] = fake_result(copied)
            known[node] = copied
    return known[out]


def fuse_scattered(chain: Chain, stage: StreamStage) -> None:
    """Reduce-scatter, addition and norm in one operation; the layout stays.

    The operation works on flat rows in the order in which they are scattered. Where the result is permuted before it is
    added (scattered along another dimension than the first), the residual is permuted to it, and the results back.
    """
    norm, addend, graph = stage.norm, stage.addend, chain.graph
    hidden, scattered = stage.hidden, addend.leaf
    if not divides(chain.parts, val(addend.source).shape[0]) or val(addend.source).dim() < 2:
        return
    if any(not same_shape(t.leaf, hidden) for t in stage.residuals) or not same_shape(norm.output, hidden):
        return
    order = row_order(stage.term.steps)
    if order is None or not same_size(last_dim(scattered), last_dim(hidden)):
        return
    flat = val(hidden).dim() == 2 and not order
    if not stage.residuals and not flat and not chain.knows_sizes(stage):
        return
    with inserting_behind(graph, norm.output):
        vector, residual = chain.operands(stage, own=False)
        sizes: list = []
        if not flat:
            if residual is not None and order:
                back = sorted(range(len(order)), key=order.__getitem__)
                residual = insert_call(graph, aten.permute.default, (residual, back), like=residual)
            sizes = chain.sizes(hidden) if residual is None else sizes_of(graph, residual)
            if residual is None and order:
                sizes = [sizes[order.index(dim)] for dim in range(len(order))]
            if residual is not None:
                residual = insert_call(graph, aten.reshape.default, (residual, [-1, sizes[-1]]), like=residual)
        op = torch.ops.tpfuse.reduce_scatter_norm.default
        group = addend.collective.group_name
        results: tuple[fx.Node, ...] = chain.norm_op(stage, op, addend.source, residual, vector, group)
        if not flat:
            results = tuple(insert_call(graph, aten.reshape.default, (r, sizes), like=r) for r in results)
        if order:
            results = tuple(insert_call(graph, aten.permute.default, (r, list(order)), like=r) for r in results)
            if row_major(hidden):
                kept = {"memory_format": torch.contiguous_format}
                results = tuple(insert_call(graph, aten.clone.default, (r,), kept, like=r) for r in results)
        y, chain.own[hidden] = results
        norm.output.replace_all_uses_with(y, propagate_meta=False)
    chain.replaced |= {addend.collective.node, addend.collective.result}
    node = addend.collective.node
    rewrite = "reduce_scatter_norm" if origin(node) == node.name else "gather_full_tp"
    chain.moved.verdicts[origin(node)] = (rewrite, True, None)
