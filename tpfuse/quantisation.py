"""A quantisation of a normed row, as data: which steps lead from y to the quantised row and to its scale.

    y → |y| → max of the row → / 448 → f32 = s;  f32(y) / s → clamp → e4m3 = q

Frameworks write this in many ways, and each way rounds elsewhere: bf16 / 448 is not f32 / 448. So a quantisation is not
a few settings but the steps themselves, each with the dtype that it is rounded to, and every implementation (plain
PyTorch here, the kernels in kernels/quantise.py) does these steps and no others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .errors import OpError

#: What q may be: the dtype, and what reports call it.
QUANTISED = {torch.float8_e4m3fn: "FP8 (e4m3)", torch.int8: "INT8"}
#: How many columns may share a scale, where it is not the row.
GROUPS = (32, 64, 128, 256)

#: The steps' operators. `amax` and `amin` are over the columns that share a scale; the others act on each value.
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "to": lambda a: a,
    "abs": torch.abs,
    "neg": torch.neg,
    "amax": lambda a: torch.amax(a, -1, keepdim=True),
    "amin": lambda a: torch.amin(a, -1, keepdim=True),
    "max": lambda a, b: torch.maximum(*_both(a, b)),
    "min": lambda a, b: torch.minimum(*_both(a, b)),
    "mul": torch.mul,
    "div": torch.div,
    "add": torch.add,
    "reciprocal": torch.reciprocal,
    "round": torch.round,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "log2": torch.log2,
    "exp2": torch.exp2,
}


def _both(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    like = a if isinstance(a, Tensor) else b
    one, other = (t if isinstance(t, Tensor) else torch.full_like(like, t) for t in (a, b))
    return one, other


@dataclass(frozen=True)
class QuantStep:
    """One step. args: the numbers (int) of the values it reads, y being 0 and step i making value i + 1, or constants
    (float). dtype: of what it makes."""

    op: str
    args: tuple[int | float, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Quantisation:
    """`steps`, and which values are handed out: `q`, of y's shape, and `scale`, one for each row (group 0) or for each
    `group` columns of it."""

    steps: tuple[QuantStep, ...]
    q: int
    scale: int
    group: int = 0

    @property
    def q_dtype(self) -> torch.dtype:
        return self.steps[self.q - 1].dtype

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.steps[self.scale - 1].dtype

    def scales_of(self, shape: Any) -> tuple:
        """The shape of the scales of a y of `shape`."""
        return (*shape[:-1], shape[-1] // self.group if self.group else 1)

    def __str__(self) -> str:
        return f"{QUANTISED[self.q_dtype]} per " + (f"{self.group} columns" if self.group else "row")

    def of(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(q, scale) of y, step by step in plain operations."""
        values = [y.unflatten(-1, (-1, self.group)) if self.group else y]
        for step in self.steps:
            given = [values[arg] if isinstance(arg, int) else arg for arg in step.args]
            values.append(FUNCTIONS[step.op](*given).to(step.dtype))
        scale = values[self.scale].reshape(self.scales_of(y.shape))
        # A copy, since scales of no rows count as contiguous whatever their strides are.
        return values[self.q].reshape(y.shape).contiguous(), scale.clone(memory_format=torch.contiguous_format)

    def text(self) -> str:
        """As a string, every number bit for bit; `read_quantisation` gives it back."""
        steps = [f"{s.op}:{','.join(map(repr, s.args))}:{str(s.dtype).removeprefix('torch.')}" for s in self.steps]
        return ";".join([f"{self.q}:{self.scale}:{self.group}", *steps])


@lru_cache(maxsize=256)
def read_quantisation(text: str) -> Quantisation:
    """The inverse of `Quantisation.text`. Raises OpError for anything that is no such text."""
    try:
        head, *rest = text.split(";")
        q, scale, group = map(int, head.split(":"))
        steps = []
        for number, each in enumerate(rest):
            op, args, dtype = each.split(":")
            numbers = tuple(float(a) if not a.lstrip("-").isdigit() else int(a) for a in args.split(","))
            if op not in FUNCTIONS or any(isinstance(a, int) and not 0 <= a <= number for a in numbers):
                raise ValueError(f"no such step: {each!r}")
            steps.append(QuantStep(op, numbers, getattr(torch, dtype)))
        found = Quantisation(tuple(steps), q, scale, group)
        if found.q_dtype not in QUANTISED:
            raise ValueError(f"q has dtype {found.q_dtype}")
        return found
    except (ValueError, IndexError, AttributeError) as error:
        raise OpError(f"quant={text!r} is no quantisation of tpfuse's: {error}") from error
