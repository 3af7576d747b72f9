"""Which ranks a group name means on this rank. Looks names up; creates nothing and communicates nothing."""

from __future__ import annotations

import torch.distributed as dist

from tpfuse._torch_private import process_group


def resolve_group(name: str) -> tuple[int, ...] | None:
    """The global ranks of the process group registered as `name`, in group order; None if there is none here."""
    group = process_group(name)
    if group is None:
        return None
    try:
        return tuple(dist.get_process_group_ranks(group))
    except (RuntimeError, ValueError, KeyError):
        return None
