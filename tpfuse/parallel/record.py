"""What `parallelize` did to a model, as it is kept on the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tpfuse.parallel.cut_modules import ModuleCut
from tpfuse.parallel.cuts import Cut
from tpfuse.parallel.mesh import Groups
from tpfuse.parallel.roles import Kind, Role
from tpfuse.parallel.used import UsedParameters
from tpfuse.policy import SharingPolicy

#: One module that is cut: its qualified name, its role, and how.
Done = tuple[str, Role, ModuleCut]


@dataclass(frozen=True)
class Site:
    """One module with a role in a parallelized model.

    Args:
        name: its qualified name.
        kind: "attention", "dense_mlp" or "moe".
        size: over how many ranks its weights are cut; 1 for a dense MLP that is held whole.
    """

    name: str
    kind: Kind
    size: int


@dataclass(frozen=True)
class Parallelized:
    """What `parallelize` did to a model (its `_tpfuse`): policy, groups, sites, and the cut of every cut parameter."""

    policy: SharingPolicy
    groups: Groups
    sites: tuple[Site, ...]
    cuts: Mapping[str, Cut]
    owed: Mapping[str, str]
    used: UsedParameters = field(compare=False)
