"""Low-rank adapters (peft's LoRA) around projections that are cut: what of them is cut, and what is refused.

    projection     lora_A                      lora_B
    column-wise    whole                       cut like the projection's output
    row-wise       cut like its input          whole, on this rank's part of what lora_A gives

Both parts of a row-wise projection's output are partial then, and one sum over the ranks pays for both.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch.nn as nn

from tpfuse._torch_private import own_modules
from tpfuse.errors import PlanError


def base_of(module: object) -> object:
    """The projection that an adapter stands around; anything else itself."""
    base = own_modules(module).get("base_layer") if isinstance(module, nn.Module) else None
    return module if base is None else base


def pairs_of(adapter: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    """(name, lora_A, lora_B) of every adapter around a projection; none where there is no adapter."""
    if base_of(adapter) is adapter:
        return []
    a, b = adapter.lora_A, adapter.lora_B
    assert isinstance(a, nn.ModuleDict) and isinstance(b, nn.ModuleDict)
    return [(name, a[name], b[name]) for name in a]


def refuse_unknown(name: str, module: nn.Module) -> None:
    """Refuses adapters in a module that is to be cut, but for plain LoRA around an nn.Linear.

    Raises:
        PlanError: naming the adapter, and what to do.
    """
    for inner, part in module.named_modules():
        if base_of(part) is part or _plain_lora(part):
            continue
        where = f"{name}.{inner}" if inner else name
        raise PlanError(
            f"{where} is an adapter that cannot be cut ({type(part).__module__}.{type(part).__name__} around "
            f"{type(base_of(part)).__name__}); known is plain LoRA around an nn.Linear. Merge it first "
            "(model = model.merge_and_unload()), put adapters on other modules, or leave this one whole (plan={...} "
            "without it)"
        )


def _plain_lora(adapter: nn.Module) -> bool:
    a, b = (own_modules(adapter).get(n) for n in ("lora_A", "lora_B"))
    if not isinstance(a, nn.ModuleDict) or not isinstance(b, nn.ModuleDict) or set(a) != set(b):
        return False
    if getattr(adapter, "lora_variant", None) or getattr(adapter, "fan_in_fan_out", False):
        return False
    others = [n for n, child in adapter.named_children() if n not in ("base_layer", "lora_A", "lora_B", "lora_dropout")]
    known = all(not any(True for _ in adapter.get_submodule(n).parameters()) for n in others)
    own = any(True for _ in adapter.parameters(recurse=False))
    linear = [base_of(adapter), *a.values(), *b.values()]
    return known and not own and all(type(one) is nn.Linear for one in linear)


def adapters_in(module: nn.Module) -> list[nn.Module]:
    """Every adapter in a module."""
    return [part for part in module.modules() if base_of(part) is not part]


def chosen(adapters: Sequence[nn.Module]) -> tuple[int, int]:
    """Which adapters are in use now, as two numbers to compare with other ranks': one of everything that counts (which
    are active, merged or switched off, and how they are scaled), and the bits of the active ones' names."""
    if not adapters:
        return 0, 0
    uses = [(*_used(one), sorted(getattr(one, "scaling", {}).items())) for one in adapters]
    active = {name for names, merged, *_ in uses for name in (*names, *merged)}
    bits = sum(1 << at for at, name in enumerate(_names(adapters)) if name in active)
    return zlib.crc32(repr(uses).encode()), bits


def named(adapters: Sequence[nn.Module], bits: int) -> str:
    """The names that `chosen` made the bits of."""
    return " and ".join(name for at, name in enumerate(_names(adapters)) if bits >> at & 1) or "none"


def _used(adapter: nn.Module) -> tuple[list[str], list[str]]:
    active = getattr(adapter, "active_adapters", [])
    off = getattr(adapter, "disable_adapters", False)
    return [] if off else list(active), list(getattr(adapter, "merged_adapters", []))


def _names(adapters: Sequence[nn.Module]) -> list[str]:
    return sorted({name for one in adapters for name, _, _ in pairs_of(one)})[:62]
