"""Cut a model's weights as a policy says, and put plain collectives at its boundaries."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Mapping

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tpfuse._torch_private import backward_hooks
from tpfuse.errors import PlanError, PolicyError
from tpfuse.parallel.boundaries import put_boundaries
from tpfuse.parallel.changes import watch
from tpfuse.parallel.cut_modules import ModuleCut, NotByRole, cut_edge, cut_module
from tpfuse.parallel.cut_report import log_summary
from tpfuse.parallel.cuts import Cut
from tpfuse.parallel.earlier_state import cut_gradient, watch_optimizers
from tpfuse.parallel.generation import sync_generation
from tpfuse.parallel.gradient_sums import owed_sums, owner_of, sum_gradients
from tpfuse.parallel.hf_plan import Planned, model_plan, read_plan, routed_block_of
from tpfuse.parallel.hooks import AllRows
from tpfuse.parallel.mesh import Groups, check_mesh, create_whole_group, describe_groups
from tpfuse.parallel.outside import watch_losses
from tpfuse.parallel.places import places
from tpfuse.parallel.reads import LookAtReads
from tpfuse.parallel.record import Done, Parallelized
from tpfuse.parallel.replicas import RefuseDDP
from tpfuse.parallel.roles import Role, policy_of, role_of
from tpfuse.parallel.router_loss import RefuseRouterLoss, ShareRouterLogits, holder_of_layers
from tpfuse.parallel.saving import guard_copies, guard_saving
from tpfuse.parallel.state_hooks import keep_state
from tpfuse.parallel.structure import ancestors, inferred_roles
from tpfuse.parallel.used import UsedParameters
from tpfuse.policy import SharingPolicy


def parallelize(
    model: nn.Module, mesh: DeviceMesh, policy: SharingPolicy | None = None, *,
    plan: Mapping[str, str] | None = None, verify: bool = False,
) -> nn.Module:  # fmt: skip
    """Shards the model in place as the policy says; the result runs in eager mode and equals the unsharded model.

    Roles come from the decorators (`tpfuse.attention`, ...), else from `plan`, else from a Hugging Face model's own
    tp plan. Modules without a role stay replicated. All ranks of one attention group give the model the same input,
    dp replicas give their own rows, and each gets the output for its rows. Each rank calls backward on its replica's
    loss; parameters then hold the gradient of the sum of all replicas' losses, as in the unsharded model, those that
    are frozen now and thawed later as well.

    Args:
        model: with whole weights, the same on all ranks (or on the meta device, to be loaded afterwards).
        mesh: 2-D (dp, attn_tp), or 1-D for dp 1. Every rank of the mesh calls this, in the same order.
        policy: None reads the one attached by `tpfuse.share_tp_group`.
        plan: Hugging Face style names by module-name pattern, e.g. {"layers.*.mlp.gate_proj": "colwise"}.
        verify: whether to prove the cut at once, as `tpfuse.verify(model)` does, against a copy of the whole model that
            is made before the cut (a Hugging Face model with real weights; each rank holds it twice meanwhile).

    Returns:
        `model`.

    Raises:
        PolicyError: when policy and mesh, or policy and model, disagree.
        PlanError: when a weight cannot be cut as its role says. Nothing is changed and nothing is communicated before
            all such errors are found.
        VerifyError: with `verify`, when a module differs from the uncut one. The model stays cut.
    """
    _check_model(model)
    _check_plan(model, plan)
    planned = _plan_of(model, plan)
    roles = _roles(model, planned)
    policy = _policy(model, policy, roles)
    check_mesh(mesh, policy)
    _check_overrides(policy, roles)
    if not roles and not planned.edges and policy.tp_size > 1:
        raise PlanError(
            f"{type(model).__name__} has no module with a role: decorate its classes (tpfuse.attention, ...), or give "
            "plan={...}; it has no tp plan of its own"
        )
    groups = describe_groups(mesh, policy)
    done, edges, left = _decide(model, planned, roles, policy, groups)
    roles = {name: role for name, role in roles.items() if name not in left}
    _refuse_nothing_but_edges(model, roles, edges, left, groups)
    cuts = _one_cut_each(model, [cut for _, _, cut in done] + edges)
    _refuse_hooked(model, cuts)

    before = copy.deepcopy(model) if verify else None

    # Nothing was changed up to here, and nothing is refused from here on.
    groups = create_whole_group(mesh, groups)
    _apply(model, cuts)
    used = UsedParameters(groups.dp)
    sites = put_boundaries(model, planned, done, edges, policy, groups, used)
    model._tpfuse_policy = policy  # type: ignore[assignment]
    owed = owed_sums(model, done, roles, groups)
    model._tpfuse = Parallelized(policy, groups, sites, cuts, owed, used)  # type: ignore[assignment]
    where = places(model, done, edges, owed, groups)
    model.register_forward_pre_hook(RefuseDDP(groups.attention.ranks))
    model.register_forward_pre_hook(LookAtReads(where))
    watch_losses(model, where, owed, groups)
    sum_gradients(model)
    own_rows = {site.name for site in sites if site.kind == "dense_mlp" and groups.attention.size > 1}
    watch(model, [*(name for name, _, cut in done if cut.over or name in own_rows), *(edge.name for edge in edges)])
    if any(isinstance(getattr(module, "_tpfuse_boundary", None), AllRows) for module in model.modules()):
        sync_generation(model, groups)
    keep_state(model)
    watch_optimizers()
    guard_saving(model)
    guard_copies(model)
    if groups.dp.size > 1 and any(site.kind == "moe" for site in sites):
        model.register_forward_pre_hook(RefuseRouterLoss(), with_kwargs=True)
    blocks = [site for site in sites if site.kind == "moe" and site.size > 1]
    for holder in {holder_of_layers(model, site.name) for site in blocks}:
        if hasattr(holder, "config"):  # Hugging Face's; another's hook would only be one more graph of a compiled model
            holder.register_forward_hook(ShareRouterLogits(blocks[0].size))
    log_summary(model, left)
    if verify:
        from tpfuse.parallel.verify import verify_against

        verify_against(model, before)
    return model


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise PlanError(f"parallelize(model={model!r}): allowed: a torch.nn.Module")
    if isinstance(whole := vars(model).get("_modules", {}).get("_orig_mod"), nn.Module):
        raise PlanError(
            f"this model is compiled (torch.compile gives an {type(model).__name__} around {type(whole).__name__}); "
            "parallelize first, and compile what it returns: model = torch.compile(tpfuse.parallelize(model, mesh, "
            "policy)). What is inside of a compiled model is its _orig_mod"
        )
    if hasattr(model, "_tpfuse_policy"):
        raise PolicyError(
            f"this {type(model).__name__} is parallelized already, with {model._tpfuse_policy}; to cut it otherwise, "
            "start from a whole model"
        )
    for name, module in model.named_modules():
        if "_tpfuse" in vars(module) or "_tpfuse_site" in vars(module):
            raise PolicyError(
                f"{name or 'the model'} ({type(module).__name__}) was parallelized before, and would be cut twice; "
                "give parallelize the outermost module once, while all of it is whole"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise PlanError(f"{name} is a DTensor: this model was distributed before; give parallelize a whole model")


def _check_plan(model: nn.Module, plan: Mapping[str, str] | None) -> None:
    decorated = next((n for n, m in model.named_modules() if role_of(m)), None)
    if plan is not None and not plan and decorated is not None:
        raise PlanError(
            f"parallelize(plan={{}}) names nothing, but {decorated or 'the model'} has a role by its decorator; leave "
            "plan out to cut by the decorators, or name the modules to cut"
        )


def _decide(
    model: nn.Module, planned: Planned, roles: Mapping[str, Role], policy: SharingPolicy, groups: Groups
) -> tuple[list[Done], list[ModuleCut], dict[str, str]]:
    """What is done to each module with a role, to embedding and output projection, and which roles that were inferred,
    or come of the model's own plan, were dropped, each with the reason. Changes nothing.

    Raises:
        PlanError: for the first module that cannot be cut.
    """
    modules = dict(model.named_modules())
    done: list[Done] = []
    left: dict[str, str] = {}
    for name, role in roles.items():
        nested = routed_block_of(name, roles)
        if nested in left:
            left[name] = left[nested]
            continue
        over = _over(name, role, policy, groups, nested)
        if role.spread and (groups.attention.size > 1 if over is None else over != "attention"):
            _refuse_spread(name, modules[name], role, policy)
        try:
            if nested is None:
                _refuse_more_inputs(name, modules[name], role, over, groups)
            done.append((name, role, cut_module(name, modules[name], role, over, groups, planned, nested is not None)))
        except PlanError as error:
            if not role.inferred and not (planned.trusted and isinstance(error, NotByRole)):
                raise
            left[name] = str(error)
    edges = [cut for name, kind in planned.edges.items() if (cut := cut_edge(name, kind, modules, groups, planned))]
    if planned.trusted:
        edges = _without_ties(model, edges)
    return done, edges, left


def _refuse_more_inputs(name: str, module: nn.Module, role: Role, over: str | None, groups: Groups) -> None:
    """A module that works on other rows than its caller's takes its hidden states and nothing else."""
    others = (over == "whole" and groups.dp.size > 1) or (over is None and groups.attention.size > 1)
    if role.kind == "attention" or not others:
        return
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    given = [p for p in inspect.signature(module.forward).parameters.values() if p.kind in plain]
    needed = [p.name for p in given if p.default is p.empty or p.name == "input_ids"]
    if len(needed) > 1:
        raise NotByRole(
            f"{name}: {type(module).__name__}.forward needs {', '.join(needed)}; a module that works on other rows "
            "than its caller's takes its hidden states alone. Leave it whole, or use dp_size=1"
        )


