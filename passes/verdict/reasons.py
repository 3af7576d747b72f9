"""Why a collective stays as it is: one sentence that says what stands there, and never a guess. Reads only."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise

from torch import fx

from ..facts import aten_ops as ops
from ..facts.collectives import Collective
from ..facts.graph import is_call, is_number, last_dim, same_shape, same_size, val, value
from ..facts.refusals import Code, Refusal
from ..recognise.alike import Alike, is_region
from ..recognise.norms import Norm
from ..recognise.scattered import scattered_sum_problem
from ..recognise.sites import ONE_OF_TWO
from ..recognise.sums import gated_inputs, linear_inputs
from .names import module_name, place
from .other_kinds import no_rewrite
from .reach import Reached

#: For a sum that no norm reads before the graph ends. What ends it is not in the graph, so the backend, which sees it,
#: adds to the sentence.
LEAVES = Refusal(
    Code.LEAVES,
    "the all-reduced value, or what is made of it row by row, leaves the graph before any norm reads it",
)
#: Whether a norm's backward reads it is asked only where that rewrite is on (`IN_BACKWARD`).
BACKWARD = Refusal(
    Code.BACKWARD,
    "it belongs to the backward pass, and no other all-reduce is added to it; norm_backward, which fuses it with the"
    " backward of a norm where one reads it, is off unless `rewrites` names it",
)
IN_BACKWARD = BACKWARD.worded(
    "it belongs to the backward pass; no norm's backward reads it, and no other all-reduce is added to it"
)

_ONLY = "only RMSNorm and LayerNorm over the last dimension are fused"


def reason_for(
    collective: Collective, refused: Refusal | None, reached: Reached, gradients: Collection[fx.Node]
) -> Refusal:
    """`refused`: the plan's word on it, or None. `gradients`: the graph's backward pass, empty where it has none."""
    if collective.problem:
        return Refusal(Code.COLLECTIVE, collective.problem)
    of_place = refused is None or refused.code is Code.SPREADS or reached.alike is not None  # where it stands says more
    if refused is not None and not of_place and reached.product is None:
        return _at_its_place(refused, gradients)
    if collective.node in gradients:
        return BACKWARD
    if collective.kind == "reduce_scatter" and gradients and reached.norm is not None and reached.product is None:
        between = (
            "between the reduce-scatter and the norm stands more than views, numbers and additions of values that are "
            "known to have the same sizes"
        )
        return Refusal(Code.BETWEEN, scattered_sum_problem(collective) or between)
    if collective.kind == "all_gather" and reached.norm is None and reached.alike is None:
        said = f"no norm reads what it gathers, so there is nothing to fuse it with{_whither(reached)}"
        return Refusal(Code.NO_NORM, said)
    if collective.kind != "all_reduce":
        return no_rewrite(collective, reached)
    if reached.alike is not None:
        return Refusal(Code.NORM, _unrecognised(reached.alike))
    if reached.product is not None:
        return Refusal(
            Code.READ_FIRST,
            f"{place(reached.product)} reads the all-reduced value before any norm does, so the sum has to be finished "
            "by itself",
        )
    if reached.norm is not None:
        return _in_the_way(collective, reached, reached.norm)
    if reached.opaque is not None:
        said = f"{place(reached.opaque)} reads it, and tpfuse cannot see what that computes"
        where = "where it is a norm, nn.RMSNorm or nn.LayerNorm in its place is fused"
        return Refusal(Code.NO_NORM, f"{said}; {where}")
    if reached.returned and not reached.limited:
        return _returned(collective.result, reached.returned)
    return Refusal(Code.NO_NORM, _no_norm(reached))


def _at_its_place(refused: Refusal, gradients: Collection[fx.Node]) -> Refusal:
    """The plan's word, with the places of the operators that it speaks of."""
    if refused.at is None:
        return refused
    if refused.by is None:
        return refused.worded(f"{refused.sentence}: {place(refused.at)}")
    stands, reads = f"{place(refused.at)} stands between the all-reduce and the norm", place(refused.by)
    if refused.by not in gradients:
        return refused.worded(f"{stands}, and {reads} reads the sum before it as well; {ONE_OF_TWO}")
    factor = "; with a factor that needs no gradient it can be fused" if refused.at.target in ops.MULS else ""
    return refused.worded(
        f"{stands}, and the backward pass reads the sum before it as well ({reads}); {ONE_OF_TWO}{factor}"
    )


def _returned(result: fx.Node, returned: list[fx.Node]) -> Refusal:
    """Of a sum that the graph returns, or what is made of it. Code outside can norm rows; it cannot norm their maximum
    for them, so a graph that returns that alone is told of what it returns."""
    rows = [node for node in returned if same_size(last_dim(node), last_dim(result))]
    if result in rows:
        return LEAVES
    if rows:
        return LEAVES.worded(f"{LEAVES.sentence}: {place(rows[0])} is returned")
    return Refusal(Code.NO_NORM, f"no norm reads the all-reduced value: of it the graph returns {place(returned[0])}")


