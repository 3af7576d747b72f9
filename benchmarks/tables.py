"""Markdown tables from the results files, as docs/performance.md has them.

python benchmarks/tables.py linked | shipped | virtual | virtual_summary | norm | layers | models | reduce_overhead |
    overhead
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tpfuse.kernels.tables import SHIPPED
from tpfuse.kernels.tune import name_of

RESULTS = Path(__file__).resolve().parent / "results"
SEPARATE = ("nccl", "symm_mem one-shot", "symm_mem two-shot", "unfused", "functional")


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _records(name: str) -> list[dict]:
    return [r for r in json.loads((RESULTS / name).read_text())["records"] if r.get("us", r.get("ms")) is not None]


def _us(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def linked_sizes() -> Iterable[tuple[int, int, dict[str, float], str]]:
    """(hidden, rows, provider -> us, the provider that the shipped table picks)"""
    records = _records("kernels_linked_h200.json")
    for hidden, rows in sorted({(r["hidden"], r["rows"]) for r in records}):
        us = {r["provider"]: r["us"] for r in records if (r["hidden"], r["rows"]) == (hidden, rows)}
        yield hidden, rows, us, name_of(SHIPPED.choose("NVIDIA H200", 2, hidden, 2, rows))


def linked() -> str:
    """One boundary over real links."""
    lines = []
    for hidden, rows, us, picked in linked_sizes():
        if hidden in (4096, 8192) and rows != 4:
            torch_best = min((us[p] for p in SEPARATE[1:3] if p in us), default=None)
            ratio = f"{us['nccl'] / us[picked]:.2f}" if "nccl" in us else "–"
            lines.append([f"{hidden}", f"{rows}", f"{us['floor']:.1f}", f"**{us[picked]:.1f}**", picked,
                          _us(us.get("unfused")), _us(torch_best), _us(us.get("nccl")), ratio])  # fmt: skip
    head = ["hidden", "rows", "floor", "picked", "which", "our all-reduce + Inductor",
            "symm_mem + Inductor", "NCCL + Inductor", "NCCL / picked"]  # fmt: skip
    return table(head, lines)


def shipped() -> str:
    """How far the shipped table's choices are from the best, over all measured sizes on 2 linked GPUs."""
    from_best, from_best_then, to_separate, few = [], [], [], []
    for hidden, rows, us, picked in linked_sizes():
        ours = _ours(us)
        from_best.append((us[picked] / min(ours.values()), hidden, rows))
        from_best_then.append((us["dispatched"] / min(ours.values()), hidden, rows))
        others = {p: us[p] for p in SEPARATE if p in us}
        best = min(others, key=lambda p: others[p])
        to_separate.append((us[picked] / others[best], hidden, rows, best))
        if rows <= 64 and "nccl" in us:
            few.append((us["nccl"] / us[picked], hidden, rows))
    return "\n".join([
        f"slowest against the best kernel: {max(from_best)}", f"slowest against the best separate: {max(to_separate)}",
        f"least against NCCL + Inductor, up to 64 rows: {min(few)}; most: {max(few)}; sizes: {len(few)}",
        f"dispatched in that run against the best kernel: within 3 % at {_within(from_best_then)} sizes, "
        f"at most {max(from_best_then)}",
    ])  # fmt: skip


def _ours(us: dict[str, float]) -> dict[str, float]:
    kernels = ("one_shot s", "two_shot", "barrier rotating", "functional")
    return {p: t for p, t in us.items() if p.startswith(kernels)}


def _within(ratios: list[tuple], limit: float = 1.03) -> str:
    return f"{sum(ratio[0] <= limit for ratio in ratios)} of {len(ratios)}"


def virtual_sizes() -> Iterable[tuple[int, int, int, dict[str, float]]]:
    """(hidden, N, rows, provider -> us), the best peer of the published figures among them"""
    records = _records("kernels_h200.json") + _records("peers_h200.json")
    for hidden, world, rows in sorted({(r["hidden"], r["world"], r["rows"]) for r in records}):
        here = [r for r in records if (r["hidden"], r["world"], r["rows"]) == (hidden, world, rows)]
        yield hidden, world, rows, {r["provider"]: r["us"] for r in here}


def virtual() -> str:
    """One boundary on virtual ranks."""
    lines = []
    for hidden, world, rows, us in virtual_sizes():
        best = [_us(min(us[p] for p in us if p.startswith(k))) for k in ("one_shot s", "two_shot")]
        ratio = f"{us['dispatched'] / us['best peer']:.2f}" if "best peer" in us else "–"
        lines.append([f"{hidden}", f"{world}", f"{rows}", *(_us(us[p]) for p in ("empty", "barrier", "unfused")), *best,
                      f"**{us['dispatched']:.1f}**", _us(us.get("best peer")), ratio])  # fmt: skip
    head = ["hidden", "N", "rows", "empty", "barrier", "unfused", "best one-shot", "two-shot", "dispatched",
            "best peer", "dispatched / peer"]  # fmt: skip
    return table(head, lines)


