"""Rewrite: own rows are quantised before they are gathered.

    [y, h] = reduce_scatter_norm(...);  rows = all-gather of y;  q, s = a chain on rows

becomes

    [y, h, q', s'] = reduce_scatter_norm(..., quant=...);  packed = all-gather of [q' | s'];  q, s = its columns

q' and s' go as bytes, side by side, in one gather. What stood between the gather and the chain is done to these bytes.
Where what is gathered is no such normed value (rows are padded first), the chain's steps stand in front of the gather.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from tpfuse._torch_private import trace_on_fakes
from tpfuse.errors import TPFuseError
from tpfuse.quantisation import Quantisation
from tpfuse.report import Boundary

from ..facts import aten_ops as ops
from ..facts.collectives import Collective, is_collective
from ..facts.graph import (
    QUANTISED_ROWS,
    argument,
    carry_meta,
    fake_result,
    insert_call,
    inserting_behind,
    same_size,
    val,
)
from ..facts.refusals import Code, Refusal
from ..plan.quantised_gathers import quantised_first
from ..recognise.known import Known
from ..recognise.quantised import SYMBOLIC
from ..recognise.quantised_gathers import SIZED, QuantisedGather, find_quantised_gathers, readers
from ..verdict.accounting import origin
from ..verdict.names import module_name, place
from .quantise import handed_out, shaped, sizes_known
from .replay import reshaped, sizes_of
from .strides import hand_over, settle_strides

aten, c10d = ops.aten, ops.c10d
_SENT = "rows are quantised before they are gathered, and sent with their scales; nothing follows that could be fused"
GATHERED = Refusal(Code.LAYOUT_CHANGED, _SENT)


def quantise_first(known: Known, boundaries: dict[str, Boundary]) -> tuple[dict[str, Boundary], list[str]]:
    """Quantise in front of every gather where that pays: the verdicts that are new, by the names of the program's
    collectives, and sentences on gathers that none of these verdicts is about. Changes the graph."""
    found: dict[str, Boundary] = {}
    notes: list[str] = []
    for each in find_quantised_gathers(known):
        gathers = {origin(collective.node) for collective in each.collectives}
        refusal = _why_not(each)
        if refusal is None:
            for name in (_apply(known.graph, each) | gathers) & boundaries.keys():
                done = replace(found.get(name, boundaries[name]), quantised=str(each.quantised.how))
                laid_out = done.rewrite is not None  # what did that is said already
                found[name] = done if laid_out else replace(_left(done, GATHERED), rewrite="quantised_outputs")
            continue
        written = [n for n in gathers & boundaries.keys() if not (boundaries[n].rewrite or boundaries[n].fused)]
        found |= {name: _left(boundaries[name], refusal) for name in written}
        if not written:
            notes.append(f"{module_name(each.collectives[0].node) or 'a gather'}: {refusal.sentence}")
    if any(boundary.quantised for boundary in found.values()):
        settle_strides(known.graph, at_once=bool(known.hazards.writes))
        known.graph.lint()
    return found, notes


def _left(boundary: Boundary, why: Refusal) -> Boundary:
    return replace(boundary, reason=why.sentence, code=why.code.value)


def _why_not(found: QuantisedGather) -> Refusal | None:
    rows = val(found.rows)
    if not sizes_known(found.quantised):
        return Refusal(Code.VALUES, f"the rows are quantised behind the gather: {SYMBOLIC}")
    plain, packed = int(rows.shape[-1]) * rows.dtype.itemsize, sum(_bytes(found))
    ranks = [len(collective.ranks) for collective in found.collectives]
    if quantised_first(ranks, plain, packed, found.reader is not None):
        return None
    if found.reader is None:
        return Refusal(Code.USED_TWICE, "the gathered rows are quantised, and with scales they are no fewer bytes")
    reader = place(found.reader)
    return Refusal(
        Code.USED_TWICE,
        f"the gathered rows are quantised, and read as they are by {reader} besides, so that both would have to be "
        "gathered, in more bytes; where that reads the rows of its own rank, rows are quantised first",
    )


def _bytes(found: QuantisedGather) -> tuple[int, int]:
    """How many bytes a row has of q and of scales."""
    how, hidden = found.quantised.how, int(val(found.rows).shape[-1])
    return hidden * how.q_dtype.itemsize, how.scales_of((hidden,))[-1] * how.scale_dtype.itemsize


def _apply(graph: fx.Graph, found: QuantisedGather) -> set[str]:
    """Returns the name of the collective in whose operation rows are quantised, if one does that."""
    first, quantised = found.collectives[0], found.quantised
    columns = sum(_bytes(found))
    by_the_operation = _by_the_operation(graph, found)
    own = by_the_operation or _by_steps(graph, first, quantised.how)
    made = _gathered(graph, first, own, columns, quantised.how)
    known = {first.node: made, first.result: made}
    for node in found.between:  # what the program does to the gathered rows is done to the bytes
        with graph.inserting_before(node):
            copied = known[node] = graph.node_copy(node, lambda old: known.get(old, old))
            if node.target in SIZED:
                copied.target = aten.reshape.default
                copied.args = (copied.args[0], [*argument(node, "size", argument(node, "shape"))[:-1], columns])
            copied.meta["val"] = fake_result(copied)
            if is_collective(node):
                _mark(copied, node, quantised.how)
    for node, instead in known.items():
        for user in set(node.users).difference(readers(node)):  # its rows are as many
            user.replace_input_with(node, instead)
    with inserting_behind(graph, quantised.y):
        start = 0
        parts = zip(_bytes(found), (quantised.how.q_dtype, quantised.how.scale_dtype), strict=True)
        for (count, dtype), nodes in zip(parts, (quantised.q, quantised.scale), strict=True):
            part = _taken(graph, known[quantised.y], start, start + count, dtype)
            for node in nodes:
                hand_over(node, shaped(graph, part, node))
            start += count
    gone = (*reversed(found.dead), *reversed(found.between), first.result, first.node)
    for node in dict.fromkeys(gone):
        if node.users:
            raise TPFuseError(f"internal error: {node} is still read, and was to be replaced")
        graph.erase_node(node)
    for node in found.views:
        if not node.users:
            graph.erase_node(node)
    return {origin(found.fused)} if found.fused is not None and by_the_operation else set()


def _by_the_operation(graph: fx.Graph, found: QuantisedGather) -> tuple[fx.Node, fx.Node] | None:
    """(q, scale) of the operation that normalises the rows; None where there is none, or it hands out another one."""
    fused, how = found.fused, found.quantised.how
    if fused is None or argument(fused, "quant", "") not in ("", how.text()):
        return None
    return handed_out(graph, fused, found.rows, how)


def _by_steps(graph: fx.Graph, collective: Collective, how: Quantisation) -> tuple[fx.Node, fx.Node]:
    """(q, scale) of the rows that are gathered, in plain operations in front of the gather."""
    traced = trace_on_fakes(lambda rows: how.of(rows), [val(collective.input)])
    copies: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(collective.node):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                copies[node] = collective.input
            elif node.op != "output":
                copies[node] = graph.node_copy(node, copies.__getitem__)
                carry_meta(collective.node, copies[node])
    q, scale = traced.graph.output_node().all_input_nodes
    return copies[q], copies[scale]


def _mark(gather: fx.Node, old: fx.Node, how: Quantisation) -> None:
    """Tell the ranks' agreement what `gather` sends; `old`: in whose place."""
    gather.meta[QUANTISED_ROWS] = (how.text(), origin(old) == old.name)


