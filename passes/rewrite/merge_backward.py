"""merge_all_reduces in the backward pass: all-reduces whose results are added up become one.

    AR(a) + AR(b) [+ r]   →   AR(a + b) [+ r]

Every column-parallel linear all-reduces the gradient of its input, and the linears that read one value (q, k and v;
gate and up) add those gradients up. Sums are linear, so the partial gradients may be added first and summed over the
ranks once, whatever views, casts and numbers stand in between.

The merged all-reduce runs in the widest dtype that its parts met in, so nothing is rounded more coarsely than before.
It stands where the last part was added, and it is decided from the graph and the members of the groups alone, so all
ranks of a group merge alike. Find, plan and rewrite, as for the other rewrites; the forward pass is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import fx

from ..facts import aten_ops as ops
from ..facts.collectives import Collective
from ..facts.graph import function_of, insert_call, is_call, same_shape, val
from ..facts.refusals import Code, Refusal
from ..recognise.divergence import Parting, find_partings, given_number
from ..recognise.hazards import Hazards
from ..recognise.known import Known
from ..recognise.sums import Step, linear_inputs
from .replay import replay

aten, c10d = ops.aten, ops.c10d


@dataclass(frozen=True)
class Part:
    """An all-reduce, and the linear nodes that its result runs through, each read by the next one alone."""

    collective: Collective
    chain: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Merge:
    """`parts` become one all-reduce; their chains end at `root`, the addition that completes their sum."""

    parts: tuple[Part, ...]
    root: fx.Node


def merge_all_reduces(known: Known) -> dict[str, Refusal | None]:
    """Merge the all-reduces of the graph's backward pass. Changes the graph.

    Returns, by the name of the collective's node, None where it was merged, and a refusal where it met another
    one and was not.
    """
    outcome: dict[str, Refusal | None] = {}
    while True:
        merges, refusals = plan_merges(find_sums(known), known.hazards)
        outcome |= refusals
        if not merges:
            return outcome
        for merge in merges:
            _apply(known.graph, merge)
            outcome |= {part.collective.node.name: None for part in merge.parts}
        known.changed()


# -- find -------------------------------------------------------------------------------------------------------------


def find_sums(known: Known) -> list[tuple[Part, ...]]:
    """Where results of two or more of the backward pass's all-reduces meet in one sum. Reads only."""
    meeting: dict[fx.Node, list[Part]] = {}
    parting = find_partings(known.collectives)
    for collective in known.collectives:
        if collective.kind != "all_reduce" or collective.problem or collective.node not in known.backward:
            continue
        chain = _chain(collective.result, parting)
        if chain:
            meeting.setdefault(chain[-1], []).append(Part(collective, chain))
    return [tuple(parts) for parts in meeting.values() if len(parts) > 1]


def _chain(result: fx.Node, parting: Parting) -> tuple[fx.Node, ...]:
    """The linear nodes that `result` runs through, as long as each value has one reader, none is repeated (what is
    repeated before it is summed over the ranks takes more bytes than it saves), and none depends on a number that each
    call brings anew."""
    chain: list[fx.Node] = []
    node = result
    while len(node.users) == 1:
        (user,) = node.users
        if is_call(user, ops.SPREADS) or any(given_number(read, parting) for read in user.all_input_nodes):
            break
        inputs = [child for child, _, _ in linear_inputs(user)]
        broadcasts = len(inputs) > 1 and not all(same_shape(child, user) for child in inputs)
        if inputs.count(node) != 1 or broadcasts:
            break
        chain.append(user)
        node = user
    return tuple(chain)


# -- plan -------------------------------------------------------------------------------------------------------------


def plan_merges(
    sums: Sequence[tuple[Part, ...]], hazards: Hazards | None = None
) -> tuple[list[Merge], dict[str, Refusal]]:
    """(merges, refusals by the name of the collective's node).

    One sum gets one merge at a time: where it adds up the all-reduces of two groups, the second group's are found
    again once the first group's are one.
    """
    merges: list[Merge] = []
    refusals: dict[str, Refusal] = {}
    for parts in sums:
        alike: dict[tuple, list[Part]] = {}
        for part in parts:
            alike.setdefault((part.collective.ranks, part.collective.reduce_op.lower()), []).append(part)
        for first, *more in alike.values():
            if not more:
                refusals[first.collective.node.name] = Refusal(Code.APART, _unlike(first, parts))
        mergeable = next((found for found in alike.values() if len(found) > 1), None)
        if mergeable is None:
            continue
        merge = _up_to_the_meeting(mergeable)
        problem = _overwritten(merge, hazards) if hazards is not None else ""
        if problem:
            refusals |= {part.collective.node.name: Refusal(Code.MOVES_PAST, problem) for part in merge.parts}
        else:
            merges.append(merge)
    return merges, refusals


def _up_to_the_meeting(parts: Sequence[Part]) -> Merge:
    """The merge of `parts`: their chains are cut behind the first node that all of them run through."""
    shared = set(parts[0].chain).intersection(*(part.chain for part in parts[1:]))
    root = next(node for node in parts[0].chain if node in shared)
    return Merge(tuple(Part(p.collective, p.chain[: p.chain.index(root) + 1]) for p in parts), root)


