"""Which ranks a group name means on this rank. Looks names up; creates nothing and communicates nothing."""

from __future__ import annotations

import torch.distributed as dist

from tpfuse._torch_private import all_group_members, process_group


def resolve_group(name: str) -> tuple[int, ...] | None:
    """The global ranks of the process group registered as `name`, in group order; None if there is none here."""
    group = process_group(name)
    if group is None:
        return None
    try:
        return tuple(dist.get_process_group_ranks(group))
    except (RuntimeError, ValueError, KeyError):
        return None


def own_rank() -> int | None:
    """This process's global rank; None without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else None


def names_of_groups() -> dict[tuple[int, ...], str]:
    """Members -> name of every process group of this rank. Where several have the same members, the oldest: groups are
    created in one order on all ranks, so all of its members choose the same one."""
    names: dict[tuple[int, ...], str] = {}
    for name, members in all_group_members().items():
        names.setdefault(members, name)
    return names
