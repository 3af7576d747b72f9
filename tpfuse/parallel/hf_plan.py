"""Roles from a plan in Hugging Face's style names, for models whose classes carry no decorators.

A plan maps module (or parameter) names to styles, e.g. {"layers.*.mlp.gate_proj": "colwise"}. Entries are grouped by
the module that owns them, and each owner becomes one role: attention, a dense MLP, or a routed block.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch.nn as nn

from tpfuse.errors import PlanError
from tpfuse.parallel.roles import Role
from tpfuse.policy import FrozenDict

COLWISE = {"colwise": 1, "packed_colwise": 2}
ROWWISE = {"rowwise", "rowwise_rep"}
GATHERED = {"colwise_gather_output", "colwise_rep"}
EMBEDDING = {"embedding_rowwise"}
# Replicated here: gradients of whatever stays whole inside a cut module are summed in any case.
WHOLE = {"replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj"}
BLOCK = {"moe_tp_experts"}
EXPERT_PARALLEL = {"ep_dispatch_experts", "grouped_gemm", "ep_router", "gather"}

# Families whose own plan leaves attention whole: MLA's up-projections are cut by heads, the latents are not.
MLA = {"q_b_proj": "colwise", "q_proj": "colwise", "kv_b_proj": "colwise", "o_proj": "rowwise"}

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


@dataclass(frozen=True)
class Planned:
    """Roles by module name, and the edges of the model that are cut over the attention group.

    Args:
        edges: module name to "embedding" or "gathered" (an output projection whose columns are gathered).
        trusted: whether the model's author wrote the plan, and so promises that its classes reshape by no count.
    """

    roles: Mapping[str, Role]
    edges: Mapping[str, str]
    trusted: bool


def model_plan(model: nn.Module) -> dict[str, str]:
    """The model's own plan (Hugging Face's `tp_plan`), completed where a family leaves attention whole; maybe empty."""
    plan = dict(getattr(model, "_tp_plan", None) or {})
    if not plan:
        return {}
    names = dict(model.named_modules())
    for name, module in names.items():
        if hasattr(module, "kv_b_proj") and hasattr(module, "o_proj"):
            for child, style in MLA.items():
                if getattr(module, child, None) is not None:
                    plan.setdefault(join(name, child), style)
    return plan


def read_plan(model: nn.Module, plan: Mapping[str, str], source: str, trusted: bool) -> Planned:
    """Groups a plan's entries into roles.

    Args:
        source: where the plan came from, for messages.
        trusted: True for the model's own plan, whose entries may match nothing (a family's plan covers all its
            variants); in a user's plan an entry without a match is a typing error.

    Raises:
        PlanError: for an unknown style, expert parallelism, an entry that matches nothing, or a module cut column-wise
            with nothing row-wise after it.
    """
    styles = _match(model, plan, source, trusted)
    modules = dict(model.named_modules())
    blocks = {n.rpartition(".")[0]: n.rpartition(".")[2] for n, s in styles.items() if s in BLOCK}
    for name in styles:
        if (block := _block_of(name)) is not None:
            blocks.setdefault(block, "experts")
    owned: dict[str, dict[str, str]] = defaultdict(dict)
    edges: dict[str, str] = {}
    for name, style in styles.items():
        owner, _, leaf = name.rpartition(".")
        if style in EMBEDDING:
            edges[name] = "embedding"
        elif style in GATHERED:
            edges[name] = "gathered"
        elif style in COLWISE or style in ROWWISE:
            owned[owner][leaf] = style
    roles: dict[str, Role] = {
        name: Role("moe", experts=experts, shared=_shared(modules[name])) for name, experts in blocks.items()
    }
    for owner, leaves in owned.items():
        roles[owner] = _role(
            owner, modules[owner], leaves, source, nested=any(outer in blocks for outer in ancestors(owner))
        )
    around = {outer for name in roles for outer in ancestors(name)}
    for name, role in roles.items():
        if role.kind == "dense_mlp" and name in around:
            roles[name] = replace(role, spread=True)
    return Planned(roles, edges, trusted)


def _match(model: nn.Module, plan: Mapping[str, str], source: str, trusted: bool) -> dict[str, str]:
    if not isinstance(plan, Mapping) or not all(isinstance(k, str) and isinstance(v, str) for k, v in plan.items()):
        raise PlanError(f"{source} is {plan!r}; allowed: a mapping from module-name patterns to style names")
    known = sorted({*COLWISE, *ROWWISE, *GATHERED, *EMBEDDING, *WHOLE, *BLOCK})
    names = [name for name, _ in model.named_modules() if name]
    names += [name for name, _ in model.named_parameters()]
    prefix = getattr(model, "base_model_prefix", "")
    styles: dict[str, str] = {}
    for pattern, style in plan.items():
        regex = re.compile("[^.]+".join(map(re.escape, pattern.split("*"))))
        matched = [n for n in names if regex.fullmatch(n) or (prefix and regex.fullmatch(n.removeprefix(f"{prefix}.")))]
        if not matched and trusted:
            continue
        if style in EXPERT_PARALLEL:
            raise PlanError(
                f"{source}: {pattern!r} asks for {style!r}, which is expert parallelism; tpfuse cuts every expert over "
                f"the whole TP group instead. Allowed styles: {', '.join(known)}"
            )
        if style not in known:
            raise PlanError(f"{source}: unknown style {style!r} for {pattern!r}; allowed: {', '.join(known)}")
        if not matched:
            raise PlanError(f"{source}: {pattern!r} matches no module and no parameter of {type(model).__name__}")
        styles.update(dict.fromkeys(matched, style))
    return styles


def _role(owner: str, module: nn.Module, leaves: dict[str, str], source: str, nested: bool) -> Role:
    colwise = tuple(n for n, s in leaves.items() if s in COLWISE)
    rowwise = tuple(n for n, s in leaves.items() if s in ROWWISE)
    if not colwise or not rowwise:
        one, other = ("column", "row") if colwise else ("row", "column")
        raise PlanError(
            f"{source}: {owner} ({type(module).__name__}) has {one}-wise weights {colwise or rowwise} and no "
            f"{other}-wise one; a module is cut with both, or not at all"
        )
    packed = FrozenDict({n: 2 for n, s in leaves.items() if s == "packed_colwise"})
    role = Role("dense_mlp", colwise, rowwise, packed=packed)
    if nested or not re.search(r"att", f"{owner.rpartition('.')[2]} {type(module).__name__}", re.IGNORECASE):
        return role
    return replace(role, kind="attention", heads=_first_int(module, _HEADS), kv_heads=_first_int(module, _KV_HEADS))


def _first_int(module: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((n for n in names if type(vars(module).get(n)) is int), None)


def _block_of(name: str) -> str | None:
    """The routed block around `...experts.N.proj`, where experts are modules of their own."""
    match = re.fullmatch(r"(.+)\.experts\.(\d+\.)?[^.]+", name)
    return match[1] if match else None


def _shared(block: nn.Module) -> str | None:
    return next((n for n in ("shared_experts", "shared_expert", "shared_mlp") if hasattr(block, n)), None)


def ancestors(name: str) -> Iterator[str]:
    """The qualified names of the modules around a module or parameter, innermost first, ending with "", the model."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def join(outer: str, leaf: str) -> str:
    """The qualified name of a module's attribute."""
    return f"{outer}.{leaf}" if outer else leaf
