"""Whether the hidden states that a norm reads are a sum whose terms can be added in front of the all-reduce. Reads
only."""

from __future__ import annotations

import math
import sys

from torch import fx

from ..facts.graph import last_dim, same_size
from ..facts.refusals import Code, Refusal
from .norms import Norm
from .sums import Sum, Term


def terms_problem(hidden: fx.Node, norm: Norm, total: Sum) -> Refusal | None:
    """Why they are not, or None."""
    if not same_size(last_dim(hidden), last_dim(norm.source)):
        said = "a view between the all-reduce and the norm changes the last dimension"
    elif not all(math.isfinite(term.scale) for term in total.terms):
        said = "the numbers that the all-reduced sum is multiplied by have a product that is not finite"
    elif any(abs(term.scale) < sys.float_info.min for term in total.owed):
        said = "the all-reduced sum is multiplied by zero before the norm, or subtracted from itself"
    else:
        return _read_twice(total)
    return Refusal(Code.BETWEEN, said)


def _read_twice(total: Sum) -> Refusal | None:
    """Of a sum that the norm reads on two ways that differ in more than a number: h = s + g * s."""
    seen: dict[fx.Node, Term] = {}
    for term in total.owed:
        other = seen.setdefault(term.leaf, term)
        if other is term:
            continue
        only = [step for step in term.steps if step not in other.steps]
        only += [step for step in other.steps if step not in term.steps]
        said = "the norm reads the all-reduced sum on two ways, and an operator changes it on one of them alone"
        return Refusal(Code.BETWEEN, said, only[0].node if only else None)
    return None


__all__ = ["terms_problem"]
