"""Tabulate what each sharing policy costs at the boundaries of a dense layer, naive and rewritten.

    python benchmarks/policy_table.py --plot docs/policy_table.svg --json benchmarks/results/policy_table.json

A model, not a measurement: bytes and collectives are counted, times come from the planner's own latency-plus-bytes
model (`tpfuse.passes.layouts`) and, for the MLP itself, from the time to read its weights or to do its arithmetic,
whichever is longer. It answers which policy to try first; measure before you believe it.

"naive" is what `parallelize` emits, "rewritten" what the compiler makes of it, averaged over the model's dense layers.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tpfuse.passes.layouts import SCATTERED, Sizes, Stage, choose, cost_us, sent_bytes, stage_cost
from tpfuse.policy import SharingPolicy

# DeepSeek-V3: hidden size, inner size of a dense MLP, leading dense layers.
HIDDEN, INNER, DENSE_LAYERS = 7168, 18432, 3
BYTES = 2  # bf16
# An H200: bytes read and operations done in a microsecond, of which kernels reach some part.
READ_PER_US, FLOPS_PER_US, REACHED = 4.8e6, 990e6, 0.7
MESHES = [(tp, dp) for tp in (2, 4, 8) for dp in (1, 2, 4) if dp <= tp]
ROWS = [1, 8, 64, 256, 1024, 4096]

Collective = tuple[str, int, float]  # name, ranks, payload in bytes


@dataclass(frozen=True)
class Row:
    """One policy at one size. Counts and bytes are per dense layer (both of its boundaries), times in microseconds.

    norm_rows: rows that each rank normalises; 1/attn_tp of 2 * rows would do.
    mlp_waste: arithmetic of each rank's MLP over that of a perfect split.
    """

    tp: int
    dp: int
    rows: int
    moe_dense_tp_size: int
    naive_collectives: str
    naive_bytes: float
    naive_us: float
    rewritten_collectives: float
    rewritten_bytes: float
    rewritten_us: float
    norm_rows_naive: int
    norm_rows_rewritten: float
    mlp_waste: float
    mlp_us: float

    @property
    def total_us(self) -> float:
        return self.rewritten_us + self.mlp_us


def naive(policy: SharingPolicy, size: int, payload: float) -> list[Collective]:
    """The collectives that `parallelize` puts around one dense layer."""
    attn, dp = policy.attn_tp_size, policy.dp_size
    out: list[Collective] = [("all_reduce", attn, payload)]
    if size == policy.tp_size and dp > 1:
        out += [("all_gather", dp, payload * dp), ("all_reduce", policy.tp_size, payload * dp)]
    elif size == 1:
        out += [("all_gather", attn, payload)]
    else:
        out += [("all_reduce", attn, payload)]
    return [c for c in out if c[1] > 1]


def stages_of(policy: SharingPolicy, size: int) -> list[Stage]:
    """The boundaries of the dense layers: attention → dense and dense → attention, in turn."""
    if size == policy.tp_size and policy.dp_size > 1:
        wants, addend = "dp_rows", "owed_whole"
    elif size == 1:
        wants, addend = "own_rows", "own_rows"
    else:
        wants, addend = "all_rows", "owed_attn"
    into = Stage("owed_attn", frozenset({wants}), True, False)
    out = Stage(addend, frozenset({"all_rows"}), True, False)
    return [into, out] * DENSE_LAYERS


def collectives_of(stage: Stage, layout: str, moved: bool, sizes: Sizes) -> list[Collective]:
    """The collectives of one rewritten boundary; `layouts.stage_cost` prices the same ones."""
    attn, dp, payload = sizes.attn, sizes.dp, sizes.payload
    gathered, scattered = payload * dp, layout == SCATTERED
    out: list[Collective] = [("all_gather", attn, payload)] if moved else []
    if stage.addend == "owed_attn":
        out.append(("reduce_scatter" if scattered else "all_reduce", attn, payload))
    elif stage.addend == "owed_whole" and scattered:
        out.append(("reduce_scatter", sizes.whole, gathered))
    elif stage.addend == "owed_whole":
        out += [("reduce_scatter", dp, gathered), ("all_reduce", attn, payload)]
    elif not scattered:
        out.append(("all_gather", attn, payload))
    if stage.wants == {"dp_rows"}:
        out.append(("all_gather", sizes.whole if scattered else dp, gathered))
    elif stage.wants == {"all_rows"} and scattered:
        out.append(("all_gather", attn, payload))
    return [c for c in out if c[1] > 1]


def rewritten(policy: SharingPolicy, size: int, sizes: Sizes) -> tuple[list[Collective], float]:
    """The collectives of all dense layers after the planner's choice, and how often a norm runs on own rows only."""
    stages = stages_of(policy, size)
    layouts = choose(stages, sizes)
    out: list[Collective] = []
    for at, (stage, layout) in enumerate(zip(stages, layouts, strict=True)):
        moved = at > 0 and layouts[at - 1] == SCATTERED and layout != SCATTERED
        chosen = collectives_of(stage, layout, moved, sizes)
        move_us = cost_us("all_gather", sizes.attn, sizes.payload) if moved else 0.0
        assert abs(sum(cost_us(*c) for c in chosen) - stage_cost(stage, layout, sizes) - move_us) < 1e-6
        out += chosen
    return out, sum(layout == SCATTERED for layout in layouts) / len(layouts)


