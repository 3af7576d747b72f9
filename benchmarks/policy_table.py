"""Tabulate what each sharing policy costs at the boundaries of a dense layer, naive and rewritten.

    python benchmarks/policy_table.py --plot docs/policy_table.svg --json benchmarks/results/policy_table.json
    python benchmarks/policy_table.py --families        counted in traced models instead (policy_families.py)

A model, not a measurement: bytes and collectives are counted, times come from the planner's own latency-plus-bytes
model (`tpfuse.passes.plan.layouts`) and, for the MLP itself, from the time to read its weights or to do its arithmetic,
whichever is longer. It answers which policy to try first; measure before you believe it.

"naive" is what `parallelize` emits, "rewritten" what the compiler makes of it, averaged over the model's dense layers.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import policy_families
from records import write
from transitions import needed_by, owed_by, transition

from tpfuse.passes.plan.layouts import SCATTERED, Sizes, Stage, Step, chain_steps, choose, total_us
from tpfuse.policy import SharingPolicy

# DeepSeek-V3: hidden size, inner size of a dense MLP, leading dense layers.
HIDDEN, INNER, DENSE_LAYERS = 7168, 18432, 3
BYTES = 2  # bf16
# An H200: bytes read and operations done in a microsecond, of which kernels reach some part.
READ_PER_US, FLOPS_PER_US, REACHED = 4.8e6, 990e6, 0.7
MESHES = [(tp, dp) for tp in (2, 4, 8) for dp in (1, 2, 4) if dp <= tp]
ROWS = [1, 8, 64, 256, 1024, 4096]


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


def naive(policy: SharingPolicy) -> tuple[Step, ...]:
    """The collectives that `parallelize` puts around one dense layer."""
    boundaries = (("attention", "dense_mlp"), ("dense_mlp", "attention"))
    return tuple(step for blocks in boundaries for step in transition(*blocks, policy, row_bytes=HIDDEN * BYTES).before)


def rewritten(policy: SharingPolicy, sizes: Sizes) -> tuple[tuple[Step, ...], float]:
    """The collectives of all dense layers after the planner's choice, and how often a norm runs on own rows only."""
    size = policy.dense_tp_size_of("")
    (addend,), want = owed_by("dense_mlp", size, policy), needed_by("dense_mlp", size, policy)
    into = Stage("owed_attn", frozenset({want}), True, False)
    out = Stage(addend, frozenset({"all_rows"}), True, False)
    stages = [into, out] * DENSE_LAYERS
    layouts = choose(stages, sizes)
    return chain_steps(stages, layouts, sizes), sum(layout == SCATTERED for layout in layouts) / len(layouts)


def tabulate(tp: int, dp: int, rows: int, size: int) -> Row:
    """One policy at one size; `rows` of each replica."""
    policy = SharingPolicy(tp, dp, size)
    attn, payload = policy.attn_tp_size, rows * HIDDEN * BYTES
    sizes = Sizes(attn, dp, payload)
    before = naive(policy)
    after, scattered = rewritten(policy, sizes)
    own = -(-rows // attn)
    mlp_rows = rows * dp if size == tp else rows if size == attn else own
    flops = 6 * mlp_rows * HIDDEN * INNER / size
    weights = 3 * HIDDEN * INNER * BYTES / size
    return Row(
        tp, dp, rows, size,
        " + ".join(f"{step.collective}({step.ranks(sizes)})" for step in before) or "none",
        sum(step.sent(sizes) for step in before),
        total_us(before, sizes),
        len(after) / DENSE_LAYERS,
        sum(step.sent(sizes) for step in after) / DENSE_LAYERS,
        total_us(after, sizes) / DENSE_LAYERS,
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
    parser.add_argument("--families", action="store_true", help="count what real model families send, in place of it")
    arguments = parser.parse_args()
    if arguments.families:
        return policy_families.main()
    rows = table()
    print(markdown(rows))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write(arguments.json, [{**asdict(r), "total_us": r.total_us} for r in rows])
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
