"""Batches of random calls in Triton's interpreter: what is right passes their checks, what is wrong does not."""

from __future__ import annotations

from tpfuse.kernels.bench.overlap import TINY_RECIPES, Call, Ledger, draw_calls, make_batch

from .protocol import Seat, run

EXCHANGED = [recipe for recipe in TINY_RECIPES if recipe.kernel == "exchanged"]


def play(seat: Seat, calls: list[Call], places: list[tuple[str, int]]) -> list[int]:
    """Wrong rows after two replays, and at one more look at the first call's results for each of `places`, where one
    element is changed: of which tensor, in which row."""
    ledger = Ledger.on("cpu")
    batch = make_batch(seat.ws, ledger, calls, 1)
    for _ in range(2):
        batch.run()
    found = [ledger.wrong_rows]
    ledger.clock -= len(calls)
    for name, row in places:
        before, results = ledger.wrong_rows, ledger.tensor(0, name, calls[0].rows, calls[0].recipe)
        right = results.clone()
        results[row, 5] += 1
        batch.steps[-1 - len(calls)].run()
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


def stressed(seat: Seat, calls: list[Call], plant: str, replays: int) -> int:
    ledger = Ledger.on("cpu")
    batch = make_batch(seat.ws, ledger, calls, 3, plant=plant if seat.ws.rank == 1 else "")
    for _ in range(replays):
        batch.run()
    return ledger.wrong_rows


def test_exchanges_among_calls_of_all_kernels() -> None:
    calls = draw_calls(13, 20, TINY_RECIPES, (0, 1, 2, 3, 5))
    assert {call.recipe.kernel for call in calls} == {recipe.kernel for recipe in TINY_RECIPES}
    assert run(2, stressed, calls, "", 2) == [[0], [0]]


def test_flags_of_an_exchange_that_are_up_too_early_are_found() -> None:
    calls = draw_calls(1, 30, EXCHANGED, (1, 2, 3, 5))
    _, (wrong,) = run(2, stressed, calls, "copy", 2, patience=20, rest=False)
    assert wrong > 0
