"""Roles from a plan in Hugging Face's style names, for models whose classes carry no decorators.

A plan maps module (or parameter) names to styles, e.g. {"layers.*.mlp.gate_proj": "colwise"}. Entries are grouped by
the module that owns them, and each owner becomes one role: attention, a dense MLP, or a routed block.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch.nn as nn

from tpfuse.errors import PlanError
from tpfuse.parallel.calls import chunks_of
from tpfuse.parallel.roles import Parts, Role
from tpfuse.parallel.structure import HEADS, KV_HEADS, ancestors, configured, first_int
from tpfuse.policy import FrozenDict

COLWISE = {"colwise": 1, "packed_colwise": 2}
ROWWISE = {"rowwise", "rowwise_rep"}
# A column-wise output that is gathered and a row-wise input that is split again: the author's way around a class that
# takes the output apart or norms all of it. With the parts known, or the norm gathered, the pair is cut like any other.
SPLIT_INPUT = {"rowwise_split_input"}
GATHERED = {"colwise_gather_output", "colwise_rep"}
EMBEDDING = {"embedding_rowwise"}
# Replicated here: gradients of whatever stays whole inside a cut module are summed in any case.
# `all_reduce` marks the output of a part of a routed block, whose one sum pays for it.
WHOLE = {"replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj", "local_params", "all_reduce"}
# Rows of experts that are [in, out]: which dimension that is, the shapes of a block's experts say.
PACKED_ROWWISE = {"packed_rowwise"}
IDENTITY = {"moe_identity_expert"}
BLOCK = {"moe_tp_experts"}
EXPERT_PARALLEL = {"ep_dispatch_experts", "grouped_gemm", "ep_router", "gather"}

# Families whose own plan leaves attention whole: MLA's up-projections are cut by heads, the latents are not.
MLA = {"q_b_proj": "colwise", "q_proj": "colwise", "g_proj": "colwise", "kv_b_proj": "colwise", "o_proj": "rowwise"}


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
    # An expert that hands its input on would be added by every rank: such a block stays whole.
    left = {n.removesuffix(".identity_expert").rpartition(".")[0] for n, s in styles.items() if s in IDENTITY}
    styles = {n: s for n, s in styles.items() if s not in IDENTITY and not any(o in left for o in ancestors(n))}
    blocks = {n: experts for n, experts in blocks.items() if n not in left}
    for name in styles:
        if (block := _block_of(name)) is not None:
            blocks.setdefault(block, "experts")
    layers = {n for n in blocks if any(s.startswith(f"{n}.") and _is_attention(s) for s in styles)}
    if layers and not trusted:
        raise PlanError(
            f"{source}: {min(layers)} ({type(modules[min(layers)]).__name__}) holds its experts beside its attention, "
            "and a routed block is cut as one; put experts and router into a module of their own, or leave them out"
        )
    alone = {join(n, blocks.pop(n)) for n in layers}  # they stay whole: no module around them is theirs alone
    styles = {n: s for n, s in styles.items() if alone.isdisjoint((n, *ancestors(n)))}
    owned: dict[str, dict[str, str]] = defaultdict(dict)
    edges: dict[str, str] = {}
    for name, style in styles.items():
        owner, _, leaf = name.rpartition(".")
        if style in EMBEDDING:
            edges[name] = "embedding"
        elif style in GATHERED:
            edges[name] = "gathered"
        elif style in COLWISE or style in ROWWISE or style in SPLIT_INPUT | PACKED_ROWWISE:
            owned[owner][leaf] = style
    for name in [n for n in edges if edges[n] == "gathered"]:
        owner, _, leaf = name.rpartition(".")
        if any(style in SPLIT_INPUT | ROWWISE for style in owned.get(owner, {}).values()):
            owned[owner][leaf] = edges.pop(name)
    for owner in list(owned):
        kinds = set(owned[owner].values())
        fused = any(isinstance(getattr(modules[owner], leaf, None), nn.Parameter) for leaf in owned[owner])
        experts = fused and any(owner == join(block, name) for block, name in blocks.items())
        if experts or kinds & PACKED_ROWWISE or kinds <= SPLIT_INPUT:
            del owned[owner]  # experts of a block, which go by their names; a lone row-wise projection, left whole
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
    every = (set(COLWISE), ROWWISE, GATHERED, SPLIT_INPUT, PACKED_ROWWISE, EMBEDDING, WHOLE, BLOCK, IDENTITY)
    known = sorted(set().union(*every))
    names = [name for name, _ in model.named_modules() if name]
    names += [name for name, _ in model.named_parameters()]
    prefix = getattr(model, "base_model_prefix", "")
    around = _around(model)
    styles: dict[str, str] = {}
    for pattern, style in plan.items():
        regex = re.compile("[^.]+".join(map(re.escape, pattern.split("*"))))
        matched = [
            name
            for name in names
            if regex.fullmatch(name)
            or regex.fullmatch(name.removeprefix(around))
            or (prefix and regex.fullmatch(name.removeprefix(around).removeprefix(f"{prefix}.")))
        ]
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


def _around(model: nn.Module) -> str:
    """What stands before the names of a model that peft wraps, which its plan knows nothing of; maybe nothing."""
    base = getattr(model, "get_base_model", None)
    inner = base() if callable(base) else model
    return next((f"{name}." for name, module in model.named_modules() if name and module is inner), "")


#: In a module's name or its class's; scattered and flattened MLPs have the letters as well.
_ATTENTION = re.compile(r"(?i:attenti|attn|attend|mla\b)|(?:\b|_)att(?![a-z])|Att(?![a-z])")


def _role(owner: str, module: nn.Module, leaves: dict[str, str], source: str, nested: bool) -> Role:
    per_head = tuple(n for n in leaves if getattr(getattr(module, n, None), "ndim", 0) == 1)
    colwise = tuple(n for n, s in leaves.items() if (s in COLWISE or s == "gathered") and n not in per_head)
    rowwise = tuple(n for n, s in leaves.items() if s in ROWWISE | SPLIT_INPUT)
    if not colwise or not rowwise:
        one, other = ("column", "row") if colwise else ("row", "column")
        hint = "; for an output projection whose columns are gathered, write 'colwise_gather_output'" if colwise else ""
        raise PlanError(
            f"{source}: {owner} ({type(module).__name__}) has {one}-wise weights {colwise or rowwise} and no "
            f"{other}-wise one; a module is cut with both, or not at all{hint}"
        )
    packed: dict[str, Parts] = {n: 2 for n, s in leaves.items() if s == "packed_colwise"}
    packed |= {n: parts for n in colwise if leaves[n] == "gathered" and (parts := _parts(module, n)) != 1}
    role = Role("dense_mlp", colwise, rowwise, packed=FrozenDict(packed), per_head=per_head)
    if nested or not _ATTENTION.search(f"{_own_name(owner)} {type(module).__name__}"):
        return role
    return replace(role, kind="attention", heads=first_int(module, HEADS), kv_heads=first_int(module, KV_HEADS))


def _is_attention(projection: str) -> bool:
    """Whether a projection belongs to attention, by the name of what holds it."""
    return bool(_ATTENTION.search(_own_name(projection.rpartition(".")[0])))


def _own_name(owner: str) -> str:
    """The last part of a qualified name that is no number."""
    return next((part for part in reversed(owner.split(".")) if not part.isdigit()), "")


def _parts(module: nn.Module, leaf: str) -> Parts:
    """The matrices in a weight whose output the class takes apart: equal ones, or queries, keys and values."""
    parts = chunks_of(type(module), leaf)
    width = getattr(module, leaf).weight.shape[0]
    q, kv = (configured(module, n) for n in ("num_attention_heads", "num_key_value_heads"))
    dim = getattr(module, "head_dim", None)
    if parts > 1 and "qkv" in leaf and q and kv and dim and (q + 2 * kv) * dim == width:
        return (q * dim, kv * dim, kv * dim)
    return parts


def _block_of(name: str) -> str | None:
    """The routed block around `...experts.N.proj`, where experts are modules of their own."""
    match = re.fullmatch(r"(.+)\.experts\.(\d+\.)?[^.]+", name)
    return match[1] if match else None


def _shared(block: nn.Module) -> str | None:
    return next((n for n in ("shared_experts", "shared_expert", "shared_mlp") if hasattr(block, n)), None)


def join(outer: str, leaf: str) -> str:
    """The qualified name of a module's attribute."""
    return f"{outer}.{leaf}" if outer else leaf


def routed_block_of(name: str, roles: Mapping[str, Role]) -> str | None:
    """The routed block that a module lies in, by its qualified name."""
    return next((o for o in ancestors(name) if o in roles and roles[o].kind == "moe"), None)
