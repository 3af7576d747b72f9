"""Where the policy lives, and whether everybody who states it agrees.

    parallelize     fixes how weights are cut, and records its policy on the classes of the modules it cut
    options         may only repeat that; for a model that was cut otherwise, it states how
    the graph       tells the groups that the boundaries really talk to

The recorded policy is read off Dynamo's graph, where every operation knows the classes of the modules around it; so it
is there for a part of the model compiled by itself, and on a warm compile cache, too.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch.nn as nn
from torch import fx

from ..errors import PolicyError
from ..options import Options
from ..passes.facts.groups import mesh_groups, names_of_groups, own_rank
from ..passes.verdict.names import clean_path
from ..policy import SharingPolicy
from ..report import Report
from .replicas import refuse_ddp

RECORD = "__tpfuse_parallelized__"


@dataclass(frozen=True)
class Recorded:
    """What `parallelize` records: the policy, and the ranks of the whole TP group that the weights are cut over."""

    policy: SharingPolicy
    ranks: tuple[int, ...]


def record_policy(module: nn.Module, recorded: Recorded, classes: dict[type, type]) -> None:
    """Give `module` a subclass of its class that carries `recorded`. `classes`: those made so far for one model."""
    base = type(module)
    if base not in classes:
        classes[base] = type(base.__name__, (base,), {RECORD: recorded, "__module__": base.__module__})
    module.__class__ = classes[base]


def recorded_policies(gm: fx.GraphModule) -> dict[Recorded, str]:
    """What `parallelize` recorded on modules of a Dynamo graph, each with the first module that has it; policies are
    normalised."""
    found: dict[Recorded, str] = {}
    for node in gm.graph.nodes:
        for path, cls in (node.meta.get("nn_module_stack") or {}).values():
            recorded = getattr(cls, RECORD, None)
            if recorded is not None:
                normalised = dataclasses.replace(recorded, policy=recorded.policy.normalised())
                found.setdefault(normalised, clean_path(str(path)) or "the model")
    return found


def with_recorded_policy(options: Options, gm: fx.GraphModule) -> Options:
    """`options` with the policy and the ranks that `parallelize` recorded on the graph's modules, if it did.

    Raises:
        PolicyError: where `options["policy"]` says anything else, or DistributedDataParallel runs over the ranks that
            the weights are cut over.
    """
    recorded = recorded_policies(gm)
    stated = options.policy
    for one, where in recorded.items():
        refuse_ddp(_ranks_of_replica(one))
        if stated is not None and stated.normalised() != one.policy:
            raise PolicyError(
                f"options['policy'] is {stated}, but parallelize cut {where} by {one.policy}: options['policy'] may "
                "only repeat the policy that the model was cut by; leave it out, or call parallelize with the other one"
            )
    policies = {one.policy for one in recorded}
    if len(policies) != 1:
        return options  # nothing was recorded, or two models share the graph and have no one preference
    ranks = {one.ranks for one in recorded}
    return dataclasses.replace(options, policy=policies.pop(), ranks=ranks.pop() if len(ranks) == 1 else None)


def _ranks_of_replica(recorded: Recorded) -> tuple[int, ...]:
    rank, policy = own_rank(), recorded.policy
    if rank is None:
        return ()
    return mesh_groups(policy.tp_size, policy.dp_size, rank, names_of_groups(), recorded.ranks).attention


def check_groups(report: Report, policy: SharingPolicy | None, ranks: tuple[int, ...] | None = None) -> None:
    """Refuse a graph whose collectives run over other groups than the policy's. `ranks`: the whole TP group's, where
    they are known.

    Groups that meet this rank's TP group in this rank alone belong to another kind of parallelism and are left alone.

    Raises:
        PolicyError: naming the collective, its ranks, and the policy's groups.
    """
    rank = own_rank()
    if policy is None or rank is None:
        return
    mesh = mesh_groups(policy.tp_size, policy.dp_size, rank, names_of_groups(), ranks)
    for boundary in report.boundaries:
        shared = set(boundary.group) & set(mesh.whole)
        beyond = set(boundary.group) > set(mesh.whole) and not boundary.feeds_norm
        if len(shared) > 1 and not beyond and not mesh.called(boundary.group):
            raise PolicyError(
                f"the {boundary.collective} of {boundary.module or 'the graph'} runs over the ranks "
                f"{list(boundary.group)}, but {policy} allows rank {rank} only {list(mesh.attention)} (attention), "
                f"{list(mesh.dp)} (dp) and {list(mesh.whole)} (the whole TP group); the mesh that the model was cut "
                "over and options['policy'] disagree"
            )
