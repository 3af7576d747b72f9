"""norm_gather: a norm of a rank's own rows and the gather of what it gives, in one operation.

    y = norm(h); gathered = all-gather(y)

becomes one call that gives y, the statistics that backward reads, and the gathered rows. An addition in front stays
where it is, so that what it gives is saved or computed again as in the program. What is sent is what the program sends,
in its order, and no other rank need have the same graph.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from tpfuse.boundary_spec import Options

from ..facts import aten_ops as ops
from ..facts.graph import input_node, insert_call, inserting_behind, val
from ..facts.refusals import Refusal
from ..recognise.gathers import Gather
from ..recognise.known import Known
from ..recognise.norm_gathers import NormGather, find_norm_gathers
from ..recognise.sums import Step
from ..verdict.accounting import origin
from .gather import take_in
from .replay import replay, reshaped, sizes_of
from .strides import hand_over

aten = ops.aten


def norm_gather(known: Known) -> tuple[dict[str, str], dict[str, Refusal]]:
    """Fuse every gather of a norm's rows that can be. Changes the graph.

    Returns, by the names of the program's gathers, (the kind of the norm of each that was fused, why others were not).
    """
    found, reasons = find_norm_gathers(known)
    for each in found:
        _apply(known.graph, each)
    taken = {origin(each.collective.node): each.norm.kind for each in found}
    return taken, {origin(node): why for node, why in reasons.items()}


def _apply(graph: fx.Graph, found: NormGather) -> None:
    norm, region, dead = found.norm, found.region, _dead(found)
    statistics = [node for node in (norm.mean, norm.rstd) if node is not None and not dead.issuperset(node.users)]
    with inserting_behind(graph, max(found.operands)):
        source = replay(graph, [Step(view) for view in found.shapes], found.hidden)
        ordered = _permuted(graph, source, found.order)
        flat = ordered
        if val(ordered).dim() != 2:
            flat = insert_call(graph, aten.reshape.default, (ordered, [-1, sizes_of(graph, ordered)[-1]]), like=ordered)
        fused = _operation(graph, found, flat, stats=bool(statistics))

        def handed_out(old: fx.Node, index: int) -> fx.Node:
            """A result in the graph's order and shape, in the place of `old`."""
            new = insert_call(graph, ops.operator.getitem, (fused, index), like=fused)
            if val(ordered).dim() != 2:
                *rows, _ = sizes_of(graph, ordered)
                shape = (*val(ordered).shape[:-1], val(new).shape[-1])
                new = reshaped(graph, new, [*rows, sizes_of(graph, new)[-1]], shape)
            new = _permuted(graph, new, sorted(range(len(found.order)), key=found.order.__getitem__))
            if val(new).dim() != val(old).dim():  # a statistic that lost its last dimension
                new = insert_call(graph, aten.reshape.default, (new, sizes_of(graph, source)[:-1]), like=old)
            if val(new).dtype != val(old).dtype:
                new = insert_call(graph, ops.prims.convert_element_type.default, (new, val(old).dtype), like=old)
            hand_over(old, new)
            return new

        normed = handed_out(norm.output, 0)
        for node in statistics:
            handed_out(node, 1 if node is norm.mean or norm.kind == "rms_norm" else 2)
    for node in sorted(region, reverse=True):
        for user in filter(_unread, list(node.users)):
            graph.erase_node(user)
        if not node.users:
            graph.erase_node(node)
    views = list(found.views)
    while normed.target is not ops.operator.getitem:
        views.append(normed)
        normed = input_node(normed)
    take_in(graph, Gather(fused, normed, tuple(views), found.collective))


def _dead(found: NormGather) -> set[fx.Node]:
    """What nobody reads any more once the operation hands out the normed rows and the statistics."""
    norm = found.norm
    dead: set[fx.Node] = set()
    for node in sorted(found.region, reverse=True):
        replaced = node in (norm.output, norm.mean, norm.rstd)
        if replaced or all(user in dead or _unread(user) for user in node.users):
            dead.add(node)
    return dead


def _unread(node: fx.Node) -> bool:
    return node.target is ops.operator.getitem and not node.users


def _operation(graph: fx.Graph, found: NormGather, rows: fx.Node, stats: bool) -> fx.Node:
    norm, collective = found.norm, found.collective
    eps_tensor, eps = (norm.eps, 0.0) if isinstance(norm.eps, fx.Node) else (None, float(norm.eps))
    options = Options(
        norm=norm.kind, eps=eps, weight_offset=norm.weight_offset, out_dtype=val(norm.output).dtype, stats=stats,
        group_name=collective.group_name,
    )  # fmt: skip
    operands = (rows, None, None, norm.weight, norm.bias, eps_tensor)
    fused = insert_call(graph, ops.tpfuse.rows_norm.default, operands, options.arguments, like=collective.node)
    # The partitioner never recomputes a collective of its own accord, but knows one by its namespace only.
    fused.meta.setdefault("recompute", CheckpointPolicy.MUST_SAVE)
    return fused


def _permuted(graph: fx.Graph, node: fx.Node, order: Sequence[int]) -> fx.Node:
    return insert_call(graph, aten.permute.default, (node, list(order)), like=node) if order else node
