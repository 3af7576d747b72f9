"""From measurements to a dispatch table. Pure: lists in, entries out.

A table takes the fastest right kernel at each size as measured. Virtual ranks measure latency and the cost of a
kernel's structure well and a link's bandwidth not at all: what is measured on them is for them alone.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

from ..compat import next_power_of_2
from ..symmetric.entries import Entry
from ..symmetric.registry import KERNELS

_NAME = re.compile(
    rf"(?P<kernel>{'|'.join((*KERNELS, 'functional'))})(?: s(?P<split>\d+))?(?: w(?P<warps>\d+))?( rotating)?$"
)


def candidates(device: str, world: int, hidden: int, rows: int, linked: bool) -> list[Entry]:
    """What is worth measuring at one size of 16-bit elements: every kernel, the one-shot at every number of programs a
    row and of warps that gives each thread one or two 16-byte pieces. `linked`: GPUs with links, which have a plain
    all-reduce to fall back to; of virtual ranks only the kernels are compared."""
    quads = next_power_of_2(hidden) // 8
    out = [
        Entry(device, world, hidden, rows, kernel.name, split, warps)
        for kernel in KERNELS.values() if world in kernel.worlds for split, warps in kernel.candidates(quads)
    ]  # fmt: skip
    if linked:
        out.append(Entry(device, world, hidden, rows, "functional"))
    return sorted(out, key=name_of)


def name_of(entry: Entry) -> str:
    """The name under which an entry is measured; `entry_of` reads it."""
    kernel = KERNELS.get(entry.kernel)
    return kernel.label(entry.split, entry.warps) if kernel is not None else entry.kernel


def entry_of(provider: str, device: str, world: int, hidden: int, rows: int) -> Entry | None:
    """The table entry that runs a benchmark's provider; None for those that dispatch cannot pick."""
    found = _NAME.match(provider)
    if found is None or provider == "barrier":  # so older results name a barrier with two rounds of flags
        return None
    return Entry(device, world, hidden, rows, found["kernel"], int(found["split"] or 1), int(found["warps"] or 0))


def measured_entries(records: Iterable[dict], device: str, noise: float = 0.0) -> list[Entry]:
    """The fastest right kernel at each measured (world, hidden, rows). One that runs as the next smaller size does is
    preferred when it is slower by no more than `noise`, a share of its time."""
    sizes: dict[tuple[int, int, int], dict[str, float]] = {}
    for record in records:
        key = record["world"], record["hidden"], record["rows"]
        if record["us"] is not None and not record["note"] and entry_of(record["provider"], device, *key):
            sizes.setdefault(key, {})[record["provider"]] = record["us"]
    out: list[Entry] = []
    before: tuple[int, int, str] | None = None
    for key, times in sorted(sizes.items()):
        chosen = min(times, key=lambda name: times[name])
        if before is not None and before[:2] == key[:2]:
            as_before = times.get(before[2], math.inf)
            chosen = before[2] if as_before * (1 - noise) <= times[chosen] else chosen
        before = (*key[:2], chosen)
        out.append(entry_of(chosen, device, *key))  # type: ignore[arg-type]
    return out


def compacted(entries: list[Entry]) -> list[Entry]:
    """The same choices in fewer entries: of neighbours that run alike, the one with the most rows stands for all."""
    ordered = sorted(entries, key=lambda e: (e.device, e.world, e.hidden, e.rows))
    return [
        here
        for here, after in zip(ordered, [*ordered[1:], None], strict=True)
        if after is None or dataclasses.replace(here, rows=after.rows) != after
    ]
