"""Which gradients of a cut model are partial, over which group, and the hooks that sum them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor

from tpfuse._torch_private import backward_hooks, first_of, forward_pre_hooks, replace_total_norm
from tpfuse.errors import PlanError
from tpfuse.parallel.clip import total_norm
from tpfuse.parallel.collectives import all_reduce
from tpfuse.parallel.cuts import Cut
from tpfuse.parallel.hf_plan import routed_block_of
from tpfuse.parallel.mesh import Group, Groups
from tpfuse.parallel.owners import own
from tpfuse.parallel.paths import leaves_of
from tpfuse.parallel.record import Done, Parallelized
from tpfuse.parallel.roles import Role
from tpfuse.parallel.structure import ancestors
from tpfuse.parallel.used import UsedParameters


def owner_of(model: nn.Module, parameter: str) -> nn.Module:
    """The module that holds a parameter, by the parameter's qualified name."""
    return model.get_submodule(parameter.rpartition(".")[0])


def owed_sums(model: nn.Module, done: list[Done], roles: Mapping[str, Role], groups: Groups) -> dict[str, str]:
    """For each parameter the group over which its gradient is still partial: "dp", "attention", "whole" or "".

    Each replica's loss sees that replica's rows, so outside of modules that gather rows over dp every gradient is
    owed over dp. A parameter that is whole inside a cut module sees only this rank's heads, features or rows.
    """
    own = {p for _, _, cut in done for p in (*cut.cuts, *cut.biases_after_sum)}
    sites = {n: (r, cut) for n, r, cut in done if not r.spread and routed_block_of(n, roles) is None}
    owed: dict[str, str] = {}
    for parameter, _ in model.named_parameters():
        owed[parameter] = "dp"
        role, cut = next((sites[n] for n in ancestors(parameter) if n in sites), (None, None))
        if role is None or cut is None:
            continue
        if parameter in own:
            owed[parameter] = "" if cut.over is not None and groups.of(cut.over) != groups.attention else "dp"
        elif cut.over is not None or role.kind == "dense_mlp":
            owed[parameter] = "whole"
    return owed


@dataclass(frozen=True)
class Total:
    """Sums one gradient over a group. A cut whose slices several ranks hold is summed by slice."""

    group: Group
    cut: Cut | None = None

    def __call__(self, grad: Tensor) -> Tensor:
        if self.cut is None:
            return all_reduce(grad, self.group.name)
        return self.cut.take(all_reduce(self.cut.spread(grad), self.group.name))


@dataclass(frozen=True)
class SumGradient:
    """Hook on a parameter, which is number `number` of those whose gradients replicas sum: gives the sum."""

    used: UsedParameters = field(compare=False)
    number: int

    def __call__(self, grad: Tensor | None) -> Tensor:
        return self.used.gradient(self.number, grad)


def sum_gradients(model: nn.Module) -> None:
    """Registers the hooks that sum partial gradients, on parameters that have none yet.

    FSDP2 and others put new parameters in place of these, so each module that owns such a parameter looks again when it
    is called: by then FSDP2 has put the parameter there that backward will reach.
    """
    state: Parallelized = model._tpfuse  # type: ignore[assignment]
    sums: dict[nn.Module, list[tuple[str, SumGradient]]] = {}
    numbers: dict[int, int] = {}
    replace_total_norm(total_norm)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own(owner_of(model, name), name.rpartition(".")[2], parameter, state.cuts.get(name), state.groups)
        if not differentiable(parameter) or (total := _total_of(name, state)) is None:
            continue
        if id(parameter) not in numbers:
            numbers[id(parameter)] = state.used.add(name, parameter, total)
        hook = SumGradient(state.used, numbers[id(parameter)])
        _sum_once(parameter, hook)
        sums.setdefault(owner_of(model, name), []).append((name.rpartition(".")[2], hook))
    for module, hooks in sums.items():
        if not any(isinstance(hook, SumsOfOwn) for hook in forward_pre_hooks(module).values()):
            module.register_forward_pre_hook(SumsOfOwn(tuple(hooks)))


def _total_of(name: str, state: Parallelized) -> Total | None:
    cut = state.cuts.get(name)
    if cut is not None and not cut.disjoint:
        return Total(state.groups.whole, cut)
    owed = state.owed.get(name)
    return Total(state.groups.of(owed)) if owed and state.groups.of(owed).size > 1 else None


def differentiable(parameter: Tensor) -> bool:
    """Whether it can ever have a gradient; quantised weights cannot."""
    return parameter.is_floating_point() or parameter.is_complex()


def hook_gradient(parameter: Tensor, hook: SumGradient) -> None:
    """Registers the hook, also on a parameter that is frozen now: adapters are switched on and off, and layers thawed,
    by `requires_grad` alone. It comes before others' hooks, which then see the sum."""
    wanted = parameter.requires_grad
    handle = parameter.requires_grad_(True).register_hook(hook)
    parameter.requires_grad_(wanted)
    first_of(backward_hooks(parameter), handle.id)


def _sum_once(parameter: Tensor, hook: SumGradient) -> None:
    if not any(isinstance(known, SumGradient) for known in backward_hooks(parameter).values()):
        hook_gradient(parameter, hook)


@dataclass(frozen=True)
class SumsOfOwn:
    """Before a module's forward: its own parameters of which a sum is owed have their hooks, new ones as well."""

    hooks: tuple[tuple[str, SumGradient], ...]

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling():
            return
        for leaf, hook in self.hooks:
            if hook.number >= len(hook.used.parameters):
                return  # in a copy of the model: `OnlyByArguments` refuses to train it
            parameter = getattr(module, leaf, None)
            # A parameter that FSDP2 has cut stands here outside of forward; backward does not reach it.
            if isinstance(parameter, Tensor) and parameter.requires_grad and not isinstance(parameter, DTensor):
                if parameter.grad_fn is not None and _summed_at_leaves(f"{type(module).__name__}.{leaf}", parameter):
                    continue
                hook.used.called(parameter, hook.number)
                _sum_once(parameter, hook)


def _summed_at_leaves(name: str, stand_in: Tensor) -> bool:
    """Whether a tensor that stands in a parameter's place for one call (`torch.func.functional_call`) is computed from
    parameters whose gradients are summed where they are: summed here as well, they would count once more.

    Raises:
        PlanError: where it is computed from such parameters and from others.
    """
    leaves = [leaf for leaf in leaves_of(stand_in) if leaf.requires_grad]
    summed = [any(isinstance(hook, SumGradient) for hook in backward_hooks(leaf).values()) for leaf in leaves]
    if any(summed) and not all(summed):
        raise PlanError(
            f"{name} was replaced for one call (torch.func.functional_call) by what is computed from this model's "
            "parameters and from other tensors that require a gradient; the sums over ranks can be paid for one or the "
            "other. Detach the parameters ({name: p.detach() + delta[name]}), or make the others parameters of the "
            "model before parallelize"
        )
    return any(summed)
