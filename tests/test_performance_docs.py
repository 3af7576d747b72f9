"""docs/performance.md says what the results files say: its tables are those that benchmarks/tables.py makes of them."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tables():
    spec = importlib.util.spec_from_file_location("benchmark_tables", ROOT / "benchmarks/tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TABLES


@pytest.mark.parametrize("name", ["linked", "models", "layers", "norm"])
def test_a_table_of_the_page_is_made_from_the_results_file(name):
    assert tables()[name]() in (ROOT / "docs/performance.md").read_text(encoding="utf-8")
