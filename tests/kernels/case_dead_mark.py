"""A rank that gave up a wait never again lets a number pass, on any rank: in Triton's interpreter."""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

import pytest
import torch

from tpfuse.kernels.symmetric.one_shot import one_shot
from tpfuse.kernels.symmetric.timeout import gave_up, set_timeout
from tpfuse.kernels.words import EPOCHS, MARKS, POISON

from .case_protocol import Call, launch
from .protocol import Seat, run

KERNELS = ["one_shot", "split", "two_shot", "barrier"]
CASES = [
    *((2, kernel) for kernel in KERNELS),
    *(pytest.param(3, kernel, marks=pytest.mark.nightly) for kernel in KERNELS),
    *(pytest.param(n, kernel, marks=pytest.mark.nightly) for n in (4, 6) for kernel in ("one_shot", "two_shot")),
]


def make(seat: Seat, call: Call) -> torch.Tensor:
    """y of the call; of a split row this program's columns, the rest being NaN on purpose."""
    if call.kernel != "split":
        return launch(call, seat)[0].y
    op = call.operands(seat.ws.rank)
    out, _ = one_shot(op, seat.ws, 2, first=seat.program).run()
    seat.fence.wait()
    return out.y[:, seat.program * call.hidden // 2 :][:, : call.hidden // 2]


def judge(y: torch.Tensor, seat: Seat, call: Call) -> str:
    """ "nan" (in every row), "right" (in every row that is a number) or "wrong"."""
    right = call.expected(seat.ws.world)[0].y
    if call.kernel == "split":
        right = right[:, seat.program * call.hidden // 2 :][:, : call.hidden // 2]
    numbers = ~y.isnan().any(-1)
    if not numbers.any():
        return "nan"
    return "right" if torch.allclose(y[numbers], right[numbers], atol=1e-3, rtol=1e-3) else "wrong"


def calls_of(kernel: str, count: int) -> list[Call]:
    return [Call(kernel, 1, 64, torch.float32, seed=n) for n in range(count)]


def seats_of(kernel: str) -> int:
    return 2 if kernel == "split" else 1


def marked(seat: Seat, kernel: str) -> list[str]:
    if seat.ws.rank == 1:
        seat.ws.state[MARKS] = POISON
    return [judge(make(seat, call), seat, call) for call in calls_of(kernel, 2)]


@pytest.mark.parametrize(("world", "kernel"), CASES)
def test_with_the_mark_set_every_result_on_every_rank_is_nan(kernel: str, world: int) -> None:
    answers = run(world, marked, kernel, programs_per_rank=seats_of(kernel), rest=False)
    assert {word for rank in answers for words in rank for word in words} == {"nan"}


def in_turn(seat: Seat, kernel: str, turn: Any) -> tuple[list[str], bool, set[bool]]:
    """Rank 0 makes each call before the others begin it, so that it gives up, and finds their words three calls
    later."""
    out = []
    if seat.ws.rank == 0:
        set_timeout(seat.ws.watch, 2e-3)
    for call in calls_of(kernel, 5):
        turn.wait()
        if seat.ws.rank == 0:
            out.append(judge(make(seat, call), seat, call))
        turn.wait()
        if seat.ws.rank != 0:
            out.append(judge(make(seat, call), seat, call))
    return out, gave_up(seat.ws.watch), set((seat.ws.state[MARKS] == POISON).tolist())


@pytest.mark.parametrize(("world", "kernel"), CASES)
def test_words_that_came_late_are_never_taken_for_fresh_ones(kernel: str, world: int) -> None:
    seats = seats_of(kernel)
    turn = multiprocessing.get_context("fork").Barrier(world * seats)
    answers = run(world, in_turn, kernel, turn, programs_per_rank=seats, rest=False)
    for rank, programs in enumerate(answers):
        for words, gone, dead in programs:
            assert gone == (rank == 0) and dead == {rank == 0}
            assert words[0] == "nan" or (rank != 0 and words[0] == "right")  # rank 0 had sent its x
            assert set(words[1:]) == {"nan"}, f"rank {rank}: {words}"


def other_shape(seat: Seat, turn: Any) -> bool:
    """Rank 1 is dead and three calls ahead, in a two-shot; rank 0 comes late to a one-shot of two rows, whose words
    cover the NaN that rank 1 has put into its own slot. What rank 1 then sends to rank 0 as the sum of its columns."""
    (late, ahead), words = (Call("one_shot", 2, 64, torch.float32), Call("two_shot", 1, 64, torch.float32)), 64
    if seat.ws.rank == 1:
        seat.ws.state[MARKS] = POISON
        seat.ws.state[EPOCHS] = 3 << 2
        turn.wait()
        launch(ahead, seat)  # waits for the words of rank 0, and takes the late ones for them
    else:
        turn.wait()
        time.sleep(1)
        set_timeout(seat.ws.watch, 2e-3)
        launch(late, seat)
    turn.wait()
    sums = seat.ws.buffer[words : 2 * words].view(torch.float32)[words // 2 :]
    return seat.ws.rank == 1 or bool(sums.isnan().all())


def test_late_words_of_another_shape_do_not_make_a_dead_rank_send_a_number() -> None:
    turn = multiprocessing.get_context("fork").Barrier(2)
    assert run(2, other_shape, turn, rest=False, patience=3) == [[True], [True]]
