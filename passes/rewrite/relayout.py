"""Choose the layouts of the residual streams, and rebuild their stages: scatter_dense, share_attention_group,
gather_full_tp, reduce_scatter_norm.

Layouts change only in graphs without a backward pass. In a joint graph the backward of every norm and of every addition
reads, and gives, the rows that forward had: own rows saved in forward would have to be gathered again there (as many
bytes as the reduce-scatter saved), and the gradients of the norms' weights would become partial sums over the attention
group, which no hook pays. Sums over the whole group are factored there too: no gradient reads a sum or its rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from ..facts import aten_ops as ops
from ..facts.collectives import Collective, ResolveGroup
from ..facts.graph import region_between, val, value
from ..facts.refusals import Code, Refusal, refused
from ..facts.sizes import find_size
from ..plan.layouts import NOMINAL_ROWS, SCATTERED, TP_ATTN_FULL, UNFACTORED, Sizes, Stage, choose, paid_whole
from ..recognise.hazards import Moving
from ..recognise.known import Known
from ..recognise.streams import NO_STREAM, StreamStage, find_streams, moves_rows
from ..verdict.accounting import origin
from ..verdict.names import module_name
from .chain import Chain, Moved
from .factor import Factored, factor_sums, unfactor
from .to_replicated import fuse_scattered, replicate
from .to_scattered import crosses_at_once, scatter

IN_TRAINING = Refusal(
    Code.TRAINING,
    "in a training graph the residual stream keeps its layout: the backward pass reads the rows that forward had, so "
    "own rows would have to be gathered again there, for as many bytes as scattering saves",
)

_KEPT = "the residual stream keeps its layout here: "


@dataclass(frozen=True)
class Choice:
    """What decides layouts; equal on all ranks. rows: the policy's maximum, or None."""

    residual: str = "auto"
    rows: int | None = None
    rewrites: tuple[str, ...] = ()
    inference: bool = True


def relayout(known: Known, rank: int, names: dict[tuple[int, ...], str], choice: Choice) -> Moved:
    """Re-lay the residual streams of the graph.

    names: members -> name of the groups this rank may use; of groups with equal members, the one that comes first in
    the graph is used, since the graph's ranks are known to meet there.
    """
    moved, graph = Moved(), known.graph
    if not moves_rows(graph):
        return moved
    written = {c.ranks: c.group_name for c in reversed(known.collectives) if c.ranks and c.group_name}
    names = names | written
    factored = factor_sums(known, rank, names, moved.kept) if "gather_full_tp" in choice.rewrites else []
    for one in factored:
        said = "its sum is paid in factors: a reduce-scatter over the dp replicas, then over the attention group"
        moved.verdicts[one.name] = ("gather_full_tp", False, Refusal(Code.LAYOUT_CHANGED, said))
    if choice.inference:
        _read_sizes_off_inputs(graph)
        known.changed()
        streams = find_streams(known, rank)
        for ranks in list(streams):
            stream = streams.get(ranks, NO_STREAM)
            gathers = {origin(c.node) for c in known.collectives if c.kind != "all_reduce"}
            left = {name: _kept(why) for name, why in stream.left.items() if name in gathers}
            if stream.stages:
                _rebuild(Chain(graph, stream.stages, names, ranks, rank, moved, known.hazards), factored, choice)
                known.changed()
                streams = find_streams(known, rank)  # what one chain's stages were may be gone
            moved.kept |= left
    else:
        moved.kept |= {c.node.name: IN_TRAINING for c in _gathers_of_rows(known)}
    _keep_whole(known, factored, choice, moved)
    return moved


def _read_sizes_off_inputs(graph: fx.Graph) -> None:
    """So that nothing that is about to go is read for its sizes alone."""
    for node in graph.find_nodes(op="call_function", target=ops.aten.sym_size.int):
        size = node.meta.get("val")
        place = find_size(graph, size, of_tensor=True) if isinstance(size, torch.SymInt) else None
        if place is not None:
            node.args = (place.node, place.dim)


def _kept(why: Refusal) -> Refusal:
    return Refusal(Code.LAYOUT_STAYS, _KEPT + why.sentence)


