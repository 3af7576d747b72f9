"""Join results files that one script wrote in slices, on one kind of machine, into one.

    python benchmarks/join.py results/layers_h200.json layers2.json layers4.json layers8.json --note "what is missing"

Refuses files of different machines or settings (the date and notes may differ), and two records of one size.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from records import write

SIZE = ("world", "model", "norm", "hidden", "phase", "rows", "size", "provider")


def joined(documents: list[dict[str, Any]], note: str = "") -> dict[str, Any]:
    """One document with all records. Raises ValueError where they cannot stand together."""

    def facts(document: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in document["machine"].items() if name not in ("date", "note", "rates")}

    records = [record for document in documents for record in document["records"]]
    if any(facts(document) != facts(documents[0]) for document in documents):
        raise ValueError("the files come from different machines or settings")
    sizes = [tuple(record.get(name) for name in SIZE) for record in records]
    twice = sorted({str(size) for size in sizes if sizes.count(size) > 1})
    if twice:
        raise ValueError(f"more than one record of {', '.join(twice)}")
    notes = [text for text in (*(d["machine"].get("note", "") for d in documents), note) if text]
    machine = documents[0]["machine"] | ({"note": "; ".join(notes)} if notes else {})
    return {"machine": machine, "records": records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("slices", type=Path, nargs="+")
    parser.add_argument("--note", default="", help="what to say of the whole")
    arguments = parser.parse_args()
    documents = [json.loads(path.read_text()) for path in arguments.slices]
    write(arguments.out, joined(documents, arguments.note))


if __name__ == "__main__":
    main()
