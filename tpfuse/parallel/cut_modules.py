"""From a role to the cuts of a module's parameters, or a refusal; changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn as nn
from torch import Tensor

from tpfuse.errors import PlanError
from tpfuse.parallel.adapters import base_of, pairs_of, refuse_unknown
from tpfuse.parallel.blocks import COLWISE_NAMES, ROWWISE_NAMES, parts_with_sums
from tpfuse.parallel.calls import chunks_of, names_configured, reduces_features
from tpfuse.parallel.cuts import Cut, Units, make_cut
from tpfuse.parallel.heads import Heads, check_reshapes, heads_of, local_counts, vectors_in
from tpfuse.parallel.hf_plan import Planned, join
from tpfuse.parallel.mesh import Groups
from tpfuse.parallel.probe import miscut
from tpfuse.parallel.roles import Parts, Role, role_of
from tpfuse.parallel.weights import (
    block_size,
    held_beside,
    is_transposed,
    matrix_of,
    matrix_or_none,
    of_other_width,
    refuse_computed,
    widest_part,
)


class NotByRole(PlanError):
    """No number is to blame: what the class computes cannot be cut by its role. A model's own plan is a saving, so such
    a module of it stays whole; in a user's plan, and by a decorator, it is an error."""


SCALES = ("weight_scale_inv", "weight_scale")


@dataclass
class ModuleCut:
    """What is done to one module.

    Args:
        over: the group, None where the module stays whole.
        cuts: by qualified parameter (or buffer) name.
        rowwise_modules: submodules whose output is a partial sum.
        sum_at_output: whether the sum is paid at the module's own output.
        biases_after_sum: row-wise biases, which are added to the sum and so stay whole.
        attributes: what to rewrite, by the module that holds it: head counts, and a config of its own with them.
        wide_norms: norms over the features of all heads, and into how many slices those are cut.
        summed_children: parts of a routed block that pay their sums themselves, since the block norms what they give.
    """

    name: str
    over: str | None
    cuts: dict[str, Cut] = field(default_factory=dict)
    rowwise_modules: list[nn.Module] = field(default_factory=list)
    sum_at_output: bool = False
    biases_after_sum: list[str] = field(default_factory=list)
    attributes: list[tuple[nn.Module, dict[str, Any]]] = field(default_factory=list)
    wide_norms: list[tuple[nn.Module, int]] = field(default_factory=list)
    summed_children: list[nn.Module] = field(default_factory=list)

    def rewrite(self) -> None:
        """Writes this rank's counts into the modules, which keep those of the uncut model (`_tpfuse_whole`)."""
        for module, values in self.attributes:
            for attribute, value in values.items():
                vars(module).setdefault("_tpfuse_whole", {}).setdefault(attribute, getattr(module, attribute))
                setattr(module, attribute, value)


def cut_module(
    name: str, module: nn.Module, role: Role, over: str | None, groups: Groups, planned: Planned, nested: bool
) -> ModuleCut:
    """The cuts of one module with a role.

    Args:
        nested: whether it lies in a routed block, which pays its sum.

    Raises:
        PlanError: when a name of the role does not exist, or a weight cannot be cut.
    """
    out = ModuleCut(name, over)
    if role.kind == "moe":
        _check_block(name, module, role)
    if over is None:
        return out
    refuse_unknown(name, module)
    if role.kind == "moe":
        for part in (role.experts, role.shared):
            if part is not None:
                _cut_experts(out, join(name, part), getattr(module, part), groups, planned, part == role.experts)
        out.summed_children = parts_with_sums(name, module, role, planned)
        out.sum_at_output = not out.summed_children
        return out
    heads = heads_of(name, module, role) if role.kind == "attention" else Heads(None, None, None)
    named = local_counts(name, module, role, heads, groups.of(over).size) if role.kind == "attention" else {}
    targets = {leaf: _target(name, module, leaf) for leaf in (*role.colwise, *role.rowwise)}
    transposed = is_transposed(module, role, targets)
    widest = max(widest_part(targets[leaf], role.packed.get(leaf, 1), transposed) for leaf in role.colwise)
    widths: set[int] = set()
    for leaf in role.colwise:
        parts = role.packed.get(leaf, 1)
        widths |= _cut_colwise(out, join(name, leaf), targets[leaf], parts, heads, widest, groups, transposed)
    for leaf in role.rowwise:
        full_name = join(name, leaf)
        widths |= _cut_rowwise(out, full_name, targets[leaf], heads, groups, transposed, nested)
        if isinstance(targets[leaf], nn.Module):
            out.rowwise_modules.append(targets[leaf])  # type: ignore[arg-type]
        else:
            out.sum_at_output = not nested
    if out.rowwise_modules and out.sum_at_output:
        raise PlanError(
            f"{name}: row-wise {role.rowwise} mixes modules and bare parameters, so sums would be paid twice; allowed: "
            "one or the other"
        )
    if any(isinstance(target, nn.Parameter) for target in targets.values()):
        _cut_beside(out, name, module, role, groups)
    known = (*role.per_head, *role.colwise, *role.rowwise)
    for leaf, parameter in vectors_in(module) if role.kind == "attention" else ():
        if leaf not in known and tuple(parameter.shape) in ((heads.q,), (heads.kv,)):
            raise NotByRole(
                f"{name}.{leaf} ({type(module).__name__}) may hold one number a head, and no role says how it is cut; "
                "leave this module whole: decorate the other classes, or give a plan={...} without it"
            )
    for leaf in role.per_head:
        _add(out, join(name, leaf), getattr(module, leaf), 0, 1, [Units(heads.q or 1)], groups)
    if role.kind == "attention":
        _find_wide_norms(out, name, module, role, targets)
        _configure(out, module, heads, groups.of(over).size)
    elif (reduction := reduces_features(type(module), of_other_width(module, role, targets))) and not nested:
        raise NotByRole(
            f"{name}: {type(module).__name__} takes a {reduction} over features that the cut divides among ranks; "
            "leave this module whole (give it no role, or plan={...} without it)"
        )
    out.attributes.append((module, named))
    if not planned.trusted or role.inferred:
        check_reshapes(name, module, role, named, widths)
    modules = all(isinstance(targets[leaf], nn.Module) for leaf in role.rowwise)
    if modules and not (transposed or role.spread or role.per_head):
        _refuse_miscut(out, name, module, role, targets, guess=not planned.trusted)
    return out