def _gathers_of_rows(known: Known) -> list[Collective]:
    """The forward gathers of rows; an output projection gathers columns, of a tensor that is not flattened."""
    found = [c for c in known.collectives if c.kind == "all_gather" and c.node not in known.backward]
    return [c for c in found if (rows := value(c.node)) is not None and rows.dim() == 2]


def _rebuild(chain: Chain, factored: Iterable[Factored], choice: Choice) -> None:
    stages = chain.stages
    seconds = {one.second: one for one in factored if one.second is not None}
    dp = [len(g.ranks) for stage in stages if not stage.scattered_form for g in stage.gathers]
    dp += [seconds[stage.addend.collective.node].parts for stage in stages if stage.addend.collective.node in seconds]
    sizes = _sizes(stages[0].hidden, len(chain.ranks), max(dp, default=1), choice)
    bound = _bound(chain, choice)
    inside = {node for stage in stages for node in stage.total.interior}
    planned = [_stage(chain, stage, inside, bound[stage].layout, seconds) for stage in stages]
    layouts = choose(planned, sizes, choice.residual)
    _say_preference(chain, bound, layouts, choice)
    for stage, layout in zip(stages, layouts, strict=True):
        chain.arrive(stage)
        if layout != _written_in(stage):
            (scatter if layout == SCATTERED else replicate)(chain, stage)
        elif stage.scattered_form and bound[stage].fusible and "reduce_scatter_norm" in choice.rewrites:
            fuse_scattered(chain, stage)
    chain.hand_out_hidden()
    chain.sweep()


def _written_in(stage: StreamStage) -> str:
    """The layout that the stage has in the graph as it was written."""
    return SCATTERED if stage.scattered_form else TP_ATTN_FULL


@dataclass(frozen=True)
class _Bound:
    """layout: the only one that a stage can have, or None; why; fusible: whether anything may become of the stage."""

    layout: str | None = None
    why: Refusal | None = None
    fusible: bool = True


def _bound(chain: Chain, choice: Choice) -> dict[StreamStage, _Bound]:
    """What binds each stage to the layout it is written in."""
    until = max(stage.norm.output for stage in chain.stages)
    found: dict[StreamStage, _Bound] = {}
    start = list(chain.staying)
    for stage in chain.stages:
        chain.arrive(stage)
        name, written = origin(stage.addend.collective.node), _written_in(stage)
        stays = stage.problem or refused(Code.MOVES_PAST, chain.hazards.stays(_moving(stage, until)))
        why = stays or _why_written(chain, stage, choice.rewrites)
        if why is not None and stage.problem is None and why.code is not Code.SWITCHED_OFF:
            chain.moved.kept[name] = _kept(why)
        found[stage] = _Bound(written if why is not None else None, why, stays is None)
    chain.staying = start
    return found


def _why_written(chain: Chain, stage: StreamStage, rewrites: tuple[str, ...]) -> Refusal | None:
    rewrite = "share_attention_group" if stage.scattered_form else "scatter_dense"
    if rewrite not in rewrites:
        return Refusal(Code.SWITCHED_OFF, f"the rewrite {rewrite} is switched off")
    if stage.scattered_form and not stage.clonable:
        return Refusal(Code.BETWEEN, "its hidden states are reshaped before or inside the norm")
    if not chain.knows_sizes(stage):
        said = "a symbolic size of its hidden states can be read off no value that stays in the graph"
        return Refusal(Code.VALUES, said)
    return None


def _say_preference(chain: Chain, bound: dict[StreamStage, _Bound], layouts: list[str], choice: Choice) -> None:
    """A declared layout that some boundaries cannot have is said, with the reason."""
    wanted = {"replicated": TP_ATTN_FULL, "scattered": SCATTERED}.get(choice.residual)
    if wanted is None:
        return
    others = [stage for stage, layout in zip(chain.stages, layouts, strict=True) if layout != wanted]
    reasons: dict[str, list[str]] = {}
    for stage in others:
        why, module = bound[stage].why, module_name(stage.addend.collective.node) or "a boundary"
        reasons.setdefault(why.sentence if why is not None else "", []).append(module)
    chain.moved.notes += [
        f"residual={choice.residual!r} is declared, and the residual stream stays "
        f"{'scattered' if wanted == TP_ATTN_FULL else 'replicated'} behind {', '.join(dict.fromkeys(modules))}: {said}"
        for said, modules in reasons.items()
    ]


