"""Before an optimizer's step on a cut model: what would let the ranks' weights drift apart, without a word, is found.

A step is right where each rank makes its slice of the step that the uncut model makes. That takes an optimizer that
works element by element, gradients of the whole weights that are equal on all ranks, and one decision of all ranks on
whether a step is left out (an overflow in float16 may lie in one rank's slice).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tpfuse import _state as state
from tpfuse._torch_private import backward_task, process_group, under_dispatch_mode
from tpfuse.errors import PlanError, PolicyError
from tpfuse.parallel.collectives import all_reduce
from tpfuse.parallel.elementwise import by_element
from tpfuse.parallel.mesh import Group
from tpfuse.parallel.owners import Owned, owned_tensors

#: Of the gradients' norms, that other orders of summation explain. Other rows or masks give 0.01 to 1.
_TOLERANCE, _TOLERANCE_16_BITS = 1e-3, 2e-2


def refuse_unless_by_element(optimizer: torch.optim.Optimizer) -> None:
    """Raises:
    PlanError: where the optimizer has cut parameters, and does not work element by element."""
    like = next((p for p, owned in _owned(optimizer) if owned.cut is not None and owned.cut.size > 1), None)
    if like is None or isinstance(like, DTensor) or by_element(optimizer, like):
        return
    of = type(optimizer)
    raise PlanError(
        f"{of.__name__} ({of.__module__}) does not work element by element (it takes norms, means or products over "
        f"whole weights), and {_name(like)} is cut: from slices it would make another step than from the whole weight. "
        "Allowed for cut parameters: optimizers that do (torch.optim.AdamW, Adam, SGD, Adagrad, RMSprop, Lion and the "
        "like); give this one the parameters that are whole, or leave the modules whole (plan={...} without them)"
    )


@torch.no_grad()
def compare_gradients(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Compares what all ranks hold whole: a few numbers, before steps 1, 2, 4, 8, ... of each optimizer.

    Raises:
        PolicyError: on all ranks, where gradients differ that must not.
    """
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if backward_task() >= 0 or under_dispatch_mode() or capturing:
        return  # an optimizer that steps inside of a backward pass, or in a CUDA graph, which cannot be asked
    by_group: dict[Group, list[Tensor]] = {}
    for parameter, owned in _owned(optimizer):
        if owned.cut is None and owned.whole.size > 1 and not isinstance(parameter, DTensor):
            known = by_group.setdefault(owned.whole, [])  # also where this rank has no gradients: its peers may
            if type(parameter.grad) is Tensor and not parameter.grad.is_sparse:
                known.append(parameter)
    for group, parameters in by_group.items():
        ranks = process_group(group.name)
        if ranks is None or dist.get_backend(ranks) == "fake":
            continue
        grads = [p.grad for p in parameters if p.grad is not None]
        norms = torch.stack([g.double().norm() for g in grads]) if grads else _none(optimizer)
        everywhere = _of_all(norms, group)
        narrow = any(g.element_size() < 4 for g in grads)
        if words := _differ(parameters, everywhere, _TOLERANCE_16_BITS if narrow else _TOLERANCE):
            raise PolicyError(
                f"before step {step} of {type(optimizer).__name__} {words}: their copies would drift apart. All ranks "
                "of one attention group give the model the same rows (shard a dataset by the dp rank, not by the "
                "global one) and draw the same random numbers (dropout: torch.manual_seed(seed + dp_rank)); and "
                "gradients are clipped by torch.nn.utils.clip_grad_norm_, which knows cut parameters, and by no norm "
                "of this rank's slices"
            )


def _none(optimizer: torch.optim.Optimizer) -> Tensor:
    """[0], where the optimizer's parameters are."""
    first = next(parameter for parameter, _ in _owned(optimizer))
    return torch.empty(0, dtype=torch.float64, device=first.device)


def _of_all(norms: Tensor, group: Group) -> list[list[float]]:
    """Every rank's `norms` [n], where each has as many; else as many zeros as it has."""
    counts = norms.new_zeros(group.size)
    counts[group.index] = len(norms)
    every = [int(count) for count in all_reduce(counts, group.name).tolist()]
    if len(set(every)) > 1 or not len(norms):
        return [[0.0] * count for count in every]
    rows = norms.new_zeros(group.size, len(norms))
    rows[group.index] = norms
    return all_reduce(rows, group.name).tolist()


def _differ(parameters: list[Tensor], everywhere: list[list[float]], tolerance: float) -> str:
    first = everywhere[0]
    for rank, norms in enumerate(everywhere):
        if len(norms) != len(first):
            return f"rank 0 has gradients of {len(first)} whole parameters, and rank {rank} of {len(norms)}"
        size = sum(n * n for n in first) ** 0.5
        off = [abs(a - b) for a, b in zip(first, norms, strict=True)]
        if size == size and sum(d * d for d in off) ** 0.5 > tolerance * size:
            at = max(range(len(off)), key=lambda i: off[i])
            return (
                "the ranks have different gradients of parameters that each of them holds whole "
                f"({_name(parameters[at])}: norm {first[at]:.4g} on rank 0, {norms[at]:.4g} on rank {rank})"
            )
    return ""


def overflows_of_all(optimizer: torch.optim.Optimizer, found: dict[torch.device, Tensor]) -> None:
    """Lets every rank know of an overflow on any of them."""
    for group in dict.fromkeys(owned.whole for _, owned in _owned(optimizer)):
        ranks = process_group(group.name)
        if group.size == 1 or ranks is None or dist.get_backend(ranks) == "fake" or under_dispatch_mode():
            continue
        for flag in found.values():
            if type(flag) is Tensor:
                flag.copy_(all_reduce(flag.reshape(1), group.name).reshape(flag.shape))


def _owned(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Owned]]:
    """An optimizer's parameters that are a parallelized model's, in its order."""
    known = {id(tensor): owned for tensor, owned in owned_tensors()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in known:
                yield parameter, known[id(parameter)]


def _name(parameter: Tensor) -> str:
    for module in state.PARTS.keyrefs():
        if (owner := module()) is not None:
            for leaf, tensor in owner.named_parameters(recurse=False):
                if tensor is parameter:
                    return f"{state.PARTS[owner].name}.{leaf}".removeprefix(".")
    return f"a parameter of shape {list(parameter.shape)}"
