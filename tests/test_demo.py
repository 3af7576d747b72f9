"""The demo: one whole run, what makes it fail, the picture, and the command."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from typer.testing import CliRunner

from tpfuse.__main__ import app
from tpfuse.cli import demo, demo_models, drawing
from tpfuse.report import Boundary, Report


def boundary(kind: str, collective: str = "all_reduce", rewrite: str | None = "all_reduce_norm", **rest) -> Boundary:
    norm = "rms_norm" if collective == "all_reduce" else None
    facts = {"norm": norm, "feeds_norm": norm is not None, "fused": rewrite is not None, "rewrite": rewrite}
    return Boundary(kind, "model.layers.0.x", collective, (0, 1), **{**facts, **rest})


MERGED = [boundary("moe→final_norm", rewrite="merge_all_reduces")] * 2
UNFUSED = boundary("attention→dense_mlp", rewrite=None)
BOUNDARIES = [boundary("embedding→attention"), UNFUSED, *MERGED, boundary("unknown", "all_gather", None)]
FAMILY = replace(demo_models.FAMILIES["llama"], must_fuse=3, may_miss=1)
REFERENCE = numpy.ones((1, 2, 4))
RESULT = demo.Result(
    reports=[Report(BOUNDARIES, norms=3, collectives_after=4)],
    eager={"all_reduce": 4, "_allgather_base": 1},
    ours={"all_reduce": 3, "fused": 2, "_allgather_base": 1},
    eager_logits=REFERENCE.astype("float32") * 1.01,
    our_logits=REFERENCE.astype("float32") * 1.01,
    seconds=1.0,
)


def test_counts_come_from_the_report(capsys):
    assert demo.show(FAMILY, [RESULT, RESULT], REFERENCE) == (3, 4)
    shown = capsys.readouterr().out
    assert "attention→dense_mlp" in shown
    numbers = {line[:38].strip(): line[38:].split() for line in shown.splitlines()}
    assert numbers["all-reduces that ran"] == ["4", "3"]
    assert numbers["of them inside a fused operation"] == ["0", "2"]
    assert numbers["norms on their own"] == ["3", "1"]
    assert numbers["relative L2 error against float64"] == ["1.00e-02", "1.00e-02"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ours": {"all_reduce": 4, "fused": 2, "_allgather_base": 1}}, "5 collectives ran"),
        ({"our_logits": RESULT.our_logits * 1.1}, "relative error"),
        ({"our_logits": RESULT.our_logits * numpy.float32("nan")}, "disagree|relative error"),
    ],
)
def test_a_broken_promise_fails(change, message):
    broken = replace(RESULT, **change)
    with pytest.raises(demo.DemoError, match=message):
        demo.show(FAMILY, [broken, broken], REFERENCE)


def test_ranks_that_disagree_and_too_few_fusions_fail():
    with pytest.raises(demo.DemoError, match="disagree"):
        demo.show(FAMILY, [RESULT, replace(RESULT, our_logits=RESULT.our_logits * 1.0001)], REFERENCE)
    for family in (replace(FAMILY, must_fuse=5), replace(FAMILY, may_miss=0)):
        with pytest.raises(demo.DemoError, match=r"3 of 4 all-reduces before a norm fused, expected [45]"):
            demo.show(family, [RESULT, RESULT], REFERENCE)


def test_table_without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert "embedding→attention, model.layers.0.x, all_reduce: all_reduce_norm" in demo._table(RESULT.reports[0])


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = drawing.draw([("A model", BOUNDARIES)], tmp_path / "new")
    assert path == tmp_path / "new" / "boundaries.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_no_picture_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert drawing.draw([("A model", BOUNDARIES)], tmp_path) is None


def test_merged_all_reduces_are_drawn_as_one():
    backward = boundary("unknown", rewrite=None, direction="backward")
    assert [len(group) for group in drawing.groups([*BOUNDARIES, backward])] == [1, 1, 2, 1]


def test_whole_demo(tmp_path, monkeypatch, capsys):
    """Two processes; without a C++ compiler, which is quicker and one of the cases the demo promises to handle."""
    monkeypatch.setattr(demo_models, "why_inductor_cannot_compile_for_cpu", lambda: "there is no C++ compiler here")
    assert demo.run(["qwen3"], tmp_path) == "demo: OK 5/5 fused"
    shown = capsys.readouterr().out
    assert "aot_eager" in shown and "dense_mlp→final_norm" in shown
    if drawing.draw([], tmp_path):
        assert (tmp_path / "boundaries.png").exists()


@pytest.mark.nightly
def test_a_rank_that_raises_fails_with_its_traceback(tmp_path):
    setup = demo.Setup("cpu", "gloo", False, "aot_eager")
    with pytest.raises(demo.DemoError, match=r"rank [01] raised(.|\n)*Traceback"):
        list(demo.run_ranks(setup, str(tmp_path), ["llama"]))  # nothing was saved there


def test_main_says_why_and_exits_with_an_error(monkeypatch, capsys):
    def fail(*_):
        raise demo.DemoError("no luck")

    monkeypatch.setattr(demo, "run", fail)
    assert demo.main() == 1
    assert capsys.readouterr().out == "demo: FAILED: no luck\n"


def test_command(monkeypatch):
    seen = []
    monkeypatch.setattr(demo, "run", lambda families, output: seen.append((families, output)) or "demo: OK 1/1 fused")
    result = CliRunner().invoke(app, ["demo", "--family", "llama", "--output", "there"])
    assert result.exit_code == 0 and result.output == "demo: OK 1/1 fused\n"
    assert seen == [(["llama"], Path("there"))]
    wrong = CliRunner().invoke(app, ["demo", "--family", "gpt"])
    assert wrong.exit_code == 2 and "qwen3" in wrong.output
