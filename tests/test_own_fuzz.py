"""Random programs with values that are a rank's own: every rank's outputs and gradients are right, and nothing raises.

A failure prints the seed and the program; `own_programs.draw(seed, short)` gives it again.
"""

from __future__ import annotations

import os
from statistics import geometric_mean

import pytest

from .own_fuzz import run
from .own_programs import STREAMS, draw
from .own_spellings import COUNT, FIRST
from .ranks import run_processes
from .training_faults import OF_BACKWARD

IN_BACKWARD = ("merge_all_reduces", "norm_backward")


def outcomes(world: int, seeds, folder, timeout: float, **how) -> list[dict]:
    try:
        return run_processes(world, run, world, list(seeds), str(folder), *how.values(), timeout=timeout)
    except TimeoutError as error:
        at = {name: (folder / name).read_text() for name in sorted(os.listdir(folder))}
        raise TimeoutError(f"{error}; the ranks were at the programs {at}") from None


def check(found: list[dict], short: bool, used: tuple[str, ...] = ("all_reduce_norm", "merge_all_reduces")) -> None:
    wrong = sorted({seed for rank in found for seed in rank["wrong"]})
    said = "\n".join(f"{draw(seed, short)}{[rank['wrong'].get(seed) for rank in found]}" for seed in wrong)
    what = "(tensor, error, that of the unfused graph, that of one more rounding)"
    assert not wrong, f"{what} on each rank of {wrong}:\n{said}"
    # One program's rounding is luck, that of all of them is not.
    assert geometric_mean([ratio for rank in found for ratio in rank["ratios"]]) < 1.1
    # What all ranks have alike is fused, what they have not is not.
    assert min(rank["rewrites"][name] for rank in found for name in used) > 0
    assert min(rank["apart"] for rank in found) > 0


@pytest.mark.timeout(600)
def test_programs_with_values_of_a_ranks_own_are_right(tmp_path):
    """Traced, which is a tenth of the work; what Dynamo and AOTAutograd do with the same programs is for the night. 978
    once read a symbolic size off a value that its own rewrite took away."""
    seeds = [*range(100), 978]
    check(outcomes(2, seeds, tmp_path, 580, short=True, agree=True, inner="traced"), short=True)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("world", "count"), [(2, 30), pytest.param(4, 100, marks=pytest.mark.nightly)])
def test_trained_streams_whose_gradients_are_summed_are_right(world, count, tmp_path):
    seeds = range(STREAMS, STREAMS + count)
    check(outcomes(world, seeds, tmp_path, 580, short=True, agree=True, inner="traced"), True, IN_BACKWARD)


@pytest.mark.parametrize("fault", OF_BACKWARD)
def test_a_fault_in_the_backward_pass_is_found(fault, tmp_path):
    seeds = range(STREAMS, STREAMS + 8)
    for rank in outcomes(2, seeds, tmp_path, 280, short=True, agree=True, inner="traced", fault=fault):
        assert rank["wrong"]


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_compiled_streams_whose_gradients_are_summed_are_right(tmp_path):
    check(outcomes(2, range(STREAMS, STREAMS + 60), tmp_path, 1180, short=True), True, IN_BACKWARD)


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_compiled_programs_with_values_of_a_ranks_own_are_right(tmp_path):
    check(outcomes(2, range(100), tmp_path, 580, short=True), short=True)


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_programs_that_once_were_wrong_or_raised_are_right(tmp_path):
    """401: ranks that do not agree, and a number that had been made a constant (wrong gradients on torch 2.11).
    1170, 1452: a merge in the forward pass that read a size off an incoming gradient."""
    check(outcomes(2, (401, 1170, 1452), tmp_path, 280, short=False), short=False)


def test_without_the_ranks_agreement_numbers_are_wrong(tmp_path):
    """That the programs can tell: two whose ranks send the same tensors, changed in different ways."""
    for rank in outcomes(2, (4, 21), tmp_path, 280, short=True, agree=False, inner="traced"):
        assert set(rank["wrong"]) == {4, 21}
        assert min(error for tensors in rank["wrong"].values() for _, error, *_ in tensors) > 0.05


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("world", "seeds"), [(2, range(1000, 3000)), (4, range(3000, 3300))])
def test_many_programs_with_values_of_a_ranks_own_are_right(world, seeds, tmp_path):
    check(outcomes(world, seeds, tmp_path, 7000, short=False), short=False)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("world", "inner", "step"), [(2, "aot_eager", 7), (4, "aot_eager", 19), (2, "inductor", 31)])
def test_spellings_of_values_of_a_ranks_own_are_right(world, inner, step, tmp_path):
    """Some of them; `benchmarks/fuzz.py --seeds 1000000:COUNT` runs all."""
    seeds = range(FIRST, FIRST + COUNT, step)
    check(outcomes(world, seeds, tmp_path, 3500, short=False, agree=True, inner=inner), short=False)
