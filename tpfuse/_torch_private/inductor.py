"""Inductor and AOTAutograd: passes, settings, decompositions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx


def trace_on_fakes(function: Callable[..., Any], fakes: Sequence[Any]) -> fx.GraphModule:
    """The graph of `function` on fake tensors of one graph, in the operators that Inductor lowers.

    If `enable_python_dispatcher` goes: `make_fx` alone traces graphs without symbolic sizes.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch.fx.experimental.proxy_tensor import make_fx

    with enable_python_dispatcher(), fakes[0].fake_mode, torch.no_grad():
        return make_fx(function, decomposition_table=inductor_decompositions(), tracing_mode="real")(*fakes)


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's decomposition table, so that `inner="aot_eager"` shows the pass the same graph as Inductor does.

    If `select_decomp_table` goes: `torch._decomp.core_aten_decompositions()`.
    """
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def joint_graph_clean_up(gm: fx.GraphModule) -> None:
    """What Inductor's joint stage does to a graph before custom passes see it, as far as the recogniser depends on it.

    If `remove_noop_ops` goes: leave it out; the recogniser looks through clones and aliases anyway.
    """
    from torch._inductor.fx_passes.post_grad import remove_noop_ops

    remove_noop_ops(gm.graph)


def custom_graph_pass() -> type:
    """The base class of passes that Inductor's caches know by a key.

    If `CustomGraphPass` goes: a plain callable works, at the price of bypassed caches.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass

    return CustomGraphPass


def compile_with_inductor(gm: fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any]) -> Callable[..., Any]:
    """Inductor on a Dynamo graph; `patches` cover the lazily compiled backward too.

    If `compile_fx` goes: `torch.compile`'s own Inductor wrapper takes the same graph and inputs.
    """
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(gm, inputs, config_patches=patches)  # a path only where it compiles ahead of time
    return compiled


def inductor_mode_options(mode: str | None = None) -> dict[str, Any]:
    """Inductor's config for a mode, or all modes by name.

    If `list_mode_options` goes: keep the table of modes here.
    """
    from torch._inductor import list_mode_options

    return list_mode_options(mode) if mode is not None else list_mode_options()


def products_are_tuned() -> bool:
    """Whether Inductor chooses among kernels for a matrix product by trying them.

    If the settings go: True, which leaves every product to Inductor.
    """
    from torch._inductor import config

    return bool(config.max_autotune or config.max_autotune_gemm)


def inductor_config() -> dict[str, Any]:
    """Inductor's current configuration, by option name.

    If `get_config_copy` goes: read the attributes of `torch._inductor.config`.
    """
    from torch._inductor import config

    return config.get_config_copy()


def inductor_settings(patches: dict[str, Any]) -> str | None:
    """Inductor's configuration under `patches`, as text that is the same in every process; None where a pass of the
    user's in it has no key.

    If `get_config_copy` goes: as for `inductor_config`.
    """
    settings: dict[str, Any] = inductor_config() | patches
    words = []
    keyed: Any = custom_graph_pass()
    for name, setting in sorted(settings.items()):
        parts: Sequence[Any] = setting if isinstance(setting, (list, tuple)) else (setting,)
        for part in parts:
            if isinstance(part, keyed):
                part = part.uuid()
                if part is None:
                    return None
            elif callable(part):
                if "pass" in name:
                    return None
                part = getattr(part, "__qualname__", type(part).__name__)
            words.append(f"{name}={part!r}")
    return "\n".join(words)


def inductor_cache_dir() -> str:
    """Where Inductor keeps its caches.

    If `cache_dir` goes: `torch._inductor.config` and TORCHINDUCTOR_CACHE_DIR tell.
    """
    from torch._inductor.runtime.runtime_utils import cache_dir

    return cache_dir()


def aot_autograd(**compilers: Any) -> Callable[..., Any]:
    """A Dynamo backend out of AOTAutograd with the compilers given.

    If it moves: `functorch.compile.aot_module_simplified` takes the same compilers.
    """
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(**compilers)


def without_cse() -> AbstractContextManager:
    """Within it, the partitioner keeps nodes that compute the same.

    If the setting goes: nothing needs to be done.
    """
    import torch._functorch.config as settings

    return settings.patch(cse=False) if hasattr(settings, "cse") else nullcontext()
