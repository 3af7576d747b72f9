"""Arguments to try a module with, beside its hidden states: by what they are called, and then whatever may fit."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

_TRIES = 40
_NAMED = (
    (re.compile(r"mask|bias"), ("none", "mask")),
    (re.compile(r"position_emb|rope|rotary|freqs"), ("rotary", "angles")),
    (re.compile(r"^(cos|sin)$|_(cos|sin)$"), ("angles",)),
    (re.compile(r"pos"), ("positions", "rotary")),
    (re.compile(r"past|cache|state_|kv"), ("none",)),
    (re.compile(r"idx|index|start|length|_len$"), ("zero",)),
    (re.compile(r"scale|factor|alpha"), ("one",)),
)
_ANY = ("none", "one", "hidden", "rotary", "positions", "mask", "zero")


def guesses(module: nn.Module, x: Tensor) -> Iterator[dict[str, Any]]:
    """Keyword arguments that a module may take beside its hidden states `x` [1, S, H]; none for one that needs more
    than its signature tells.

    At first nothing but what is needed; then also what is optional and called like positions.
    """
    try:
        given = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return
    named = [p for p in given if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not named or named[0].kind != inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return
    needed = [p.name for p in named[1:] if p.default is p.empty]
    more = [p.name for p in named[1:] if p.default is None and _known(p.name)[:1] not in ((), ("none",), ("one",))]
    values = _values(module, x)
    for names in [needed, needed + more] if more else [needed]:
        choices = [dict.fromkeys((*_known(name), *_ANY)) for name in names]
        ranked = sorted(itertools.product(*(enumerate(c) for c in choices)), key=lambda combo: sum(i for i, _ in combo))
        for combo in ranked[:_TRIES]:
            yield {name: values[kind] for name, (_, kind) in zip(names, combo, strict=True)}


def _known(name: str) -> tuple[str, ...]:
    return next((kinds for pattern, kinds in _NAMED if pattern.search(name)), ())


def _values(module: nn.Module, x: Tensor) -> dict[str, Any]:
    length = x.shape[1]
    dim = next((d for n in ("head_dim", "d") if type(d := getattr(module, n, None)) is int), x.shape[-1])
    angles = torch.randn(1, length, dim).to(x)
    return {
        "none": None, "one": 1.0, "zero": 0, "hidden": torch.randn_like(x), "angles": angles,
        "rotary": (angles.cos(), angles.sin()), "positions": torch.arange(length, device=x.device)[None],
        "mask": x.new_zeros(1, 1, length, length),
    }  # fmt: skip
