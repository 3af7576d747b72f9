"""What a fused operation is told besides its tensors, as one string that a compiled graph can hold.

An operation in a compiled graph is called as `tpfuse::all_reduce_norm.lean(x, y, spec, ...)`: outputs are given to it,
and everything that is no tensor is in `spec`. It holds nothing of a process but the name of a group, so graphs may be
kept and found again by other processes; it is read once in each of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

import torch

from .errors import OpError

#: The tensors an operation reads, in the order of the functional operator.
OPERANDS = ("x", "residual", "pre_bias", "weight", "bias", "eps_tensor")
#: The tensors it may fill, in the order in which the functional operator returns those that are wanted.
OUTPUTS = ("y", "hidden", "total", "mean", "rstd")
#: The arguments of the smaller of the two lean forms.
FEW = ("x", "y", "spec", "residual", "weight", "hidden")


@dataclass(frozen=True)
class BoundarySpec:
    """The options of the functional operator (see ops.py), and the dtypes of its operands: None for one that is absent.

    Equal texts say equal things of two calls, but for the shapes, strides and addresses of their tensors."""

    norm: str
    eps: float
    weight_offset: float
    alpha: float
    post: bool
    out_dtype: torch.dtype
    hidden_dtype: torch.dtype | None
    want_sum: bool
    stats: bool
    group_name: str
    batch_invariant: bool
    operands: tuple[torch.dtype | None, ...]

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the functional operator."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "operands"}

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs that are wanted."""
        wanted = {
            "y": True, "hidden": self.hidden_dtype is not None, "total": self.want_sum, "rstd": self.stats,
            "mean": self.stats and self.norm == "layer_norm",
        }  # fmt: skip
        return tuple(name for name in OUTPUTS if wanted[name])

    def text(self) -> str:
        """The spec as a string; `read_spec` gives it back, every number bit for bit."""
        words = [_word(getattr(self, field.name)) for field in fields(self)]
        return json.dumps(words, separators=(",", ":"))


def read_spec(text: str) -> BoundarySpec:
    """The inverse of `BoundarySpec.text`. Raises OpError for anything that is no such text."""
    try:
        *words, operands = json.loads(text)
        given = dict(zip([field.name for field in fields(BoundarySpec)], words, strict=False))
        given |= {name: _dtype(given[name]) for name in ("out_dtype", "hidden_dtype")}
        return BoundarySpec(**given, operands=tuple(_dtype(word) for word in operands))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OpError(f"spec={text!r} is none of tpfuse's: {error}; only compiled graphs call this operator") from error


def _word(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_word(each) for each in value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _dtype(word: str | None) -> torch.dtype | None:
    if word is None:
        return None
    found = getattr(torch, word)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{word!r} is no dtype")
    return found
