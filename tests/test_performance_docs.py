"""The pages say what the results files say: their tables are those that benchmarks/tables.py makes of them.
And results files of slices join into one only where they belong together."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
docs = pytest.mark.docs  # `make docs-check` runs what asks whether pages are true, `make test` the rest


def script(name):
    """A script of benchmarks/ as a module; it imports its neighbours as when it is run."""
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@docs
def test_the_tables_of_the_pages_are_made_from_the_results_files():
    pages = script("page_tables")
    shown = [place[2] for page in pages.pages() for place in pages.PLACE.finditer(page.read_text("utf-8"))]
    assert {"side_by_side", "linked", "four", "virtual", "models", "layers", "norm", "overhead"} <= set(shown)
    for page in pages.pages():
        assert pages.with_tables(page.read_text("utf-8")) == page.read_text("utf-8"), page.name


@docs
def test_a_number_that_the_results_do_not_have_is_seen():
    pages = script("page_tables")
    page = (ROOT / "docs/performance.md").read_text("utf-8")
    spoilt = page.replace("| decode 1 | 4.26 |", "| decode 1 | 4.25 |")
    assert spoilt != page == pages.with_tables(spoilt)


@docs
def test_a_table_without_rows_is_refused():
    """A page with an empty table says nothing, and looks right."""
    with pytest.raises(ValueError, match="no rows for the table"):
        script("md").table(["GPUs", "tokens/s"], iter(()))


def test_the_coverage_page_is_made_from_its_results_file():
    coverage = script("coverage")
    assert (ROOT / "docs/coverage.md").read_text("utf-8") == coverage.page(coverage.Results.load())


def results(world, device="H200", note=""):
    record = {"world": world, "rows": 1, "provider": "a", "us": 1}
    return {"machine": {"device": device, "note": note}, "records": [record]}


def test_slices_join_with_all_their_notes():
    whole = script("join").joined([results(2, note="first"), results(4)], "N = 8 is missing")
    assert [record["world"] for record in whole["records"]] == [2, 4]
    assert whole["machine"] == {"device": "H200", "note": "first; N = 8 is missing"}


@pytest.mark.parametrize(
    ("other", "words"), [(results(4, "H100"), "different machines"), (results(2), "more than one record")]
)
def test_what_does_not_belong_together_is_not_joined(other, words):
    with pytest.raises(ValueError, match=words):
        script("join").joined([results(2), other])


def test_runs_joined_into_one_file_come_apart_again(tmp_path):
    records = script("records")

    def run(date, *times):
        sizes = [{"world": 2, "hidden": 64, "rows": rows, "provider": "a", "us": us} for rows, us in times]
        return {"machine": {"date": date}, "records": sizes}

    runs = [run("first", (1, 2.0), (8, None)), run("second", (8, 3.0))]
    records.write(tmp_path / "runs.json", records.joined(runs))
    assert records.documents(tmp_path / "runs.json") == runs
    assert '"rows": 8' in (tmp_path / "runs.json").read_text().splitlines()[-3]  # one record a line


def test_slices_of_several_norms_join():
    def of(norm):
        return {"machine": {}, "records": [{"norm": norm, "hidden": 64, "rows": 1, "provider": "ours", "us": 1}]}

    assert len(script("join").joined([of("rms_norm"), of("layer_norm")])["records"]) == 2


def test_a_results_file_says_by_which_table_the_operator_ran(tmp_path, monkeypatch):
    """Two runs of one machine may differ in that alone."""
    from tpfuse.kernels.bench.measure import Record
    from tpfuse.kernels.symmetric.dispatch import Table, default_table

    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for a script that is run: kernels.py imports its neighbours
    kernels = script("kernels")
    monkeypatch.setattr(kernels, "machine", lambda setting: {"setting": setting})
    monkeypatch.setenv("TPFUSE_DISPATCH_TABLE", str(tmp_path / "table.json"))
    (tmp_path / "table.json").write_text(Table([], "from first.json").to_json())
    default_table.cache_clear()
    try:
        kernels.Results(tmp_path / "out.json", "linked", True)([Record(2, 64, 1, "dispatched", 1.0)], {})
    finally:
        default_table.cache_clear()
    assert json.loads((tmp_path / "out.json").read_text())["machine"]["table"].startswith("from first.json (")


@docs
def test_the_local_kernels_choice_is_as_close_to_the_best_as_the_page_says():
    tables = script("tables")
    said = tables.variants(tables.CARDS["h100"])
    assert "of 88 sizes (0 more" in said and "0.052, 'layer_norm', 2048" in said and "0.028" in said


def test_a_picture_of_several_files_has_each_size_from_the_last(tmp_path):
    pytest.importorskip("matplotlib")

    def results(name, *sizes):
        records = [{"world": 2, "hidden": 64, "rows": rows, "provider": "dispatched", "us": us} for rows, us in sizes]
        path = tmp_path / name
        path.write_text(json.dumps({"machine": {"device": "H", "setting": "linked"}, "records": records}))
        return path

    plots = script("plots")
    drawn = []
    plots._fastest = lambda records: drawn.append(sorted((r["rows"], r["us"]) for r in records)) or {}
    plots.kernels([results("a", (1, 2.0), (256, 9.0)), results("b", (256, 7.0))], tmp_path / "picture.png")
    assert [(1, 2.0), (256, 7.0)] in drawn


@pytest.mark.parametrize(
    ("card", "setting"), [("h200", "linked"), ("h200", "four"), ("h100", "linked"), ("h100", "virtual")]
)
def test_the_shipped_tables_measured_entries_are_those_of_the_results_files(card, setting):
    """Where one kind of GPU has several files, of their means."""
    from tpfuse.kernels.symmetric.tables import SHIPPED

    runs = getattr(script("tables").CARDS[card], setting)
    entries = script("entries").entries_of([run.document() for run in runs])
    worlds = {entry.world for entry in entries}
    shipped = [e for e in SHIPPED.entries if e.device == entries[0].device and e.source == "measured"]
    assert entries == sorted((e for e in shipped if e.world in worlds), key=lambda e: (e.world, e.hidden, e.rows))
