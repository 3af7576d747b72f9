"""norm_backward: a gradient's collective, the norm's backward and the residual's gradient in one operation.

    s = all-reduce or reduce-scatter; dx = backward of the norm (s) + residual's gradient

becomes one call that gives dx, and the gradients of the norm's weight and bias, which are sums over the same rows.
Nothing moves in front of the sum: what is sent is what the program sends, and everything that is read besides is used
on this rank's own result alone. So no other rank need have the same graph behind its collective.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from ..facts import aten_ops as ops
from ..facts.collectives import communicates_between
from ..facts.graph import added, insert_call, inserting_behind, region_between, same_shape, val
from ..facts.refusals import Code, Refusal
from ..recognise.hazards import Hazards
from ..recognise.known import Known
from ..recognise.norm_gradients import NormGradient, find_norm_gradients
from ..recognise.scattered import row_order
from ..verdict.accounting import origin
from .replay import sizes_of
from .scattered_rows import ScatteredRows
from .strides import hand_over

aten = ops.aten
_OPERATORS = {"all_reduce": "all_reduce_norm_backward", "reduce_scatter": "reduce_scatter_norm_backward"}


def norm_backward(known: Known, as_written: bool = False) -> dict[str, Refusal | None]:
    """Fuse every gradient that a norm's backward reads. Changes the graph.

    as_written: only where the collective keeps its place among the others. Returns, by the name of the collective of
    the program, None where it was fused, and the reason where it was not.
    """
    found, reasons = find_norm_gradients(known)
    outcome: dict[str, Refusal | None] = {origin(node): Refusal(Code.COLLECTIVE, why) for node, why in reasons.items()}
    instead: dict[fx.Node, fx.Node] = {}
    for gradient in found:
        residuals = tuple(instead.get(node, node) for node in gradient.residuals)
        gradient = replace(gradient, residuals=residuals)
        name = origin(gradient.collective.node)
        outcome[name] = _problem(gradient, known.hazards, as_written)
        if outcome[name] is None:
            instead[gradient.out] = _apply(known.graph, gradient)
    return outcome


def _problem(gradient: NormGradient, hazards: Hazards, as_written: bool) -> Refusal | None:
    first, last = gradient.collective.node, _last_operand(gradient)
    way = region_between(gradient.out, {gradient.collective.result})
    # What forward made is read where it stood, or was saved in another form: no write may have come since.
    made = [node for node in (gradient.norm.hidden, gradient.norm.rstd) if node is not None]
    end = max(last, gradient.out)
    written = hazards.write_to([*_operands(gradient), *way], first, end) or hazards.write_to(made, min(made), end)
    if written:
        said = f"{written} writes in place to what the norm's backward reads"
        return Refusal(Code.MOVES_PAST, said)
    if any(first < node < gradient.out for node in hazards.modes):
        said = "how operators work changes between the collective and the norm's backward"
        return Refusal(Code.MOVES_PAST, said)
    if gradient.reads_output:
        said = "the norm's backward reads what the norm gave; the operation would keep the hidden states besides"
        return Refusal(Code.NORM, said)
    if as_written and communicates_between(first, last):
        return Refusal(Code.AS_WRITTEN, "it would be sent after a collective that follows it")
    if _sized(gradient, gradient.incoming) is None or _sized(gradient, gradient.out) is None:
        return Refusal(Code.VALUES, "a symbolic size of its gradient can be read off no value that stays in the graph")
    return None


def _sized(gradient: NormGradient, like: fx.Node) -> fx.Node | None:
    """A node that stays and has the sizes of `like`, which may be about to go; itself where those are numbers."""
    if all(isinstance(size, int) for size in val(like).shape):
        return like
    staying = [gradient.norm.hidden, *gradient.residuals, gradient.collective.input]
    return next((node for node in staying if same_shape(node, like)), None)


def _operands(gradient: NormGradient) -> list[fx.Node]:
    norm = gradient.norm
    found = [norm.hidden, norm.rstd, norm.weight, *gradient.residuals, gradient.collective.input]
    found += [other for step in gradient.steps for other in step.others]
    return [node for node in found if node is not None]


def _last_operand(gradient: NormGradient) -> fx.Node:
    return max(_operands(gradient))


# -- rewrite ----------------------------------------------------------------------------------------------------------


def _apply(graph: fx.Graph, gradient: NormGradient) -> fx.Node:
    """Put the operation in; returns what stands in the place of `gradient.out`."""
    collective, norm, out = gradient.collective, gradient.norm, gradient.out
    dead = _dead(gradient)
    wanted = collective.result not in dead
    parts = len(collective.ranks) if collective.kind == "reduce_scatter" else 1
    shape = val(collective.result).shape
    rows = ScatteredRows(collective.input, parts, shape, gradient.steps, row_order(gradient.steps) or ())
    sized = _sized(gradient, gradient.incoming) or gradient.incoming
    with inserting_behind(graph, max(_last_operand(gradient), collective.node)):

        def flat(node: fx.Node | None, last: bool = True) -> fx.Node | None:
            if node is None:
                return None
            if not last:  # one number a row
                sizes = [*sizes_of(graph, sized)[:-1], 1]
                node = insert_call(graph, aten.reshape.default, (node, sizes), like=out)
            return rows.flat(graph, node)

        def as_incoming(node: fx.Node) -> fx.Node:
            if same_shape(node, sized):
                return node
            return insert_call(graph, aten.reshape.default, (node, sizes_of(graph, sized)), like=out)

        source = collective.input
        if val(source).dim() != 2:
            source = insert_call(
                graph, aten.reshape.default, (source, [-1, sizes_of(graph, source)[-1]]), like=collective.node
            )
        weight = norm.weight
        if weight is not None and val(weight).dim() != 1:
            weight = insert_call(graph, aten.reshape.default, (weight, [-1]), like=out)
        residual: fx.Node | None = None
        for each in gradient.residuals:
            residual = added(graph, residual, as_incoming(each))
        options = {
            "norm": norm.kind,
            "eps": norm.eps,
            "weight_offset": float(norm.weight_offset),
            "out_dtype": val(out).dtype,
            "want_sum": wanted,
            "want_weight": gradient.weight is not None,
            "want_bias": gradient.bias is not None,
            "group_name": collective.group_name,
        }
        operands = (
            flat(as_incoming(norm.hidden)),
            None,  # the mean: computed anew of the rows that are read in any case, so that none is kept for it
            flat(norm.rstd, False),
            weight,
            flat(residual),
        )
        operator = getattr(ops.tpfuse, _OPERATORS[collective.kind]).default
        fused = insert_call(graph, operator, (source, *operands), options, like=collective.node)
        outputs = iter(range(4))

        def next_output() -> fx.Node:
            return insert_call(graph, ops.operator.getitem, (fused, next(outputs)), like=out)

        def like_old(node: fx.Node, old: fx.Node) -> fx.Node:
            if not same_shape(node, old):
                shape = sizes_of(graph, _sized(gradient, old) or old)
                node = insert_call(graph, aten.reshape.default, (node, shape), like=old)
            if val(node).dtype != val(old).dtype:
                node = insert_call(graph, ops.prims.convert_element_type.default, (node, val(old).dtype), like=old)
            return node

        given = like_old(rows.placed(graph, next_output()), out)
        hand_over(out, given)
        if wanted:
            hand_over(collective.result, rows.arrived(graph, next_output()))
        for vector in (gradient.weight, gradient.bias):
            if vector is not None:
                hand_over(vector, like_old(next_output(), vector))
    for node in sorted(dead, reverse=True):
        if not node.users:
            graph.erase_node(node)
    if collective.result not in dead:
        graph.erase_node(collective.result)
    graph.erase_node(collective.node)
    return given


def _dead(gradient: NormGradient) -> set[fx.Node]:
    """What nobody reads any more once the operation stands there, the collective's result among it where that is so."""
    result = gradient.collective.result
    replaced = {node for node in (gradient.out, gradient.weight, gradient.bias) if node is not None}
    region = {result}.union(*(region_between(node, {result}) for node in replaced))
    dead: set[fx.Node] = set()
    for node in sorted(region, reverse=True):
        dead.update(filter(_unread, node.users))
        if node in replaced or all(user in dead for user in node.users):
            dead.add(node)
    return dead


def _unread(node: fx.Node) -> bool:
    return node.op == "call_function" and not node.users and not node.is_impure()
