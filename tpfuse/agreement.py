"""Where the policy lives, and whether everybody who states it agrees.

    parallelize     fixes how weights are cut, and records its policy on the classes of the modules it cut
    options         may only repeat that; for a model that was cut otherwise, it states how
    the graph       tells the groups that the boundaries really talk to

The recorded policy is read off Dynamo's graph, where every operation knows the classes of the modules around it; so it
is there for a part of the model compiled by itself, and on a warm compile cache, too.
"""

from __future__ import annotations

import dataclasses

import torch.nn as nn
from torch import fx

from .errors import PolicyError
from .options import Options
from .passes.groups import mesh_groups, names_of_groups, own_rank
from .passes.kinds import clean_path
from .policy import SharingPolicy
from .report import Report

RECORD = "__tpfuse_parallelized__"


def record_policy(module: nn.Module, policy: SharingPolicy, classes: dict[type, type]) -> None:
    """Give `module` a subclass of its class that carries `policy`. `classes`: those made so far for one model."""
    base = type(module)
    if base not in classes:
        classes[base] = type(base.__name__, (base,), {RECORD: policy, "__module__": base.__module__})
    module.__class__ = classes[base]


def recorded_policies(gm: fx.GraphModule) -> dict[SharingPolicy, str]:
    """The policies that `parallelize` recorded on modules of a Dynamo graph, each with the first module that has it."""
    found: dict[SharingPolicy, str] = {}
    for node in gm.graph.nodes:
        for path, cls in (node.meta.get("nn_module_stack") or {}).values():
            policy = getattr(cls, RECORD, None)
            if policy is not None:
                found.setdefault(policy.normalised(), clean_path(str(path)) or "the model")
    return found


def with_recorded_policy(options: Options, gm: fx.GraphModule) -> Options:
    """`options` with the policy that `parallelize` recorded on the graph's modules, if it did.

    Raises:
        PolicyError: where `options["policy"]` says anything else.
    """
    recorded = recorded_policies(gm)
    stated = options.policy
    for policy, where in recorded.items():
        if stated is not None and stated.normalised() != policy:
            raise PolicyError(
                f"options['policy'] is {stated}, but parallelize cut {where} by {policy}: options['policy'] may only "
                "repeat the policy that the model was cut by; leave it out, or call parallelize with the other one"
            )
    if len(recorded) != 1:
        return options  # nothing was recorded, or two models share the graph and have no one preference
    return dataclasses.replace(options, policy=next(iter(recorded)))


def check_groups(report: Report, policy: SharingPolicy | None) -> None:
    """Refuse a graph whose collectives run over other groups than the policy's.

    Groups that meet this rank's TP group in this rank alone belong to another kind of parallelism and are left alone.

    Raises:
        PolicyError: naming the collective, its ranks, and the policy's groups.
    """
    rank = own_rank()
    if policy is None or rank is None:
        return
    mesh = mesh_groups(policy.tp_size, policy.dp_size, rank, names_of_groups())
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
