"""Which ranks a group name means on this rank. Looks names up; creates nothing and communicates nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class MeshGroups:
    """The three groups of one rank under a policy, by members."""

    attention: tuple[int, ...]
    dp: tuple[int, ...]
    whole: tuple[int, ...]

    def called(self, ranks: tuple[int, ...]) -> str:
        """ "attention", "dp" or "whole" (the first that has these members), or "" for any other group."""
        for name in ("attention", "dp", "whole"):
            if ranks == getattr(self, name):
                return name
        return ""


def mesh_groups(
    tp_size: int, dp_size: int, rank: int, known: Iterable[tuple[int, ...]], whole: tuple[int, ...] | None = None
) -> MeshGroups:
    """The groups of `rank`, dp slowest. `known`: members of the groups there are; `whole`: those of the whole TP group.

    Where `whole` is not known it is guessed: the first group of `tp_size` members that holds this rank; where there is
    none, ranks stand in blocks of `tp_size`.
    """
    if whole is None or rank not in whole:
        whole = next((members for members in known if len(members) == tp_size and rank in members), None)
    if whole is None:
        first = rank - rank % tp_size
        whole = tuple(range(first, first + tp_size))
    attn = tp_size // dp_size
    own_dp, own_attn = divmod(whole.index(rank), attn)
    return MeshGroups(whole[own_dp * attn : (own_dp + 1) * attn], whole[own_attn::attn], whole)
