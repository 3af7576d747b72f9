"""The boundaries of a model whose modules were cut: hooks and classes that communicate where sums are owed."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch.nn as nn

from tpfuse._torch_private import first_of, forward_hooks
from tpfuse.parallel.adapters import adapters_in, base_of, pairs_of
from tpfuse.parallel.after_sum import ends_with_sum
from tpfuse.parallel.cut_modules import ModuleCut
from tpfuse.parallel.hf_plan import Planned, join, routed_block_of
from tpfuse.parallel.hooks import (
    AllRows,
    CopyIn,
    GatherColumns,
    IdleAttention,
    OwnRows,
    PartialLinear,
    ReduceOut,
    RowwiseLinear,
    ShareOut,
    VocabEmbedding,
    WideNorm,
    install,
)
from tpfuse.parallel.mesh import Group, Groups
from tpfuse.parallel.paths import ENTRY, OWN_ROWS, OnlyByArguments, mark
from tpfuse.parallel.record import Done, Site
from tpfuse.parallel.recorded_policy import Recorded, record_policy
from tpfuse.parallel.roles import Role
from tpfuse.parallel.rows_check import RowsCheck
from tpfuse.parallel.structure import uncut_mixers
from tpfuse.parallel.used import UsedParameters
from tpfuse.policy import SharingPolicy


def put_boundaries(
    model: nn.Module, planned: Planned, done: list[Done], edges: list[ModuleCut], policy: SharingPolicy, groups: Groups,
    used: UsedParameters,
) -> tuple[Site, ...]:  # fmt: skip
    """Hooks and classes around the modules that were cut, and the record of them on the modules; returns the sites."""
    modules, roles = dict(model.named_modules()), {name: role for name, role, _ in done}
    check = RowsCheck()
    classes: dict[type, type] = {}
    shared = _of_several(done)
    sites = []
    for name, role, cut in done:
        cut.rewrite()
        in_block = routed_block_of(name, roles) is not None
        several = any(child in shared for child in _children(cut))
        _hook(name, modules[name], role, cut, groups, policy, check, used, in_block, several, hasattr(model, "config"))
        if planned.trusted and role.kind == "attention":
            install(modules[name], IdleAttention())
        if not in_block:
            sites.append(Site(name, role.kind, groups.of(cut.over).size if cut.over else 1))
            modules[name]._tpfuse_policy = policy  # type: ignore[assignment]
            modules[name]._tpfuse_site = sites[-1]  # type: ignore[assignment]
            record_policy(modules[name], Recorded(policy, groups.whole.ranks), classes)
    if planned.trusted and groups.dp.size > 1:
        for mixer in uncut_mixers(model, roles):
            install(mixer, IdleAttention())
    for edge in edges:
        _hook_edge(modules[edge.name], edge, groups.attention)
    return tuple(sites)


def _hook(
    name: str, module: nn.Module, role: Role, cut: ModuleCut, groups: Groups, policy: SharingPolicy, check: RowsCheck,
    used: UsedParameters, nested: bool, several: bool, of_transformers: bool,
) -> None:  # fmt: skip
    if cut.over is None:
        if role.kind == "dense_mlp" and not nested and groups.attention.size > 1:
            install(module, OwnRows(name, groups.attention))
            _register_first(module, OnlyByArguments(name, OWN_ROWS, weakref.ref(module)))
        return
    group = groups.of(cut.over)
    for leaf, parameter in module.named_parameters():
        mark(parameter, cut=join(name, leaf) in cut.cuts)
    for norm, count in cut.wide_norms:
        weight: Any = norm.weight
        install(norm, WideNorm(group, count, weight.shape[0]))
    # A routed block pays once, at its output; the parts of other modules in it pay nothing at all.
    goes_on = not nested and not role.spread and not cut.sum_at_output and not ends_with_sum(module, role)
    # Others' hooks may do anything behind the sum, and a projection of two modules stands in both of them alike.
    goes_on = goes_on or ((bool(forward_hooks(module)) or several) and not nested and not role.spread)
    for child in cut.summed_children:
        _pay_once(child, ReduceOut(group, goes_on))
    for child in cut.rowwise_modules:
        _hook_rowwise(child, group, goes_on, partial=nested or role.kind == "moe")
    if nested:
        return
    owes = ReduceOut(group, goes_on) if cut.sum_at_output else None
    if role.spread:
        for leaf in role.colwise:
            module.get_submodule(leaf).register_forward_pre_hook(CopyIn(group), with_kwargs=True)
        return
    share = ShareOut(group) if goes_on else None
    if group != groups.attention and groups.dp.size > 1 and role.kind != "attention":
        site = check.number_of(name)
        check.adapters.extend(adapters_in(module))
        alone = role.kind == "dense_mlp"
        install(module, AllRows(name, site, groups.dp, policy.max_rows, check, used, CopyIn(group), owes, share, alone))
        _register_first(module, OnlyByArguments(name, ENTRY, weakref.ref(module)))
        return
    module.register_forward_pre_hook(CopyIn(group), with_kwargs=True)
    by_arguments = OnlyByArguments(name, ENTRY, weakref.ref(module))
    if share is None:
        _register_first(module, by_arguments)
    else:
        module.register_forward_hook(share)
        module.register_forward_hook(by_arguments)
    if owes is not None:
        _register_first(module, replace(owes, beside=role.kind == "moe" and not of_transformers))


def _children(cut: ModuleCut) -> list[nn.Module]:
    return [*cut.summed_children, *cut.rowwise_modules]


def _of_several(done: list[Done]) -> set[nn.Module]:
    """Projections that stand in several modules with a role, and pay the sum in each."""
    seen: dict[nn.Module, str] = {}
    return {child for name, _, cut in done for child in set(_children(cut)) if seen.setdefault(child, name) != name}


def _pay_once(child: nn.Module, pay: ReduceOut) -> None:
    """In front of others' hooks, which then see the whole sum; once for a module under two names."""
    if not any(isinstance(known, ReduceOut) for known in forward_hooks(child).values()):
        _register_first(child, pay)


def _register_first(module: nn.Module, hook: Any) -> None:
    """As `prepend=True`, which moves the hook in the ordered dict alone: Dynamo of torch 2.11 reads the plain one."""
    handle = module.register_forward_hook(hook)
    first_of(forward_hooks(module), handle.id)


def _hook_rowwise(child: nn.Module, group: Group, goes_on: bool, partial: bool) -> None:
    if (base := base_of(child)) is not child:
        # An adapter's part is added to the projection's: every rank adds a share of the biases, and one sum pays all.
        for linear in (base, *(b for _, _, b in pairs_of(child))):
            if getattr(linear, "bias", None) is not None:
                linear.__class__ = PartialLinear
                linear.tpfuse_group = group  # type: ignore[attr-defined]
        if not partial:
            _pay_once(child, ReduceOut(group, goes_on))
    elif getattr(child, "bias", None) is not None:
        child.__class__ = PartialLinear if partial else RowwiseLinear
        child.tpfuse_group = group  # type: ignore[assignment]
        child.tpfuse_scaled = goes_on  # type: ignore[assignment]
    elif not partial:
        _pay_once(child, ReduceOut(group, goes_on))


def _hook_edge(module: nn.Module, edge: ModuleCut, group: Group) -> None:
    if isinstance(module, nn.Embedding):
        module.__class__ = VocabEmbedding
        module.tpfuse_group = group  # type: ignore[assignment]
    else:
        module.register_forward_pre_hook(CopyIn(group), with_kwargs=True)
        module.register_forward_hook(GatherColumns(group))
