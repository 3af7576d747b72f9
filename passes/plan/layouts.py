"""Layouts of the residual stream, and what a boundary costs in each. Pure Python.

The rows of hidden states lie over a mesh of dp replicas × attn ranks in one of three ways: `SCATTERED` (each rank holds
its share of its replica's rows), `TP_ATTN_FULL` (each rank holds all rows of its replica) or `FULL` (the rows of every
replica). The residual stream is kept in one of the first two. What a boundary pays depends on the layout it hands on:

    the new addend is...                    TP_ATTN_FULL                             SCATTERED
    owed over the attention group           all-reduce                               reduce-scatter
    owed over the whole group, all rows     all-reduce(whole), or                    reduce-scatter(whole)
                                            reduce-scatter(dp) + all-reduce
    complete, own rows only                 all-gather                               nothing
    complete, the replica's rows            nothing                                  nothing

    the normed value is wanted...           TP_ATTN_FULL                             SCATTERED
    with the replica's rows                 nothing                                  all-gather
    with the own rows                       nothing                                  nothing
    with the rows of every replica          all-gather(dp)                           all-gather(whole)

Handing a scattered stream on as `TP_ATTN_FULL` costs one more all-gather; the other way is free. What the choice reads
(sizes of groups, hidden size, nominal rows) is equal on all ranks, so the choice is too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SCATTERED, TP_ATTN_FULL, FULL = "SCATTERED", "TP_ATTN_FULL", "FULL"
#: The layouts that the residual stream can be kept in.
RESIDUAL_LAYOUTS = (TP_ATTN_FULL, SCATTERED)

#: (collective, over) -> the layout of the rows it reads, and of those it gives.
STEP_LAYOUTS = {
    ("all_reduce", "attention"): (TP_ATTN_FULL, TP_ATTN_FULL),
    ("all_reduce", "dp"): (FULL, FULL),
    ("all_reduce", "whole"): (FULL, FULL),
    ("reduce_scatter", "attention"): (TP_ATTN_FULL, SCATTERED),
    ("reduce_scatter", "dp"): (FULL, TP_ATTN_FULL),
    ("reduce_scatter", "whole"): (FULL, SCATTERED),
    ("all_gather", "attention"): (SCATTERED, TP_ATTN_FULL),
    ("all_gather", "dp"): (TP_ATTN_FULL, FULL),
    ("all_gather", "whole"): (SCATTERED, FULL),
}

#: Microseconds to start a collective, and bytes a rank sends in a microsecond: NVLink of an H100 or H200 class host.
#: Only their ratio matters, and only where the number of collectives and the bytes disagree.
LATENCY_US = 8.0
BYTES_PER_US = 250e3
#: Rows assumed where the policy states no maximum: a decode batch. It must not depend on a rank's own rows.
NOMINAL_ROWS = 256


def sent_bytes(collective: str, ranks: int, payload: float) -> float:
    """Bytes each rank sends. `payload` is the full tensor's size: what is reduced, or what is there once gathered."""
    share = (ranks - 1) / ranks
    return payload * (2 * share if collective == "all_reduce" else share)


def cost_us(collective: str, ranks: int, payload: float) -> float:
    """Latency plus bytes of one collective over `ranks` ranks."""
    if ranks == 1:
        return 0.0
    return LATENCY_US + sent_bytes(collective, ranks, payload) / BYTES_PER_US


@dataclass(frozen=True)
class Sizes:
    """attn: ranks of the attention group; dp: replicas; payload: bytes of one replica's hidden states."""

    attn: int
    dp: int
    payload: float

    @property
    def whole(self) -> int:
        return self.attn * self.dp


@dataclass(frozen=True)
class Step:
    """One collective over the "attention", the "dp" or the "whole" group."""

    collective: str
    over: str

    @property
    def layouts(self) -> tuple[str, str]:
        """The layouts of the rows before and after it."""
        return STEP_LAYOUTS[self.collective, self.over]

    def ranks(self, sizes: Sizes) -> int:
        return {"attention": sizes.attn, "dp": sizes.dp, "whole": sizes.whole}[self.over]

    def payload(self, sizes: Sizes) -> float:
        return sizes.payload if self.over == "attention" else sizes.payload * sizes.dp

    def sent(self, sizes: Sizes) -> float:
        """Bytes each rank sends."""
        return sent_bytes(self.collective, self.ranks(sizes), self.payload(sizes))

    def cost(self, sizes: Sizes) -> float:
        return cost_us(self.collective, self.ranks(sizes), self.payload(sizes))


@dataclass(frozen=True)
class Stage:
    """One boundary of the chain, as the choice sees it.

    addend: "owed_attn", "owed_whole", "own_rows" or "all_rows". wants: the set of what the normed value's readers
    want, of "all_rows", "own_rows", "dp_rows". linked: the residual is the previous stage's. outside: the residual
    stream behind this stage is read with all rows by something that is no stage. fixed: the only layout the stage can
    have, or None. arriving: how many of the values it adds come from no stage and as own rows, so that each has to be
    gathered before all rows can be added. apart: rows do not divide, or no group is the product of the two: what would
    be one collective over the whole group is one over each factor.
    """

    addend: str
    wants: frozenset[str]
    linked: bool
    outside: bool
    fixed: str | None = None
    arriving: int = 0
    apart: bool = False


