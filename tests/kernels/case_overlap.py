"""Batches of random calls in Triton's interpreter: what is right passes their checks, what is wrong does not."""

from __future__ import annotations

import pytest
import torch

from tpfuse.kernels.bench.overlap import TINY_RECIPES, draw_calls, make_batch
from tpfuse.kernels.bench.overlap_steps import Call, Ledger, Recipe

from .protocol import Seat, run

EXCHANGED = [recipe for recipe in TINY_RECIPES if recipe.kernel == "exchanged"]
BACKWARD = [recipe for recipe in TINY_RECIPES if "backward" in recipe.kernel]


def play(seat: Seat, calls: list[Call], places: list[tuple[str, int]]) -> list[int]:
    """Wrong rows after two replays, and at one more look at the first call's results for each of `places`, where one
    element is changed: of which tensor, in which row."""
    ledger = Ledger.on("cpu")
    batch = make_batch(seat.ws, ledger, calls, 1)
    for _ in range(2):
        batch.run()
    found = [ledger.wrong_rows]
    ledger.clock -= len(calls)
    first, *others = (2 if call.recipe in BACKWARD else 1 for call in calls)  # steps that check a call
    for name, row in places:
        before, results = ledger.wrong_rows, ledger.tensor(0, name, calls[0].rows, calls[0].recipe)
        if name in ("dweight", "dbias"):
            results = ledger.room(0, name, 1, calls[0].recipe.hidden, torch.float32)
        right = results.clone()
        results[row, 5] += 1
        for step in batch.steps[-1 - first - sum(others) :][:first]:
            step.run()
        results.copy_(right)
        found.append(ledger.wrong_rows - before)
    return found


def test_a_batch_of_random_calls() -> None:
    calls = [Call(TINY_RECIPES[0], 2, False), Call(TINY_RECIPES[3], 1, False)]
    assert run(2, play, calls, [("y", 1), ("residual_out", 0)]) == [[[0, 1, 1]]] * 2


def test_of_an_exchange_y_is_looked_at_in_all_rows_and_h_in_the_own_ones() -> None:
    calls = [Call(EXCHANGED[0], 6, False), Call(TINY_RECIPES[6], 5, False), Call(EXCHANGED[1], 2, False)]
    places = [("y", row) for row in range(6)] + [("residual_out", row) for row in range(3)]
    assert run(2, play, calls, places) == [[[0, *[1] * 9]]] * 2


def test_of_a_backward_call_every_result_is_looked_at() -> None:
    calls = [Call(recipe, 6, False) for recipe in BACKWARD]
    for call in calls[1:3]:
        own = 3 if call.recipe.scattered else 6
        places = [("y", row) for row in range(6)] + [("residual_out", row) for row in range(own)] + [("dweight", 0)]
        places += [("dbias", 0)] if call.recipe.norm == "layer_norm" else []
        assert run(2, play, [call, *calls], places) == [[[0, *[1] * len(places)]]] * 2


def stressed(seat: Seat, calls: list[Call], plant: str, replays: int) -> int:
    ledger = Ledger.on("cpu")
    batch = make_batch(seat.ws, ledger, calls, 3, plant=plant if seat.ws.rank == 1 else "")
    for _ in range(replays):
        batch.run()
    return ledger.wrong_rows


def test_calls_of_all_kernels() -> None:
    calls = draw_calls(13, 20, TINY_RECIPES, (0, 1, 2, 3, 5))
    assert {call.recipe.kernel for call in calls} == {recipe.kernel for recipe in TINY_RECIPES}
    assert run(2, stressed, calls, "", 2) == [[0], [0]]


@pytest.mark.parametrize("recipes", [EXCHANGED, BACKWARD], ids=["exchanges", "backward"])
def test_flags_that_are_up_too_early_are_found(recipes: list[Recipe]) -> None:
    calls = draw_calls(1, 30, recipes, (1, 2, 3, 5))
    _, (wrong,) = run(2, stressed, calls, "copy", 2, patience=20, rest=False)
    assert wrong > 0
