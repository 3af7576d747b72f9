"""Tables of products and the boundaries behind them, overlapped; benchmarks/tables.py prints them with its own."""

from __future__ import annotations

from collections.abc import Iterator

from md import records_of, table

#: Of one layer: the product and each kernel of the boundary by itself.
BOUNDARIES = ("one_shot", "copied", "boundary")
#: What the ways are made of, and no way by itself.
PARTS = ("product", "boundary", "copy", "local part")


def _sizes(file: str) -> Iterator[tuple[str, int, dict[str, float]]]:
    """(product, rows, provider -> us)"""
    records = records_of(file)
    for size in dict.fromkeys(_size(r) for r in records):
        yield *size, {r["provider"]: r["us"] for r in records if _size(r) == size}


def _size(record: dict) -> tuple[str, int]:
    """(the product, of which model where there are several; its rows)"""
    model = "" if record["model"] == "8b" else f"{record['model'].upper()}'s "
    return f"{model}{record['product']}", record["rows"]


def limit(us: dict[str, float], boundaries: tuple[str, ...] = BOUNDARIES) -> float:
    """What no overlap can go below: the product, or the fastest of the boundaries by itself."""
    return max(us["product"], min(us[name] for name in boundaries if name in us))


def overlap() -> str:
    """A product and its boundary by the shipped kernel, one after the other and overlapped."""
    lines = []
    for product, rows, us in _sizes("overlap_h200_x2.json"):
        after, mine = us["product, then one_shot"], us["overlapped"]
        parts = [f"{us[name]:.1f}" for name in ("product", "one_shot", "copied")]
        lines.append([
            product, f"{rows}", *parts, f"{limit(us):.1f}", f"{after:.1f}", f"**{mine:.1f}**",
            f"{mine / limit(us):.2f}", f"{mine / after:.3f}", f"{us['NCCL + Inductor']:.1f}",
        ])  # fmt: skip
    head = ["product", "rows", "by itself", "one-shot", "copied", "limit", "product, then one-shot", "overlapped",
            "overlapped / limit", "overlapped / one after the other", "NCCL + Inductor"]  # fmt: skip
    return table(head, lines)


def overlap_scattered() -> str:
    """The same where rows are scattered, as in sequence parallelism."""
    lines = []
    for product, rows, us in _sizes("overlap_h200_x2.json"):
        mine, theirs = us["scattered, overlapped"], us["scattered, NCCL + Inductor"]
        lines.append([
            product, f"{rows}", f"{us['product']:.1f}", f"{us['scattered']:.1f}", f"**{mine:.1f}**",
            f"{mine / limit(us, ('scattered',)):.2f}", f"{theirs:.1f}", f"{us['async TP']:.1f}", f"{theirs / mine:.2f}",
        ])  # fmt: skip
    head = ["product", "rows", "by itself", "exchange", "overlapped", "overlapped / limit",
            "product, NCCL + Inductor", "async TP", "NCCL + Inductor / overlapped"]  # fmt: skip
    return table(head, lines)


def overlap_ways() -> str:
    """The ways that were tried, of a size the share of the limit in brackets."""
    sizes = list(_sizes("overlap_ways_h200_x2.json"))
    lines = []
    for way in sizes[0][2]:
        cells = [f"{us[way]:.1f}" + ("" if way in PARTS else f" ({us[way] / limit(us):.2f})") for _, _, us in sizes]
        lines.append([way, *cells])
    return table(["", *(f"{product}, {rows} rows" for product, rows, _ in sizes)], lines)


def overlap_prefill() -> str:
    """Prefill steps with their products overlapped, beside Inductor's."""
    records = records_of("end_to_end_overlap_h200_x2.json")
    lines = []
    for size in dict.fromkeys(r["size"] for r in records):
        by = {r["provider"]: r for r in records if r["size"] == size}
        for name in (name for name in by if "CUDA graph" not in name):
            cells = []
            for way in ("", " + CUDA graph"):
                theirs, this = by[f"inductor{way}"], by[name + way]
                cells += [f"{this['ms']:.2f} ({this['spread']:.2f})", f"{theirs['ms'] / this['ms']:.3f}"]
            lines.append([f"{size:,}", name.replace("inductor", "Inductor"), *cells])
    head = ["tokens", "", "from Python (quartiles apart)", "Inductor / this", "CUDA graph (quartiles apart)",
            "Inductor / this"]  # fmt: skip
    return table(head, lines)


def overlap_power() -> str:
    """Parts of an overlap, and what follows it, under load."""
    records = [r for r in records_of("overlap_power_h200_x2.json") if r["product"] != "prefill"]
    sizes = list(dict.fromkeys((r["product"], r["rows"]) for r in records))
    lines = []
    for way in dict.fromkeys(r["provider"] for r in records):
        found = {(r["product"], r["rows"]): r for r in records if r["provider"] == way}
        lines.append([way, *(f"{found[size]['us']:.0f} ({found[size]['mhz'] / 1000:.2f})" for size in sizes)])
    return table(["", *(f"{product}, {rows} rows" for product, rows in sizes)], lines)


def overlap_power_prefill() -> str:
    """Prefill steps under load, and one that sends nothing."""
    records = [r for r in records_of("overlap_power_h200_x2.json") if r["product"] == "prefill"]
    theirs = records[0]["us"]
    lines = [
        [f"{r['rows']:,}", r["provider"], f"{r['us'] / 1000:.2f} ({r['spread'] / 1000:.2f})",
         f"{theirs / r['us']:.3f}", f"{r['watts']:.0f}", f"{r['mhz']:,.0f}"]
        for r in records
    ]  # fmt: skip
    return table(["tokens", "", "ms (turns apart)", "Inductor / this", "W", "MHz"], lines)


TABLES = {
    f.__name__: lambda _, f=f: f()
    for f in (overlap, overlap_scattered, overlap_ways, overlap_prefill, overlap_power, overlap_power_prefill)
}
