"""Process groups: the name of one a user passes, and the three of a policy, from the device mesh it is used with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tpfuse._torch_private import all_group_members, flat_mesh_group
from tpfuse.errors import OpError, PolicyError
from tpfuse.policy import SharingPolicy


def group_name_of(group: Any) -> str:
    """The registered name of `group`: a ProcessGroup, a name, a 1-D DeviceMesh or (mesh, dim).

    Dynamo traces through it. A name is not looked up here: the operator that is given it does so, and raises OpError
    for one that no group has. Raises OpError for anything else.
    """
    if isinstance(group, str):
        return group
    if isinstance(group, dist.ProcessGroup):
        return group.group_name
    if isinstance(group, DeviceMesh) and group.ndim == 1:
        return group.get_group().group_name
    if isinstance(group, tuple) and len(group) == 2 and isinstance(group[0], DeviceMesh):
        names = group[0].mesh_dim_names or ()
        if group[1] in names or (isinstance(group[1], int) and 0 <= group[1] < group[0].ndim):
            return group[0].get_group(group[1]).group_name
        raise OpError(f"group=(mesh, {group[1]!r}): allowed: one of its {group[0].ndim} dimensions, named {names}")
    raise OpError(
        f"group={group!r} is no group on this rank; allowed: a ProcessGroup, a group's name, a 1-D DeviceMesh or "
        "(mesh, dim)"
    )


def no_such_group(name: str) -> str:
    """The sentence on a name that no process group of this rank has."""
    known = [f"{own!r} (ranks {', '.join(map(str, ranks))})" for own, ranks in all_group_members().items()]
    return f"group={name!r} is the name of no process group on this rank; its groups: {', '.join(known) or 'none'}"


@dataclass(frozen=True)
class Group:
    """One process group as seen by this rank: its name, its members, and which of them this rank is."""

    name: str
    ranks: tuple[int, ...]
    index: int

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Groups:
    """The groups of one rank. With dp 1 (or attn_tp 1) the whole group is the attention (or the dp) group."""

    attention: Group
    dp: Group
    whole: Group

    def of(self, kind: str) -> Group:
        """The group called "attention", "dp" or "whole"."""
        return getattr(self, kind)


def check_mesh(mesh: DeviceMesh, policy: SharingPolicy) -> None:
    """Refuses a mesh whose groups differ from the policy's; looks at nothing but this rank's mesh.

    Raises:
        PolicyError: naming the mesh's shape and what the policy needs.
    """
    if not isinstance(mesh, DeviceMesh):
        raise PolicyError(f"parallelize(mesh={mesh!r}): allowed: a torch.distributed.DeviceMesh")
    wanted = (policy.dp_size, policy.attn_tp_size)
    shape, names = tuple(mesh.shape), mesh.mesh_dim_names
    where = f"the mesh has shape {shape}" + (f" with dims {names}" if names else "")
    need = f"SharingPolicy(tp_size={policy.tp_size}, dp_size={policy.dp_size}) needs shape {wanted} as (dp, attn_tp)"
    if mesh.ndim == 1:
        if policy.dp_size != 1:
            raise PolicyError(f"{where}, and a 1-D mesh means dp 1; {need}")
        if shape != (policy.tp_size,):
            raise PolicyError(f"{where}; {need}, or a 1-D mesh of {policy.tp_size} ranks")
    elif mesh.ndim != 2 or shape != wanted:
        raise PolicyError(f"{where}; {need}" + (", or a 1-D mesh" if policy.dp_size == 1 else ""))
    elif names in (("attn_tp", "dp"), ("tp", "dp")):
        raise PolicyError(f"{where}; dp comes first (slowest): {need}")
    ranks = mesh.mesh.flatten().tolist()
    if ranks != sorted(ranks):
        # Process groups order their members by rank, and gathered rows follow that order.
        raise PolicyError(f"{where} and ranks {ranks}; allowed: ranks in ascending order, dp slowest, attn_tp fastest")
    if mesh.ndim == 2 and names is None and mesh.size() != dist.get_world_size():
        raise PolicyError(f"{where} and does not cover the world; it needs mesh_dim_names, e.g. ('dp', 'attn_tp')")
    if mesh.get_coordinate() is None:
        raise PolicyError(f"rank {dist.get_rank()} is not part of the mesh with ranks {ranks}")


def describe_groups(mesh: DeviceMesh, policy: SharingPolicy) -> Groups:
    """The groups for a mesh that `check_mesh` accepted. The whole group has no name yet when it has to be created."""
    if mesh.ndim == 1:
        group = _group(mesh.get_group(), mesh.get_local_rank())
        return Groups(group, Group("", (dist.get_rank(),), 0), group)
    dp, attn = (_group(mesh.get_group(i), mesh.get_local_rank(i)) for i in (0, 1))
    if dp.size == 1:
        return Groups(attn, dp, attn)
    if attn.size == 1:
        return Groups(attn, dp, dp)
    return Groups(attn, dp, Group("", tuple(mesh.mesh.flatten().tolist()), dp.index * attn.size + attn.index))


def create_whole_group(mesh: DeviceMesh, groups: Groups) -> Groups:
    """The same groups, the whole one created where it was missing. A rendezvous: all ranks of the mesh call it."""
    if groups.whole.name:
        return groups
    return replace(groups, whole=replace(groups.whole, name=_flat(mesh).group_name))


def _flat(mesh: DeviceMesh) -> dist.ProcessGroup:
    if mesh.mesh_dim_names is not None:
        return flat_mesh_group(mesh, "_".join(("tpfuse", *mesh.mesh_dim_names)))
    world = dist.group.WORLD
    assert world is not None
    return world


def _group(group: dist.ProcessGroup, index: int) -> Group:
    return Group(group.group_name, tuple(dist.get_process_group_ranks(group)), index)