def _gathered(
    graph: fx.Graph, collective: Collective, own: tuple[fx.Node, fx.Node], columns: int, how: Quantisation
) -> fx.Node:
    """Both as bytes of all ranks, side by side, in the place of the program's gather and of its shape, whatever shape
    the rows had before: peers need not have seen theirs in the same one."""
    like, shape = collective.node, (*val(collective.input).shape[:-1], columns)
    with graph.inserting_before(like):
        parts = [insert_call(graph, aten.view.dtype, (part, torch.uint8), like=like) for part in own]
        packed = insert_call(graph, aten.cat.default, (parts, -1), like=like)
        if val(packed).dim() != len(shape) or not all(map(same_size, val(packed).shape, shape)):
            packed = reshaped(graph, packed, [*sizes_of(graph, collective.input)[:-1], columns], shape)
        given = (packed, len(collective.ranks), collective.group_name)
        pending = insert_call(graph, c10d.all_gather_into_tensor.default, given, like=like)
        _mark(pending, like, how)
        return insert_call(graph, ops.WAIT, (pending,), like=like)


def _taken(graph: fx.Graph, packed: fx.Node, start: int, end: int, dtype: torch.dtype) -> fx.Node:
    """Some columns of the gathered bytes, as what they are; compact, as products of quantised rows want them."""
    last = val(packed).dim() - 1
    part = insert_call(graph, aten.slice.Tensor, (packed, last, start, end), like=packed)
    part = insert_call(graph, aten.clone.default, (part,), {"memory_format": torch.contiguous_format}, like=packed)
    return insert_call(graph, aten.view.dtype, (part, dtype), like=packed)