def virtual_summary() -> str:
    peers, from_best, unfused, barrier, portable = [], [], [], [], []
    for hidden, world, rows, us in virtual_sizes():
        size, mine = (hidden, world, rows), us["dispatched"]
        from_best.append((mine / min(_ours(us).values()), size))
        unfused.append((us["unfused"] / mine, size))
        portable.append((us["one_shot portable"] / min(us[p] for p in us if p.startswith("one_shot s1")), size))
        if "best peer" in us:
            peers.append((mine / us["best peer"], size))
        if rows <= 32:
            barrier.append(((us["barrier"] - us["empty"]) / (mine - us["empty"]), size))
    mean = statistics.geometric_mean(ratio for ratio, _ in peers)
    return "\n".join([
        f"against the best peer: {min(peers)} to {max(peers)}, geometric mean {mean:.3f}, {len(peers)} sizes",
        f"against the best kernel: within 3 % at {_within(from_best)}, most {sorted(from_best)[-3:]}",
        f"unfused / dispatched: {min(unfused)} to {max(unfused)}",
        f"above empty, barrier / dispatched, up to 32 rows: {min(barrier)} to {max(barrier)}; "
        f"at least 1.3 at {sum(ratio >= 1.3 for ratio, _ in barrier)} of {len(barrier)}",
        f"portable wait / PTX wait of whole rows: {min(portable)} to {max(portable)}",
    ])  # fmt: skip


def norm() -> str:
    records = _records("norm_h200.json")
    lines = []
    for kind, hidden, size in sorted({(r["norm"], r["hidden"], r["megabytes"]) for r in records}):
        here = {r["provider"]: r for r in records if (r["norm"], r["hidden"], r["megabytes"]) == (kind, hidden, size)}
        cells = [f"{here[p]['us']:.1f} ({here[p]['share']:.0%})" for p in ("ours", "inductor", "liger", "torch")]
        lines.append([kind.split("_")[0], f"{hidden}", f"{size}", f"{here['copy']['us']:.1f}", *cells])
    return table(["norm", "hidden", "MB", "copy", "ours", "Inductor", "Liger", "torch, two operations"], lines)


def layers() -> str:
    records = _records("layers_h200.json")
    lines = []
    for world, phase, rows in sorted({(r["world"], r["phase"], r["rows"]) for r in records}):
        us = {r["provider"]: r["us"] for r in records if (r["world"], r["phase"], r["rows"]) == (world, phase, rows)}
        shares = [f"{1 - us['no sum'] / us[p]:.1%}" for p in ("unfused", "tpfuse")]
        ratio = f"{us['unfused'] / us['tpfuse']:.3f}"
        lines.append([f"{world}", f"{phase} {rows}", f"{us['unfused']:.1f}", f"**{us['tpfuse']:.1f}**", ratio, *shares])
    return table(["N", "step", "unfused", "tpfuse", "unfused / tpfuse", "sums in unfused", "sums in tpfuse"], lines)


def models() -> str:
    records = _records("end_to_end_h200_x2.json")
    lines = []
    for model, phase, size in dict.fromkeys((r["model"], r["phase"], r["size"]) for r in records):
        ms = {r["provider"]: r for r in records if (r["model"], r["phase"], r["size"]) == (model, phase, size)}
        graphs = ms["inductor + CUDA graph"], ms["tpfuse + CUDA graph"]
        lines.append([
            model, f"{phase} {size}", f"{ms['inductor']['ms']:.2f}", f"{ms['tpfuse']['ms']:.2f}",
            f"{graphs[0]['ms']:.3f}", f"**{graphs[1]['ms']:.3f}**", f"{graphs[0]['ms'] / graphs[1]['ms']:.3f}",
            *(f"{g['boundary_ms']:.3f} + {g['other_ms']:.3f} + {g['idle_ms']:.3f}" for g in graphs),
            f"{graphs[1]['tokens_per_s']:,.0f}",
        ])  # fmt: skip
    head = ["model", "step", "Inductor", "tpfuse", "Inductor, CUDA graph", "tpfuse, CUDA graph", "ratio",
            "profile Inductor", "profile tpfuse", "tokens/s tpfuse"]  # fmt: skip
    return table(head, lines)


def reduce_overhead() -> str:
    """torch.compile's own CUDA graphs."""
    records = _records("reduce_overhead_h200_x2.json")
    lines = []
    for phase, size in dict.fromkeys((r["phase"], r["size"]) for r in records):
        ms = {r["provider"]: r["ms"] for r in records if (r["phase"], r["size"]) == (phase, size)}
        lines.append([f"{phase} {size}"])
        for way in ("reduce-overhead", "+ CUDA graph"):
            theirs, ours = ms[f"inductor {way}"], ms[f"tpfuse {way}"]
            lines[-1] += [f"{theirs:.3f}", f"**{ours:.3f}**", f"{theirs / ours:.3f}"]
    head = ["step", "Inductor, reduce-overhead", "tpfuse, reduce-overhead", "ratio", "Inductor, captured by hand",
            "tpfuse, captured by hand", "ratio"]  # fmt: skip
    return table(head, lines)


def overhead() -> str:
    """Host time of an eager call."""
    records = json.loads((RESULTS / "op_overhead.json").read_text())["records"]
    lines = []
    for rows, hidden in dict.fromkeys((r["rows"], r["hidden"]) for r in records):
        us = {r["what"]: r["host_us"] for r in records if (r["rows"], r["hidden"]) == (rows, hidden)}
        cells = [f"{us[what]:.0f}" for what in ("operator", "kernel", "unfused")]
        lines.append([f"{rows}", f"{hidden}", *cells, f"{us['look at the watch']:.1f}"])
    return table(["rows", "hidden", "eager operator", "of that the kernel's entry",
                  "unfused: functional all-reduce, add, RMSNorm", "look at the watch"], lines)  # fmt: skip


TABLES: dict[str, Callable[[], str]] = {f.__name__: f for f in (
    linked, shipped, virtual, virtual_summary, norm, layers, models, reduce_overhead, overhead
)}  # fmt: skip

if __name__ == "__main__":
    for name in sys.argv[1:] or TABLES:
        if name not in TABLES:
            sys.exit(f"{name}: allowed: {', '.join(TABLES)}")
        print(TABLES[name](), end="\n\n")
