"""Which sharing policy the cost model prefers, from sizes alone. Pure Python over the planner's own costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..passes.plan.layouts import Sizes, Stage, chain_steps, choose, total_us


@dataclass(frozen=True)
class ModelSizes:
    """weights: bytes of each sort ("attention", "dense_mlp", "moe", "embedding", ""). moe: for each layer, whether its
    MLP is routed. rows: tokens of one step, of all replicas together."""

    weights: Mapping[str, int]
    moe: tuple[bool, ...]
    hidden: int
    rows: int


@dataclass(frozen=True)
class Candidate:
    """One policy: microseconds and bytes that its boundaries cost a rank in a step, and GiB of weights on a rank."""

    dp_size: int
    attn_tp_size: int
    moe_dense_tp_size: int | None
    us: float
    sent: float
    gib: float

    @property
    def name(self) -> str:
        return f"dp_size={self.dp_size}, moe_dense_tp_size={self.moe_dense_tp_size}"

    def line(self, memory: float) -> str:
        fits = "" if self.gib <= memory else f"  (does not fit into {memory:.0f} GiB)"
        return f"{self.name:<40} {self.us:9.0f} µs {self.sent / 1e6:9.2f} MB sent {self.gib:7.1f} GiB weights{fits}"

    def why(self, others: Sequence[Candidate], memory: float) -> str:
        fitting = [c for c in others if c.gib <= memory and c is not self]
        cheaper = [c for c in others if c.us < self.us]
        words = f"its boundaries cost a rank {self.us:.0f} µs a step, the least of {len(fitting) + 1} that fit"
        if fitting:
            words += f" (the next, {fitting[0].name}, {fitting[0].us:.0f} µs)"
        if cheaper:
            first = cheaper[0]
            words += f"; {first.name} would cost {first.us:.0f} µs, but its weights take {first.gib:.0f} GiB"
        return words


def recommend(model: ModelSizes, ranks: int, memory: float) -> list[Candidate]:
    """Every policy that divides `ranks`, the cheapest first; among equals the one with fewer weights on a rank."""
    found = []
    for dp in (d for d in range(1, ranks + 1) if ranks % d == 0 and model.rows % d == 0):
        attn = ranks // dp
        for dense in dict.fromkeys((None, 1 if dp > 1 else None, attn if 1 < attn < ranks else None)):
            found.append(_candidate(model, ranks, dp, attn, dense))
    return sorted(found, key=lambda c: (round(c.us, 3), c.gib))


def _candidate(model: ModelSizes, ranks: int, dp: int, attn: int, dense: int | None) -> Candidate:
    sizes = Sizes(attn, dp, model.rows // dp * model.hidden * 2)
    stages = []
    for routed in model.moe:
        over = None if routed else dense
        wants = {None: "dp_rows" if dp > 1 else "all_rows", 1: "own_rows", attn: "all_rows"}[over]
        pays = {None: "owed_whole" if dp > 1 else "owed_attn", 1: "own_rows", attn: "owed_attn"}[over]
        stages.append(Stage("owed_attn", frozenset({wants}), True, False))
        stages.append(Stage(pays, frozenset({"all_rows"}), True, False))
    steps = chain_steps(stages, choose(stages, sizes), sizes)
    us, sent = total_us(steps, sizes), sum(step.sent(sizes) for step in steps)
    w = model.weights
    shared = w["attention"] / attn + w["dense_mlp"] / (dense or ranks) + w["moe"] / ranks
    return Candidate(dp, attn, dense, us, sent, (shared + w["embedding"] / attn + w[""]) / 2**30)
