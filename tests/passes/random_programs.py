"""Random programs over everything a boundary is made of, as data: a failing one can be read and kept.

A program starts from two values, `x` (whose name may be `tangents`, which makes the graph a backward pass) and a
residual `r`, and every step appends one value computed from earlier ones. Values are [A, B, H] or [A * B, H].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..graphs import all_reduce
from . import spellings

#: Members of the groups of four ranks; two of them have the same size and different members.
GROUPS = ((0, 1, 2, 3), (0, 1), (0, 2))
NORMS = {fn.__name__: fn for fn in spellings.ALL}


@dataclass(frozen=True)
class Step:
    """One operation. `a`, `b`: operands, counted back from the newest value. `what`: group, number, dtype or norm."""

    op: str
    a: int = 0
    b: int = 0
    what: object = None


@dataclass(frozen=True)
class Program:
    """Steps, and which of the values computed are returned (counted from the newest)."""

    steps: tuple[Step, ...]
    returned: tuple[int, ...]
    backward: bool = False
    dynamic: bool = False


_BACK = st.integers(0, 4)
_STEPS = {
    "all_reduce": st.tuples(st.sampled_from(GROUPS), st.sampled_from(("sum", "sum", "sum", "avg"))),
    "add": st.none(),
    "sub": st.none(),
    "norm": st.sampled_from(sorted(NORMS)),
    "layer": st.none(),
    "scale": st.sampled_from((0.5, -1.0, 2.0, 0.22)),
    "divide": st.sampled_from((2.0, 1.7)),
    "rows": st.none(),
    "transpose": st.none(),
    "cast": st.sampled_from((torch.float32, torch.bfloat16)),
    "bias": st.none(),
    "expand": st.none(),
    "gate": st.none(),
}
#: How often each is drawn: sums and norms make boundaries, the rest stands between them.
_OFTEN = [*_STEPS] + ["all_reduce", "add", "norm"] * 4 + ["layer"] * 2


@st.composite
def _steps(draw: st.DrawFn) -> Step:
    op = draw(st.sampled_from(_OFTEN))
    return Step(op, draw(_BACK), draw(_BACK), draw(_STEPS[op]))


programs = st.builds(
    Program,
    steps=st.lists(_steps(), min_size=3, max_size=14).map(tuple),
    returned=st.lists(_BACK, min_size=1, max_size=3, unique=True).map(lambda back: (0, *(i for i in back if i))),
    backward=st.booleans(),
    dynamic=st.booleans(),
)


def as_function(program: Program, groups: dict[tuple[int, ...], str], exact: bool = False) -> Callable[..., tuple]:
    """The program as a function of (x, r, weight, bias); `exact` leaves its casts out.

    x, r: [A, B, H]; weight, bias: [H]. Returns the values returned, in order.
    """

    def run(x: Tensor, r: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        values = [r, x]
        for step in program.steps:
            a, b = (values[-1 - min(back, len(values) - 1)] for back in (step.a, step.b))
            values.append(_apply(step, a, b, x, weight, bias, groups, exact))
        # A view of an input is no output that a compiled graph computes; every value returned is one of its own.
        return tuple(values[-1 - min(back, len(values) - 1)] * 1 for back in program.returned)

    def backward(tangents: Tensor, r: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return run(tangents, r, weight, bias)

    return backward if program.backward else run


def _apply(
    step: Step, a: Tensor, b: Tensor, x: Tensor, weight: Tensor, bias: Tensor, groups: dict, exact: bool
) -> Tensor:
    if step.op == "all_reduce":
        ranks, reduce_op = step.what
        return all_reduce(a, groups[ranks], reduce_op)
    if step.op == "add":
        return a + b.reshape(a.shape)
    if step.op == "sub":
        return a - b.reshape(a.shape)
    if step.op == "norm":
        return NORMS[step.what](a, weight.to(a.dtype), bias.to(a.dtype))
    if step.op == "layer":
        # What stands for a linear layer: it mixes units, and nothing can be moved through it.
        return torch.tanh(a.roll(1, -1) * weight.to(a.dtype))
    if step.op == "scale":
        return a * step.what
    if step.op == "divide":
        return a / step.what
    if step.op == "rows":
        return a.reshape(-1, a.shape[-1]) if a.dim() == 3 else a.reshape(x.shape)
    if step.op == "transpose":
        return a.transpose(0, 1).reshape(x.shape) if a.dim() == 3 else a
    if step.op == "cast":
        return a if exact else a.to(step.what)
    if step.op == "bias":
        return a + bias.to(a.dtype)
    if step.op == "expand":
        return a + bias.to(a.dtype).expand(a.shape)
    if step.op == "gate":
        return a * torch.sigmoid(b.reshape(a.shape).mean(-1, keepdim=True))
    raise ValueError(step.op)
