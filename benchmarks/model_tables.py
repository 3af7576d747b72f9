"""Tables of whole models, whole layers and host time; benchmarks/tables.py prints them with its own.

Each is made from one results file by its name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from md import RESULTS, records_of, table


def layers(file: str) -> str:
    records = records_of(file)
    lines = []
    for world, phase, rows in sorted({(r["world"], r["phase"], r["rows"]) for r in records}):
        us = {r["provider"]: r["us"] for r in records if (r["world"], r["phase"], r["rows"]) == (world, phase, rows)}
        shares = [f"{1 - us['no sum'] / us[p]:.1%}" for p in ("unfused", "tpfuse")]
        ratio = f"{us['unfused'] / us['tpfuse']:.3f}"
        lines.append([f"{world}", f"{phase} {rows}", f"{us['unfused']:.1f}", f"**{us['tpfuse']:.1f}**", ratio, *shares])
    return table(["N", "step", "unfused", "tpfuse", "unfused / tpfuse", "sums in unfused", "sums in tpfuse"], lines)


def models(file: str) -> str:
    records = records_of(file)
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


def models_short(file: str) -> str:
    """Llama alone, without the profile."""
    lines = [line.split(" | ") for line in models(file).splitlines() if line.startswith("| llama")]
    head = ["step", "Inductor", "tpfuse", "Inductor, CUDA graph", "tpfuse, CUDA graph", "ratio"]
    return table(head, [line[1:7] for line in lines])


def steps_with_cuda_graphs(file: str) -> Iterator[tuple[str, float, float, float]]:
    """(step, Inductor's ms, tpfuse's ms, their ratio) with torch.compile's own CUDA graphs on both sides."""
    records = records_of(file)
    for phase, size in dict.fromkeys((r["phase"], r["size"]) for r in records):
        ms = {r["provider"]: r["ms"] for r in records if (r["phase"], r["size"]) == (phase, size)}
        theirs, ours = ms["inductor reduce-overhead"], ms["tpfuse reduce-overhead"]
        yield f"{phase} {size}", theirs, ours, theirs / ours


def reduce_overhead(file: str) -> str:
    """torch.compile's own CUDA graphs."""
    records = records_of(file)
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


def overhead(file: str) -> str:
    """Host time of an eager call."""
    records = [r for r in json.loads((RESULTS / file).read_text())["records"] if "of_inductor" not in r]
    lines = []
    for rows, hidden in dict.fromkeys((r["rows"], r["hidden"]) for r in records):
        us = {r["what"]: r["host_us"] for r in records if (r["rows"], r["hidden"]) == (rows, hidden)}
        cells = [f"{us[what]:.0f}" for what in ("operator", "operator, differentiated", "unfused")]
        lines.append([f"{rows}", f"{hidden}", *cells, f"{us['look at the watch']:.1f}"])
    return table(["rows", "hidden", "eager operator", "with gradients",
                  "unfused: functional all-reduce, add, RMSNorm", "look at the watch"], lines)  # fmt: skip


def overhead_slope(file: str) -> str:
    """Host time of one boundary more in a compiled graph; each line is one run, all of its ways in turn."""
    runs: list[list[dict]] = []
    for record in (r for r in json.loads((RESULTS / file).read_text())["records"] if "of_inductor" in r):
        if record["what"] == "slope, inductor":
            runs.append([])
        runs[-1].append(record)
    lines = []
    for run in runs:
        us = {r["what"].removeprefix("slope, "): r for r in run}
        cells = [f"{us[way]['host_us']:.0f}" if way in us else "-" for way in ("inductor", "auto_select", "tpfuse")]
        lines.append([*cells, f"{us['tpfuse']['of_inductor']:.2f}"])
    return table(["Inductor", "Inductor, auto_select", "tpfuse", "tpfuse of Inductor"], lines)


