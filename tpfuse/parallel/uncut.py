"""The uncut twin of a module that `parallelize` cut: whole weights, no hooks, the classes and numbers it had before."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn as nn
from torch import Tensor

from tpfuse._torch_private import forward_hooks, forward_pre_hooks
from tpfuse.parallel.collectives import all_gather
from tpfuse.parallel.cuts import Cut
from tpfuse.parallel.generation import SyncedGenerate
from tpfuse.parallel.hooks import AROUND, PartialLinear, RowwiseLinear, VocabEmbedding
from tpfuse.parallel.mesh import Groups
from tpfuse.parallel.recorded_policy import RECORD
from tpfuse.parallel.saving import guard_saving

#: The module whose functions stand on cut modules in the place of their classes' methods.
SAVING = guard_saving.__module__


@torch.no_grad()
def uncut(name: str, module: nn.Module, cuts: Mapping[str, Cut], groups: Groups) -> nn.Module:
    """A copy of `module` as it was before the cut. All ranks call it; one gather for each cut tensor.

    Args:
        name: its qualified name in the model, "" for the model itself.
        cuts: the cuts of the model's parameters, by qualified name.
    """
    memo: dict[int, Tensor] = {}
    for leaf, tensor in _tensors(module):
        cut = cuts.get(f"{name}.{leaf}" if name else leaf)
        if cut is not None and cut.size > 1 and id(tensor) not in memo:
            full = gather_whole(tensor, cut, groups)
            memo[id(tensor)] = nn.Parameter(full, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else full
    twin = copy.deepcopy(module, memo)
    for part in twin.modules():
        _plain(part)
    for parameter in twin.parameters():
        parameter.grad = None
    return twin


def gather_whole(tensor: Tensor, cut: Cut, groups: Groups) -> Tensor:
    """The full tensor, from every rank's slice."""
    flat = tensor.detach().contiguous().reshape(1, -1)
    shards = all_gather(flat, cut.size, groups.of(cut.over).name).view(cut.size, *tensor.shape)
    return cut.merge(list(shards.unbind(0)))


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def class_before(cls: type) -> type:
    """The class that a module had before `parallelize` put its own in front of it."""
    while RECORD in vars(cls) or any(vars(base).get(AROUND) is cls for base in cls.__bases__):
        cls = cls.__bases__[0]
    return cls.__bases__[0] if cls in (RowwiseLinear, PartialLinear, VocabEmbedding) else cls


def _plain(module: nn.Module) -> None:
    """Takes boundaries, hooks, local counts and records off one module."""
    module.__class__ = class_before(type(module))
    inner = vars(module).pop("_tpfuse_inner", None)
    if inner is not None:
        module.forward = inner
    if isinstance(vars(module).get("generate"), SyncedGenerate):
        del module.generate
    for own in [n for n, v in vars(module).items() if getattr(getattr(v, "__func__", v), "__module__", "") == SAVING]:
        delattr(module, own)
    for attribute, value in vars(module).pop("_tpfuse_whole", {}).items():
        setattr(module, attribute, value)
    for hooks in (forward_pre_hooks(module), forward_hooks(module)):
        for key in [k for k, hook in hooks.items() if type(hook).__module__.startswith("tpfuse.")]:
            del hooks[key]
    for attribute in [a for a in vars(module) if a.startswith("_tpfuse") or a == "tpfuse_group"]:
        delattr(module, attribute)