def _moving(stage: StreamStage, until: fx.Node) -> Moving:
    norm, addend = stage.norm, stage.addend
    leaves = [term.leaf for term in stage.total.replicated]
    read = [addend.source, *leaves, *(n for n in (norm.weight, norm.bias, norm.eps) if isinstance(n, fx.Node))]
    made = {addend.collective.node, addend.collective.result, addend.leaf, stage.hidden, *stage.total.interior}
    made |= region_between(norm.output, {stage.hidden}) | {*stage.cuts, *(g.result for g in stage.gathers)}
    return Moving(addend.collective.node, tuple(read), tuple(leaves), made, norm.output, until)


def _keep_whole(known: Known, factored: list[Factored], choice: Choice, moved: Moved) -> None:
    """Take factors back where the replica's rows stayed wanted and one all-reduce over the whole group is cheaper."""
    left = set(known.graph.nodes)
    sizes = {one: _sizes_of_factors(one, known.resolve, choice) for one in factored if one.second in left}
    cheaper = [one for one, its in sizes.items() if paid_whole(its) == UNFACTORED]
    if not cheaper:
        return
    # Where a norm reads two sums, the second half joins the other sum's all-reduce and costs nothing more.
    joined = {o.collective.node for site in known.recognition.sites if len(site.owed) > 1 for o in site.owed}
    for one in cheaper:
        if one.second not in joined:
            unfactor(known.graph, one)
            known.changed()
            moved.verdicts.pop(one.name)
            moved.kept[one.name] = _why_whole(choice)
            if choice.rows is not None:
                moved.demanded.add(one.name)


def _why_whole(choice: Choice) -> Refusal:
    start = "one all-reduce over the whole group costs less than a reduce-scatter and a fused all-reduce at "
    if choice.rows is not None:
        said = f"{start}{choice.rows} rows, which the policy states as max_rows: so the policy asks for it to stay"
        return Refusal(Code.FACTORS_COST_MORE, said)
    return Refusal(
        Code.FACTORS_COST_MORE,
        f"{start}{NOMINAL_ROWS} rows, which are assumed because the policy states no max_rows; state max_rows, or "
        "residual='scattered', in the policy",
    )


def _sizes_of_factors(factored: Factored, resolve: ResolveGroup, choice: Choice) -> Sizes:
    whole = resolve(factored.group_name) or ()
    return _sizes(factored.paid, len(whole) // factored.parts, factored.parts, choice)


def _sizes(hidden: fx.Node, attn: int, dp: int, choice: Choice) -> Sizes:
    """Of the hidden states' own sizes only the last is equal on all ranks whatever they compile."""
    tensor = val(hidden)
    width = tensor.shape[-1] if isinstance(tensor.shape[-1], int) else 4096
    return Sizes(attn, dp, (choice.rows or NOMINAL_ROWS) * width * tensor.element_size())


def _stage(
    chain: Chain, stage: StreamStage, inside: set[fx.Node], fixed: str | None, seconds: dict[fx.Node, Factored]
) -> Stage:
    wants = set()
    if stage.cuts:
        wants.add("own_rows")
    if stage.gathers:
        wants.add("all_rows" if stage.scattered_form else "dp_rows")
    if stage.read_as_is:
        wants.add("own_rows" if stage.scattered_form else "all_rows")
    owed = "owed_whole" if stage.addend.collective.node in seconds else "owed_attn"
    kind = {"owed": owed, "scattered": "owed_attn", "gathered": "own_rows"}[stage.addend.kind]
    region = region_between(stage.norm.output, {stage.hidden})
    outside = any(user not in inside and user not in region for user in stage.hidden.users)
    hidden_states = {other.hidden for other in chain.stages}
    arriving = [t.leaf for t in stage.residuals if stage.scattered_form and t.leaf not in hidden_states]
    return Stage(
        kind,
        frozenset(wants),
        stage.previous is not None,
        outside and not stage.scattered_form,
        fixed,
        sum(chain.whole_of(leaf) is None for leaf in arriving),
        apart=not stage.scattered_form and not crosses_at_once(chain, stage),
    )
