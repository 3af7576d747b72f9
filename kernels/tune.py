"""From measurements to a dispatch table. Pure: lists in, entries out.

Virtual ranks measure latency and the cost of a kernel's structure well and a link's bandwidth not at all. So a table
for virtual ranks takes the fastest kernel at each size as measured, while a table for linked GPUs takes from the same
measurements only how to run a one-shot (programs a row, warps), and where the one-shot ends from bytes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

from .compat import next_power_of_2
from .dispatch import Entry

# Bytes of one rank's tensor from which the two-shot is faster over NVLink: where its smaller traffic outweighs its
# second trip, on GPUs of the Hopper family. Two ranks move as much either way.
ONE_SHOT_BYTES = {2: 8 << 20, 4: 800_000, 8: 220_000}
TWO_SHOT_BYTES = {2: 0, 4: 8 << 20, 8: 8 << 20}  # past that, a plain all-reduce is limited by bandwidth alone
_NAME = re.compile(
    r"(?P<kernel>one_shot|two_shot|barrier|functional)(?: s(?P<split>\d+))?(?: w(?P<warps>\d+))?( rotating)?$"
)


def candidates(device: str, world: int, hidden: int, rows: int, linked: bool) -> list[Entry]:
    """What is worth measuring at one size of 16-bit elements: every kernel, the one-shot at every number of programs a
    row and of warps that gives each thread one or two 16-byte pieces. `linked`: GPUs with links, which have a plain
    all-reduce to fall back to; of virtual ranks only the kernels are compared."""
    quads = next_power_of_2(hidden) // 8
    most = max(min(quads // 32, 32), 1)
    out = [Entry(device, world, hidden, rows, "two_shot", warps=warps) for warps in {most, max(most // 2, 1)}]
    out.append(Entry(device, world, hidden, rows, "barrier"))
    for split in (1, 2, 4, 8):
        for warps in (32, 16, 8, 4, 2):
            pieces = quads / split / (32 * warps)
            if pieces == 1 or (pieces == 2 and split == 1):
                out.append(Entry(device, world, hidden, rows, "one_shot", split, warps))
    if linked:
        out.append(Entry(device, world, hidden, rows, "functional"))
    return sorted(out, key=name_of)


def name_of(entry: Entry) -> str:
    """The name under which an entry is measured; `entry_of` reads it."""
    if entry.kernel == "one_shot":
        return f"one_shot s{entry.split} w{entry.warps}"
    return {"two_shot": f"two_shot w{entry.warps}", "barrier": "barrier rotating"}.get(entry.kernel, entry.kernel)


def entry_of(provider: str, device: str, world: int, hidden: int, rows: int) -> Entry | None:
    """The table entry that runs a benchmark's provider; None for those that dispatch cannot pick."""
    found = _NAME.match(provider)
    if found is None or provider == "barrier":
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


def linked_entries(records: list[dict], device: str) -> list[Entry]:
    """For GPUs with links: the fastest measured one-shot up to ONE_SHOT_BYTES, then the two-shot."""
    shots = [r for r in records if r["provider"].startswith("one_shot")]
    out = []
    measured = measured_entries(shots, device)
    for world, hidden in sorted({(e.world, e.hidden) for e in measured}):
        here = [e for e in measured if (e.world, e.hidden) == (world, hidden)]
        last_one = ONE_SHOT_BYTES[world] // (2 * hidden)
        last_two = TWO_SHOT_BYTES[world] // (2 * hidden)
        out += [e for e in here if e.rows < last_one]
        # whole rows at the end of the range: many rows keep all programs busy without splitting
        whole = [e for e in here if e.split == 1] or [dataclasses.replace(here[-1], split=1, warps=0)]
        out.append(dataclasses.replace(whole[-1], rows=last_one, source="derived"))
        if last_two > last_one:
            out.append(Entry(device, world, hidden, last_two, "two_shot", source="derived"))
    return out