def _unrecognised(alike: Alike) -> str:
    node, statistic = alike.node, alike.statistic
    if alike.called:
        return f"{place(node)} reads it, a part of what the program calls {alike.called}; {_ONLY}"
    if statistic is not None and not alike.by_row:
        return (
            "what reads it is normalised over other units than those of each row: "
            f"{place(node)}, by {'a root of ' if alike.root else ''}{place(statistic)}; {_ONLY}"
        )
    if is_region(node):
        return (
            f"the norm that reads it stands in a region of its own, which {place(node)} calls: nothing is fused across "
            "its edge; with the sum inside it, or the norm in front of it, they are in one graph"
        )
    if statistic is None:
        return (
            f"{place(node)} reads it, an operator that is called a norm and that tpfuse cannot see into; as nn.RMSNorm "
            "or nn.LayerNorm it could be fused"
        )
    if not alike.root:
        return (
            f"what reads it scales each row by a measure of its units: {place(node)}, by {place(statistic)}; where it "
            "is RMSNorm or LayerNorm over the last dimension, nn.RMSNorm or nn.LayerNorm in its place is fused"
        )
    return (
        f"what reads it looks like a norm in a spelling that is not recognised: {place(node)}, by a root of "
        f"{place(statistic)}; where it is one, nn.RMSNorm or nn.LayerNorm in its place is fused"
    )


def _in_the_way(collective: Collective, reached: Reached, norm: Norm) -> Refusal:
    obstacle = reached.obstacle
    spread = _spread(reached)
    if spread is not None:
        below, node = spread
        return Refusal(
            Code.SPREADS,
            f"{place(node)} spreads the all-reduced value of shape {_shape(below)} to {_shape(node)} before the norm; "
            "more would be sent if the sum were taken afterwards, so it is finished first; spread before its "
            "all-reduce, or added to another all-reduced value of that shape, it is fused",
        )
    if is_call(obstacle, ops.ADDS | ops.SUBS) and any(map(is_number, obstacle.args[:2])):
        said = f"{place(obstacle)} adds a number between the all-reduce and the norm; an addition of a tensor, of one "
        return Refusal(Code.BETWEEN, f"{said}element or of one for each hidden unit, is looked through")
    if obstacle is not None:
        return Refusal(
            Code.BETWEEN,
            f"{place(obstacle)} stands between the all-reduce and the norm; only views, casts, additions, "
            "multiplications, sums of rows and rows put in another order are looked through",
        )
    if norm.problem:
        return Refusal(Code.NORM, norm.problem)
    return Refusal(Code.BETWEEN, _where_the_sum_ends(reached, norm))


def _spread(reached: Reached) -> tuple[fx.Node, fx.Node] | None:
    """The step at which the way to the norm gets more rows, and what it reads; not behind another obstacle."""
    for below, node in pairwise(reached.path):
        wide, narrow = value(node), value(below)
        if wide is not None and narrow is not None and narrow.dim() <= wide.dim() and not same_shape(below, node):
            repeated = is_call(node, ops.SPREADS) or [*linear_inputs(node)[1:], *_factors(node)]
            if repeated and not same_size(wide.numel(), narrow.numel()):
                reader = next(iter(node.users)) if len(node.users) == 1 else node
                same_line = reader.meta.get("stack_trace") == node.meta.get("stack_trace")
                return below, reader if same_line and reader.target in ops.ADDS | ops.SUBS else node
        if node is reached.obstacle:
            break
    return None


def _factors(node: fx.Node) -> list[fx.Node]:
    return node.all_input_nodes[1:] if node.target in ops.MULS | ops.DIVS else []


def _where_the_sum_ends(reached: Reached, norm: Norm) -> str:
    """The step on a way of linear operators at which the recogniser could not go on."""
    for node in reached.path[1:]:
        if not linear_inputs(node) and len({child for child, _ in gated_inputs(node)}) > 1:
            return (
                f"{place(node)} stands between the all-reduce and the norm and multiplies two values that are both "
                "made of all-reduced sums"
            )
    way = ", ".join(place(node) for node in reached.path[1:]) or "nothing"
    where = module_name(norm.output) or "the graph"
    return f"the norm in {where} reads it over {way}, and tpfuse did not take it into that norm's sum: a gap in tpfuse"


def _whither(reached: Reached) -> str:
    if reached.returned and not reached.ends:
        return ": the graph returns it"
    return f": it goes into {place(reached.ends[0])}" if reached.ends and not reached.returned else ""


def _no_norm(reached: Reached) -> str:
    if reached.limited:
        return "no norm was found among the first few hundred operators that read the all-reduced value"
    if not reached.ends:
        return "no norm reads the all-reduced value: nothing in the graph does"
    places = list(dict.fromkeys(map(place, reached.ends)))
    more = f" and {len(places) - 2} more" if len(places) > 2 else ""
    return f"no norm reads the all-reduced value: it goes into {', '.join(places[:2])}{more}"


def _shape(node: fx.Node) -> list[int | str]:
    return [int(size) if isinstance(size, int) else str(size) for size in val(node).shape]


__all__ = ["LEAVES", "reason_for"]