def _without_ties(model: nn.Module, edges: list[ModuleCut]) -> list[ModuleCut]:
    """A model's own plan cuts its edges as a saving: one that shares its tensor with a module that stays whole does so
    too (tied embeddings)."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    cut = {name for edge in edges for name in edge.cuts}
    whole = {id(p) for name, p in parameters.items() if name not in cut}
    return [edge for edge in edges if not any(id(parameters.get(name)) in whole for name in edge.cuts)]


def _refuse_nothing_but_edges(
    model: nn.Module, roles: Mapping[str, Role], edges: list[ModuleCut], left: Mapping[str, str], groups: Groups
) -> None:
    if roles or groups.whole.size == 1 or not (edges or left):
        return
    why = "".join(f"; {reason}" for reason in dict.fromkeys(left.values()))
    raise PlanError(
        f"the tp plan of {type(model).__name__} names neither attention nor an MLP, and none could be cut by its names "
        f"and shapes{why}. Say what to cut: plan={{'model.layers.*.self_attn.q_proj': 'colwise', ..., "
        "'model.layers.*.self_attn.o_proj': 'rowwise', ...}, or decorate the classes"
    )


def _plan_of(model: nn.Module, plan: Mapping[str, str] | None) -> Planned:
    if plan is not None:
        return read_plan(model, plan, "parallelize(plan=...)", trusted=False)
    if any(role_of(module) for module in model.modules()):
        return Planned({}, {}, trusted=False)
    return read_plan(model, model_plan(model), f"the tp plan of {type(model).__name__}", trusted=True)


def _roles(model: nn.Module, planned: Planned) -> dict[str, Role]:
    """The role of every module that has one, by qualified name; the plan wins where both speak."""
    roles: dict[str, Role] = {}
    for name, module in model.named_modules():
        role = planned.roles.get(name) or role_of(module)
        if role is None:
            continue
        outer = next((o for o in ancestors(name) if o in roles and not roles[o].spread), None)
        if outer is not None and not (roles[outer].kind == "moe" and role.kind == "dense_mlp"):
            raise PlanError(
                f"{name} ({role.kind}) lies inside {outer or 'the model'} ({roles[outer].kind}); allowed inside one "
                "another: a dense_mlp in a moe block"
            )
        roles[name] = role
    if planned.trusted:
        roles |= {name: dataclasses.replace(r, inferred=True) for name, r in inferred_roles(model, roles).items()}
        roles = {name: roles[name] for name, _ in model.named_modules() if name in roles}
    return roles


def _policy(model: nn.Module, policy: SharingPolicy | None, roles: Mapping[str, Role]) -> SharingPolicy:
    """The policy given, or the one the classes carry; the innermost class wins for what it contains."""
    if policy is not None:
        if not isinstance(policy, SharingPolicy):
            raise PolicyError(f"parallelize(policy={policy!r}): allowed: a tpfuse.SharingPolicy, or None")
        return policy
    found = {name: own for name, module in model.named_modules() if (own := policy_of(module))}
    if not found:
        raise PolicyError(
            f"parallelize(policy=None), and no class in {type(model).__name__} carries one; give policy=, or put "
            "@tpfuse.share_tp_group(policy) on a class"
        )
    outer_name, outer = next(iter(found.items()))
    overrides = dict(outer.overrides)
    for name, own in found.items():
        same = ("tp_size", "dp_size", "residual", "max_rows")
        for field in same:
            if getattr(own, field) != getattr(outer, field):
                raise PolicyError(
                    f"@tpfuse.share_tp_group policies disagree: {field}={getattr(own, field)} on "
                    f"{name or 'the model'}, {getattr(outer, field)} on {outer_name or 'the model'}; only the dense "
                    "sizes may differ"
                )
    for name, role in roles.items():
        if role.kind == "dense_mlp" and routed_block_of(name, roles) is None:
            innermost = next((found[n] for n in (name, *ancestors(name)) if n in found), outer)
            if innermost is not outer:
                overrides[name] = innermost.dense_tp_size_of(name)
    return dataclasses.replace(outer, overrides=overrides)


def _check_overrides(policy: SharingPolicy, roles: Mapping[str, Role]) -> None:
    dense = [n for n, r in roles.items() if r.kind == "dense_mlp" and routed_block_of(n, roles) is None]
    for pattern in policy.unmatched_overrides(dense):
        raise PolicyError(
            f"SharingPolicy.overrides[{pattern!r}] matches no dense MLP of the model; "
            f"dense MLPs: {', '.join(dense) or 'none'}"
        )


def _refuse_spread(name: str, module: nn.Module, role: Role, policy: SharingPolicy) -> None:
    raise PlanError(
        f"{name} ({type(module).__name__}) holds {role.colwise + role.rowwise} beside other roles, so its MLP can only "
        f"be cut over the attention group of {policy.attn_tp_size} ranks; {policy.dense_tp_size_of(name)} needs an MLP "
        "that is a module of its own"
    )


def _over(name: str, role: Role, policy: SharingPolicy, groups: Groups, nested: str | None) -> str | None:
    """The group a module's weights are cut over, None where they stay whole. Degenerate sizes fall together here."""
    if role.kind == "attention":
        over = "attention"
    elif role.kind == "moe" or nested is not None:
        over = "whole"
    else:
        size = policy.dense_tp_size_of(name)
        over = "none" if size == 1 else "whole" if size == policy.tp_size else "attention"
    if over == "none" or groups.of(over).size == 1:
        return None
    return "attention" if groups.of(over) == groups.attention else over