def tabulate(tp: int, dp: int, rows: int, size: int) -> Row:
    """One policy at one size; `rows` of each replica."""
    policy = SharingPolicy(tp, dp, size)
    attn, payload = policy.attn_tp_size, rows * HIDDEN * BYTES
    sizes = Sizes(attn, dp, payload)
    before = naive(policy, size, payload)
    after, scattered = rewritten(policy, size, sizes)
    own = -(-rows // attn)
    mlp_rows = rows * dp if size == tp else rows if size == attn else own
    flops = 6 * mlp_rows * HIDDEN * INNER / size
    weights = 3 * HIDDEN * INNER * BYTES / size
    return Row(
        tp, dp, rows, size,
        " + ".join(f"{name}({ranks})" for name, ranks, _ in before) or "none",
        sum(sent_bytes(*c) for c in before),
        sum(cost_us(*c) for c in before),
        len(after) / DENSE_LAYERS,
        sum(sent_bytes(*c) for c in after) / DENSE_LAYERS,
        sum(cost_us(*c) for c in after) / DENSE_LAYERS,
        2 * rows,
        2 * (rows * (1 - scattered) + own * scattered),
        flops / (6 * rows * dp * HIDDEN * INNER / tp),
        max(weights / READ_PER_US, flops / FLOPS_PER_US) / REACHED,
    )  # fmt: skip


def table() -> list[Row]:
    """Every policy at every size."""
    return [tabulate(tp, dp, rows, size) for tp, dp in MESHES for rows in ROWS for size in sorted({1, tp // dp, tp})]


def recommended(rows: list[Row]) -> dict[tuple[int, int, int], Row]:
    """For each (tp, dp, rows) the policy with the least time for collectives and MLP."""
    best: dict[tuple[int, int, int], Row] = {}
    for row in rows:
        key = (row.tp, row.dp, row.rows)
        if key not in best or row.total_us < best[key].total_us:
            best[key] = row
    return best


def markdown(rows: list[Row]) -> str:
    """The table as text; `*` marks the recommended policy."""
    best = set(recommended(rows).values())
    lines = [
        "| tp | dp | rows | moe_dense_tp_size | naive collectives | KB sent, naive → rewritten | collectives | "
        "µs naive → rewritten | norm rows | MLP waste | MLP µs | total µs |",
        "|" + "---|" * 12,
    ]
    for r in rows:
        lines.append(
            f"| {r.tp} | {r.dp} | {r.rows} | {r.moe_dense_tp_size}{' *' if r in best else ''} | {r.naive_collectives} "
            f"| {r.naive_bytes / 1e3:.0f} → {r.rewritten_bytes / 1e3:.0f} | {r.rewritten_collectives:.1f} "
            f"| {r.naive_us:.0f} → {r.rewritten_us:.0f} | {r.norm_rows_naive} → {r.norm_rows_rewritten:.0f} "
            f"| {r.mlp_waste:.1f}× | {r.mlp_us:.0f} | {r.total_us:.0f} |"
        )
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Total time over rows, one panel for each mesh with two or more replicas."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    meshes = [(tp, dp) for tp, dp in MESHES if dp > 1 and tp > dp]
    figure, axes = plt.subplots(1, len(meshes), figsize=(4 * len(meshes), 3.6), sharey=True, squeeze=False)
    for axis, (tp, dp) in zip(axes[0], meshes, strict=True):
        for size, name in ((1, "1"), (tp // dp, "attention group"), (tp, "whole group")):
            here = [r for r in rows if (r.tp, r.dp, r.moe_dense_tp_size) == (tp, dp, size)]
            (line,) = axis.plot([r.rows for r in here], [r.total_us for r in here], marker="o", label=name)
            axis.plot(
                [r.rows for r in here], [r.naive_us + r.mlp_us for r in here], "--", color=line.get_color(), alpha=0.5
            )
        axis.set(xscale="log", yscale="log", title=f"tp {tp}, dp {dp}", xlabel="rows of each replica")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("µs per dense layer (model)\nsolid: rewritten, dashed: naive")
    axes[0][0].legend(title="moe_dense_tp_size", fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    parser.add_argument("--plot", type=Path, help="also draw it (.svg or .png)")
    arguments = parser.parse_args()
    rows = table()
    print(markdown(rows))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps([{**asdict(r), "total_us": r.total_us} for r in rows], indent=1) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
