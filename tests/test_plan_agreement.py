"""Ranks that compile different plans hear of it, all of them, and ranks that only look different do not."""

from __future__ import annotations

import threading
import timeit

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import tpfuse
from tpfuse.options import parse_options
from tpfuse.report import Boundary, Report, Step
from tpfuse.runtime.guard import guard
from tpfuse.runtime.heartbeat import PULSES
from tpfuse.runtime.plan_check import LEDGERS, Ledger, Record, disagreement, distinct, ledger, records

from .faults import mark, outcomes
from .graphs import fake_world
from .models import HIDDEN, Stack

PAIR = (0, 1)


def a_report(*fused: bool, module: str = "layers.{}.o_proj", hidden: int = HIDDEN, group=PAIR) -> Report:
    """A graph with one all-reduce for each argument, fused or not."""
    boundaries = [
        Boundary(
            "unknown", module.format(i), "all_reduce", group, rewrite="all_reduce_norm" if done else None, fused=done,
            reason="" if done else "an internal error", dtype="float32", hidden=hidden,
        )
        for i, done in enumerate(fused)
    ]  # fmt: skip
    steps = [Step("all_reduce_norm" if done else "all_reduce", group, "float32", hidden) for done in fused]
    return Report(boundaries, steps=steps)


def a_record(*fused: bool, **more) -> Record:
    return records(a_report(*fused, **more))[more.get("group", PAIR)]


# -- what counts as a disagreement ------------------------------------------------------------------------------------


def test_a_rank_that_fell_back_is_named_with_the_boundary():
    place, words = disagreement(PAIR, {0: [a_record(True, True)], 1: [a_record(True, False)]}, own=0)
    assert place == "first"
    assert "boundary 1 (layers.1.o_proj)" in words and "group [0, 1]" in words
    assert "rank 0: all_reduce of float32 x 64 fused by all_reduce_norm" in words
    assert "rank 1: all_reduce of float32 x 64 left as it is (an internal error)" in words


def test_ranks_that_recompile_more_often_than_their_peers_agree():
    """Rows 5, 7, 1, 0 on one rank: the same graph again and again, since rows are no part of a plan."""
    busy = [a_record(True, True)] * 4
    assert len(distinct(busy)) == 1
    assert disagreement(PAIR, {0: busy, 1: [a_record(True, True)]}, own=0) is None


def test_a_second_plan_for_the_same_graph_is_compared_with_the_peers_second_one():
    """Say, the same model compiled again with other options, on all ranks; one of them has not got there yet."""
    first, second, other = a_record(True, True), a_record(False, False), a_record(True, False)
    assert disagreement(PAIR, {0: [first, second], 1: [first]}, own=0) is None
    assert disagreement(PAIR, {0: [first, second], 1: [first, second]}, own=1) is None
    place, words = disagreement(PAIR, {0: [first, second], 1: [first, other]}, own=1)
    assert place.endswith("/1") and "boundary 0" in words


def test_graphs_that_one_rank_alone_has_are_not_compared():
    one, two = a_record(True), a_record(True, False, module="draft.{}")
    assert disagreement(PAIR, {0: [one, two], 1: [one]}, own=0) is None
    assert disagreement(PAIR, {0: [one, two], 1: [one, a_record(True, hidden=8)]}, own=0) is None


def test_a_graph_break_on_one_rank_only_is_no_disagreement():
    assert disagreement(PAIR, {0: [a_record(True, True)], 1: [a_record(True)]}, own=0) is None


def test_first_graphs_of_different_models_are_a_disagreement():
    assert disagreement(PAIR, {0: [a_record(True)], 1: [a_record(True, hidden=32)]}, own=0)[0] == "first"


def test_different_versions_are_said_to_be_that(monkeypatch):
    old = a_record(True)
    monkeypatch.setattr(tpfuse, "__version__", "0.0.7")
    _, words = disagreement(PAIR, {0: [old], 1: [a_record(True)]}, own=0)
    assert "different versions" in words and "tpfuse 0.0.7" in words


def test_plans_are_compared_group_by_group():
    """A rank of another replica has other members in its attention group, and the same plan."""
    plans = records(Report(a_report(True).boundaries + a_report(True, group=(0, 2)).boundaries))
    assert sorted(plans) == [(0, 1), (0, 2)]
    other = records(Report(a_report(True, group=(2, 3)).boundaries + a_report(True, group=(0, 2)).boundaries))
    assert plans[0, 2].digest == other[0, 2].digest and plans[0, 2].graph == other[0, 2].graph


# -- through a store --------------------------------------------------------------------------------------------------


def ledgers(count: int = 2) -> list[Ledger]:
    store = dist.HashStore()
    return [Ledger(store, rank) for rank in range(count)]


def in_threads(*calls) -> list[str]:
    said = [""] * len(calls)

    def run(index, call):
        try:
            call()
        except tpfuse.PlanMismatchError as error:
            said[index] = str(error)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_every_rank_raises_the_same_words_and_again_at_the_next_try():
    one, two = ledgers()
    calls = (
        lambda: one.agree({PAIR: a_record(True)}, 10),
        lambda: two.agree({PAIR: a_record(False)}, 10),
    )
    first = in_threads(*calls)
    assert first[0] == first[1] != "" and in_threads(*calls) == first