def models_from_python(file: str) -> str:
    """Steps launched from Python and the same under a CUDA graph, beside both of Inductor's ways."""
    records = records_of(file)
    lines = []
    for model, phase, size in dict.fromkeys((r["model"], r["phase"], r["size"]) for r in records):
        ms = {r["provider"]: r["ms"] for r in records if (r["model"], r["phase"], r["size"]) == (model, phase, size)}
        line = [model, f"{phase} {size}"]
        for way in ("", " + CUDA graph"):
            theirs, other, ours = (ms.get(name + way) for name in ("inductor", "auto_select", "tpfuse"))
            line += [f"{theirs:.3f}", "–" if other is None else f"{other:.3f}", f"**{ours:.3f}**"]
            line.append(f"{theirs / ours:.2f}")
        lines.append(line)
    head = ["model", "step", "Inductor", "auto_select", "tpfuse", "ratio", "Inductor, CUDA graph",
            "auto_select, CUDA graph", "tpfuse, CUDA graph", "ratio"]  # fmt: skip
    return table(head, lines)


def generate(file: str) -> str:
    """Tokens a second of Hugging Face's `generate`."""
    lines = [
        [f"{r['world']}", r["provider"], f"{r['tokens_per_s']:.0f}", f"{r['spread']:.0f}", f"{r['fused']}"]
        for r in records_of(file)
    ]
    return table(["GPUs", "generate, batch 1", "tokens/s", "spread of the rounds", "boundaries fused"], lines)


def batching(file: str) -> str:
    """Tokens a second of Hugging Face's continuous batching."""
    records = records_of(file)
    rates = {(r["sequences"], r["provider"]): r["tokens_per_s"] for r in records}
    lines = []
    for r in records:
        plain, theirs = (rates[r["sequences"], name] for name in ("plain", "inductor, whole attention"))
        lines.append([
            f"{r['sequences']}", r["provider"].replace("inductor", "Inductor"), f"**{r['tokens_per_s']:,.0f}**",
            f"{r['spread']:,.0f}", f"{r['tokens_per_s'] / plain:.2f}", f"{r['tokens_per_s'] / theirs:.2f}",
            f"{r['call_tokens_per_s']:,.0f}", f"{r['same_tokens']:.0%}", f"{r['fused']}",
        ])  # fmt: skip
    head = ["sequences", "", "tokens/s", "quartiles apart", "/ plain", "/ Inductor", "tokens/s of the whole call",
            "tokens that are plain's", "boundaries fused"]  # fmt: skip
    return table(head, lines)


def before_after(file: str) -> str:
    """Steps by several trees, whose processes took turns: each process's milliseconds, a column for each tree."""
    document = json.loads((RESULTS / file).read_text())
    trees = [run["tree"] for run in document["runs"]]
    lines = []
    for r in sorted(document["records"], key=lambda r: r["size"]):
        digits = 4 if "CUDA graph" in r["provider"] else 2  # from Python, processes of one tree differ by up to half
        values: dict[str, list[str]] = {tree: [] for tree in trees}
        for ms, tree in zip(r["ms"], trees, strict=True):
            if ms is not None:
                values[tree].append(f"{ms:.{digits}f}")
        lines.append([f"{r['phase']} {r['size']}", r["provider"], *(", ".join(v) or "–" for v in values.values())])
    return table(["step", "", *(f"`{tree}`" for tree in dict.fromkeys(trees))], lines)


def quantised_steps(file: str) -> str:
    """Steps of a quantised model, with and without quantised outputs, beside Inductor."""
    records = records_of(file)
    lines = []
    for phase, size in dict.fromkeys((r["phase"], r["size"]) for r in records):
        ways = {r["provider"]: r for r in records if (r["phase"], r["size"]) == (phase, size)}
        theirs = ways["inductor + CUDA graph"]["ms"]
        for name in (name for name in ways if "CUDA graph" not in name):
            python, graph = ways[name], ways[f"{name} + CUDA graph"]
            lines.append([
                f"{phase} {size}", name.replace("inductor", "Inductor"), f"{python['ms']:.2f} ({python['spread']:.2f})",
                f"**{graph['ms']:.4f}**", f"{theirs / graph['ms']:.3f}",
                f"{graph['boundary_ms']:.3f} + {graph['other_ms']:.3f} + {graph['idle_ms']:.3f}",
            ])  # fmt: skip
    return table(["step", "", "from Python (quartiles apart)", "CUDA graph", "Inductor / this", "profile"], lines)
