"""Every private PyTorch name tpfuse uses, each with what to do when it is gone.

Supported: torch 2.11 to 2.15. No other file imports a module or name of torch that starts with an underscore, but for
`torch.distributed._functional_collectives` and `torch.distributed._symmetric_memory`, the documented homes of the
collectives and of symmetric memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import fx


def process_group(name: str) -> dist.ProcessGroup | None:
    """The process group registered under `name` on this rank, or None.

    If `_resolve_process_group` goes: look the name up in `dist.distributed_c10d._world.pg_names`.
    """
    if not dist.is_available():
        return None
    from torch.distributed import distributed_c10d

    try:
        return distributed_c10d._resolve_process_group(name)
    except (RuntimeError, ValueError, KeyError):
        return None


def group_size(name: str) -> int:
    """How many ranks the group registered under `name` has; raises where there is none."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(name).size()


def all_group_members() -> dict[str, tuple[int, ...]]:
    """Name -> members of every process group this rank belongs to.

    If `_world` goes: keep only the groups that appear in the graph.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return {}
    from torch.distributed import distributed_c10d

    names = distributed_c10d._world.pg_names
    return {name: tuple(dist.get_process_group_ranks(group)) for group, name in list(names.items())}


def register_local_tensor_rule(op: Any, decomposition: Callable[..., Any]) -> None:
    """Let `LocalTensorMode` (many ranks in one process) see through a custom op: run its decomposition in the mode.

    If `LocalTensorMode` goes: drop this; only tests use it.
    """
    try:
        from torch.distributed._local_tensor import LocalTensorMode
    except ImportError:
        return

    def rule(mode: Any, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with mode:
            return decomposition(*args, **(kwargs or {}))

    torch.library.register_torch_dispatch(op, LocalTensorMode, rule)


def raised_through_dynamo(error: Exception) -> Exception:
    """`error` as an exception that Dynamo does not wrap into BackendCompilerFailed, and that is still an instance of
    `error`'s class.

    If `ShortenTraceback` goes: return `error`; users then find it as `BackendCompilerFailed.inner_exception`.
    """
    try:
        from torch._dynamo.exc import ShortenTraceback
    except ImportError:
        return error
    kind = type(error)

    def init(self: Any, *args: Any) -> None:
        Exception.__init__(self, *args)
        self.first_useful_frame = None

    unwrapped = type(kind.__name__, (kind, ShortenTraceback), {"__init__": init, "__module__": kind.__module__})
    raised = unwrapped(*error.args)
    raised.__dict__.update(error.__dict__)
    raised.__cause__ = error.__cause__
    return raised


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


def compile_stopped_at_graph_break(gm: fx.GraphModule) -> bool:
    """Whether Dynamo ended this graph because of a graph break.

    If `compile_subgraph_reason` goes: explain can no longer tell, and says nothing about breaks.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    return bool(getattr(reason, "graph_break", False))


def graph_break_reason(gm: fx.GraphModule) -> str:
    reason = getattr(gm, "compile_subgraph_reason", None)
    return str(getattr(reason, "reason", "")).strip().splitlines()[0] if reason is not None else ""


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

    return compile_fx(gm, inputs, config_patches=patches)


def inductor_mode_options(mode: str | None = None) -> dict[str, Any]:
    """Inductor's config for a mode, or all modes by name.

    If `list_mode_options` goes: keep the table of modes here.
    """
    from torch._inductor import list_mode_options

    return list_mode_options(mode) if mode is not None else list_mode_options()


def inductor_config() -> dict[str, Any]:
    """Inductor's current configuration, by option name.

    If `get_config_copy` goes: read the attributes of `torch._inductor.config`.
    """
    from torch._inductor import config

    return config.get_config_copy()


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


def tensor_leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors in nested lists, tuples and dicts.

    If `_pytree` goes: `torch.utils.pytree`.
    """
    from torch.utils import _pytree

    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
