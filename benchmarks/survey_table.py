"""The table of docs/policy.md, made from results/parallelize_survey.jsonl.

python benchmarks/survey_table.py        writes it between the page's marks
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "parallelize_survey.jsonl", ROOT / "docs" / "policy.md"
START, END = "<!-- survey -->\n", "<!-- /survey -->\n"
POLICIES = ("whole", "attention", "own rows")


def table(records: list[dict]) -> str:
    """One line for each family: the outcome, what is cut over the whole group, and the share of the weights a rank."""
    families: dict[str, dict[str, dict]] = {}
    for record in records:
        families.setdefault(record["family"], {})[record["policy"]] = record
    right = sum(all(r["outcome"] == "right" for r in of.values()) for of in families.values())
    lines = [
        f"{len(families)} configurations; {right} are right under all three policies.",
        "",
        "| family | numbers | cut (kind/ranks) | share, whole group | share, attention group | share, own rows |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    refused = []
    for family, of in sorted(families.items()):
        name = family.removesuffix("Config")
        outcomes = dict.fromkeys(of[p]["outcome"] for p in POLICIES)
        cut = of["whole"]["cut"].replace("_", " ") or "–"
        shares = [f"{of[p]['share']:.2f}" if of[p]["share"] else "–" for p in POLICIES]
        lines.append(f"| {name} | {', '.join(outcomes)} | {cut} | {' | '.join(shares)} |")
        why = next((of[p]["reason"] for p in POLICIES if of[p]["outcome"] != "right"), "")
        if why:
            refused.append(f"* {name}: {re.sub('^[A-Za-z]*Error: ', '', why).replace('*', chr(92) + '*')}")
    return "\n".join([*lines, "", "What is said of those that are not right everywhere:", "", *refused, ""])


def page(text: str, records: list[dict]) -> str:
    """The page with the table in it."""
    before, rest = text.split(START)
    return before + START + "\n" + table(records) + "\n" + END + rest.split(END)[1]


def read() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), read()))
