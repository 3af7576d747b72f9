"""From measurements to a dispatch table. Pure: lists in, entries out.

Virtual ranks measure latency and the cost of a kernel's structure well and a link's bandwidth not at all. So a table
for virtual ranks takes the fastest kernel at each size as measured, while a table for linked GPUs takes from the same
measurements only how to run a one-shot (programs a row, warps), and where the one-shot ends from bytes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from .dispatch import Entry

# Bytes of one rank's tensor from which the two-shot is faster over NVLink: where its smaller traffic outweighs its
# second trip, on GPUs of the Hopper family. Two ranks move as much either way.
ONE_SHOT_BYTES = {2: 8 << 20, 4: 800_000, 8: 220_000}
TWO_SHOT_BYTES = {2: 0, 4: 8 << 20, 8: 8 << 20}  # past that, a plain all-reduce is limited by bandwidth alone
_NAME = re.compile(r"(?P<kernel>one_shot|two_shot|barrier)(?: s(?P<split>\d+))?(?: w(?P<warps>\d+))?( rotating)?$")


def entry_of(provider: str, device: str, world: int, hidden: int, rows: int) -> Entry | None:
    """The table entry that runs a benchmark's provider; None for those that dispatch cannot pick."""
    found = _NAME.match(provider)
    if found is None or provider == "barrier":
        return None
    return Entry(device, world, hidden, rows, found["kernel"], int(found["split"] or 1), int(found["warps"] or 0))


def measured_entries(records: Iterable[dict], device: str) -> list[Entry]:
    """The fastest right kernel at each measured (world, hidden, rows)."""
    best: dict[tuple[int, int, int], dict] = {}
    for record in records:
        key = record["world"], record["hidden"], record["rows"]
        usable = record["us"] is not None and not record["note"] and entry_of(record["provider"], device, *key)
        if usable and (key not in best or record["us"] < best[key]["us"]):
            best[key] = record
    return [entry_of(best[key]["provider"], device, *key) for key in sorted(best)]  # type: ignore[misc]


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
