"""Random programs around all-reduces and norms, for fuzzing: a list of steps, drawn by hypothesis, run on tensors.

Every step reads earlier values by number and appends one. Values are [2, 3, H] or a rearrangement of it, so most steps
fit most values; those that do not fit do nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from ..graphs import all_reduce
from . import spellings

HIDDEN = 4
ROWS = (2, 3)
H = spellings.EPS


def _with(fn):
    """A step that takes one value."""
    return lambda values, a, b: fn(values[a])


def _pair(fn):
    """A step that takes two values of one shape, or one value twice."""
    return lambda values, a, b: fn(values[a], values[b] if values[b].shape == values[a].shape else values[a])


def _norm(fn):
    weights = torch.arange(1.0, HIDDEN + 1), torch.arange(HIDDEN) / 8

    def step(values, a, b):
        x = values[a]
        if x.dim() == 0 or x.shape[-1] != HIDDEN or not x.is_floating_point():
            return x
        weight, bias = values[0], values[1]
        return fn(x, weight, bias)

    step.weights = weights
    return step


def _rms_over(dim, keepdim=True):
    def norm(x):
        h = x * torch.rsqrt(x.pow(2).mean(dim, keepdim=keepdim) + H)
        return h if h.shape == x.shape else x

    return norm


def _centred_elsewhere(x):
    """Looks like LayerNorm, but the mean is another one than the variance's."""
    return (x - x.mean(0, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + H)


def _centred_twice_over(x):
    mean = x.mean(-1, keepdim=True)
    centred = torch.sub(x, mean, alpha=2)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + H)


def _statistics_handed_out(x):
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + H)
    return x * rstd + rstd * 2


def _changed_in_between(x):
    h = x * 1
    rstd = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + H)
    h.add_(1)
    return h * rstd


def _scaled_in_place(x):
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + H)
    z = y.mul_(torch.arange(1, x.shape[-1] + 1, dtype=x.dtype))
    return z + y


def _doubled(x):
    for _ in range(9):
        x = x + x
    return x / 512


STEPS = {
    "all_reduce": _with(all_reduce),
    "all_reduce_avg": _with(lambda x: all_reduce(x, op="avg")),
    "all_reduce_max": _with(lambda x: all_reduce(x, op="max")),
    "waited_twice": _with(lambda x: torch.ops._c10d_functional.wait_tensor(all_reduce(x))),
    "add": _pair(torch.add),
    "add_alpha": _pair(lambda x, y: torch.add(x, y, alpha=-0.5)),
    "sub": _pair(torch.sub),
    "mul_number": _with(lambda x: x * 0.5),
    "div_number": _with(lambda x: x / -3.0),
    "neg": _with(torch.neg),
    "doubled": _with(_doubled),
    "relu": _with(torch.relu),
    "square": _with(torch.square),
    "flatten": _with(lambda x: x.reshape(-1, x.shape[-1]) if x.dim() else x),
    "unflatten": _with(lambda x: x.reshape(*ROWS, HIDDEN) if x.numel() == 6 * HIDDEN else x),
    "transpose": _with(lambda x: x.transpose(0, 1) if x.dim() > 1 else x),
    "transpose_last": _with(lambda x: x.transpose(-1, -2) if x.dim() > 1 else x),
    "contiguous": _with(lambda x: x.contiguous()),
    "clone": _with(torch.clone),
    "float_and_back": _with(lambda x: x.float().double()),
    "int_and_back": _with(lambda x: (x * 4).long().double()),
    "complex_and_back": _with(lambda x: (x.to(torch.complex128) * 1j).imag),
    "first_row": _with(lambda x: x[:1] if x.dim() else x),
    "expand": _with(lambda x: x[:1].expand(x.shape) if x.dim() else x),
    "rows_added_up": _with(lambda x: x.sum(0) if x.dim() > 1 else x),
    "rows_averaged": _with(lambda x: x.mean(tuple(range(x.dim() - 1)), keepdim=True) if x.dim() > 1 else x),
    "rows_added_to_each": _with(lambda x: x + x.sum(0, keepdim=True) if x.dim() > 1 else x),
    "all_added_up": _with(lambda x: x + x.sum()),
    "detach": _with(torch.Tensor.detach),
    "add_in_place": _with(lambda x: x.add_(1)),
    "mul_in_place": _with(lambda x: x.mul_(0.5)),
    "add_value_in_place": _pair(lambda x, y: x.add_(y)),
    "view_written": _with(lambda x: x.view(-1)[:2].mul_(3) if x.is_contiguous() and x.numel() else x),
    "row_written": _with(lambda x: x[0].add_(0.25) if x.dim() > 1 and x.shape[0] else x),
    "rms_over_rows": _with(lambda x: _rms_over(0)(x) if x.dim() > 1 else x),
    "rms_without_keepdim": _with(lambda x: _rms_over(-1, False)(x) if x.dim() == 1 else x),
    "rms_over_two": _with(lambda x: _rms_over((-1, -2))(x) if x.dim() > 1 else x),
    "centred_elsewhere": _with(lambda x: _centred_elsewhere(x) if x.dim() > 1 else x),
    "centred_twice_over": _with(lambda x: _centred_twice_over(x) if x.dim() else x),
    "statistics": _with(lambda x: _statistics_handed_out(x) if x.dim() else x),
    "changed_in_between": _with(lambda x: _changed_in_between(x) if x.dim() else x),
    "scaled_in_place": _with(lambda x: _scaled_in_place(x) if x.dim() else x),
    "layer_two_dims": _with(lambda x: F.layer_norm(x, x.shape[-2:]) if x.dim() > 1 else x),
    **{fn.__name__: _norm(fn) for fn in spellings.ALL},
}

NORMS = tuple(
    name for name in STEPS if name.startswith(("rms_", "layer_", "centred", "statistics", "scaled", "changed"))
)

#: Recent values are read more often.
_INDEX = st.sampled_from((0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 5, 6))


def _steps(names, min_size: int, max_size: int):
    step = st.tuples(st.sampled_from(names), _INDEX, _INDEX)
    return st.lists(step, min_size=min_size, max_size=max_size)


@st.composite
def programs(draw):
    """(steps, which values are returned): anything, an all-reduce, anything, a norm, anything."""
    anything = ("add", "all_reduce", *STEPS)
    steps = draw(_steps(anything, 0, 2)) + draw(_steps(("all_reduce",), 1, 1))
    steps += draw(_steps(anything, 0, 3)) + draw(_steps(NORMS, 1, 1)) + draw(_steps(anything, 0, 3))
    return steps, draw(st.lists(_INDEX, min_size=1, max_size=3))


def program(steps, returned):
    """The function of (partial, residual, weight, bias) that runs `steps`. Numbers count back from the newest value."""

    def run(x, r, weight, bias):
        values = [weight, bias, r, x]
        for name, a, b in steps:
            values.append(STEPS[name](values, _back(a, values), _back(b, values)))
        return tuple(values[_back(i, values)] for i in returned)

    return run


def _back(number: int, values: list) -> int:
    """Values 2 and on, newest first: the norm's weight and bias are only ever read as such."""
    return len(values) - 1 - number % (len(values) - 2)
