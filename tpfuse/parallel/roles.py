"""Decorators that say what a module class is: attention, a dense MLP or a routed (MoE) block, and how it is cut.

A decorator only records facts on the class (`__tpfuse_role__`, `__tpfuse_policy__`); `parallelize` acts on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch.nn as nn

from tpfuse.errors import PlanError, PolicyError
from tpfuse.policy import FrozenDict, SharingPolicy

Kind = Literal["attention", "dense_mlp", "moe"]
Parts = int | tuple[int, ...]
ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])

ROLE = "__tpfuse_role__"
POLICY = "__tpfuse_policy__"


@dataclass(frozen=True)
class Role:
    """What a module is and how its weights are cut. Names are attributes of the module (dots reach deeper).

    Args:
        kind: "attention", "dense_mlp" or "moe".
        colwise: submodules or parameters cut along the output features.
        rowwise: those cut along the input features; their output is a partial sum.
        heads, kv_heads: attributes that hold head counts, rewritten to this rank's counts (attention only).
        packed: for a colwise weight that holds several matrices: how many equal parts, or their sizes.
        experts, shared: submodules of a routed block.
        spread: whether the module holds other roles too (a layer with its MLP's projections beside its attention), so
            that only the projections themselves are its own. Comes from plans, not from decorators.
        per_head: parameters that hold one number a head (attention sinks). Comes from plans.
        inferred: whether nobody gave the role, and names and shapes showed it (`structure`).
    """

    kind: Kind
    colwise: tuple[str, ...] = ()
    rowwise: tuple[str, ...] = ()
    heads: str | None = None
    kv_heads: str | None = None
    packed: Mapping[str, Parts] = FrozenDict()
    experts: str | None = None
    shared: str | None = None
    spread: bool = False
    per_head: tuple[str, ...] = ()
    inferred: bool = False


def attention(
    *, colwise: Iterable[str], rowwise: Iterable[str], heads: str | None = None, kv_heads: str | None = None,
    packed: Mapping[str, int | Iterable[int]] | None = None,
) -> Callable[[ModuleClass], ModuleClass]:  # fmt: skip
    """Marks a class as attention: cut over the attention group, its output summed there.

    Args:
        colwise, rowwise: the projections, e.g. ("q_proj", "k_proj", "v_proj") and ("o_proj",).
        heads, kv_heads: attributes that hold the head counts. Name those that `forward` reshapes by.
        packed: e.g. {"qkv_proj": 3}, or {"qkv_proj": (q, k, v)} in features when the parts differ.

    Raises:
        PlanError: for arguments of the wrong type, or a class that is no nn.Module.
    """
    for name, value in (("heads", heads), ("kv_heads", kv_heads)):
        if value is not None and not isinstance(value, str):
            raise PlanError(f"@tpfuse.attention({name}={value!r}): allowed: the name of an attribute, or None")
    cols, rows = _names("attention", "colwise", colwise), _names("attention", "rowwise", rowwise)
    parts = _packed("attention", packed, cols)
    return _marker(Role("attention", cols, rows, heads, kv_heads, parts))


def dense_mlp(
    *, colwise: Iterable[str], rowwise: Iterable[str], packed: Mapping[str, int | Iterable[int]] | None = None
) -> Callable[[ModuleClass], ModuleClass]:
    """Marks a class as a dense MLP: over how many ranks it is cut is the policy's `moe_dense_tp_size`.

    Args:
        colwise, rowwise: the projections, e.g. ("gate_proj", "up_proj") and ("down_proj",).
        packed: e.g. {"gate_up": 2}, or the sizes of the parts in features.

    Raises:
        PlanError: as `attention`.
    """
    cols, rows = _names("dense_mlp", "colwise", colwise), _names("dense_mlp", "rowwise", rowwise)
    return _marker(Role("dense_mlp", cols, rows, packed=_packed("dense_mlp", packed, cols)))


def moe(*, experts: str = "experts", shared: str | None = None) -> Callable[[ModuleClass], ModuleClass]:
    """Marks a class as a routed block: experts and shared experts are cut over the whole TP group, the router is not.

    Args:
        experts: the attribute that holds the experts: a ModuleList of `dense_mlp` modules, or one module with fused
            3-D parameters `gate_up_proj` (or `gate_proj`, `up_proj`) and `down_proj`, expert first.
        shared: the attribute that holds the shared expert(s), if there are any.

    Raises:
        PlanError: as `attention`.
    """
    for name, value in (("experts", experts), ("shared", shared)):
        if not isinstance(value, str) and not (name == "shared" and value is None):
            raise PlanError(f"@tpfuse.moe({name}={value!r}): allowed: the name of an attribute")
    return _marker(Role("moe", experts=experts, shared=shared))


def share_tp_group(policy: SharingPolicy) -> Callable[[ModuleClass], ModuleClass]:
    """Attaches a policy to a model or layer class; the innermost one wins. Read by `parallelize(policy=None)`.

    Raises:
        PolicyError: when `policy` is no SharingPolicy.
        PlanError: when the class is no nn.Module.
    """
    if not isinstance(policy, SharingPolicy):
        raise PolicyError(f"@tpfuse.share_tp_group({policy!r}): allowed: a tpfuse.SharingPolicy")

    def mark(cls: ModuleClass) -> ModuleClass:
        setattr(_module_class(cls, "share_tp_group"), POLICY, policy)
        return cls

    return mark


def role_of(module: nn.Module) -> Role | None:
    """The role on the module's class or a base of it."""
    return getattr(type(module), ROLE, None)


def policy_of(module: nn.Module) -> SharingPolicy | None:
    """The policy on the module's class or a base of it."""
    return getattr(type(module), POLICY, None)


def _marker(role: Role) -> Callable[[ModuleClass], ModuleClass]:
    def mark(cls: ModuleClass) -> ModuleClass:
        setattr(_module_class(cls, role.kind), ROLE, role)
        return cls

    return mark


def _module_class(cls: Any, decorator: str) -> Any:
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise PlanError(f"@tpfuse.{decorator} on {cls!r}: allowed: a subclass of torch.nn.Module")
    return cls


def _names(decorator: str, argument: str, value: Iterable[str]) -> tuple[str, ...]:
    # A bare string is an iterable of letters: "qkv" for ("qkv",) would otherwise look for modules q, k and v.
    names = () if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise PlanError(f"@tpfuse.{decorator}({argument}={value!r}): allowed: a tuple of attribute names")
    if len(set(names)) != len(names):
        raise PlanError(f"@tpfuse.{decorator}({argument}={value!r}): a name is given twice")
    return names


def _packed(decorator: str, packed: Mapping[str, Any] | None, colwise: tuple[str, ...]) -> Mapping[str, Parts]:
    if packed is not None and not isinstance(packed, Mapping):
        raise PlanError(
            f"@tpfuse.{decorator}(packed={packed!r}): allowed: a mapping from colwise names to parts, or None"
        )
    out: dict[str, Parts] = {}
    for name, parts in (packed or {}).items():
        if name not in colwise:
            raise PlanError(f"@tpfuse.{decorator}(packed={packed!r}): {name!r} is not one of colwise={colwise}")
        sizes = (parts,) if isinstance(parts, int) else tuple(parts) if isinstance(parts, Iterable) else ()
        if not sizes or not all(type(size) is int and size > 0 for size in sizes):
            raise PlanError(
                f"@tpfuse.{decorator}(packed={{{name!r}: {parts!r}}}): allowed: how many equal parts the weight holds, "
                "or a tuple of their sizes"
            )
        out[name] = parts if isinstance(parts, int) else sizes
    return FrozenDict(out)
