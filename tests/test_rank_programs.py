"""Ranks whose graphs differ and may: numbers are right, nobody hangs, and nothing raises where eager runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tpfuse

from .rank_programs import (
    DIFFERING,
    a_statistic_of_the_other_sum,
    all_reduce,
    norm_on_one_rank,
    one_of_two_sums,
    same_on_all_ranks,
    sum_for_a_log,
    worst_error,
)
from .ranks import run_processes

#: One of each kind, whose gradients every run compares: another output, a part of one, a statistic, another norm.
TRAINED = (sum_for_a_log, one_of_two_sums, a_statistic_of_the_other_sum, norm_on_one_rank, same_on_all_ranks)


def errors(rank: int, options: dict, trained: tuple = (*DIFFERING, same_on_all_ranks)) -> dict:
    found = {}
    for program in (*DIFFERING, same_on_all_ranks):
        for train in (False, True) if program in trained else (False,):
            found[program.__name__, train] = worst_error(program, rank, train, **options)
    found["merged"] = [b.rewrite for b in tpfuse.reports()[-1].boundaries if b.direction == "forward"]
    return found


def assert_right(ranks: list[dict]) -> list[list]:
    for found in ranks:
        merged = found.pop("merged")
        wrong = {key: error for key, error in found.items() if not error < 5e-6}
        assert not wrong, wrong
        yield merged


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"inner": "aot_eager", "plan_timeout": 20.0}, TRAINED),
        *(
            pytest.param(options, (*DIFFERING, same_on_all_ranks), marks=pytest.mark.nightly)
            for options in (
                {"inner": "aot_eager", "plan_timeout": 20.0},
                {"inner": "aot_eager", "check_plans": False},
                {"inner": "inductor", "plan_timeout": 100.0},
            )
        ),
    ],
    ids=["agreed", "agreed-all-trained", "unchecked", "inductor"],
)
def test_ranks_that_read_different_values_of_a_boundary_get_right_numbers(options, trained):
    merged = list(assert_right(run_processes(2, errors, options, trained)))
    # Where all ranks do the same they agree on more than what the program wrote; unasked they change nothing.
    expected = ["all_reduce_norm", None] if "check_plans" in options else ["merge_all_reduces"] * 2
    assert all(sorted(found, key=str) == sorted(expected, key=str) for found in merged), merged


@pytest.mark.nightly
def test_four_ranks_of_which_one_reads_more():
    list(assert_right(run_processes(4, errors, {"inner": "aot_eager", "plan_timeout": 60.0})))


def at_a_break(rank: int) -> float:
    """One rank's graph breaks (it prints), its peer's does not."""
    weight = torch.ones(16)

    def fn(x):
        a = all_reduce(x)
        if rank == 0:
            print("a log")
        h = a + all_reduce(x.sin())
        return F.rms_norm(h, (16,), weight)

    x = torch.full((3, 16), rank + 1.0).cumsum(-1)
    with torch.no_grad():
        exact = fn(x.double())
        got = torch.compile(fn, backend="tpfuse", options={"inner": "aot_eager", "plan_timeout": 60.0})(x)
    return float((got - exact).norm() / exact.norm())


def test_a_graph_that_breaks_on_one_rank_only_is_run_as_written_by_the_other():
    assert max(run_processes(2, at_a_break, timeout=50)) < 1e-5


def with_symbols(rank: int) -> dict[str, float]:
    """Graphs of symbolic sizes and numbers, of which one number is a rank's own; called with two counts of rows."""
    weight = torch.ones(16)

    def start(x, number):
        return F.rms_norm((x.sin() + all_reduce(x * (1 + rank)))[:, number : number + 2], (16,), weight)

    def factor(x, number):
        return F.rms_norm(
            (x + all_reduce(x * (1 + rank)) * number + all_reduce(x.sin())).reshape(-1, 16), (16,), weight
        )

    found = {}
    for fn, number in ((start, 2 + rank), (factor, 2 + rank), (factor, 2.5 + rank)):
        torch._dynamo.reset()
        compiled = torch.compile(
            fn, backend="tpfuse", dynamic=True, options={"inner": "aot_eager", "plan_timeout": 60.0}
        )
        for rows in (8, 11):
            x = torch.linspace(-1, 1, 2 * rows * 16).reshape(2, rows, 16)
            exact = fn(x.double(), number)
            found[f"{fn.__name__} {number} {rows}"] = float((compiled(x, number) - exact).norm() / exact.norm())
    return found


def test_numbers_and_sizes_that_are_symbols():
    """A symbolic number is compared as a tensor is; the graph as written fits other sizes as well."""
    for found in run_processes(2, with_symbols):
        assert max(found.values()) < 5e-6, found
