"""Roles that module names and shapes show, for Hugging Face models whose own plan leaves attention or MLPs out.

Some families' plans name `lm_head` alone, or the experts and not the attention. What their classes hold is plain all
the same: q, k, v and an output projection; gate, up and down. Such a module gets a role here. A role that is only
inferred binds nobody: where the module cannot be cut after all, it stays whole, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch.nn as nn

from tpfuse.parallel.adapters import base_of
from tpfuse.parallel.calls import chunks_of
from tpfuse.parallel.roles import Role
from tpfuse.policy import FrozenDict

_QKV = ("q_proj", "k_proj", "v_proj")
_OUT = ("o_proj", "out_proj", "dense")
_MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("input_linear",), "output_linear"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
)
#: A module of this class mixes tokens; one that is not cut must still cope with a replica that has none.
MIXER = re.compile(r"att|mixer|mamba|deltanet|conv|ssm|recurrent", re.IGNORECASE)


def inferred_roles(model: nn.Module, roles: Mapping[str, Role]) -> dict[str, Role]:
    """Roles for modules that neither have one, nor lie around or inside one that has."""
    taken = set(roles) | {outer for name in roles for outer in ancestors(name)}
    found: dict[str, Role] = {}
    for name, module in model.named_modules():
        if not name or name in taken or any(outer in roles or outer in found for outer in ancestors(name)):
            continue
        role = _attention(module) or (None if _routed(model, name) else _mlp(module))
        if role is not None:
            found[name] = role
    return found


def _attention(module: nn.Module) -> Role | None:
    out = next((leaf for leaf in _OUT if _linear(module, leaf)), None)
    if out is None or not all(_linear(module, leaf) for leaf in _QKV):
        return None
    named = {leaf: getattr(module, leaf) for leaf in (*_QKV, out)}
    if named[out].in_features % named["v_proj"].out_features:
        return None  # not as many features as the queries have: some other attention
    per_head = tuple(leaf for leaf, p in module.named_parameters(recurse=False) if leaf == "sinks" and p.ndim == 1)
    if any(leaf not in per_head for leaf, _ in module.named_parameters(recurse=False)):
        return None  # parameters whose meaning nobody knows
    others = [leaf for leaf, child in module.named_children() if isinstance(child, nn.Linear) and leaf not in named]
    gates = tuple(leaf for leaf in others if getattr(module, leaf).weight.shape == named["q_proj"].weight.shape)
    if len(others) != len(gates) or not all("gate" in leaf for leaf in gates):
        return None  # projections whose meaning nobody knows
    role = Role("attention", (*_QKV, *gates), (out,), heads=first_int(module, HEADS))
    return replace(role, kv_heads=first_int(module, KV_HEADS), per_head=per_head)


def _mlp(module: nn.Module) -> Role | None:
    children = [leaf for leaf, child in module.named_children() if any(True for _ in child.parameters())]
    for colwise, rowwise in _MLPS:
        if sorted(children) == sorted((*colwise, rowwise)) and all(_linear(module, leaf) for leaf in children):
            if any(True for _ in module.parameters(recurse=False)):
                return None
            packed = {leaf: parts for leaf in colwise if (parts := chunks_of(type(module), leaf)) > 1}
            return Role("dense_mlp", colwise, (rowwise,), packed=FrozenDict(packed))
    return None


def _routed(model: nn.Module, name: str) -> bool:
    """Whether `name` lies in a routed block: experts see other rows on every call, and some see none."""
    blocks = [model.get_submodule(outer) for outer in ancestors(name) if outer]
    return "expert" in name or any(hasattr(block, "experts") or hasattr(block, "router") for block in blocks)


def uncut_mixers(model: nn.Module, roles: Mapping[str, Role]) -> Iterator[nn.Module]:
    """The outermost modules that mix tokens and have no role."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(outer in found or outer in roles for outer in ancestors(name))
        around = any(name in ancestors(other) for other in roles)
        if not name or inside or around or name in roles or isinstance(module, (nn.ModuleList, nn.Conv1d)):
            continue
        if MIXER.search(type(module).__name__) and any(True for _ in module.parameters()):
            found.append(name)
            yield module


HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


def first_int(module: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((n for n in names if type(vars(module).get(n)) is int), None)


def _linear(module: nn.Module, leaf: str) -> bool:
    return isinstance(base_of(getattr(module, leaf, None)), nn.Linear)


def ancestors(name: str) -> Iterator[str]:
    """The qualified names of the modules around a module or parameter, innermost first, ending with "", the model."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def configured(module: nn.Module, name: str) -> Any:
    """What a module's Hugging Face configuration says; that of its own layer, where layers differ in it, as such a
    configuration does not answer for the whole model. None where it says nothing."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    if getattr(config, "is_heterogeneous", False):
        if type(layer) is not int:
            return None
        config = config.per_layer_config[layer]  # type: ignore[union-attr]
    return getattr(config, name, None)
