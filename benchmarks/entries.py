"""Dispatch table entries from results files of kernels.py: how the measured ones of tpfuse/kernels/tables.py are made.

    python benchmarks/entries.py results/kernels_linked_h100.json [more files] [--table table.json]

Prints the entries as they stand in tables.py: of each size the kernel whose mean over the files is least, or the one
that the next smaller size runs where that is slower by less than `--noise`. `--table` also writes them as a file for
TPFUSE_DISPATCH_TABLE.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from records import documents

from tpfuse.cli.tune import NOISE
from tpfuse.kernels.bench.table import compacted, measured_entries
from tpfuse.kernels.symmetric.dispatch import Entry, Table


def mean_records(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record for each size and provider that every file with this size found right. Raises ValueError where the
    files are of different devices or settings."""
    if len({device_of(document) for document in documents}) > 1:
        raise ValueError("the files come from different devices or settings")
    times: dict[tuple, list[float | None]] = {}
    for record in (record for document in documents for record in document["records"]):
        right = record["us"] is not None and not record["note"]
        key = record["world"], record["hidden"], record["rows"], record["provider"]
        times.setdefault(key, []).append(record["us"] if right else None)
    return [
        {"world": world, "hidden": hidden, "rows": rows, "provider": provider, "us": statistics.mean(us), "note": ""}
        for (world, hidden, rows, provider), us in times.items()
        if None not in us
    ]


def device_of(document: dict[str, Any]) -> str:
    """The name under which the table looks the device up."""
    machine = document["machine"]
    return f"virtual {machine['device']}" if "virtual" in machine["setting"] else machine["device"]


def entries_of(documents: list[dict[str, Any]], noise: float = NOISE) -> list[Entry]:
    return compacted(measured_entries(mean_records(documents), device_of(documents[0]), noise))


def shown(entry: Entry) -> str:
    """As tables.py writes it."""
    how = (f"{name}={value}" for name, value, usual in
           (("split", entry.split, 1), ("warps", entry.warps, 0)) if value != usual)  # fmt: skip
    given = [f'"{entry.device}"', str(entry.world), str(entry.hidden), str(entry.rows), f'"{entry.kernel}"', *how]
    return f"    Entry({', '.join(given)}),"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--noise", type=float, default=NOISE)
    parser.add_argument("--table", type=Path, help="write a table for TPFUSE_DISPATCH_TABLE here")
    arguments = parser.parse_args()
    entries = entries_of([run for path in arguments.results for run in documents(path)], arguments.noise)
    print("\n".join(map(shown, entries)))
    if arguments.table:
        names = ", ".join(path.name for path in arguments.results)
        arguments.table.write_text(Table(entries, f"from {names}").to_json(indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
