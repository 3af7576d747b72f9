"""The sites that plain `register_replacement` patterns find: how existing passes match, tried on the same graphs.

Existing passes register one pattern per spelling of "all-reduce, (add,) norm" that their own model code uses. Here are
more than any of them has: three spellings of the norm, both orders of the addition, two values of eps, two dtypes,
2-D and 3-D hidden states. They are matched as Inductor matches them, on Inductor's own decomposition of the pattern.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor.pattern_matcher import PatternMatcherPass, fwd_only, register_replacement

EPS = (1e-5, 1e-6)
DTYPES = (torch.bfloat16, torch.float32)
SHAPES = ((5, 16), (2, 5, 16))


def hugging_face_rms(h: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = h.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(h.dtype)


def torch_rms(h: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.rms_norm(h, h.shape[-1:], weight, eps)


def torch_layer(h: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(h, h.shape[-1:], weight, bias, eps)


NORMS = (hugging_face_rms, torch_rms, torch_layer)


def _search(norm: Callable[..., Tensor], add: str, eps: float, group: str) -> Callable[..., tuple[Tensor, ...]]:
    def added(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", group))
        h = residual + s if add == "left" else s + residual
        return norm(h, weight, bias, eps), h

    def alone(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", group))
        return norm(s, weight, bias, eps), s

    return alone if add == "none" else added


def _replace(add: str) -> Callable[..., tuple[Tensor, ...]]:
    """Any two tensors: what is counted is whether the pattern is found."""

    def added(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return x * weight + bias, x + residual

    def alone(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return x * weight, x + bias

    return alone if add == "none" else added


@cache
def patterns(group: str) -> PatternMatcherPass:
    """All patterns over one group, the larger ones first."""
    found = PatternMatcherPass(pass_name="plain_patterns")
    variants = itertools.product(("left", "right", "none"), NORMS, EPS, DTYPES, SHAPES)
    for add, norm, eps, dtype, shape in variants:
        hidden, vector = torch.empty(shape, dtype=dtype), torch.empty(shape[-1], dtype=dtype)
        inputs = [hidden, vector, vector] if add == "none" else [hidden, hidden, vector, vector]
        register_replacement(
            _search(norm, add, eps, group), _replace(add), inputs, fwd_only, found, skip_duplicates=True
        )
    return found


def sites_found(gm: fx.GraphModule, group: str) -> int:
    """How many sites of `gm` the patterns match. `gm` is left alone."""
    copied = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    return patterns(group).apply(copied.graph)
