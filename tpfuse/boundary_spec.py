"""What a fused operation is told besides its tensors, as one string that a compiled graph can hold.

An operation in a compiled graph is called as `tpfuse::all_reduce_norm.lean(x, y, spec, ...)`: outputs are given to it,
and everything that is no tensor is in `spec`. It holds nothing of a process but the name of a group, so graphs may be
kept and found again by other processes; it is read once in each of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from .errors import OpError

#: The tensors an operation reads, in the order of the functional operator.
OPERANDS = ("x", "residual", "pre_bias", "weight", "bias", "eps_tensor")
#: The tensors it may fill, in the order in which the functional operator returns those that are wanted.
OUTPUTS = ("y", "hidden", "total", "mean", "rstd", "q", "scale")
_FIRST = ("x", "y", "spec", "residual", "weight", "hidden")
SELDOM = ("rstd", "bias", "mean", "pre_bias", "total", "eps_tensor")
#: The arguments of a lean operator's forms, the smallest first of those that quantise and of those that do not.
FORMS = {
    "lean": _FIRST,
    "with_rstd": (*_FIRST, *SELDOM[:1]),
    "with_bias": (*_FIRST, *SELDOM[:2]),
    "full": (*_FIRST, *SELDOM),
    "quantised": (*_FIRST, "q", "scale"),
    "quantised_full": (*_FIRST, "q", "scale", *SELDOM),
}


def form_for(given: set[str]) -> str:
    """The name of the smallest form that takes all of these arguments."""
    return next(form for form, names in FORMS.items() if given <= set(names))


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a fused operation is told besides its tensors: the keyword arguments of the operators of ops.py, which has
    their formula. The one place that lists them.

    eps: where no tensor says it. hidden_dtype: None where the hidden states are not wanted. want_sum: also the sum
    itself, in the dtype of x. stats: also the norm's statistics. batch_invariant: a row's bits do not depend on how
    many rows there are. quant: how y is quantised (`Quantisation.text`), or nothing. overlap:
    whether a large call may send a part of its rows while others are multiplied.
    """

    norm: str
    eps: float = 0.0
    weight_offset: float = 0.0
    alpha: float = 1.0
    post: bool = False
    out_dtype: torch.dtype
    hidden_dtype: torch.dtype | None = None
    want_sum: bool = False
    stats: bool = False
    group_name: str = ""
    batch_invariant: bool = False
    quant: str = ""
    overlap: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of an operator, without those that its schema has a default for and that are it."""
        given = {field.name: getattr(self, field.name) for field in fields(Options)}
        return {name: value for name, value in given.items() if name not in _ADDED_LATER or value}

    @classmethod
    def schema(cls) -> str:
        """The keyword arguments as an operator's schema lists them. Traced graphs leave out what equals a default of
        the schema, so only what was added later has one there."""
        named = [(f"{_SCHEMA_TYPES[field.type]} {field.name}", field.name) for field in fields(Options)]
        return ", ".join(f"{text}={_ADDED_LATER[name]}" if name in _ADDED_LATER else text for text, name in named)


_SCHEMA_TYPES: dict[Any, str] = {
    "str": "str", "float": "float", "bool": "bool", "torch.dtype": "ScalarType", "torch.dtype | None": "ScalarType?",
}  # fmt: skip
_ADDED_LATER = {"batch_invariant": "False", "quant": '""', "overlap": "False"}


@dataclass(frozen=True, kw_only=True)
class BoundarySpec(Options):
    """`Options`, and the dtypes of the operands: None for one that is absent.

    Equal texts say equal things of two calls, but for the shapes, strides and addresses of their tensors."""

    operands: tuple[torch.dtype | None, ...]

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs that are wanted."""
        wanted = {
            "y": True, "hidden": self.hidden_dtype is not None, "total": self.want_sum, "rstd": self.stats,
            "mean": self.stats and self.norm == "layer_norm", "q": bool(self.quant), "scale": bool(self.quant),
        }  # fmt: skip
        return tuple(name for name in OUTPUTS if wanted[name])

    def text(self) -> str:
        """The spec as a string, a short one; `read_spec` gives it back, every number bit for bit."""
        operands = ",".join(map(_word, self.operands))
        numbers = (self.eps, self.weight_offset, self.alpha)
        flags = (self.post, self.want_sum, self.stats, self.batch_invariant, self.overlap)
        words = [self.norm, *map(repr, numbers), "".join(str(int(flag)) for flag in flags)]
        dtypes = (_word(self.out_dtype), _word(self.hidden_dtype))
        return "|".join([*words, *dtypes, operands, self.quant, self.group_name])


def read_spec(text: str) -> BoundarySpec:
    """The inverse of `BoundarySpec.text`. Raises OpError for anything that is no such text."""
    try:
        norm, eps, weight_offset, alpha, flags, out, hidden, operands, quant, group_name = text.split("|", 9)
        post, want_sum, stats, batch_invariant, overlap = (flag == "1" for flag in flags)
        out_dtype = _dtype(out)
        if out_dtype is None:
            raise ValueError("no dtype for y")
        return BoundarySpec(
            norm=norm, eps=float(eps), weight_offset=float(weight_offset), alpha=float(alpha), post=post,
            out_dtype=out_dtype, hidden_dtype=_dtype(hidden), want_sum=want_sum, stats=stats, group_name=group_name,
            batch_invariant=batch_invariant, quant=quant, overlap=overlap,
            operands=tuple(map(_dtype, operands.split(","))),
        )  # fmt: skip
    except (ValueError, AttributeError) as error:
        raise OpError(f"spec={text!r} is none of tpfuse's: {error}; only compiled graphs call this operator") from error


def _word(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def _dtype(word: str) -> torch.dtype | None:
    if not word:
        return None
    found = getattr(torch, word)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{word!r} is no dtype")
    return found
