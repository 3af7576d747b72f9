"""Rewrite: own rows are quantised before they are gathered.

    [y, h] = reduce_scatter_norm(...);  rows = all-gather of y;  q, s = a chain on rows

becomes

    [y, h, q', s'] = reduce_scatter_norm(..., quant=...);  packed = all-gather of [q' | s'];  q, s = its columns

q' and s' go as bytes, side by side, in one gather. What stood between the gather and the chain is repeated on both.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from tpfuse.errors import TPFuseError
from tpfuse.report import Boundary

from ..facts import aten_ops as ops
from ..facts.collectives import Collective
from ..facts.graph import argument, fake_result, insert_call, inserting_behind, same_size, val
from ..facts.refusals import Code, Refusal
from ..plan.quantised_gathers import quantised_first
from ..recognise.known import Known
from ..recognise.quantised import SECOND, SYMBOLIC
from ..recognise.quantised_gathers import SIZED, QuantisedGather, find_quantised_gathers, readers
from ..verdict.accounting import origin
from ..verdict.names import module_name, place
from .quantise import handed_out, shaped, sizes_known
from .replay import computed, reshaped, sizes_of
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
        fused, gathers = origin(each.fused), {origin(collective.node) for collective in each.collectives}
        refusal = _why_not(each)
        if refusal is None:
            _apply(known.graph, each)
            for name in {fused, *gathers} & boundaries.keys():
                done = replace(found.get(name, boundaries[name]), quantised=str(each.quantised.how))
                laid_out = done.rewrite is not None  # what did that is said already
                found[name] = done if laid_out else replace(_left(done, GATHERED), rewrite="quantised_outputs")
            continue
        written = [n for n in gathers & boundaries.keys() if not (boundaries[n].rewrite or boundaries[n].fused)]
        found |= {name: _left(boundaries[name], refusal) for name in written}
        if not written:
            notes.append(f"{module_name(each.fused) or 'a boundary'}: {refusal.sentence}")
    if any(boundary.quantised for boundary in found.values()):
        settle_strides(known.graph, at_once=bool(known.hazards.writes))
        known.graph.lint()
    return found, notes


def _left(boundary: Boundary, why: Refusal) -> Boundary:
    return replace(boundary, reason=why.sentence, code=why.code.value)


def _why_not(found: QuantisedGather) -> Refusal | None:
    how, rows = found.quantised.how, val(found.rows)
    given = argument(found.fused, "quant", "")
    if given not in ("", how.text()):
        return Refusal(Code.USED_TWICE, f"the gathered rows are quantised, but {SECOND}")
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


def _apply(graph: fx.Graph, found: QuantisedGather) -> None:
    first, quantised = found.collectives[0], found.quantised
    columns = sum(_bytes(found))
    own = handed_out(graph, found.fused, found.rows, quantised.how)
    made = _gathered(graph, first, own, columns)
    known = {first.node: made, first.result: made}
    for node in found.between:  # what the program does to the gathered rows is done to the bytes
        with graph.inserting_before(node):
            copied = known[node] = graph.node_copy(node, lambda old: known.get(old, old))
            if node.target in SIZED:
                copied.target = aten.reshape.default
                copied.args = (copied.args[0], [*argument(node, "size", argument(node, "shape"))[:-1], columns])
            copied.meta["val"] = fake_result(copied)
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


def _gathered(graph: fx.Graph, collective: Collective, own: tuple[fx.Node, fx.Node], columns: int) -> fx.Node:
    """Both as bytes of all ranks, side by side, in the place of the program's gather and of its shape."""
    like, shape = collective.node, (*val(collective.result).shape[:-1], columns)
    with graph.inserting_before(like):
        parts = [insert_call(graph, aten.view.dtype, (part, torch.uint8), like=like) for part in own]
        packed = insert_call(graph, aten.cat.default, (parts, -1), like=like)
        given = (packed, len(collective.ranks), collective.group_name)
        pending = insert_call(graph, c10d.all_gather_into_tensor.default, given, like=like)
        made = insert_call(graph, ops.WAIT, (pending,), like=like)
        if val(made).dim() == len(shape) and all(map(same_size, val(made).shape, shape)):
            return made
        rows, *rest = sizes_of(graph, collective.input)
        every = computed(graph, ops.operator.mul, rows, len(collective.ranks), made)
        return reshaped(graph, made, [every, *rest[:-1], columns], shape)


def _taken(graph: fx.Graph, packed: fx.Node, start: int, end: int, dtype: torch.dtype) -> fx.Node:
    """Some columns of the gathered bytes, as what they are; compact, as products of quantised rows want them."""
    last = val(packed).dim() - 1
    part = insert_call(graph, aten.slice.Tensor, (packed, last, start, end), like=packed)
    part = insert_call(graph, aten.clone.default, (part,), {"memory_format": torch.contiguous_format}, like=packed)
    return insert_call(graph, aten.view.dtype, (part, dtype), like=packed)
