"""Results files: JSON with one record a line, and one file for several runs of the same sizes.

    python benchmarks/records.py results/whole.json run1.json run2.json ...     join runs into one file

A document is {"machine": {...}, "records": [{...}, ...]} or a list of records. A file of several runs has "runs", the
machine of each, in place of "machine"; in its records "run_values" names the fields that hold one value a run (None
where a run has no such record).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Document = dict[str, Any]
#: What tells one record from another; everything else was measured.
SIZE = ("world", "model", "norm", "hidden", "phase", "rows", "size", "megabytes", "provider")


@dataclass(frozen=True)
class OfModel:
    """What a record of a whole model begins with: the ranks, the model, and what was run of it at which size."""

    world: int
    model: str
    phase: str
    size: int


def dump(document: Any) -> str:
    """JSON text in which every record, and every other value of the document, has a line of its own."""
    if isinstance(document, list):
        return "[\n" + ",\n".join(_line(record) for record in document) + "\n]\n"
    parts = []
    for name, value in document.items():
        many = isinstance(value, (list, dict)) and any(isinstance(v, (list, dict)) for v in _values(value))
        parts.append(f"{json.dumps(name)}: {_block(value) if many else _line(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _values(value: Any) -> Sequence[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _block(value: Any) -> str:
    if isinstance(value, dict):
        return "{\n" + ",\n".join(f" {json.dumps(k, ensure_ascii=False)}: {_line(v)}" for k, v in value.items()) + "\n}"
    return "[\n" + ",\n".join(f" {_line(v)}" for v in value) + "\n]"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def write(path: Path, document: Any) -> None:
    path.write_text(dump(document), encoding="utf-8")


def write_run(path: Path, machine: Document, records: Sequence[Any]) -> None:
    """The document of one run; its records are dictionaries or instances of dataclasses."""
    write(path, {"machine": machine, "records": [r if isinstance(r, dict) else asdict(r) for r in records]})


def documents(path: Path) -> list[Document]:
    """Each run of a results file as a document of its own."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    if "runs" not in whole:
        return [whole]
    fields = whole["run_values"]
    each = []
    for index, machine in enumerate(whole["runs"]):
        records = []
        for record in whole["records"]:
            own = {name: value[index] if name in fields else value for name, value in record.items()}
            if own.pop("there"):
                records.append(own)
        each.append({"machine": machine, "records": records})
    return each


def joined(runs: Sequence[Document]) -> Document:
    """One document of several runs."""
    sizes: dict[tuple, list[dict[str, Any] | None]] = {}
    for index, run in enumerate(runs):
        for record in run["records"]:
            key = tuple((name, record[name]) for name in SIZE if name in record)
            sizes.setdefault(key, [None] * len(runs))[index] = record
    fields = sorted({name for run in runs for record in run["records"] for name in record} - set(SIZE))
    records = [
        dict(key)
        | {"there": [record is not None for record in each]}
        | {name: [None if record is None else record.get(name) for record in each] for name in fields}
        for key, each in sizes.items()
    ]
    return {"runs": [run["machine"] for run in runs], "run_values": ["there", *fields], "records": records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    arguments = parser.parse_args()
    write(arguments.out, joined([document for path in arguments.runs for document in documents(path)]))


if __name__ == "__main__":
    main()
