"""What one rank alone wants of a later call: right numbers, or an error on every rank, and never a wrong number."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor

import tpfuse
from tpfuse.runtime.ballots import Place

from .faults import outcomes
from .test_plan_agreement import MERGED, PAIR, WRITTEN, a_record, ledgers, together, votes

HIDDEN, LATER = 32, 3
F1, F2, G = ("model.py", 1, "forward"), ("model.py", 50, "draft"), ("model.py", 90, "layer")


def all_reduce(x: Tensor) -> Tensor:
    return funcol.all_reduce(x, "sum", dist.group.WORLD)


# -- programs: n is 2 on all ranks, and on rank 0 alone LATER in the third call ----------------------------------------


def number_beside(x, y, n):
    return F.rms_norm(x + all_reduce(y) + all_reduce(y.sin()), (HIDDEN,)) * n


def a_number_times_one_of_two_sums(x, y, n):
    return F.rms_norm(x + all_reduce(y) * n + all_reduce(y.sin()), (HIDDEN,))


def a_number_of_rows(x, y, n):
    return F.rms_norm((x + all_reduce(y))[:, n : n + 2], (HIDDEN,))


def a_break_in_front(x, y, n):
    if n == LATER:
        torch._dynamo.graph_break()
    return F.rms_norm(x + all_reduce(y) + all_reduce(y.sin()), (HIDDEN,))


def a_sum_for_a_log(x, y, n):
    a, b = all_reduce(y), all_reduce(y.sin())
    out = F.rms_norm(x + a + b, (HIDDEN,))
    return (out, a) if n == LATER else (out,)


def a_break_between_sums(x, y, n):
    a = all_reduce(y)
    if n == LATER:
        torch._dynamo.graph_break()
    return F.rms_norm(x + a + all_reduce(y.sin()), (HIDDEN,))


def a_break_in_what_is_called(x, y, n):
    return a_break_between_sums(x, y, n) + 1


def called(fn: Callable, compiled: Callable, rank: int) -> list[float | str]:
    """The error of each call against float64, or what it raised. Eager comes first: afterwards the group may be of no
    more use."""
    calls = []
    for call in range(4):
        x = torch.randn(2, 8, HIDDEN, generator=torch.Generator().manual_seed(call))
        y = torch.randn(2, 8, HIDDEN, generator=torch.Generator().manual_seed(100 * call + rank))
        n = LATER if rank == 0 and call == 2 else 2
        calls.append((x, y, n, first(fn(x.double(), y.double(), n))))
    found: list[float | str] = []
    for x, y, n, exact in calls:
        try:
            with torch.no_grad():
                got = first(compiled(x, y, n))
            found.append(float((got - exact).norm() / exact.norm()))
        except tpfuse.TPFuseError as error:
            found.append(type(error).__name__)
    return found


def first(value):
    return value[0] if isinstance(value, tuple) else value


def right_ones(rank: int) -> dict[str, list]:
    found = {}
    programs = (
        (a_break_in_front, None, 3.0),  # waits that long once, in vain
        (number_beside, None, 60.0),
        (a_number_times_one_of_two_sums, True, 60.0),
        (a_number_of_rows, True, 60.0),
    )
    for fn, dynamic, seconds in programs:
        options = {"inner": "aot_eager", "plan_timeout": seconds}
        compiled = torch.compile(fn, backend="tpfuse", options=options, dynamic=dynamic)
        found[fn.__name__] = called(fn, compiled, rank)
    return found


def test_numbers_and_breaks_of_one_rank_alone_that_change_nothing_of_what_is_sent_are_right():
    """Under dynamic=True a number is symbolic from the first call on: its values differ later without a compilation."""
    for ended in outcomes(2, right_ones):
        assert ended.error == "", ended
        assert len(ended.value) == 4 and all(
            isinstance(error, float) and error < 1e-5 for found in ended.value.values() for error in found
        ), ended


def wrong_ones(rank: int, name: str) -> list:
    fn = globals()[name]
    compiled = torch.compile(fn, backend="tpfuse", options={"inner": "aot_eager", "plan_timeout": 3})
    return called(fn, compiled, rank)


@pytest.mark.parametrize(
    "name",
    [
        "a_break_in_what_is_called",
        *(
            pytest.param(name, marks=pytest.mark.nightly)
            for name in (
                "a_sum_for_a_log",
                "a_break_between_sums",
                "a_number_times_one_of_two_sums",
                "a_number_of_rows",
            )
        ),
    ],
)
def test_what_the_peers_do_not_send_is_an_error_on_every_rank_from_then_on(name):
    for ended in outcomes(2, wrong_ones, name, group_timeout=20):
        assert ended.error == "", ended
        assert all(isinstance(error, float) and error < 1e-5 for error in ended.value[:2]), ended
        assert ended.value[2:] == ["PlanMismatchError"] * 2, ended


# -- through a store --------------------------------------------------------------------------------------------------


WHOLE = (Place(1, 0, (F1,)),) * 2


def running(places=WHOLE):
    """The books of two ranks that have agreed on a changed plan of F1."""
    books = ledgers()
    assert votes(MERGED, MERGED, books=books, places=places) == [True, True]
    return books


def test_a_new_graph_beside_a_running_plan_waits_even_as_written():
    """A graph break on one rank alone: its first half is as written, and the peer sends both sums as one."""
    for place in (Place(1, 1, (F1,)), Place(7, 0, (F1,)), Place(8, 0, (G, F1))):
        with pytest.raises(tpfuse.PlanMismatchError, match="dynamic=True"):
            running()[0].agree({PAIR: a_record("#0", count=1)}, 0.05, place)


def test_code_that_always_sent_what_was_written_is_left_alone():
    books = running()
    assert votes("#0", "#0", books=books, places=(Place(2, 0, (F2,)),) * 2, count=1) == [True, True]
    began = time.monotonic()
    assert books[0].agree({PAIR: a_record("#0 #1 #2", count=3)}, 60.0, Place(2, 1, (F2,)))
    assert time.monotonic() - began < 5


def test_the_rest_of_a_function_whose_whole_was_agreed_on_runs_after_a_wait():
    books = running()
    assert books[0].agree({PAIR: a_record(MERGED)}, 0.05, Place(7, 0, (F1,)))
    # The round is over for the peer as well, and both count on from there.
    assert votes("d:#0,#1", "d:#0,#1", books=books, places=(Place(1, 1, (F1,)),) * 2) == [True, True]
    assert votes("e:#0,#1", "f:#0,#1", books=books, places=(Place(1, 2, (F1,)),) * 2) == [False, False]


def test_ranks_that_are_all_at_new_graphs_of_the_code_run_them_as_written():
    books, part = running(), {PAIR: a_record("#0", count=1)}
    began = time.monotonic()
    found = together(
        lambda: books[0].agree({PAIR: a_record("b:#0,#1")}, 60.0, Place(2, 0, (F1,))),
        lambda: books[1].agree(part, 60.0, Place(3, 0, (F1,))),
    )
    assert found == [False, False]
    assert books[1].agree(part, 60.0, Place(4, 0, (F1,))), "the second half needs no peer"
    assert time.monotonic() - began < 5
    with pytest.raises(tpfuse.PlanMismatchError):
        books[1].agree({PAIR: a_record("#0 #1 #2", count=3)}, 0.05, Place(1, 1, (F1,)))


def test_a_peer_that_compiles_is_waited_for_longer():
    books, new = running(), {PAIR: a_record(WRITTEN)}

    def late() -> bool:
        with books[1].compiling():
            time.sleep(0.5)
        return books[1].agree(new, 5.0, Place(1, 1, (F1,)))

    assert together(lambda: books[0].agree(new, 0.1, Place(1, 1, (F1,))), late) == [True, True]
