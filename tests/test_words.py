"""Words for people are not what programs compare: a refusal has a code for that."""

from __future__ import annotations

import ast
import json

import pytest

from tests.test_rooms import modules
from tpfuse.passes.facts.refusals import Code
from tpfuse.report import Boundary, Report

#: What a sentence is called, in fields and in names.
SENTENCES = {"reason", "sentence", "problem", "runs", "said", "why"}
TAKES_APART = {"startswith", "endswith", "partition", "rpartition", "split", "find", "index", "removeprefix"}
#: Where a sentence of somebody else is looked into, which comes without a code.
OTHERS_SENTENCES = {"tpfuse.runtime.endings": "Dynamo says in words alone why it breaks a graph"}


def is_sentence(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and node.value.count(" ") > 2
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name in SENTENCES


def comparisons(source: str) -> list[str]:
    """Where a sentence is compared, searched or taken apart; whether it is empty may be asked."""
    found = []
    for node in ast.walk(ast.parse(source)):
        sides: list[ast.expr] = []
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Eq, ast.NotEq, ast.In, ast.NotIn)):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in TAKES_APART:
            sides = [node.func.value]
        if any(map(is_sentence, sides)):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def test_nothing_compares_sentences():
    found = {name: said for name, path in modules().items() if (said := comparisons(path.read_text("utf-8")))}
    assert set(found) == set(OTHERS_SENTENCES), found


@pytest.mark.parametrize("source", [
    "waits = boundary.reason == ASTRIDE",
    "kept = 'switched off' not in why",
    "name = boundary.runs.partition(':')[0]",
    "known = text == 'the norm runs over two dimensions'",
])  # fmt: skip
def test_a_compared_sentence_is_found(source):
    assert comparisons(source)


def test_every_refusal_of_the_passes_has_a_code_that_is_made_somewhere():
    made = "".join(path.read_text("utf-8") for name, path in modules().items() if name != "passes.facts.refusals")
    assert [code.name for code in Code if f"Code.{code.name}" not in made] == []


def test_a_report_without_codes_is_read():
    older = Report([Boundary("unknown", "", "all_reduce", (0, 1), reason="no norm reads it")]).to_dict()
    older["boundaries"][0].pop("code"), older["boundaries"][0].pop("kernel")
    (boundary,) = Report.from_json(json.dumps(older)).boundaries
    assert (boundary.reason, boundary.code, boundary.kernel) == ("no norm reads it", "", False)
