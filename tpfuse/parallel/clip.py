"""Clipping by the uncut model's gradient norm: each rank holds slices, and parts of the norm are summed.

Torch's own `clip_grad_norm_` finds its norm through one function of its module. `parallelize` puts one in place that
knows cut parameters and hands everything else on, so that existing training loops clip right and ranks stay alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from tpfuse._torch_private import local_of, process_group
from tpfuse.errors import PolicyError
from tpfuse.parallel.cut_tensor import held
from tpfuse.parallel.owners import Owned, owned_tensors

#: Elements of a gradient that this rank holds, and how many ranks hold the same ones.
Part = tuple[Tensor, int]


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
def total_norm(
    original: Callable[..., Tensor], tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:  # fmt: skip
    """The norm that the uncut model's gradients have, equal on all ranks; torch's own for gradients that are not known.

    Args:
        original: torch's function, whose other arguments these are.
    """
    grads = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    known, norm_type = _known(grads), float(norm_type)
    others = [g for g in grads if id(g) not in known]
    if any(isinstance(g, DTensor) for g in others):
        _refuse_unsharded()
    if not known or norm_type == 0:  # torch's norm of order 0 counts tensors, which are as many here
        return original(grads, norm_type, error_if_nonfinite, foreach)
    norms = [original(others, norm_type, False, foreach)] if others else []
    for parts, groups in _by_ranks(grads, known):
        norms.append(_norm_over(parts, norm_type, groups))
    whole = [n.full_tensor() if isinstance(n, DTensor) else n for n in norms]
    total = torch.linalg.vector_norm(torch.stack([n.to(grads[0].device) for n in whole]), norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite; cannot clip"
        )
    return total


def _by_ranks(grads: Sequence[Tensor], known: dict[int, Owned]) -> list[tuple[list[Part], list[Any]]]:
    """The parts of all known gradients, and the groups that hold the others: those of each model and of FSDP2."""
    found: dict[Any, tuple[list[Part], list[Any]]] = {}
    for grad in grads:
        if (owned := known.get(id(grad))) is None:
            continue
        mesh = grad.device_mesh if isinstance(grad, DTensor) else None
        if (owned.whole.name, mesh) not in found:
            groups = [process_group(owned.whole.name)]
            groups += [] if mesh is None else [mesh.get_group(dim) for dim in range(mesh.ndim)]
            found[owned.whole.name, mesh] = ([], groups)
        found[owned.whole.name, mesh][0].extend(_parts(grad, owned))
    return list(found.values())


def _norm_over(parts: Sequence[Part], norm_type: float, groups: Sequence[Any]) -> Tensor:
    """The norm of all ranks' elements, where each part's elements are held by as many ranks as it says."""
    first = parts[0][0]
    least = math.isinf(norm_type) and norm_type < 0
    norms = [torch.linalg.vector_norm(x, norm_type).double() for x, _ in parts if x.numel()]
    norms += [torch.full((), math.inf if least else 0.0, dtype=torch.float64, device=first.device)]
    each = torch.stack(norms)
    if math.isinf(norm_type):
        total, op = (each.amin(), dist.ReduceOp.MIN) if least else (each.amax(), dist.ReduceOp.MAX)
    else:
        copies = torch.tensor([*(c for x, c in parts if x.numel()), 1], dtype=each.dtype, device=first.device)
        total, op = (each[:-1].pow(norm_type) / copies[:-1]).sum(), dist.ReduceOp.SUM
    for group in groups:
        dist.all_reduce(total, op, group=group)
    return (total if math.isinf(norm_type) else total.pow(1 / norm_type)).to(first.dtype)


def _parts(grad: Tensor, owned: Owned) -> list[Part]:
    """What this rank holds of a gradient, by how many ranks hold the same."""
    local, copies = grad, 1
    if isinstance(grad, DTensor):
        if any(p.is_partial() for p in grad.placements):
            grad = grad.redistribute(placements=[p if p.is_shard() else Replicate() for p in grad.placements])
        local, sizes = local_of(grad), grad.device_mesh.shape
        copies = math.prod(size for size, p in zip(sizes, grad.placements, strict=True) if not p.is_shard())
    if owned.cut is None or owned.over is None:
        return [(local, owned.whole.size * copies)]
    replicas, dim = owned.whole.size // owned.cut.size, owned.cut.dim
    return [
        (local.narrow(dim, box.own[dim], box.sizes[dim]), box.copies * replicas * copies)
        for box in held(grad, owned.cut, owned.over).boxes
    ] or [(local, 1)]


def _known(grads: Sequence[Tensor]) -> dict[int, Owned]:
    """What is known of each gradient, by its identity; only parameters whose gradient is among them count."""
    given = {id(g) for g in grads}
    return {
        id(t.grad): owned
        for t, owned in owned_tensors()
        if owned.whole.size > 1 and t.is_leaf and t.grad is not None and id(t.grad) in given
    }


def _refuse_unsharded() -> None:
    """FSDP2 that does not reshard after backward has whole parameters in the modules, and the gradients elsewhere."""
    for tensor, owned in owned_tensors():
        if tensor.requires_grad and not isinstance(tensor, DTensor) and owned.first() is not tensor:
            raise PolicyError(
                "clip_grad_norm_: the parallelized model's parameters are unsharded by FSDP2, so their gradients "
                "cannot be told apart; call model.reshard() before clipping, or keep set_reshard_after_backward(True)"
            )