_PAID = {
    ("owed_attn", TP_ATTN_FULL): (Step("all_reduce", "attention"),),
    ("owed_attn", SCATTERED): (Step("reduce_scatter", "attention"),),
    ("owed_whole", SCATTERED): (Step("reduce_scatter", "whole"),),
    ("own_rows", TP_ATTN_FULL): (Step("all_gather", "attention"),),
    ("own_rows", SCATTERED): (),
    ("all_rows", TP_ATTN_FULL): (),
    ("all_rows", SCATTERED): (),
}
UNFACTORED = (Step("all_reduce", "whole"),)
FACTORED = (Step("reduce_scatter", "dp"), Step("all_reduce", "attention"))
_WANTED = {
    ("all_rows", TP_ATTN_FULL): (),
    ("all_rows", SCATTERED): (Step("all_gather", "attention"),),
    ("own_rows", TP_ATTN_FULL): (),
    ("own_rows", SCATTERED): (),
    ("dp_rows", TP_ATTN_FULL): (Step("all_gather", "dp"),),
    ("dp_rows", SCATTERED): (Step("all_gather", "whole"),),
}
MOVED = (Step("all_gather", "attention"),)
#: The steps over the whole group that `_PAID` and `_WANTED` have, where no such step can be taken.
_APART = {
    Step("reduce_scatter", "whole"): (Step("reduce_scatter", "dp"), Step("reduce_scatter", "attention")),
    Step("all_gather", "whole"): (Step("all_gather", "attention"), Step("all_gather", "dp")),
}


def normalised(steps: tuple[Step, ...], sizes: Sizes) -> tuple[Step, ...]:
    """Without the collectives of one rank, and the whole group called by the smaller name where it is that group."""
    whole = "attention" if sizes.dp == 1 else "dp" if sizes.attn == 1 else "whole"
    steps = tuple(Step(s.collective, whole) if s.over == "whole" else s for s in steps)
    return tuple(step for step in steps if step.ranks(sizes) > 1)


def total_us(steps: tuple[Step, ...], sizes: Sizes) -> float:
    return sum(step.cost(sizes) for step in steps)


def paid_whole(sizes: Sizes) -> tuple[Step, ...]:
    """How a sum over the whole group is paid where the replica's rows are wanted: the cheaper of the two ways.

    One all-reduce of every replica's rows starts one collective less; in factors, fewer bytes are sent.
    """
    return min(FACTORED, UNFACTORED, key=lambda steps: total_us(normalised(steps, sizes), sizes))


def paid(addend: str, layout: str, sizes: Sizes) -> tuple[Step, ...]:
    """What brings an addend into `layout`."""
    if (addend, layout) == ("owed_whole", TP_ATTN_FULL):
        return normalised(paid_whole(sizes), sizes)
    return normalised(_PAID[addend, layout], sizes)


def wanted(want: str, layout: str, sizes: Sizes) -> tuple[Step, ...]:
    """What brings the normed value from `layout` to a reader."""
    return normalised(_WANTED[want, layout], sizes)


def stage_steps(stage: Stage, layout: str, sizes: Sizes) -> tuple[Step, ...]:
    """The collectives of one stage in `layout` (the table in the module's docstring)."""
    after = [step for want in sorted(stage.wants) for step in wanted(want, layout, sizes)]
    steps = (*paid(stage.addend, layout, sizes), *after)
    if stage.apart:
        steps = normalised(tuple(part for step in steps for part in _APART.get(step, (step,))), sizes)
    return steps


def stage_cost(stage: Stage, layout: str, sizes: Sizes) -> float:
    """What the stage's own collectives cost in `layout`."""
    return total_us(stage_steps(stage, layout, sizes), sizes)


def gathers_before(stage: Stage, before: str, layout: str) -> int:
    """How often own rows are gathered for a stage in `layout`, behind one in `before`, besides its own collectives."""
    if layout == TP_ATTN_FULL:
        return stage.arriving + (stage.linked and before == SCATTERED)
    return int(stage.outside)


def chain_steps(stages: Sequence[Stage], layouts: Sequence[str], sizes: Sizes) -> tuple[Step, ...]:
    """The collectives of a chain of stages in these layouts, gathers of the residual included, in order."""
    steps: list[Step] = []
    before = TP_ATTN_FULL
    for stage, layout in zip(stages, layouts, strict=True):
        steps += normalised(MOVED, sizes) * gathers_before(stage, before, layout)
        steps += stage_steps(stage, layout, sizes)
        before = layout
    return tuple(steps)


def choose(stages: Sequence[Stage], sizes: Sizes, residual: str = "auto") -> list[str]:
    """A layout for every stage: the cheapest chain ("auto"), or one layout wherever it can be ("replicated",
    "scattered").

    Ties go to `TP_ATTN_FULL`, where the residual never has to be gathered.
    """
    preferred = {"replicated": (TP_ATTN_FULL,), "scattered": (SCATTERED,)}.get(residual, RESIDUAL_LAYOUTS)
    gather = total_us(normalised(MOVED, sizes), sizes)
    best: dict[str, tuple[float, list[str]]] = {TP_ATTN_FULL: (0.0, [])}
    for stage in stages:
        following: dict[str, tuple[float, list[str]]] = {}
        for layout in preferred if stage.fixed is None else (stage.fixed,):
            options = []
            for before, (cost, path) in best.items():
                gathered = gathers_before(stage, before, layout) * gather
                options.append((cost + gathered + stage_cost(stage, layout, sizes), [*path, layout]))
            following[layout] = min(options, key=lambda option: option[0])
        best = following
    chosen, scattered = best.get(TP_ATTN_FULL) or best[SCATTERED], best.get(SCATTERED)
    return (scattered if scattered is not None and scattered[0] < chosen[0] - 1e-9 else chosen)[1]
