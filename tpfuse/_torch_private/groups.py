"""Process groups: `torch.distributed.distributed_c10d` and meshes."""

from __future__ import annotations

import datetime
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist

_c10d: Any = None
if dist.is_available():
    from torch.distributed import distributed_c10d as _c10d


def _resolved(name: str) -> dist.ProcessGroup:
    """The process group registered under `name` here. If `_resolve_process_group` goes: as in `process_group`."""
    return _c10d._resolve_process_group(name)


def process_group(name: str) -> dist.ProcessGroup | None:
    """The process group registered under `name` on this rank, or None.

    If `_resolve_process_group` goes: look the name up in `dist.distributed_c10d._world.pg_names`.
    """
    if not dist.is_available():
        return None
    try:
        return _resolved(name)
    except (RuntimeError, ValueError, KeyError):
        return None


def default_group() -> dist.ProcessGroup | None:
    """This rank's default process group, or None; cheap enough to ask at every call of a compiled graph.

    If `_world` goes: `dist.group.WORLD`, which costs twice as much.
    """
    return _c10d._world.default_pg if _c10d is not None else None


def default_store() -> Any:
    """The store through which the ranks met: a `Store`, whose stub leaves out `timeout` and `has_extended_api`.

    If `_get_default_store` goes: a PrefixStore over the store given to `init_process_group` by the caller.
    """
    return _c10d._get_default_store()


def groups_of(members: tuple[int, ...]) -> list[dist.ProcessGroup]:
    """Every process group of this rank with these members, the oldest first.

    If `_world` goes: as for `all_group_members`.
    """
    return [group for group in list(_c10d._world.pg_names) if tuple(dist.get_process_group_ranks(group)) == members]


def group_exists(group: dist.ProcessGroup | None) -> bool:
    """Whether `group` was not destroyed yet; may be asked by any thread.

    If `_world` goes: answer True, and a pulse ends with the last reference to its process group.
    """
    return group in _c10d._world.pg_map


def set_group_timeout(group: dist.ProcessGroup, seconds: float) -> None:
    """How long an operation of `group` may wait, from now on.

    If `_set_pg_timeout` goes: leave the group as it is; `peer_timeout` is then the time given to `init_process_group`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that the name is deprecated, and that other backends have no timeout
        _c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


def group_timeout(group: dist.ProcessGroup) -> float | None:
    """How many seconds an operation of `group` may wait now; None where its backends do not tell.

    If `_get_backend` or `_timeout` goes: None, and a graph without a `peer_timeout` keeps another graph's.
    """
    for device in ("cuda", "cpu"):
        try:
            return group._get_backend(torch.device(device)).options._timeout.total_seconds()
        except (RuntimeError, AttributeError):
            continue
    return None


def group_size(name: str) -> int:
    """How many ranks the group registered under `name` has; raises where there is none.

    If `_resolve_process_group` goes: as for `process_group`.
    """
    return _resolved(name).size()


def group_rank(name: str) -> int:
    """This process's rank in the group registered under `name`; raises where there is none.

    If `_resolve_process_group` goes: as for `process_group`.
    """
    return _resolved(name).rank()


def all_group_members() -> dict[str, tuple[int, ...]]:
    """Name -> members of every process group this rank belongs to.

    If `_world` goes: keep only the groups that appear in the graph.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return {}
    from torch.distributed import distributed_c10d

    names = distributed_c10d._world.pg_names
    return {name: tuple(dist.get_process_group_ranks(group)) for group, name in list(names.items())}


def fake_store() -> dist.Store:
    """A store for `init_process_group("fake", ...)`, whose ranks send nothing.

    If `FakeStore` goes: `dist.HashStore()` serves a group whose ranks never meet.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


def compiles_on_one_rank() -> bool:
    """Whether graphs are kept free of what only one rank knows (2.13 and newer)."""
    config = sys.modules.get("torch.distributed.config")
    return bool(getattr(config, "compile_on_one_rank", False))


def flat_mesh_group(mesh: Any, name: str) -> dist.ProcessGroup:
    """The group of all ranks of a mesh with named dimensions; made at the first call, by all of its ranks.

    If `_flatten` goes: `torch.distributed.new_group` with the mesh's ranks, on every rank of the world.
    """
    return mesh._flatten(name).get_group()