def test_a_rank_that_was_not_asked_any_more_hears_of_a_later_disagreement():
    one, two = ledgers()
    same = a_record(True)
    assert in_threads(lambda: one.agree({PAIR: same}, 10), lambda: two.agree({PAIR: same}, 10)) == ["", ""]
    later = a_record(True, module="other.{}")
    one.agree({PAIR: later}, 10)  # runs at once: only the first graph waits
    with pytest.raises(tpfuse.PlanMismatchError) as found:
        two.agree({PAIR: a_record(False, module="other.{}")}, 10)
    assert one.heard({PAIR: later}) == str(found.value)


def test_a_group_whose_other_ranks_compile_nothing_waits_once_and_goes_on(caplog):
    one, _ = ledgers()
    one.agree({PAIR: a_record(True)}, timeout=0.05)
    assert "ranks [1] of group [0, 1]" in caplog.text
    assert timeit.timeit(lambda: one.agree({PAIR: a_record(True, module="b{}")}, 60), number=1) < 5


def test_worlds_that_do_not_exist_are_not_asked():
    assert ledger() is None
    with fake_world(2):
        assert ledger() is None


def test_graphs_without_collectives_are_returned_as_they_are():
    fn = lambda x: x  # noqa: E731
    assert guard(fn, Report(), parse_options({})) is fn


def test_a_guarded_call_costs_next_to_nothing_after_the_first():
    """Nothing of the check is left: less than two microseconds a call, of the tens that a compiled graph takes."""

    def plain(*args):
        return args

    with fake_world(2):
        guarded = guard(plain, a_report(True), parse_options({}))
        guarded(1)
        cost = [
            min(timeit.repeat(lambda fn=fn: fn(1), number=20_000, repeat=5)) / 20_000 for fn in (plain, guarded)
        ]  # fmt: skip
    assert cost[1] - cost[0] < 2e-6


# -- two processes ----------------------------------------------------------------------------------------------------


def broken_on_rank_one(rank: int, folder: str, when: str) -> None:
    """A pass that fails on one rank alone, which then keeps plain collectives."""
    import tpfuse.passes.pipeline as fuse_module

    torch.manual_seed(0)
    options = {"inner": "aot_eager", "plan_timeout": 60}
    x = torch.randn(3, HIDDEN)
    if when == "later":
        torch.compile(Stack(2, layers=1), backend="tpfuse", options=options)(x)
    if rank == 1:
        mark(folder)

        def fail(*_):
            raise RuntimeError("made to fail")

        fuse_module.recognise = fail
    torch.compile(Stack(2, layers=2), backend="tpfuse", options=options)(x)


@pytest.mark.parametrize("when", [pytest.param("first", marks=pytest.mark.nightly), "later"])
def test_one_rank_that_falls_back_is_an_error_on_every_rank(when, tmp_path):
    ended = outcomes(2, broken_on_rank_one, str(tmp_path), when)
    assert [o.error for o in ended] == ["PlanMismatchError"] * 2, ended
    assert ended[0].message == ended[1].message
    assert "boundary 0 (layers.0)" in ended[0].message and "rank 1: " in ended[0].message
    assert "made to fail" in ended[0].message
    assert all(o.exitcode == 0 for o in ended)


def unequal_rows(rank: int) -> int:
    """Replicas: each rank's rows are its own, padded to the same number before the sum over both."""
    from .graphs import all_reduce

    weight = torch.ones(HIDDEN)

    @torch.no_grad()
    def fn(x):
        padded = F.pad(x * 2, (0, 0, 0, 8 - x.shape[0]))
        return F.rms_norm(all_reduce(padded), (HIDDEN,), weight)[: x.shape[0]]

    compiled = torch.compile(fn, backend="tpfuse", options={"inner": "aot_eager", "plan_timeout": 20}, dynamic=False)
    rows = (5, 7, 1, 0) if rank == 0 else (5, 5, 5, 5)
    for count in rows:
        compiled(torch.ones(count, HIDDEN))
    return len(tpfuse.reports())


def test_ranks_that_do_not_compile_in_step_run_on():
    ended = outcomes(2, unequal_rows)
    assert [o.value for o in ended] == [4, 1], ended


def worlds(rank: int, folder: str) -> list[tuple[int, int]]:
    """A compiled model that outlives its process group. The group goes by its name, on which Dynamo does not guard."""
    import gc

    from .graphs import all_reduce

    def fn(x):
        return F.rms_norm(all_reduce(x * 2, "0"), (HIDDEN,))

    compiled = torch.compile(fn, backend="tpfuse", options={"inner": "aot_eager", "peer_timeout": 20.0})
    seen = []
    for turn in range(3):
        with torch.no_grad():
            compiled(torch.ones(3, HIDDEN))
        seen.append((len(ledger().published[PAIR][rank]), len(tpfuse.reports())))
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()
        for thread in threading.enumerate():
            if thread.name == "tpfuse-pulse":
                thread.join(timeout=10)
        pulses = sum(thread.name == "tpfuse-pulse" for thread in threading.enumerate())
        assert (len(LEDGERS), len(PULSES), pulses) == (0, 0, 0), (len(LEDGERS), len(PULSES), pulses)
        dist.init_process_group("gloo", init_method=f"file://{folder}/{turn}", rank=rank, world_size=2)
    return seen


def test_a_model_that_outlives_its_world_agrees_anew_in_the_next(tmp_path):
    for ended in outcomes(2, worlds, str(tmp_path)):
        assert ended.value == [(1, 1)] * 3, ended
