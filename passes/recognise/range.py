"""Whether a step can leave float16's range in front of the sum, though it does not behind it. Reads only.

Partial sums of large, opposite values are finite, and so is their sum; multiplied, divided or added up over rows before
they meet, they may not be. bfloat16 has float32's range and needs no such care. And what a step makes wider may be
rounded more in front of the sum.
"""

from __future__ import annotations

import torch
from torch import fx

from ..facts import aten_ops as ops
from ..facts.graph import input_node, is_call, val, value
from .sums import Step, Term

aten = ops.aten
#: Their results lie between -1 and 1.
_BOUNDED = {aten.sigmoid.default, aten._softmax.default, aten.tanh.default}
_CHOICES = {aten.where.self, aten.masked_fill.Scalar}


def overflow(term: Term) -> str:
    """Why the steps of `term` stay behind its sum, or ''."""
    val = value(term.leaf)
    if val is None or val.dtype is not torch.float16:
        return ""
    for step in term.steps:
        if not _shrinks(step):
            return (
                f"{step.node.target} could overflow in float16 in front of the sum where it does not behind it, so it"
                " stays there; in bfloat16 this boundary fuses"
            )
    return ""


def rounded_more(term: Term, root: fx.Node) -> str:
    """What is computed of a sum in float32 would be rounded to what is sent, on every rank, in front of the sum."""
    for step in term.steps:
        if not step.moves_only and term.stays_wider(step.node, root):
            wide, sent = val(step.node).dtype, val(term.leaf).dtype
            return (
                f"{step.node.target} makes a {wide} value of the all-reduced sum, which is {sent}; in front of the sum "
                f"its result would be rounded to {sent} on every rank. Cast the result, or reduce in {wide}"
            )
    return ""


def _shrinks(step: Step) -> bool:
    node = step.node
    if is_call(node, ops.ROW_SUMS):
        return is_call(node, {aten.mean.dim})
    if not step.is_gate or is_call(node, _CHOICES | ops.PICKS):
        return True
    return is_call(node, ops.MULS) and all(_bounded(gate) for gate in step.others)


def _bounded(node: fx.Node) -> bool:
    while is_call(node, ops.VIEWS | ops.SELECTIONS | ops.CASTS | {aten.expand.default}):
        node = input_node(node)
        tensor = value(node)
        if tensor is not None and tensor.dtype is torch.bool:
            return True
    return is_call(node, _BOUNDED)