def _unlike(part: Part, parts: Sequence[Part]) -> str:
    one, other = part.collective, next(p.collective for p in parts if p is not part)
    if other.ranks != one.ranks:
        ranks = f"{list(one.ranks)} and {list(other.ranks)}"
        return f"the backward pass adds it to an all-reduce over different ranks, {ranks}, so the two cannot be one"
    names = f"{one.reduce_op!r} and {other.reduce_op!r}"
    return f"the backward pass adds it to an all-reduce with another reduce op, {names}, so the two cannot be one"


def _overwritten(merge: Merge, hazards: Hazards) -> str:
    read = [part.collective.input for part in merge.parts]
    write = hazards.write_to(read, min(part.collective.node for part in merge.parts), merge.root)
    return f"{write} writes in place to a gradient before it is added to another one" if write else ""


# -- rewrite ----------------------------------------------------------------------------------------------------------


def _apply(graph: fx.Graph, merge: Merge) -> None:
    root = merge.root
    with graph.inserting_before(root):
        summed = _all_reduced(graph, merge)
        rest = _without(
            graph, root, {p.collective.result for p in merge.parts}, {n for p in merge.parts for n in p.chain}
        )
        if rest is not None:
            summed = insert_call(graph, aten.add.Tensor, (summed, rest), like=root)
    root.replace_all_uses_with(summed, propagate_meta=False)
    for node in sorted({node for part in merge.parts for node in part.chain}, reverse=True):
        graph.erase_node(node)
    for part in merge.parts:
        graph.erase_node(part.collective.result)
        graph.erase_node(part.collective.node)


def _all_reduced(graph: fx.Graph, merge: Merge) -> fx.Node:
    """One all-reduce of all parts, in the root's shape and dtype."""
    dtypes = [val(merge.root).dtype, *(val(part.collective.result).dtype for part in merge.parts)]
    widest = reduce(torch.promote_types, dtypes)
    if widest is torch.float16:
        # Parts that are finite once summed over the ranks may overflow when they are added up before. Two float16
        # all-reduces send as many bytes as one in float32.
        widest = torch.float32
    last = max((part.collective for part in merge.parts), key=lambda collective: collective.node)
    partial: fx.Node | None = None
    for part in merge.parts:
        node = _along_the_chain(graph, part, widest)
        partial = node if partial is None else insert_call(graph, aten.add.Tensor, (partial, node), like=last.node)
    args = (partial, last.reduce_op, last.group_name)
    collective = insert_call(graph, c10d.all_reduce.default, args, like=last.node)
    return _cast(graph, insert_call(graph, ops.WAIT, (collective,), like=last.result), dtypes[0])


def _along_the_chain(graph: fx.Graph, part: Part, dtype: torch.dtype) -> fx.Node:
    """The partial gradient with the chain's views and numbers applied to it, in `dtype`."""
    scale, steps, at = 1.0, list[Step](), part.collective.result
    for node in part.chain:
        _, factor, step = next(found for found in linear_inputs(node) if found[0] is at)
        scale *= factor
        if step is not None and not is_call(node, ops.CASTS):
            steps.append(step)
        at = node
    if val(part.collective.input).dtype is torch.float16:
        node = replay(graph, steps, _cast(graph, part.collective.input, dtype))
    else:
        node = _cast(graph, replay(graph, steps, part.collective.input), dtype)
    return node if scale == 1.0 else insert_call(graph, aten.mul.Tensor, (node, scale), like=part.collective.node)


def _without(graph: fx.Graph, node: fx.Node, taken: set[fx.Node], chains: set[fx.Node]) -> fx.Node | None:
    """`node` without the terms `taken`: what remains of the sum, or None. Every node of `chains` has one under it."""
    if node in taken:
        return None
    if node not in chains:
        return node
    inputs = linear_inputs(node)
    rests = [_without(graph, child, taken, chains) for child, _, _ in inputs]
    if all(rest is None for rest in rests):
        return None
    if None in rests:
        # One side of an addition is gone; the other one stands alone, with its sign.
        rest, factor = next((r, factor) for r, (_, factor, _) in zip(rests, inputs, strict=True) if r is not None)
        rest = _cast(graph, rest, val(node).dtype)
        return rest if factor == 1.0 else insert_call(graph, aten.mul.Tensor, (rest, factor), like=node)
    instead = {child: rest for (child, _, _), rest in zip(inputs, rests, strict=True)}
    target = aten.reshape.default if is_call(node, aten.view.default) else function_of(node)
    args = tuple(instead.get(arg, arg) if isinstance(arg, fx.Node) else arg for arg in node.args)
    return insert_call(graph, target, args, dict(node.kwargs), like=node)


def _cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    if val(node).dtype == dtype:
        return node
    return insert_call(graph, ops.prims.convert_element_type.default, (node, dtype), like=node)