def _refuse_miscut(
    out: ModuleCut, name: str, module: nn.Module, role: Role, targets: Mapping[str, nn.Module | nn.Parameter],
    guess: bool,
) -> None:  # fmt: skip
    if out.wide_norms:
        return  # they see all features, which a module alone does not
    cuts = {
        leaf: out.cuts[join(name, leaf) if isinstance(target, nn.Parameter) else _weight(join(name, leaf), target)]
        for leaf, target in targets.items()
    }
    colwise, rowwise = ({n: cuts[n] for n in names} for names in (role.colwise, role.rowwise))
    problem = miscut(module, colwise, rowwise, out.attributes, guess=guess)
    if problem:
        raise PlanError(
            f"{name} ({type(module).__name__}), cut as {role.colwise} and {role.rowwise}: {problem}"
            f"{held_beside(module, targets)}. If no role fits, leave the module whole"
        )


def cut_edge(
    name: str, kind: str, modules: Mapping[str, nn.Module], groups: Groups, planned: Planned
) -> ModuleCut | None:
    """The cut of an embedding or an output projection over the attention group; None where it stays whole.

    A model's own plan cuts them as a saving, so a vocabulary that does not divide is left whole; in a user's plan it
    is refused.

    Raises:
        PlanError: when the module is of another class, or does not divide.
    """
    module, group = modules[name], groups.attention
    plain = type(module) is nn.Embedding if kind == "embedding" else type(module).forward is nn.Linear.forward
    plain = plain and not getattr(module, "max_norm", None) and not getattr(module, "sparse", False)
    plain = plain and "forward" not in vars(module)
    vocabulary = matrix_of(module).shape[0] if plain else 0
    divides = plain and vocabulary % group.size == 0
    if group.size == 1 or (planned.trusted and not divides):
        return None
    if not plain:
        raise PlanError(
            f"{name} is a {type(module).__name__}; allowed: an nn.Linear, or an nn.Embedding without max_norm and "
            "sparse, with its class's forward and not one put on the instance (by a hook of accelerate, for example)"
        )
    out = ModuleCut(name, "attention")
    _cut_parameters(out, name, module, 0, 1, None, groups)
    if kind == "embedding":
        out.attributes.append((module, {"num_embeddings": vocabulary // group.size}))
    return out


def _find_wide_norms(
    out: ModuleCut, name: str, module: nn.Module, role: Role, targets: Mapping[str, nn.Module | nn.Parameter]
) -> None:
    """Norms over all heads' features at once (OLMo 2): each sees every rank's features; its weights stay whole."""
    widths = {leaf: matrix_of(targets[leaf]).shape[0] for leaf in role.colwise if isinstance(targets[leaf], nn.Module)}
    for leaf, child in module.named_children():
        weight = getattr(child, "weight", None)
        if leaf in (*role.colwise, *role.rowwise) or not isinstance(weight, Tensor) or weight.ndim != 1:
            continue
        named = [col for col, width in widths.items() if width == weight.shape[0] and col[0] == leaf[0]]
        if named and weight.shape[0] != getattr(module, "head_dim", None) and role.packed.get(named[0], 1) == 1:
            out.wide_norms.append((child, out.cuts[_weight(join(name, named[0]), targets[named[0]])].counts[0]))


def _configure(out: ModuleCut, module: nn.Module, heads: Heads, size: int) -> None:
    """A class that reshapes by the counts of its config gets a config of its own, with this rank's counts."""
    config = getattr(module, "config", None)
    local = {"num_attention_heads": heads.q and heads.q // size,
             "num_key_value_heads": heads.kv and max(1, heads.kv // size)}  # fmt: skip
    read = [n for n, count in local.items() if count and names_configured(type(module), n)]
    if config is None or size == 1 or not read:
        return
    own = copy.copy(config)
    for attribute in read:
        setattr(own, attribute, local[attribute])
    out.attributes.append((module, {"config": own}))


def _check_block(name: str, module: nn.Module, role: Role) -> None:
    for argument, part in (("experts", role.experts), ("shared", role.shared)):
        if part is not None and not isinstance(getattr(module, part, None), nn.Module):
            raise PlanError(
                f"{name} ({type(module).__name__}): {argument}={part!r} is no submodule of it; "
                f"submodules: {', '.join(n for n, _ in module.named_children())}"
            )


def _cut_experts(out: ModuleCut, name: str, module: nn.Module, groups: Groups, planned: Planned, experts: bool) -> None:
    """Cuts the MLPs in a routed block that carry no role; those that do are cut as modules by themselves."""
    if name in planned.roles or role_of(module):
        return
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        for leaf, child in module.named_children():
            _cut_experts(out, join(name, leaf), child, groups, planned, experts)
        return
    colwise = tuple(n for n in COLWISE_NAMES if matrix_or_none(getattr(module, n, None)) is not None)
    rowwise = tuple(n for n in ROWWISE_NAMES if matrix_or_none(getattr(module, n, None)) is not None)
    if not colwise or not rowwise:
        raise PlanError(
            f"{name} ({type(module).__name__}) is in a routed block, but holds none of the known weights "
            f"({', '.join(COLWISE_NAMES)}; {', '.join(ROWWISE_NAMES)}); decorate its class with tpfuse.dense_mlp"
        )
    # Interleaved gate and up rows stay interleaved in any contiguous slice.
    packed = {n: COLWISE_NAMES[n] for n in colwise if getattr(module, "is_concatenated", True)}
    packed |= {n: parts for n in colwise if (parts := chunks_of(type(module), n)) > 1}
    role = Role("dense_mlp", colwise, rowwise, packed={n: p for n, p in packed.items() if p > 1})
    inner = cut_module(name, module, role, out.over, groups, planned, nested=True)
    out.cuts.update(inner.cuts)
    out.rowwise_modules.extend(inner.rowwise_modules)
    out.attributes.extend(inner.attributes)


def _target(name: str, module: nn.Module, leaf: str) -> nn.Module | nn.Parameter:
    target = module
    for part in leaf.split("."):
        target = getattr(target, part, None)  # type: ignore[assignment]
    if matrix_or_none(target) is None:
        raise PlanError(
            f"{name} ({type(module).__name__}): {leaf!r} is {'missing' if target is None else type(target).__name__}; "
            "allowed: a submodule with a weight [out, in] (nn.Linear), or a parameter"
        )
    return target


def _cut_colwise(
    out: ModuleCut, name: str, target: nn.Module | nn.Parameter, parts: Parts, heads: Heads, widest: int,
    groups: Groups, transposed: bool,
) -> set[int]:  # fmt: skip
    weight = matrix_of(target)
    full = weight.shape[-1 if transposed else -2]
    sizes = (full // parts,) * parts if isinstance(parts, int) else parts
    by_heads = heads.q or heads.dim
    units = [heads.units(size, widest) for size in sizes]
    if isinstance(target, nn.Parameter):
        dim = weight.ndim - (1 if transposed else 2)
        _add(out, name, target, dim, parts, units if by_heads else None, groups)
    else:
        _cut_parameters(out, name, target, 0, parts, units if by_heads else None, groups)
    return {full, *sizes}


def _cut_rowwise(
    out: ModuleCut, name: str, target: nn.Module | nn.Parameter, heads: Heads, groups: Groups, transposed: bool,
    nested: bool,
) -> set[int]:  # fmt: skip
    weight = matrix_of(target)
    full = weight.shape[-2 if transposed else -1]
    units = [Units(heads.q)] if heads.q and full % heads.q == 0 else None
    if isinstance(target, nn.Parameter):
        _add(out, name, target, weight.ndim - (2 if transposed else 1), 1, units, groups)  # type: ignore[union-attr]
        return {full}
    _cut_parameters(out, name, target, 1, 1, units, groups)
    if base_of(target) is target and getattr(target, "bias", None) is not None:
        if type(target).forward is not nn.Linear.forward:
            raise PlanError(f"{name} is a {type(target).__name__} with a bias, cut row-wise; allowed: an nn.Linear")
        if "forward" in vars(target):
            raise PlanError(
                f"{name} has a bias, is cut row-wise, and has a forward put on the instance (by a hook of accelerate, "
                "for example), which would add the bias once for each rank; take it off before parallelize"
            )
        if not nested:
            out.biases_after_sum.append(join(name, "bias"))
    return {full}


def _cut_parameters(
    out: ModuleCut, name: str, module: nn.Module, dim: int, parts: Parts, units: list[Units] | None,
    groups: Groups,
) -> None:  # fmt: skip
    """Cuts all parameters of one linear-like module along its output (dim 0) or input (dim 1) features.

    Raises:
        PlanError: for a weight or bias that is computed from other parameters, and for tensors beside the weight that
            nobody knows how to cut.
    """
    if (base := base_of(module)) is not module:
        assert isinstance(base, nn.Module)
        _cut_parameters(out, join(name, "base_layer"), base, dim, parts, units, groups)
        for adapter, a, b in pairs_of(module):
            side, part = ("lora_B", b) if dim == 0 else ("lora_A", a)
            weight = out.cuts[_weight(name, module)]
            for leaf in ("weight", "bias") if dim == 0 else ("weight",):
                if getattr(part, leaf, None) is not None:
                    out.cuts[join(name, f"{side}.{adapter}.{leaf}")] = weight
            out.attributes.append((part, {("out_features", "in_features")[dim]: _local_width(weight)}))
        return
    refuse_computed(name, module)
    block = block_size(module)
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    for leaf, tensor in tensors.items():
        full_name = join(name, leaf)
        if leaf == "weight":
            _add(out, full_name, tensor, dim, parts, units, groups, block[dim])
        elif leaf == "bias":
            if dim == 0:
                _add(out, full_name, tensor, 0, parts, units, groups)
        elif leaf in SCALES and tensor.ndim == 2 and block != (1, 1):
            _add_scales(out, full_name, tensor, dim, out.cuts[join(name, "weight")], block[dim])
        elif tensor.numel() > 1:
            raise PlanError(
                f"{full_name} of shape {tuple(tensor.shape)}: do not know how to cut it beside its weight; known are "
                f"weight, bias, {', '.join(SCALES)} in blocks, and scalars. Leave the module whole"
            )
    values = {("out_features", "in_features")[dim]: _local_width(out.cuts[join(name, "weight")])}
    if isinstance(module, nn.Linear):
        out.attributes.append((module, values))


def _cut_beside(out: ModuleCut, name: str, module: nn.Module, role: Role, groups: Groups) -> None:
    """Cuts the biases that stand beside bare parameters (fused experts), and refuses what it does not know."""
    for leaf, tensor in module.named_parameters(recurse=False):
        stem = leaf.removesuffix("_bias")
        if leaf in (*role.colwise, *role.rowwise):
            continue
        if stem != leaf and stem in role.colwise:
            _add(out, join(name, leaf), tensor, tensor.ndim - 1, role.packed.get(stem, 1), None, groups)
        elif stem in role.rowwise:
            why = "a bias of fused row-wise weights would be added by every rank"
            raise PlanError(f"{name}.{leaf}: {why}; leave the module whole")
        else:
            raise PlanError(
                f"{name}.{leaf} of shape {tuple(tensor.shape)} stands beside weights that are cut, and no role names "
                f"it; named: {', '.join((*role.colwise, *role.rowwise))}. Name it, or leave the module whole"
            )


def _weight(name: str, target: object) -> str:
    """The qualified name of a projection's weight, which an adapter may stand around."""
    return join(name, "weight" if base_of(target) is target else "base_layer.weight")


def _local_width(cut: Cut) -> int:
    return sum(stop - start for start, stop in cut.ranges())


def _add(
    out: ModuleCut, name: str, tensor: Tensor, dim: int, parts: Parts, units: list[Units] | None,
    groups: Groups, block: int = 1,
) -> None:  # fmt: skip
    assert out.over is not None
    out.cuts[name] = make_cut(name, tensor.shape[dim], dim, out.over, groups, parts=parts, units=units, block=block)


def _add_scales(out: ModuleCut, name: str, scales: Tensor, dim: int, weight: Cut, block: int) -> None:
    if any(part % block for part in weight.parts):
        why = f"the parts {weight.parts} of its weight are not multiples of the quantization block of {block}"
        raise PlanError(f"{name}: {why}; leave the module whole")
    out.cuts[name] = Cut(
        dim, weight.over, tuple(p // block for p in weight.parts), weight.counts, weight.size, weight.index
    )
