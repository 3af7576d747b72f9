"""The protocol, model-checked: with all rules nothing is wrong; without any one of them something is."""

from __future__ import annotations

from pathlib import Path

import pytest

from .model import RULES, Call, Violation, explore

ONE, TWO, MEET = Call(), Call("two_shot"), Call("barrier")
SPLIT, NONE = Call(split=2), Call(rows=0)
ONE_OF_2, TWO_OF_2 = Call(rows=2), Call("two_shot", rows=2)  # two rows, one program
GRID_2, GRID_3 = Call(rows=2, grid=2), Call(rows=3, grid=2)


@pytest.mark.parametrize(
    ("world", "calls"),
    [
        (2, [ONE] * 5),
        (2, [TWO] * 4),
        (2, [MEET] * 5),
        (2, [SPLIT] * 3),
        (2, [GRID_2, GRID_3, ONE]),
        (2, [Call("two_shot", rows=3)] * 2),
        (2, [ONE_OF_2, TWO, MEET, NONE, ONE, SPLIT]),
        (2, [TWO_OF_2, GRID_2, MEET, TWO]),
        (3, [ONE] * 4),
        (3, [TWO] * 2),
        (3, [MEET, ONE]),
        (3, [ONE, TWO, MEET]),
        (3, [TWO, NONE, ONE]),
        (4, [ONE]),
        pytest.param(3, [MEET] * 2, marks=pytest.mark.nightly),
        pytest.param(3, [ONE_OF_2, ONE], marks=pytest.mark.nightly),
        pytest.param(3, [SPLIT], marks=pytest.mark.nightly),
        pytest.param(3, [GRID_2], marks=pytest.mark.nightly),
        pytest.param(4, [ONE] * 2, marks=pytest.mark.nightly),
    ],
)
def test_every_result_is_right_and_nobody_waits_for_ever(world: int, calls: list[Call]) -> None:
    assert explore(world, calls) > 20


def test_two_slots_would_do_and_one_would_not() -> None:
    explore(2, [ONE, TWO, ONE, TWO], slots=2)
    with pytest.raises(Violation):
        explore(2, [ONE, TWO, ONE, TWO], slots=1)


@pytest.mark.parametrize(
    ("world", "calls", "give_ups"),
    [
        (2, [ONE] * 6, (0, 1)),  # the rank that gives up in the first call may be five calls ahead
        (2, [TWO] * 6, (0,)),
        (2, [TWO] * 3, (0, 1)),
        (2, [MEET] * 6, (0,)),
        (2, [ONE_OF_2, MEET, ONE, TWO, ONE], (0,)),
        (2, [ONE_OF_2, MEET, ONE, TWO, ONE], (1,)),
        (2, [TWO_OF_2, ONE, MEET, ONE_OF_2], (0,)),
        (2, [SPLIT], (0,)),
        (2, [GRID_2, TWO], (1,)),
        (3, [ONE] * 3, (0,)),
        pytest.param(2, [TWO] * 6, (0, 1), marks=pytest.mark.nightly),
        pytest.param(2, [MEET] * 6, (0, 1), marks=pytest.mark.nightly),
        pytest.param(2, [TWO_OF_2, ONE, MEET, ONE_OF_2, TWO], (1,), marks=pytest.mark.nightly),
        pytest.param(2, [GRID_2, GRID_2], (1,), marks=pytest.mark.nightly),
        pytest.param(2, [SPLIT, SPLIT], (0,), marks=pytest.mark.nightly),
        pytest.param(3, [TWO] * 2, (0,), marks=pytest.mark.nightly),
        pytest.param(3, [MEET] * 2, (0,), marks=pytest.mark.nightly),
        pytest.param(3, [MEET, ONE], (2,), marks=pytest.mark.nightly),
    ],
)
def test_after_a_wait_that_was_given_up_no_result_is_a_wrong_number(world, calls, give_ups) -> None:
    assert explore(world, calls, give_ups) > 1000


#: For each rule: calls in which it matters, who may give up, and what happens without it.
NEGATIVE_CONTROLS = {
    "sentinel": ([ONE], (), "a wait for ever"),
    "rotating slots": ([ONE] * 3, (), "a wait for ever"),
    "stored once": ([ONE], (), "not at rest"),
    "clear after read": ([ONE] * 4, (), "a wrong number"),
    "barrier before clear": ([ONE] * 2, (), "a wait for ever"),
    "push before wait": ([ONE], (), "a wait for ever"),
    "kernel boundary": ([ONE] * 4, (), "a wrong number"),
    "own epoch": ([GRID_2] * 2, (), "a wait for ever"),
    "all epochs": ([ONE, GRID_2], (), "not at rest"),
    "no rows, no call": ([ONE, NONE, NONE, ONE], (), "a wait for ever"),
    "residency": ([SPLIT], (), "a wait for ever"),
    "inbox emptied": ([SPLIT] * 2, (), "a wrong number"),
    "two stages": ([MEET] * 2, (), "a wrong number"),
    "release": ([MEET], (), "a wrong number"),
    "flag of the next call": ([MEET] * 2, (), "a wait for ever"),
    "dead mark": ([ONE] * 4, (0,), "a wrong number"),
    "mark before push": ([ONE] * 4, (0,), "a wrong number"),
    "own words": ([ONE] * 4, (0,), "a number on a dead rank"),
    "mark of the rank": ([GRID_3, ONE, ONE, GRID_2], (0,), "a wrong number"),
    "mark stays": ([ONE] * 4, (0,), "a wrong number"),
    "sums of the dead": ([ONE_OF_2, ONE, ONE, TWO], (1,), "a wrong number"),
    "whole row": ([TWO] * 4, (0,), "a wrong number"),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_needed(rule: str) -> None:
    calls, give_ups, what = NEGATIVE_CONTROLS[rule]
    with pytest.raises(Violation, match=what) as found:
        explore(2, calls, give_ups, (rule,))
    assert len(str(found.value).splitlines()) > 2  # and the way there


def test_the_kernels_page_names_every_rule() -> None:
    page = (Path(__file__).parents[2] / "docs/kernels.md").read_text(encoding="utf-8")
    assert not [rule for rule in RULES if f"| {rule} |" not in page]
