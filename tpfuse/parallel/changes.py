"""Modules that are put into a model after `parallelize`: their gradients are summed, or they are refused.

A module set in a cut one's place would take over neither its sums nor its slices, and nothing would say so.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn

from tpfuse import _state as state
from tpfuse._torch_private import forward_hooks, own_modules
from tpfuse.errors import PlanError
from tpfuse.parallel.adapters import base_of
from tpfuse.parallel.gradient_sums import SumGradient, Total, differentiable, hook_gradient
from tpfuse.parallel.hooks import PartialLinear, ReduceOut, RowwiseLinear
from tpfuse.parallel.owners import own
from tpfuse.parallel.record import Parallelized


@dataclass(frozen=True)
class Part:
    """A module of a parallelized model; `inside`: whether it is, or lies in, one that was cut."""

    model: weakref.ref[nn.Module]
    name: str
    inside: bool


def watch(model: nn.Module, cut: Iterable[str]) -> None:
    """From now on modules that are set in the model are looked at. `cut`: the names of those that were cut."""
    names, reference = set(cut), weakref.ref(model)
    for name, module in model.named_modules():
        inside = any(name == one or name.startswith(f"{one}.") or not one for one in names)
        with state.LOCK:
            state.PARTS[module] = Part(reference, name, inside)
    with state.LOCK:
        if not state.WATCHING.on:
            state.WATCHING.on = True
            nn.modules.module.register_module_module_registration_hook(_registered)


def _registered(owner: nn.Module, leaf: str, module: nn.Module | None) -> None:
    # Traced, this would make the registry the first place where Dynamo meets the modules, and name them after it.
    if torch.compiler.is_compiling():
        return
    part = state.PARTS.get(owner)
    model = part.model() if part is not None else None
    record = getattr(model, "_tpfuse", None)
    if part is None or model is None or record is None or not isinstance(module, nn.Module):
        return
    before = own_modules(owner).get(leaf)
    name = f"{part.name}.{leaf}" if part.name else leaf
    if before is not None and before is not module and base_of(before) is module:
        _unwrapped(before, module, name, record)
    fresh = {sub: m for sub, m in module.named_modules() if m not in state.PARTS}
    new = [m for m in fresh.values() if any(True for _ in m.parameters(recurse=False))]
    replaced = state.PARTS.get(before) if before is not None else None
    inside = part.inside or (replaced is not None and replaced.inside)
    if new and record.groups.whole.size > 1 and inside:
        raise PlanError(
            f"{name} was cut by parallelize, and {type(module).__name__} ({type(module).__module__}) brings parameters "
            "that were not. Put adapters, parametrizations and other modules in first, and give parallelize the model "
            "that has them: model = get_peft_model(model, config); parallelize(model, mesh, policy)"
        )
    with state.LOCK:  # torch's parametrizations come in an empty container, which is filled afterwards
        for sub, one in fresh.items():
            state.PARTS[one] = Part(part.model, f"{name}.{sub}".removesuffix("."), inside)
    if new and record.groups.dp.size > 1:
        _sum(name, module, record)


def _sum(name: str, module: nn.Module, record: Parallelized) -> None:
    """Outside of cut modules every replica sees its own rows."""
    for leaf, parameter in module.named_parameters():
        if any(ref() is parameter for ref in record.used.parameters) or not differentiable(parameter):
            continue
        total = Total(record.groups.dp)
        hook_gradient(parameter, SumGradient(record.used, record.used.add(f"{name}.{leaf}", parameter, total)))
        owner, _, own_name = leaf.rpartition(".")
        own(module.get_submodule(owner), own_name, parameter, None, record.groups)


def _unwrapped(adapter: nn.Module, base: nn.Module, name: str, record: Parallelized) -> None:
    """An adapter is taken off: what it paid is paid by the projection, which has its name back."""
    for hook in forward_hooks(adapter).values():
        if isinstance(hook, ReduceOut) and isinstance(base, PartialLinear):
            base.__class__ = RowwiseLinear  # type: ignore[assignment]  # narrowed above
            base.tpfuse_group, base.tpfuse_scaled = hook.group, hook.scaled  # type: ignore[assignment]
        elif isinstance(hook, ReduceOut):
            base.register_forward_hook(hook)
    for table in (record.cuts, record.owed):
        assert isinstance(table, dict)
        for key in [k for k in table if k.startswith(f"{name}.")]:
            value = table.pop(key)
            if key.startswith(f"{name}.base_layer."):
                table[f"{name}.{key.removeprefix(f'{name}.base_layer.')}"] = value
