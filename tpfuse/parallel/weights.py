"""What a weight looks like, before anything is decided about its cut: its matrix, its orientation, its blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn as nn
from torch import Tensor
from torch.nn.utils import parametrize

from tpfuse.errors import PlanError
from tpfuse.parallel.hf_plan import join
from tpfuse.parallel.roles import Parts, Role


def matrix_of(target: nn.Module | nn.Parameter) -> Tensor:
    """The matrix that a target of a role holds."""
    weight = target if isinstance(target, nn.Parameter) else target.weight
    assert isinstance(weight, Tensor)
    return weight


def matrix_or_none(target: object) -> Tensor | None:
    """The matrix of a linear-like module, or the parameter itself; None for anything else."""
    if isinstance(target, nn.Parameter):
        return target if target.ndim in (2, 3) else None
    weight = getattr(target, "weight", None) if isinstance(target, nn.Module) else None
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    shape = (getattr(target, "out_features", None), getattr(target, "in_features", None))
    return weight if shape == tuple(weight.shape) else None


def is_transposed(module: nn.Module, role: Role, targets: Mapping[str, nn.Module | nn.Parameter]) -> bool:
    """Whether bare parameters are [..., in, out] and not [..., out, in]; the shapes say so, an attribute if not."""
    if any(isinstance(t, nn.Module) for t in targets.values()):
        return False
    col, row = matrix_of(targets[role.colwise[0]]).shape, matrix_of(targets[role.rowwise[0]]).shape
    straight, crossed = col[-1] == row[-2], col[-2] == row[-1]
    return bool(getattr(module, "is_transposed", False)) if straight == crossed else crossed


def widest_part(target: nn.Module | nn.Parameter, parts: Parts, transposed: bool) -> int:
    """The features of the widest matrix in a column-wise weight."""
    out = matrix_of(target).shape[-1 if transposed else -2]
    return out // parts if isinstance(parts, int) else max(parts)


def refuse_computed(name: str, module: nn.Module) -> None:
    """Refuses a weight or bias that is no parameter or buffer, but computed from some (parametrizations)."""
    if parametrize.is_parametrized(module):
        leaf = next(iter(module.parametrizations))  # type: ignore[arg-type]
        raise PlanError(
            f"{join(name, leaf)} is parametrized (torch.nn.utils.parametrize) and cannot be cut; make it a plain "
            f"parameter before parallelize: torch.nn.utils.parametrize.remove_parametrizations(module, {leaf!r})"
        )
    stored = [*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))]
    for leaf in ("weight", "bias"):
        if isinstance(getattr(module, leaf, None), Tensor) and leaf not in stored:
            if not stored:
                raise PlanError(
                    f"{name} is a {type(module).__name__} ({type(module).__module__}), which has no {leaf} of its own "
                    f"and hands on that of {' or '.join(n for n, _ in module.named_children())}; parallelize without "
                    "it (with peft: without this module in modules_to_save), or leave the module around it whole "
                    "(plan={...} without it)"
                )
            raise PlanError(
                f"{join(name, leaf)} is neither parameter nor buffer, but computed from {', '.join(stored)}; make it "
                "a plain parameter before parallelize (torch.nn.utils.remove_weight_norm, remove_spectral_norm)"
            )


def block_size(module: nn.Module) -> tuple[int, int]:
    """Elements of a quantization block along (out, in), from a `block_size` of module or weight; (1, 1) if none."""
    block = getattr(module, "block_size", None) or getattr(getattr(module, "weight", None), "block_size", None)
    if isinstance(block, int):
        return block, block
    if isinstance(block, (tuple, list)) and len(block) == 2 and all(type(b) is int and b > 0 for b in block):
        return block[0], block[1]
    return 1, 1


def held_beside(module: nn.Module, targets: Mapping[str, nn.Module | nn.Parameter]) -> str:
    """What a module holds beside its projections, which no role cuts: a number for each head or feature, perhaps."""
    known = {id(t) for target in targets.values() if isinstance(target, nn.Module) for t in target.parameters()}
    known |= {id(target) for target in targets.values()}
    own = vars(module).items()
    held = [*module.named_parameters(), *module.named_buffers(), *((n, t) for n, t in own if isinstance(t, Tensor))]
    named = [f"{leaf} {list(tensor.shape)}" for leaf, tensor in held if id(tensor) not in known and tensor.numel() > 1]
    if not named:
        return ""
    more = ", ..." if len(named) > 4 else ""
    return (
        f". Beside them it holds {', '.join(named[:4])}{more}, which stay whole on every rank: what has an entry for "
        "each head or feature must come from a projection that colwise= names (a gate of one output a head, say)"
    )


def of_other_width(module: nn.Module, role: Role, targets: Mapping[str, nn.Module | nn.Parameter]) -> set[str]:
    """Submodules with a weight that fits none of the features that are cut (a norm before or behind the MLP)."""
    linear = [targets[leaf] for leaf in role.rowwise if isinstance(targets[leaf], nn.Module)]
    cut = {matrix_of(target).shape[1] for target in linear}
    return {
        leaf
        for leaf, child in module.named_children()
        if linear and isinstance(weight := getattr(child, "weight", None), Tensor) and weight.shape[-1] not in cut
    }
