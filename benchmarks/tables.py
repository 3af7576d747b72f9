"""Markdown tables from the results files, as docs/performance.md has them.

python benchmarks/tables.py linked | norm | layers | models | shipped
"""

from __future__ import annotations

import json
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
    from_best, to_separate, few = [], [], []
    for hidden, rows, us, picked in linked_sizes():
        kernels = ("one_shot s", "two_shot", "barrier rotating", "functional")
        ours = {p: t for p, t in us.items() if p.startswith(kernels)}
        from_best.append((us[picked] / min(ours.values()), hidden, rows))
        others = {p: us[p] for p in SEPARATE if p in us}
        best = min(others, key=lambda p: others[p])
        to_separate.append((us[picked] / others[best], hidden, rows, best))
        if rows <= 64 and "nccl" in us:
            few.append((us["nccl"] / us[picked], hidden, rows))
    return "\n".join([
        f"slowest against the best kernel: {max(from_best)}", f"slowest against the best separate: {max(to_separate)}",
        f"least against NCCL + Inductor, up to 64 rows: {min(few)}; most: {max(few)}",
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


TABLES: dict[str, Callable[[], str]] = {f.__name__: f for f in (linked, norm, layers, models, shipped)}

if __name__ == "__main__":
    for name in sys.argv[1:] or TABLES:
        if name not in TABLES:
            sys.exit(f"{name}: allowed: {', '.join(TABLES)}")
        print(TABLES[name](), end="\n\n")
