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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor.pattern_matcher import PatternMatcherPass, fwd_only, register_replacement

EPS = (1e-5, 1e-6)
DTYPES = (torch.bfloat16, torch.float32)
SHAPES = ((5, 16), (2, 5, 16))


def hugging_face_rms(h: Tensor, eps: float, weight: Tensor) -> Tensor:
    wide = h.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(h.dtype)


def torch_rms(h: Tensor, eps: float, weight: Tensor) -> Tensor:
    return F.rms_norm(h, h.shape[-1:], weight, eps)


def torch_layer(h: Tensor, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(h, h.shape[-1:], weight, bias, eps)


#: A norm, and how many vectors it takes.
NORMS = ((hugging_face_rms, 1), (torch_rms, 1), (torch_layer, 2))


def _search(norm: Callable[..., Tensor], vectors: int, add: str, eps: float, group: str) -> Callable[..., Any]:
    """(normed value, hidden states) of all-reduce, addition and norm. The matcher reads names off the signature, so
    there is one function for each number of inputs."""

    def boundary(x: Tensor, residual: Tensor | None, *affine: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", group))
        h = s if residual is None else residual + s if add == "left" else s + residual
        return norm(h, eps, *affine), h

    return {
        (True, 1): lambda x, weight: boundary(x, None, weight),
        (True, 2): lambda x, weight, bias: boundary(x, None, weight, bias),
        (False, 1): lambda x, residual, weight: boundary(x, residual, weight),
        (False, 2): lambda x, residual, weight, bias: boundary(x, residual, weight, bias),
    }[add == "none", vectors]


def _replace(vectors: int, add: str) -> Callable[..., Any]:
    """Any two tensors of all inputs: what is counted is whether the pattern is found."""
    return {
        (True, 1): lambda x, weight: (x * weight, x + weight),
        (True, 2): lambda x, weight, bias: (x * weight, x + bias),
        (False, 1): lambda x, residual, weight: (x * weight, x + residual),
        (False, 2): lambda x, residual, weight, bias: (x * weight + bias, x + residual),
    }[add == "none", vectors]


@cache
def patterns(group: str) -> PatternMatcherPass:
    """All patterns over one group, the larger ones first."""
    found = PatternMatcherPass(pass_name="plain_patterns")
    variants = itertools.product(("left", "right", "none"), NORMS, EPS, DTYPES, SHAPES)
    for add, (norm, vectors), eps, dtype, shape in variants:
        inputs = [torch.empty(shape, dtype=dtype)] * (1 if add == "none" else 2)
        inputs = [t.clone() for t in inputs] + [torch.empty(shape[-1], dtype=dtype) for _ in range(vectors)]
        search = _search(norm, vectors, add, eps, group)
        register_replacement(search, _replace(vectors, add), inputs, fwd_only, found, skip_duplicates=True)
    return found


def sites_found(gm: fx.GraphModule, group: str) -> int:
    """How many sites of `gm` the patterns match. `gm` is left alone."""
    copied = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    return patterns(group).apply(copied.graph)
