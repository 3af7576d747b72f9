"""Every private PyTorch name tpfuse uses, each with what to do when it is gone.

Supported: torch 2.11 to 2.15. Nothing else in tpfuse imports a name with a leading underscore from torch, except
`torch._dynamo`/`torch._inductor` entry points that PyTorch documents for backend authors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import fx


def resolve_group_name(group: Any) -> str:
    """The registered name of `group`: a ProcessGroup, a name, a 1-D DeviceMesh or (mesh, dim).

    If `_resolve_group_name` goes: build it from `ProcessGroup.group_name` and `DeviceMesh.get_group`.
    """
    from torch.distributed import _functional_collectives as funcol

    return funcol._resolve_group_name(group)


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
