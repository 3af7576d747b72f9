"""Tables of training steps; benchmarks/tables.py prints them with its own."""

from __future__ import annotations

import json

from md import RESULTS, records_of, table


def training_steps(file: str) -> str:
    """One training step; each way beside Inductor."""
    records = records_of(file)
    theirs = {(r["world"], r["phase"], r["size"]): r["ms"] for r in records if r["provider"] == "inductor"}
    names = {"inductor": "Inductor", "norm_backward": "tpfuse, `norm_backward` named", "micro_pipeline": "async TP",
             "reuse": "tpfuse, buffers reused", "overlap": "tpfuse, `overlap_all_reduce_norm` named",
             "all_named": "tpfuse, both named", "all_named, reuse": "tpfuse, both named, buffers reused"}  # fmt: skip
    lines = [
        [f"{r['world']}", r["phase"], names.get(r["provider"], r["provider"]), f"{r['ms']:.1f}",
         f"{theirs[r['world'], r['phase'], r['size']] / r['ms']:.3f}", f"{r['tokens_per_s']:,}", f"{r['peak_mb']:,.0f}",
         f"{r['fused']}"]
        for r in records
    ]  # fmt: skip
    head = ["GPUs", "layout", "", "ms", "Inductor / this", "tokens/s", "peak MB of a step", "collectives fused"]
    return table(head, lines)


def training_peaks(file: str) -> str:
    """Peaks of training steps by the code that is run, with and without Inductor's reuse of buffers."""
    records = [json.loads(line) for line in (RESULTS / file).read_text("utf-8").splitlines()]
    ways = [(provider, reuse) for reuse in (True, False) for provider in ("inductor", "tpfuse")]
    lines = []
    for size in dict.fromkeys((r["layout"], r["tokens"], r["vocabulary"]) for r in records):
        of = {(r["provider"], r["reuse"]): r for r in records if (r["layout"], r["tokens"], r["vocabulary"]) == size}
        kept = [f"{of[p, True]['kept_mb']:,.0f}" for p in ("inductor", "tpfuse")]
        lines.append([size[0], *(f"{n:,}" for n in size[1:]), *kept, *(f"{of[way]['peak_mb']:,.0f}" for way in ways)])
    head = ["layout", "tokens", "vocabulary", "Inductor: kept for backward", "tpfuse", "Inductor: peak MB", "tpfuse",
            "Inductor, no reuse", "tpfuse, no reuse"]  # fmt: skip
    return table(head, lines)


_OF_STEPS = {
    "training_overlap": "training_overlap_h200_x2.json",
    "training_reuse": "training_reuse_h200_x2.json",
    "training_steps": "training_h200_x2.json",
}
TABLES = {name: lambda _, file=file: training_steps(file) for name, file in _OF_STEPS.items()} | {
    "training_peaks": lambda _: training_peaks("peak_memory.jsonl")
}
