"""`python -m tpfuse tune`: what it says it would measure, what it refuses, and the table it writes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from tpfuse.__main__ import app
from tpfuse.cli import tune as tuning
from tpfuse.cli.tune import Plan, explain
from tpfuse.errors import OptionError
from tpfuse.kernels.bench.measure import Record
from tpfuse.kernels.symmetric.dispatch import Table

SMALL = Plan((2,), (4096,), (1, 64), linked=False)


def run(*arguments: str):
    return CliRunner().invoke(app, ["tune", *arguments])


def test_a_dry_run_needs_no_gpu_and_names_sizes_kernels_and_time():
    done = run("--dry-run", "--ranks", "2", "--hidden", "4096", "--rows", "1", "--rows", "64", "--output", "mine.json")
    assert done.exit_code == 0, done.output
    sizes = ["virtual ranks", "hidden  4096", "rows    1, 64", "sizes   2", f"{SMALL.measurements} measurements"]
    kernels = ["one_shot s1 w16", "two_shot", "barrier"]
    for words in [*sizes, *kernels, "Estimated time", "TPFUSE_DISPATCH_TABLE=mine.json"]:
        assert words in done.output
    assert "functional" not in done.output, "virtual ranks have no other all-reduce to compare with"


def test_under_torchrun_the_world_is_given_and_a_plain_all_reduce_competes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    done = run("--dry-run", "--hidden", "4096")
    assert "4 processes, one a GPU, over real links" in done.output and "functional" in done.output
    assert run("--dry-run", "--ranks", "2").exit_code != 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "9"], "worlds has 9; allowed: 2, 3, 4, 5, 6, 7, 8"),
        (["--hidden", "100"], "hidden has 100; allowed: 8 to 16384 in steps of 8"),
        (["--rows", "0"], "rows has 0; allowed: 1 to 1048576"),
    ],
)
def test_sizes_that_no_kernel_takes_are_refused(arguments, words):
    done = run("--dry-run", *arguments)
    assert done.exit_code == 1 and words in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine could measure")
def test_without_a_gpu_it_says_how_to_see_what_it_would_do():
    done = run()
    assert done.exit_code == 1 and "--dry-run" in done.output


def test_a_longer_plan_takes_longer():
    assert Plan((2, 4), (4096,), (1, 64), False).seconds > SMALL.seconds > 0
    assert Plan((2,), (4096,), (1, 64), True).measurements == SMALL.measurements + 2  # the functional path
    assert "2 processes" in explain(Plan((2,), (4096,), (1,), True), "t.json")


def test_the_fastest_kernels_become_a_table_that_can_be_loaded(tmp_path, monkeypatch):
    """With measuring itself replaced, which needs GPUs."""
    times = {1: {"one_shot s4 w4": 3.0, "barrier rotating": 5.0}, 64: {"one_shot s4 w4": 9.0, "barrier rotating": 6.0}}
    said: list[str] = []

    def measure(plan, ranks, size, done):
        world, hidden, rows = size
        found = [Record(world, hidden, rows, name, us) for name, us in times[rows].items()]
        return [vars(r) for r in [*found, Record(world, hidden, rows, "two_shot w8", None, note="ranks differ")]]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuning, "_ranks", lambda plan, world: SimpleNamespace(device_name="H", setting="nothing"))
    monkeypatch.setattr(tuning, "_measure", measure)
    path = tmp_path / "table.json"
    table = tuning.tune(SMALL, path, said.append)
    assert Table.from_json(path.read_bytes()) == table
    assert [(e.rows, e.kernel, e.split) for e in table.entries] == [(1, "one_shot", 4), (64, "barrier", 1)]
    assert said[0] == "left out: two_shot w8 with 1 rows of 4096: ranks differ" and str(path) in said[-1]
    assert not list(tmp_path.glob("*.part"))


def test_nothing_to_measure_is_refused():
    with pytest.raises(OptionError, match="no rows given"):
        Plan((2,), (4096,), (), False)
