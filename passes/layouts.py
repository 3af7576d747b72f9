"""Layouts of the residual stream, and which one is cheapest at each boundary. Pure Python.

The rows of one attention group's hidden states are either `TP_ATTN_FULL` (every rank of the group holds all of them)
or `SCATTERED` (each holds its own share). What a boundary pays depends on the layout it hands on:

    the new addend is...                    TP_ATTN_FULL                        SCATTERED
    owed over the attention group           all-reduce                          reduce-scatter
    owed over the whole group, rows of dp   reduce-scatter(dp) + all-reduce     reduce-scatter(whole)
    complete, own rows only                 all-gather                          nothing
    complete, all rows                      nothing                             nothing

    the normed value is wanted...           TP_ATTN_FULL                        SCATTERED
    with all rows                           nothing                             all-gather
    with the own rows                       nothing                             nothing
    with the rows of every dp replica       all-gather(dp)                      all-gather(whole)

Handing a scattered stream to something that wants all its rows costs one more all-gather; the other way is free.
The inputs of the model (sizes of groups, hidden size, nominal rows) are equal on all ranks, so the choice is too.
"""

from __future__ import annotations

from dataclasses import dataclass

FULL, SCATTERED = "TP_ATTN_FULL", "SCATTERED"
LAYOUTS = (FULL, SCATTERED)

#: Microseconds to start a collective, and bytes a rank sends in a microsecond: NVLink of an H100 or H200 class host.
#: Only their ratio matters, and only where the number of collectives and the bytes disagree.
LATENCY_US = 8.0
BYTES_PER_US = 250e3
#: Rows assumed where the policy states no maximum: a decode batch. It must not depend on a rank's own rows.
NOMINAL_ROWS = 256


def sent_bytes(collective: str, ranks: int, payload: float) -> float:
    """Bytes each rank sends. `payload` is the full tensor's size: what is reduced, or what is there once gathered."""
    share = (ranks - 1) / ranks
    return {"all_reduce": 2 * share, "reduce_scatter": share, "all_gather": share, "all_to_all": share}[
        collective
    ] * payload


def cost_us(collective: str, ranks: int, payload: float) -> float:
    """Latency plus bytes of one collective over `ranks` ranks."""
    if ranks == 1:
        return 0.0
    return LATENCY_US + sent_bytes(collective, ranks, payload) / BYTES_PER_US


@dataclass(frozen=True)
class Stage:
    """One boundary of the chain, as the choice sees it.

    addend: "owed_attn", "owed_whole", "own_rows" or "all_rows". wants: the set of what the normed value's readers
    want, of "all_rows", "own_rows", "dp_rows". linked: the residual is the previous stage's. outside: the residual
    stream behind this stage is read with all rows by something that is no stage.
    """

    addend: str
    wants: frozenset[str]
    linked: bool
    outside: bool


@dataclass(frozen=True)
class Sizes:
    """attn: ranks of the attention group; dp: replicas; payload: bytes of one replica's hidden states."""

    attn: int
    dp: int
    payload: float

    @property
    def whole(self) -> int:
        return self.attn * self.dp


def stage_cost(stage: Stage, layout: str, sizes: Sizes) -> float:
    """What the stage's own collectives cost in `layout` (the table in the module's docstring)."""
    attn, dp, whole, payload = sizes.attn, sizes.dp, sizes.whole, sizes.payload
    gathered = payload * dp
    if layout == FULL:
        addend = {
            "owed_attn": cost_us("all_reduce", attn, payload),
            "owed_whole": cost_us("reduce_scatter", dp, gathered) + cost_us("all_reduce", attn, payload),
            "own_rows": cost_us("all_gather", attn, payload),
            "all_rows": 0.0,
        }
        wants = {"all_rows": 0.0, "own_rows": 0.0, "dp_rows": cost_us("all_gather", dp, gathered)}
    else:
        addend = {
            "owed_attn": cost_us("reduce_scatter", attn, payload),
            "owed_whole": cost_us("reduce_scatter", whole, gathered),
            "own_rows": 0.0,
            "all_rows": 0.0,
        }
        wants = {
            "all_rows": cost_us("all_gather", attn, payload),
            "own_rows": 0.0,
            "dp_rows": cost_us("all_gather", whole, gathered),
        }
    return addend[stage.addend] + sum(wants[want] for want in sorted(stage.wants))


def choose(stages: list[Stage], sizes: Sizes, residual: str = "auto") -> list[str]:
    """A layout for every stage: the cheapest chain ("auto"), or one layout throughout ("replicated", "scattered").

    Ties go to `TP_ATTN_FULL`, where the residual never has to be gathered.
    """
    if residual != "auto":
        return [FULL if residual == "replicated" else SCATTERED] * len(stages)
    gather = cost_us("all_gather", sizes.attn, sizes.payload)
    best: dict[str, tuple[float, list[str]]] = {FULL: (0.0, [])}
    for stage in stages:
        following: dict[str, tuple[float, list[str]]] = {}
        for layout in LAYOUTS:
            options = []
            for before, (cost, path) in best.items():
                came_scattered = stage.linked and before == SCATTERED
                moved = gather if came_scattered and layout == FULL else 0.0
                outside = gather if stage.outside and layout == SCATTERED else 0.0
                options.append((cost + moved + outside + stage_cost(stage, layout, sizes), [*path, layout]))
            following[layout] = min(options, key=lambda option: option[0])
        best = following
    full, scattered = best.get(FULL), best.get(SCATTERED)
    return (scattered if scattered is not None and scattered[0] < full[0] - 1e-9 else full)[1]