def _one_cut_each(model: nn.Module, module_cuts: list[ModuleCut]) -> dict[str, Cut]:
    """The cut of each parameter by name; parameters that share one tensor must share one cut."""
    cuts: dict[str, Cut] = {}
    seen: dict[int, tuple[str, Cut]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for module_cut in module_cuts:
        for name, cut in module_cut.cuts.items():
            tensor = parameters[name] if name in parameters else model.get_buffer(name)
            other, before = seen.setdefault(id(tensor), (name, cut))
            if before != cut:
                raise PlanError(
                    f"{name} and {other} share one tensor, but are cut differently: {cut} and {before}; untie them, or "
                    "cut both alike"
                )
            cuts[name] = cut
    for name, tensor in parameters.items():
        if name not in cuts and id(tensor) in seen:
            other, cut = seen[id(tensor)]
            if owner_of(model, name) is owner_of(model, other):
                cuts[name] = cut  # one module under two names
                continue
            raise PlanError(
                f"{name} shares its tensor with {other}, which is cut ({cut}), but is not cut itself; untie them, or "
                "cut both alike"
            )
    return cuts


def _refuse_hooked(model: nn.Module, cuts: Mapping[str, Cut]) -> None:
    """A hook on the gradient of a weight that is to be cut was written for the whole one."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, cut in cuts.items():
        if cut.size > 1 and name in parameters and backward_hooks(parameters[name]):
            raise PlanError(
                f"{name} has a hook on its gradient (Tensor.register_hook), which would be given this rank's slice of "
                f"it (one of {cut.size}) from now on; take it off, and register one after parallelize that "
                "expects a slice"
            )


@torch.no_grad()
def _apply(model: nn.Module, cuts: Mapping[str, Cut]) -> None:
    done: set[int] = set()
    for name, cut in cuts.items():
        owner, _, leaf = name.rpartition(".")
        tensor = getattr(model.get_submodule(owner), leaf)
        if id(tensor) not in done:
            done.add(id(tensor))
            tensor.data = cut.take(tensor.data)  # in place: ties and optimizers keep seeing this Parameter
            cut_gradient(tensor, cut)
