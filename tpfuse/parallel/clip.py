"""Clipping by the uncut model's gradient norm: each rank holds slices, and parts of the norm are summed.

Torch's own `clip_grad_norm_` finds its norm through one function of its module. `parallelize` puts one in place that
knows cut parameters and hands everything else on, so that existing training loops clip right and ranks stay alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from tpfuse._torch_private import process_group, replace_total_norm
from tpfuse.parallel.cuts import Cut
from tpfuse.parallel.mesh import Groups

#: REGISTRY: the parameters of parallelized models by identity; an entry goes with its parameter.
_KNOWN: WeakValueDictionary[int, nn.Parameter] = WeakValueDictionary()
#: What a known parameter says of itself, under this attribute.
_HELD = "_tpfuse_held"


@dataclass(frozen=True)
class Held:
    """How often the elements that a rank holds of a parameter are held in the whole group; `group` is its name.

    Args:
        pieces: (dim, length, copies) of each slice that stands side by side; no piece means the whole tensor, on all.
    """

    group: str
    size: int
    pieces: tuple[tuple[int, int, int], ...] = ()

    def parts(self, grad: Tensor) -> list[tuple[Tensor, int]]:
        """(elements, number of ranks that hold the same ones)."""
        if not self.pieces:
            return [(grad, self.size)]
        out, start = [], 0
        for dim, length, copies in self.pieces:
            out.append((grad.narrow(dim, start, length), copies))
            start += length
        return out


def remember(parameter: nn.Parameter, cut: Cut | None, groups: Groups) -> None:
    """Make clipping know a parameter of a parallelized model."""
    whole = groups.whole
    pieces: tuple[tuple[int, int, int], ...] = ()
    if cut is not None:
        replicas = whole.size // cut.size
        pieces = tuple(
            (cut.dim, stop - start, cut.size // count * replicas)
            for (start, stop), count in zip(cut.ranges(), cut.counts, strict=True)
        )
    setattr(parameter, _HELD, Held(whole.name, whole.size, pieces))
    _KNOWN[id(parameter)] = parameter
    replace_total_norm(_total_norm)


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:  # fmt: skip
    """Clips gradients in place by the norm that the uncut model's gradients have: g * min(1, max_norm / (norm + 1e-6)).

    The same as `torch.nn.utils.clip_grad_norm_`, which is right for parallelized models too. All ranks of the mesh call
    it with the same parameters; one all-reduce of one number, for each mesh.

    Returns:
        The norm before clipping, a scalar tensor, equal on all ranks.

    Raises:
        RuntimeError: with `error_if_nonfinite`, on every rank, for a norm that is not finite.
    """
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)


@torch.no_grad()
def _total_norm(
    original: Callable[..., Tensor], tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:  # fmt: skip
    grads = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    helds = _helds(grads)
    if not helds or float(norm_type) == 0:  # torch's norm of order 0 counts tensors, which are as many here
        return original(grads, norm_type, error_if_nonfinite, foreach)
    norm_type = float(norm_type)
    others = [g for g in grads if id(g) not in helds]
    norms = [original(others, norm_type, False, foreach)] if others else []
    groups = {(held.group, held.size) for held in helds.values()}
    for name, _ in sorted(groups):
        pairs = [part for g in grads if (held := helds.get(id(g))) and held.group == name for part in held.parts(g)]
        norms.append(_norm_over(pairs, norm_type, name))
    total = torch.linalg.vector_norm(torch.stack([n.to(grads[0].device) for n in norms]), norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite; cannot clip"
        )
    return total


def _norm_over(pairs: Sequence[tuple[Tensor, int]], norm_type: float, group_name: str) -> Tensor:
    """The norm of all ranks' elements, where each pair's elements are held by as many ranks as it says."""
    norms = torch.stack([torch.linalg.vector_norm(x, norm_type).double() for x, _ in pairs])
    group = process_group(group_name)
    if math.isinf(norm_type):
        total = norms.amax() if norm_type > 0 else norms.amin()
        dist.all_reduce(total, dist.ReduceOp.MAX if norm_type > 0 else dist.ReduceOp.MIN, group=group)
        return total.to(pairs[0][0].dtype)
    copies = torch.tensor([c for _, c in pairs], dtype=norms.dtype, device=norms.device)
    total = (norms.pow(norm_type) / copies).sum()
    dist.all_reduce(total, group=group)
    return total.pow(1 / norm_type).to(pairs[0][0].dtype)


def _helds(grads: Sequence[Tensor]) -> dict[int, Held]:
    """What is known of each gradient, by its identity; only parameters whose gradient is among them count."""
    given = {id(g) for g in grads}
    return {
        id(p.grad): getattr(p, _HELD)
        for p in list(_KNOWN.values())
        if p.grad is not None and id(p.grad) in given and getattr(p, _HELD).group
    }
