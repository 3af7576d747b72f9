"""Pictures of the results files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from records import documents


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


# provider prefix -> (label, style); the fastest variant of each is drawn
_KERNELS = {
    "one_shot": ("one-shot", "-"), "two_shot": ("two-shot", "-"), "barrier rotating": ("barrier", "-"),
    "nccl": ("NCCL + Inductor", "--"), "symm_mem one-shot": ("symm_mem one-shot + Inductor", "--"),
    "symm_mem two-shot": ("symm_mem two-shot + Inductor", "--"), "unfused": ("our all-reduce + Inductor", "--"),
    "flashinfer": ("FlashInfer", "--"), "dispatched": ("dispatched", "-"), "floor": ("floor", ":"),
}  # fmt: skip


def kernels(results: Sequence[Path], picture: Path) -> None:
    """Microseconds over rows, one panel a (world, hidden). A size that several files have is the last one's."""
    plt = _pyplot()
    runs = [run for path in results for run in documents(path)]
    data = runs[-1]
    sizes: dict[tuple[int, int, int], list[dict]] = {}
    for document in runs:
        own: dict[tuple[int, int, int], list[dict]] = {}
        for r in document["records"]:
            own.setdefault((r["world"], r["hidden"], r["rows"]), []).append(r)
        sizes |= own
    records = [r for each in sizes.values() for r in each if r["us"] is not None and "portable" not in r["provider"]]
    hiddens, worlds = sorted({r["hidden"] for r in records}), sorted({r["world"] for r in records})
    figure, panels = plt.subplots(len(worlds), len(hiddens), figsize=(3.6 * len(hiddens), 3.2 * len(worlds) + 0.8),
                                  sharex=True, squeeze=False, layout="constrained")  # fmt: skip
    for across, world in zip(panels, worlds, strict=True):
        for panel, hidden in zip(across, hiddens, strict=True):
            here = [r for r in records if (r["world"], r["hidden"]) == (world, hidden)]
            for prefix, (label, style) in _KERNELS.items():
                best = _fastest(r for r in here if r["provider"].startswith(prefix))
                if best:
                    heavy = prefix == "dispatched"
                    panel.plot(*zip(*sorted(best.items()), strict=True), style, label=label,
                               color="black" if heavy else None, linewidth=2.5 if heavy else 1.2,
                               alpha=0.35 if heavy else 1)  # fmt: skip
            panel.set(title=f"{world} ranks, hidden {hidden}")
            _logarithmic(panel)
    handles: dict[str, Any] = {}
    for panel in panels.flat:
        lines, labels = panel.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize="small")
    for panel in panels[-1]:
        panel.set_xlabel("rows")
    figure.supylabel("µs a call")
    figure.suptitle(f"{data['machine']['device']}, {data['machine']['setting']}", fontsize="medium")
    figure.savefig(picture, dpi=80)


def _fastest(records: Iterable[dict]) -> dict[int, float]:
    best: dict[int, float] = {}
    for r in records:
        best[r["rows"]] = min(best.get(r["rows"], r["us"]), r["us"])
    return best


def _logarithmic(panel: Any) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter("{x:g}")
    panel.grid(True, alpha=0.3)


def layers(results: Path, picture: Path) -> None:
    """Time of one layer for each size, and how much of it the boundaries take."""
    plt = _pyplot()
    data = json.loads(results.read_text())
    cases = sorted({(r["world"], r["phase"], r["rows"]) for r in data["records"]})
    us = {(r["world"], r["phase"], r["rows"], r["provider"]): r["us"] for r in data["records"]}
    figure, panel = plt.subplots(figsize=(1.1 * len(cases) + 2, 3.6), layout="constrained")
    for shift, provider in enumerate(("unfused", "tpfuse")):
        rest = [us[(*case, "no sum")] for case in cases]
        boundary = [us[(*case, provider)] - us[(*case, "no sum")] for case in cases]
        shares = [100 * b / (b + r) for b, r in zip(boundary, rest, strict=True)]
        bars = panel.bar([i + 0.4 * shift for i in range(len(cases))], shares, width=0.36, label=provider)
        panel.bar_label(bars, fmt="%.1f", fontsize="small")
    panel.set_xticks([i + 0.2 for i in range(len(cases))], [f"N={w}\n{phase} {rows}" for w, phase, rows in cases])
    panel.set(ylabel="all-reduces, % of a layer")
    panel.set_title(f"{data['machine']['device']}, {data['machine']['setting']}", fontsize="medium")
    panel.legend()
    figure.savefig(picture, dpi=80)


def end_to_end(results: Path, picture: Path) -> None:
    """A profiled step under CUDA graphs: boundary kernels, other kernels, gaps; one pair of bars a size."""
    plt = _pyplot()
    data = json.loads(results.read_text())
    records = [r for r in data["records"] if r["boundary_ms"] is not None]
    cases = list(dict.fromkeys((r["model"], r["phase"], r["size"]) for r in records))
    figure, panels = plt.subplots(1, len(cases), figsize=(1.5 * len(cases), 4), layout="constrained", squeeze=False)
    parts = {"other kernels": "other_ms", "boundary kernels": "boundary_ms", "between kernels": "idle_ms"}
    for panel, (model, phase, size) in zip(panels.flat, cases, strict=True):
        here = [r for r in records if (r["model"], r["phase"], r["size"]) == (model, phase, size)]
        base = [0.0] * len(here)
        for label, key in parts.items():
            panel.bar([r["provider"].split()[0] for r in here], [r[key] for r in here], bottom=base, label=label)
            base = [b + r[key] for b, r in zip(base, here, strict=True)]
        panel.set_title(f"{model}\n{phase} {size}", fontsize="small")
        panel.tick_params(labelsize="x-small")
    panels[0][0].set_ylabel("ms a step, under CUDA graphs")
    lines, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3)
    figure.suptitle(f"{data['machine']['device']} × {records[0]['world']}", fontsize="medium")
    figure.savefig(picture, dpi=80)
