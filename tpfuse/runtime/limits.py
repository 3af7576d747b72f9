"""How long a process group waits: each graph's own limit while its calls run, and the group's own where it has none.

A group has one timeout, and graphs with and without a `peer_timeout` share groups. So the timeout is set when a call
begins whose limit is another one than that of the call before; a backward pass runs under what its forward pass set,
unless another graph was called in between.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch.distributed as dist

from .. import _state as state
from .._torch_private import group_timeout, groups_of, set_group_timeout

#: A compiled graph may outlive its groups, and does not keep them.
Group = weakref.ref[dist.ProcessGroup]


@dataclass
class Limit:
    """own: the seconds that the group had before the first `peer_timeout`, or None where it does not say; now: those
    that it has."""

    own: float | None
    now: float | None


def apply_limit(groups: Iterable[Group], seconds: float | None) -> None:
    """Let operations of `groups` wait for `seconds` from now on; None: as long as before any graph set a limit."""
    for reference in groups:
        group = reference()
        if group is None:
            continue
        known = state.LIMITS.get(group)
        if known is None:
            if seconds is None:
                continue
            own = group_timeout(group)
            with state.LOCK:
                known = state.LIMITS.setdefault(group, Limit(own, own))
        wanted = known.own if seconds is None else seconds
        if wanted is not None and wanted != known.now:
            with state.LOCK:
                set_group_timeout(group, wanted)
                known.now = wanted


def groups_with_ranks(members: Iterable[tuple[int, ...]]) -> tuple[Group, ...]:
    """Every process group of this rank with one of these lists of members: a plan knows a group by its ranks, a graph
    by one of the groups with those ranks."""
    return tuple(weakref.ref(group) for ranks in members for group in groups_of(ranks))
