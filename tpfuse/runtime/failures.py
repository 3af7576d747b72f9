"""Groups that a compiled graph waited for in vain: later calls say so again, whatever the group itself would say.

After a wait in vain the ranks of a group no longer agree on which call is which, so what a later collective brings, if
it comes through at all, need not be what belongs to it. Only a new group is sound.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch.distributed as dist

from .. import _state as state
from .._torch_private import group_exists, groups_of
from ..errors import PeerTimeoutError, PlanMismatchError
from ..report import Step
from .heartbeat import name_step
from .limits import Group


def note_failure(
    groups: Iterable[Group], error: PeerTimeoutError | PlanMismatchError, failed: Container[tuple[int, ...]]
) -> None:
    """Remember `error` for those of `groups` whose ranks are among `failed`. (A plan knows a group by its ranks.)"""
    for reference in groups:
        group = reference()
        if group is not None and tuple(dist.get_process_group_ranks(group)) in failed:
            # Without the traceback, which holds the tensors of the call.
            with state.LOCK:
                state.FAILED.setdefault(group, error.again())


def raise_again(groups: Iterable[Group]) -> None:
    """Raise the error of an earlier call over one of `groups` again, if one failed. Destroyed groups are not asked."""
    for reference in groups:
        group = reference()
        if group is not None and group in state.FAILED and group_exists(group):
            raise state.FAILED[group].again()


def watched_groups(steps: Iterable[Step]) -> tuple[tuple[str, str], ...]:
    """(name of the group, the boundaries it serves) for each group over which kernels may run in symmetric memory."""
    kernels: dict[tuple[int, ...], list[Step]] = {}
    for step in steps:
        if step.kernel:
            kernels.setdefault(step.group, []).append(step)
    return tuple(
        (group.group_name, name_step(found[0] if len(found) == 1 else None, found))
        for ranks, found in kernels.items()
        for group in groups_of(ranks)
    )
