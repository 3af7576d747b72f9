"""Markdown tables, and the records of a results file that were measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
#: What a record says that was measured: microseconds, milliseconds, or a rate.
MEASURED = ("us", "ms", "tokens_per_s")


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table. Raises ValueError where it has no rows: a page would say nothing and look right."""
    rows = list(rows)
    if not rows:
        raise ValueError(f"no rows for the table {' | '.join(head)}")
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def records_of(name: str) -> list[dict]:
    records = json.loads((RESULTS / name).read_text())["records"]
    return [r for r in records if any(r.get(unit) is not None for unit in MEASURED)]
