"""Where a routed block pays its sum: once at its output, or at each of its parts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn as nn

from tpfuse.errors import PlanError
from tpfuse.parallel.block_probe import adds_up
from tpfuse.parallel.hf_plan import Planned, join
from tpfuse.parallel.roles import Role, role_of
from tpfuse.parallel.weights import matrix_or_none

# What the parts of an MLP are called where no role names them (experts and shared experts of a routed block).
COLWISE_NAMES = {"gate_proj": 1, "up_proj": 1, "gate_up_proj": 2, "gate_up": 2, "w1": 1, "w3": 1, "w13": 2, "fc1": 1}
ROWWISE_NAMES = ("down_proj", "down", "w2", "fc2")


@dataclass(frozen=True)
class Inside:
    """The projections in a routed block with the features each gives, those that give partial sums, and hidden sizes
    that the block may have. A part with fused weights is one projection, whose output has its input's size (0)."""

    projections: dict[nn.Module, int] = field(default_factory=dict)
    partial: set[nn.Module] = field(default_factory=set)
    widths: list[int] = field(default_factory=list)


def parts_with_sums(name: str, block: nn.Module, role: Role, planned: Planned) -> list[nn.Module]:
    """The parts that pay a sum each; none where one sum at the block's output pays for all.

    One is right where the block does no more to what its parts give than to weigh it and to add it up, which shows when
    it runs. A block that cannot be run by itself pays once where its author's own plan says that it may.

    Raises:
        PlanError: where neither is right, or cannot be known to be.
    """
    norm = _norm_inside(block, role)
    proof = _adds_up(block, _inside(name, block, role, planned))
    if proof or (proof is None and planned.trusted and not norm):
        return []
    parts = [(join(name, leaf), getattr(block, leaf)) for leaf in (role.experts, role.shared) if leaf is not None]
    if any(isinstance(part, (nn.ModuleList, nn.ModuleDict)) for _, part in parts):
        why = "takes more than its hidden states, so that it does cannot be seen"
        if proof is not None or norm:
            why = f"does more{f' ({norm})' if norm else ''}: a norm, a residual, a bias or a module that stays whole"
            why += " would come in front of their sum over the ranks"
        raise PlanError(
            f"{name} ({type(block).__name__}) is to weigh what its experts give and to add it up, and {why}. Leave the "
            "block whole, or move that behind it"
        )
    for part_name, part in parts:
        inside = _inside(part_name, part, role, planned, part=True)
        if part not in inside.projections and _adds_up(part, inside) is False:
            raise PlanError(
                f"{part_name} ({type(part).__name__}) does more to what its projections give than to add it up (a "
                "norm, a residual, a bias), so no sum over the ranks can be paid at its output. Leave the block whole, "
                "or move that out of it"
            )
    return [part for _, part in parts]


def _norm_inside(block: nn.Module, role: Role) -> str:
    """The name of a norm that stands in a routed block beside its experts, or ''."""
    parts = (role.experts, role.shared)
    return next((n for n, child in block.named_children() if n not in parts and "norm" in n.lower()), "")


def _adds_up(module: nn.Module, inside: Inside) -> bool | None:
    return adds_up(module, inside.projections, inside.partial, inside.widths)


def _inside(name: str, block: nn.Module, role: Role, planned: Planned, part: bool = False) -> Inside:
    """The projections of a block's parts, or of `block`, which is one part."""
    found = Inside()
    parts = [""] if part else [leaf for leaf in (role.experts, role.shared) if leaf is not None]
    roles = {n: planned.roles.get(join(name, n) if n else name) or role_of(m) for n, m in block.named_modules()}
    with_role = [n for n, own in roles.items() if own is not None and own.kind == "dense_mlp"]
    for leaf in dict.fromkeys([*parts, *with_role]):
        _note(found, block.get_submodule(leaf), roles.get(leaf))
    found.widths.extend(m.in_features for m in block.modules() if isinstance(m, nn.Linear))
    return found


def _note(found: Inside, module: nn.Module, role: Role | None) -> None:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        for child in module.children():
            _note(found, child, role_of(child))
        return
    colwise, rowwise = (role.colwise, role.rowwise) if role is not None else (tuple(COLWISE_NAMES), ROWWISE_NAMES)
    for leaf in (*colwise, *rowwise):
        target = getattr(module, leaf, None)
        weight = matrix_or_none(target)
        if weight is None:
            continue
        projection = target if isinstance(target, nn.Module) else module
        found.projections[projection] = weight.shape[0] if projection is target else 0
        found.widths.extend([weight.shape[1]] if projection is target else weight.shape[-2:])
        if leaf in rowwise:
            found.partial.add(projection)
