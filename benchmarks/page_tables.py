"""The tables of README.md and of the pages under docs/, made from the results files.

    python benchmarks/page_tables.py            # write them into the pages
    python benchmarks/page_tables.py --check    # status 1 and the names of the pages that would change

A page says where a table goes, and which one of benchmarks/tables.py, for which card:

    <!-- table: linked h200 -->
    <!-- end -->

What was counted and not measured names no card.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from tables import CARDS, TABLES

ROOT = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"(<!-- table: (\w+)(?: (\w+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(page: str) -> str:
    """`page` with every table that it names as the results files have it; KeyError for an unknown table or card."""
    return PLACE.sub(lambda place: f"{place[1]}{TABLES[place[2]](CARDS[place[3] or 'h200'])}\n{place[4]}", page)


def pages() -> list[Path]:
    every = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in every if PLACE.search(page.read_text(encoding="utf-8"))]


def main(check: Annotated[bool, typer.Option(help="write nothing; status 1 if a page would change")] = False) -> None:
    changed = []
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = with_tables(before)
        if after != before:
            changed.append(page.name)
            if not check:
                page.write_text(after, encoding="utf-8")
    print(f"{len(changed)} of {len(pages())} pages {'differ from' if check else 'written from'} the results: {changed}")
    raise typer.Exit(bool(check and changed))


if __name__ == "__main__":
    typer.run(main)
