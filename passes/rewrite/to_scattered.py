"""TP_ATTN_FULL → SCATTERED: a stage of the residual stream on own rows (scatter_dense, gather_full_tp).

all-reduce, + residual, norm        →  reduce-scatter + own residual + norm, in one operation
all-gather, + residual, norm        →  + own residual + norm; the gather is no longer needed here
norm, own rows                      →  nothing
norm, all-gather over the replicas  →  all-gather over the whole group
norm, any other reader              →  all-gather over the attention group
"""

from __future__ import annotations

import torch
from torch import fx

from ..facts import aten_ops as ops
from ..facts.collectives import Collective
from ..facts.graph import FINISHES, argument, input_node, insert_call, inserting_behind, last_dim, same_size, val
from ..facts.refusals import Code, Refusal
from ..plan.layouts import SCATTERED
from ..recognise.padding import padding_is_dropped
from ..recognise.streams import StreamStage, divides, flat_rows
from ..verdict.accounting import origin
from .chain import Chain
from .replay import replay

c10d = ops.c10d


def scatter(chain: Chain, stage: StreamStage) -> None:
    """Rebuild a stage that adds and normalises all rows of the replica, so that it works on own rows."""
    norm, addend, graph = stage.norm, stage.addend, chain.graph
    with inserting_behind(graph, norm.output):
        vector, residual = chain.operands(stage, own=True)
        if addend.kind == "gathered":
            y, h = chain.norm_op(stage, torch.ops.tpfuse.rows_norm.default, addend.source, residual, vector, "")
        else:
            source, group = _owed_over(chain, stage)
            op = torch.ops.tpfuse.reduce_scatter_norm.default
            y, h = chain.norm_op(stage, op, source, residual, vector, group)
            # The replicas' own rows are no two alike, so over the whole group there is nothing to compare.
            if group == addend.collective.group_name:
                input_node(y).meta[FINISHES] = True
        chain.own[stage.hidden] = h
        _readers_of_scattered(chain, stage, y)
    chain.replaced |= {addend.collective.node, addend.collective.result}
    name = origin(addend.collective.node)
    if addend.kind == "owed":
        crosses = bool(stage.gathers) or name != addend.collective.node.name
        rewrite = "gather_full_tp" if crosses else "scatter_dense"
        chain.moved.verdicts[name] = (rewrite, True, None)
    else:
        said = "moved behind the next norm: the residual stream stays scattered, so only the normed rows are gathered"
        chain.moved.verdicts[name] = ("scatter_dense", False, Refusal(Code.LAYOUT_CHANGED, said))
    chain.moved.layouts[name] = SCATTERED


def _owed_over(chain: Chain, stage: StreamStage) -> tuple[fx.Node, str]:
    """(partial, group): where a reduce-scatter over dp comes first, both are one over the whole group.

    Rows are cut from the partial sum as they are from the hidden states: what rearranges them between the two is
    repeated on the partial sum.
    """
    source, term, group = stage.addend.source, stage.term, stage.addend.collective.group_name
    if not term.only_reshapes or not same_size(last_dim(source), last_dim(stage.hidden)):
        return replay(chain.graph, term.steps, source), group
    first = input_node(source) if source.target is ops.WAIT else None
    if first is None or first.target is not c10d.reduce_scatter_tensor.default or len(source.users) != 1:
        return source, group
    dp_name = argument(first, "group_name")
    dp = next((members for members, name in chain.names.items() if name == dp_name), ())
    whole = _whole_group(chain, dp)
    if whole is None or not _even(chain, source):
        return source, group
    chain.replaced |= {first, source}
    return input_node(first), whole


def _whole_group(chain: Chain, dp: tuple[int, ...]) -> str | None:
    """The group that is the product of the replicas' group `dp` and this chain's, the replicas slowest: only then do
    rows that are scattered over both, one after the other, lie as those scattered over the product."""
    attn = chain.parts
    for members, name in chain.names.items():
        if len(members) == len(dp) * attn and chain.rank in members:
            own_dp, own_attn = divmod(members.index(chain.rank), attn)
            if dp == members[own_attn::attn] and chain.ranks == members[own_dp * attn : (own_dp + 1) * attn]:
                return name
    return None


def crosses_at_once(chain: Chain, stage: StreamStage) -> bool:
    """Whether what crosses the replicas around the stage, scattered, is one collective over the whole group."""
    into = [g for g in stage.gathers if _whole_group(chain, g.ranks) is None or not _even(chain, g.input)]
    source = stage.addend.source
    return not into and (source.target is not ops.WAIT or _even(chain, source))


def _even(chain: Chain, node: fx.Node) -> bool:
    return divides(chain.parts, val(node).shape[0])


def _readers_of_scattered(chain: Chain, stage: StreamStage, y: fx.Node) -> None:
    for gather in stage.gathers:
        _gather_whole(chain, gather, y)
    for cut in stage.cuts:
        own = y
        if not divides(chain.parts, flat_rows(stage.hidden)) and not padding_is_dropped(cut):
            own = chain.without_padding(y, stage.hidden)
        cut.replace_all_uses_with(chain.shaped(own, cut), propagate_meta=False)
        chain.replaced.add(cut)
    out = stage.norm.output
    if chain.alive(out):
        full = chain.gathered(y, out, stage)
        out.replace_all_uses_with(full, propagate_meta=False)


def _gather_whole(chain: Chain, gather: Collective, y: fx.Node) -> None:
    """Gather the rows of every replica straight from the scattered rows, where the shares are even."""
    whole = _whole_group(chain, gather.ranks)
    if whole is None or not _even(chain, gather.input):
        return
    count = chain.parts * len(gather.ranks)
    node = insert_call(chain.graph, c10d.all_gather_into_tensor.default, (y, count, whole), like=gather.node)
    node = insert_call(chain.graph, ops.WAIT, (node,), like=gather.node)
    gather.result.replace_all_uses_with(chain.shaped(node, gather.result), propagate_meta=False)
    chain.replaced |= {gather.node, gather.result}
    said = "gathers over the whole group straight from the scattered rows; nothing follows it that could be fused"
    chain.moved.verdicts[origin(gather.node)] = ("gather_full_tp", False, Refusal(Code.LAYOUT_CHANGED, said))
