"""Kernels that wait for a peer in vain give up, say whom they missed, and leave NaN: in Triton's interpreter."""

from __future__ import annotations

import time

import pytest
import torch

from tpfuse.errors import OptionError, PeerTimeoutError
from tpfuse.kernels.symmetric.barrier import barrier
from tpfuse.kernels.symmetric.one_shot import one_shot
from tpfuse.kernels.symmetric.timeout import GONE, LATE, gave_up, late_ranks, new_watch, raise_if_late, set_timeout
from tpfuse.kernels.symmetric.two_shot import two_shot
from tpfuse.kernels.words import EPOCHS, MARKS, POISON

from .case_protocol import Call, equal_on_all_ranks, play
from .protocol import Seat, run

PATIENCE = 2e-3  # two units, which the interpreter takes for 64 polls
KERNELS = ["one_shot", "two_shot", "barrier"]


def launch(kernel: str, call: Call, seat: Seat):
    ws, op = seat.ws, call.operands(seat.ws.rank)
    if kernel == "one_shot":
        return one_shot(op, ws).run()[0]
    if kernel == "two_shot":
        return two_shot(op, ws).run()[0]
    return barrier(op, ws).run()[0]


def desert(seat: Seat, kernel: str, calls: int, deserter: int) -> dict:
    """`calls` good calls, then one, of several rows a program, that the deserter does not make."""
    for n in range(calls):
        launch(kernel, Call(rows=2, seed=n), seat)
    if seat.ws.rank == deserter:
        return {}
    set_timeout(seat.ws.watch, PATIENCE)  # not before: a good call waits as long as it takes
    out = launch(kernel, Call(rows=5, seed=calls), seat)
    message = ""
    try:
        raise_if_late(seat.ws, "tp", "model.layers.3.mlp")
    except PeerTimeoutError as error:
        message = str(error)
    # The rest of what was queued on the stream does not wait its full time once more.
    started = time.monotonic()
    set_timeout(seat.ws.watch, float("inf"))
    again = launch(kernel, Call(rows=5, seed=calls + 1), seat)
    return {
        "late": late_ranks(seat.ws.watch), "message": message, "again": time.monotonic() - started,
        "nan": bool(out.y.isnan().all() and again.y.isnan().all() and out.residual_out.isnan().any()),
    }  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_peer_that_never_comes(kernel: str) -> None:
    (left,), _ = run(2, desert, kernel, 3, 1, rest=False)
    assert left["nan"]
    assert set(left["late"]) == {1} and left["again"] < 20
    for part in ("group 'tp', rank 0", "model.layers.3.mlp", "rank 1 (call 3)", "TPFUSE_PEER_TIMEOUT"):
        assert part in left["message"]


@pytest.mark.nightly
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("world", [3, 4])
def test_each_rank_names_the_one_of_several_that_is_missing(world: int, kernel: str) -> None:
    answers = run(world, desert, kernel, 1, 2, rest=False)
    for rank in {*range(world)} - {2}:
        # (a two-shot may also miss the sums of a rank that itself waits in vain)
        assert 2 in answers[rank][0]["late"] and answers[rank][0]["nan"]


def half_a_row(seat: Seat) -> tuple[bool, bool, bool] | None:
    """Only the first program of each rank runs: the peers' words come, those of the own rank's other program do not."""
    if seat.program:
        return None
    out, _ = one_shot(Call(rows=1, options={"norm": "layer_norm"}).operands(seat.ws.rank), seat.ws, 2, first=0).run()
    named = seat.ws.rank in late_ranks(seat.ws.watch)
    return bool(out.y[:, :32].isnan().all()), named, bool((seat.ws.state[MARKS] == POISON).all())


def test_programs_of_a_row_do_not_wait_for_each_other_for_ever() -> None:
    answers = run(2, half_a_row, programs_per_rank=2, patience=0.01, rest=False)
    assert [first for first, _ in answers] == [(True, True, True)] * 2


def late_but_in_time(seat: Seat, calls: list[Call]) -> tuple[list, bool]:
    if seat.ws.rank == 1:
        time.sleep(0.3)
    return play(seat, calls), gave_up(seat.ws.watch)


def test_a_late_peer_within_the_limit_is_waited_for() -> None:
    answers = run(2, late_but_in_time, [Call(kernel, 3) for kernel in ("one_shot", "two_shot", "barrier")], patience=60)
    assert not any(late for ((_, late),) in answers)
    equal_on_all_ranks([[played] for ((played, _),) in answers])


def first_barrier_before_the_wrap(seat: Seat, epoch: int) -> tuple[list, bool]:
    """Rank 1 is late, so that rank 0 meets flags that nobody has raised yet."""
    seat.ws.state[EPOCHS] = epoch
    if seat.ws.rank == 1:
        time.sleep(0.3)
    return play(seat, [Call("barrier", 3, seed=1), Call("barrier", 2, seed=2), Call("barrier", 5, seed=3)])


@pytest.mark.parametrize("count", [-2, -1, 0])
def test_a_flag_never_raised_is_not_taken_for_a_raised_one(count: int) -> None:
    """A barrier first used when the count of calls is about to be 0 again."""
    equal_on_all_ranks(run(2, first_barrier_before_the_wrap, count * 4 + 1))


# -- the watch by itself ----------------------------------------------------------------------------------------------


def test_the_limit_comes_from_the_argument_or_the_environment(monkeypatch) -> None:
    monkeypatch.delenv("TPFUSE_PEER_TIMEOUT", raising=False)
    assert int(new_watch("cpu")[0]) == pytest.approx(600e9 / 2**20, abs=1)
    monkeypatch.setenv("TPFUSE_PEER_TIMEOUT", "2.5")
    assert int(new_watch("cpu")[0]) == pytest.approx(2.5e9 / 2**20, abs=1)
    assert int(new_watch("cpu", 1e-9)[0]) == 1
    assert int(new_watch("cpu", float("inf"))[0]) == 0x7FFFFFFF


@pytest.mark.parametrize("bad", ["0", "-1", "soon", "nan"])
def test_a_limit_that_is_none_is_refused_by_name(bad: str, monkeypatch) -> None:
    monkeypatch.setenv("TPFUSE_PEER_TIMEOUT", bad)
    with pytest.raises(OptionError, match=f"TPFUSE_PEER_TIMEOUT={bad}; allowed: a positive number"):
        new_watch("cpu")
    with pytest.raises(OptionError, match="timeout=0;"):
        new_watch("cpu", 0)


def test_the_host_reads_what_the_device_noted() -> None:
    watch = new_watch("cpu")
    assert not gave_up(watch) and late_ranks(watch) == {}
    watch[GONE], watch[LATE + 5] = 1, 42
    assert gave_up(watch) and late_ranks(watch) == {5: 41}
    assert watch.dtype == torch.int32
