"""Batches of random calls in Triton's interpreter: what is right passes their checks, what is wrong does not."""

from __future__ import annotations

from tpfuse.kernels.bench.overlap import TINY_RECIPES, Call, Ledger, make_batch

from .protocol import Seat, run


def play(seat: Seat) -> list[int]:
    """Wrong rows after two replays, and after one more look at a result in which one element was changed."""
    ledger = Ledger.on("cpu")
    calls = [Call(TINY_RECIPES[0], 2, False), Call(TINY_RECIPES[3], 1, False)]
    batch = make_batch(seat.ws, ledger, calls, 1)
    for _ in range(2):
        batch.run()
    found = [ledger.wrong_rows]
    ledger.clock -= len(calls)
    ledger.tensor(0, "y", 2, TINY_RECIPES[0])[1, 5] *= 1.02
    *_, check, _, _ = batch.steps
    check.run()
    return [*found, ledger.wrong_rows]


def test_a_batch_of_random_calls() -> None:
    assert run(2, play) == [[[0, 1]], [[0, 1]]]
