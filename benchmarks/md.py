"""Markdown tables, and the records of a results file that have a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def records_of(name: str) -> list[dict]:
    return [r for r in json.loads((RESULTS / name).read_text())["records"] if r.get("us", r.get("ms")) is not None]
