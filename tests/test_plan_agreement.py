"""The ranks of a group agree on what they send: equal plans run, others are run as written, and nobody hangs."""

from __future__ import annotations

import threading
import time
import timeit
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import tpfuse
from tpfuse._state import LEDGERS, PULSES
from tpfuse.options import parse_options
from tpfuse.report import Boundary, Report, Step
from tpfuse.runtime.ballots import Ledger, Place, ledger
from tpfuse.runtime.guard import guard
from tpfuse.runtime.plan_check import Record, describe, records

from .faults import mark, outcomes
from .graphs import fake_world
from .models import HIDDEN, Stack

PAIR = (0, 1)


def a_report(sends: str, module: str = "layers.{}.o_proj", hidden: int = HIDDEN, group=PAIR, count: int = 2) -> Report:
    """A graph of `count` all-reduces, and what is sent for them: "#0 #1" as written, "a:#0,#1" merged into one."""
    boundaries = [
        Boundary("unknown", module.format(i), "all_reduce", group, dtype="float32", hidden=hidden) for i in range(count)
    ]
    steps = [Step("all_reduce_norm", group, "float32", hidden, sends=word) for word in sends.split()]
    return Report(boundaries, steps=steps)


def a_record(sends: str, **more) -> Record:
    return records(a_report(sends, **more))[more.get("group", PAIR)]


MERGED, WRITTEN = "a:#0,#1", "#0 #1"

# -- what a plan is ---------------------------------------------------------------------------------------------------


def test_a_plan_that_sends_the_programs_tensors_in_their_order_is_as_written():
    assert a_record(WRITTEN).as_written
    assert not a_record("#1 #0").as_written, "sums would be paired wrongly"
    assert not a_record("#0").as_written and not a_record(MERGED).as_written
    kernel = replace(a_report(WRITTEN).steps[0], kernel=True)
    one = replace(a_report(WRITTEN), steps=[kernel, a_report(WRITTEN).steps[1]])
    assert not records(one)[PAIR].as_written, "a peer's plain all-reduce cannot take part in a kernel"


def test_ranks_that_name_what_decides_the_kernel_differently_have_different_plans():
    step = replace(a_report("#0", count=1).steps[0], kernel=True)
    plans = [
        records(replace(a_report("#0", count=1), steps=[replace(step, told=told)]))[PAIR] for told in ("", "overlap")
    ]
    assert plans[0].sent != plans[1].sent
    assert "all_reduce_norm (overlap)" in describe(PAIR, dict(enumerate(plans)))


def test_a_plan_that_sends_over_another_group_first_is_not_as_written():
    """A peer that keeps the program's order would wait for the one sum, and this rank for the other."""
    mine, theirs = a_report("#0 #2"), a_report("#1 #3", group=(0, 2))
    boundaries = [b for pair in zip(mine.boundaries, theirs.boundaries, strict=True) for b in pair]
    first, second, third, fourth = (s for pair in zip(mine.steps, theirs.steps, strict=True) for s in pair)
    plans = [
        records(Report(boundaries, steps=steps))
        for steps in ([first, second, third, fourth], [second, first, third, fourth], [first, second, fourth, third])
    ]
    assert [plan[PAIR].as_written for plan in plans] == [True, False, False]
    assert len({plan[PAIR].sent for plan in plans}) == 3, "and no two of them go together"


def test_what_a_rank_hands_out_and_how_it_fuses_are_no_part_of_what_is_sent():
    report = a_report(WRITTEN)
    other = Report(
        [replace(b, fused=True, rewrite="all_reduce_post_norm", module="elsewhere") for b in report.boundaries],
        steps=[replace(step, op="all_reduce") for step in report.steps],
    )
    assert records(report)[PAIR].sent == records(other)[PAIR].sent
    assert a_record(MERGED).sent != a_record("b:#0,#1").sent


def test_plans_are_made_group_by_group():
    """A rank of another replica has other members in its attention group, and the same plan."""
    plans = records(Report(a_report(WRITTEN).boundaries + a_report(WRITTEN, group=(0, 2)).boundaries))
    assert sorted(plans) == [(0, 1), (0, 2)]
    other = records(Report(a_report(WRITTEN, group=(2, 3)).boundaries + a_report(WRITTEN, group=(0, 2)).boundaries))
    assert plans[0, 2].sent == other[0, 2].sent


def test_words_on_a_difference_name_boundary_ranks_and_reason():
    fused, plain = a_record(WRITTEN), a_record(WRITTEN)
    left = replace(plain, boundaries=[plain.boundaries[0], replace(plain.boundaries[1], reason="an internal error")])
    done = replace(fused, boundaries=[replace(b, fused=True, rewrite="all_reduce_norm") for b in fused.boundaries])
    words = describe(PAIR, {0: replace(done, boundaries=[plain.boundaries[0], done.boundaries[1]]), 1: left})
    assert "boundary 1 (layers.1.o_proj)" in words and "group [0, 1]" in words
    assert "rank 0: all_reduce of float32 x 64 fused by all_reduce_norm" in words
    assert "rank 1: all_reduce of float32 x 64 left as it is (an internal error)" in words


# -- through a store --------------------------------------------------------------------------------------------------


def ledgers(count: int = 2) -> list[Ledger]:
    store = dist.HashStore()
    return [Ledger(store, rank) for rank in range(count)]


def together(*calls) -> list:
    """What each call gives or raises, each in a thread of its own."""
    found: list = [None] * len(calls)

    def run(index, call):
        try:
            found[index] = call()
        except tpfuse.PlanMismatchError as error:
            found[index] = str(error)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def votes(*plans, places=None, books=None, timeout=10.0, count=2) -> list:
    places = places or (Place(1), Place(1))
    books = books or ledgers(len(plans))
    records = [{PAIR: a_record(plan, count=count) if isinstance(plan, str) else plan} for plan in plans]
    return together(
        *(
            lambda b=b, r=r, p=p: b.agree(r, timeout, p)
            for b, r, p in zip(books, records, places, strict=True)
        )
    )  # fmt: skip


def test_equal_plans_run_and_others_run_as_written_on_all_ranks():
    assert votes(MERGED, MERGED) == [True, True]
    assert votes(MERGED, "b:#0,#1") == [False, False]
    # The rank that sends what its program wrote has nothing to change.
    assert votes(MERGED, WRITTEN) == [False, True]
    assert votes(WRITTEN, WRITTEN) == [True, True]


def test_ranks_that_recompile_more_often_than_their_peers_ask_nobody():
    """Rows 5, 7, 1, 0 on one rank: the same plan again and again, since rows are no part of it."""
    books = ledgers()
    assert votes(MERGED, MERGED, books=books) == [True, True]
    began = time.monotonic()
    assert all(books[0].agree({PAIR: a_record(MERGED)}, 60.0, Place(1, turn)) for turn in (1, 2, 3))
    assert time.monotonic() - began < 1


def test_what_was_not_agreed_on_is_not_tried_again():
    books = ledgers()
    assert votes(MERGED, WRITTEN, books=books) == [False, True]
    assert books[0].agree({PAIR: a_record("c:#0,#1")}, 60.0, Place(1, 1)) is False


def test_new_code_that_communicates_alike_is_voted_on_anew():
    books = ledgers()
    assert votes(MERGED, WRITTEN, books=books) == [False, True]
    assert votes(MERGED, MERGED, books=books, places=(Place(2), Place(7))) == [True, True]
    assert votes(MERGED, WRITTEN, books=books, places=(Place(3), Place(8))) == [False, False]


def test_a_rank_whose_peer_is_at_another_graph_does_not_wait_for_it():
    """One rank's graph breaks, its peer's does not."""
    began = time.monotonic()
    part = a_record("a:#0", count=1)
    assert votes(MERGED, part, timeout=60.0) == [False, False]
    assert votes(MERGED, a_record("#0", count=1), timeout=60.0) == [False, True]
    assert time.monotonic() - began < 5


def test_a_rank_alone_waits_once_and_runs_as_written(caplog):
    one, _ = ledgers()
    assert one.agree({PAIR: a_record(MERGED)}, 0.05, Place(1)) is False
    assert "ranks [1] of group [0, 1]" in caplog.text


def test_a_rank_that_comes_late_hears_the_outcome():
    one, two = ledgers()
    assert one.agree({PAIR: a_record(MERGED)}, 0.05, Place(1)) is False
    assert two.agree({PAIR: a_record(MERGED)}, 60.0, Place(1)) is False


def test_a_rank_that_alone_wants_more_of_a_running_graph_gets_an_error_and_no_wrong_number():
    """Its peers send the sum of two; nothing on this rank can tell it one of them."""
    books = ledgers()
    assert votes(MERGED, MERGED, books=books) == [True, True]
    with pytest.raises(tpfuse.PlanMismatchError, match="agreed on before") as found:
        books[0].agree({PAIR: a_record(WRITTEN)}, 0.1, Place(1, 1))
    assert "ranks [1] of group [0, 1]" in str(found.value)
    assert books[1].heard({PAIR: a_record(MERGED)}) == str(found.value)


def test_a_disagreement_in_one_group_is_one_for_the_peers_in_the_others():
    """Ranks 0 to 3 on a 2 x 2 mesh; only 0 and 1 see that they differ."""
    plans = {0: "a:#0,#1", 1: "b:#0,#1", 2: "a:#0,#1", 3: "a:#0,#1"}
    rows, columns = ((0, 1), (2, 3)), ((0, 2), (1, 3))

    def plan(rank: int) -> dict:
        row, column = next(g for g in rows if rank in g), next(g for g in columns if rank in g)
        mine, theirs = a_report(plans[rank], group=row), a_report("m:#2,#3", group=column)
        return records(Report(mine.boundaries + theirs.boundaries, steps=mine.steps + theirs.steps))

    books = ledgers(4)
    assert together(*(lambda r=r: books[r].agree(plan(r), 10.0, Place(1)) for r in range(4))) == [False] * 4
    plans[1] = plans[0]
    assert together(*(lambda r=r: books[r].agree(plan(r), 10.0, Place(2)) for r in range(4))) == [True] * 4


def test_different_versions_are_an_error_on_every_rank():
    old = replace(a_record(MERGED), tpfuse="0.0.7")
    said = votes(old, MERGED)
    assert said[0] == said[1] and "different versions" in said[0] and "tpfuse 0.0.7" in said[0]


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
        guarded = guard(plain, a_report(WRITTEN), parse_options({}))
        guarded(1)
        # Many short bursts: some of them have a core for themselves, whatever else the machine does.
        cost = [min(timeit.repeat(lambda fn=fn: fn(1), number=500, repeat=400)) / 500 for fn in (plain, guarded)]
    assert cost[1] - cost[0] < 2e-6


# -- two processes ----------------------------------------------------------------------------------------------------


def broken_on_rank_one(rank: int, folder: str, when: str) -> tuple[int, float]:
    """A pass that fails on one rank alone, which then keeps plain collectives."""
    import tpfuse.passes.recognise.known as known

    torch.manual_seed(0)
    options = {"inner": "aot_eager", "plan_timeout": 60}
    x = torch.randn(3, HIDDEN)
    if when == "later":
        torch.compile(Stack(2, layers=1), backend="tpfuse", options=options)(x)
    if rank == 1:
        mark(folder)

        def fail(*_):
            raise RuntimeError("made to fail")

        known.recognise = fail
    model = Stack(2, layers=2)
    exact = model(x)
    got = torch.compile(model, backend="tpfuse", options=options)(x)
    return len(tpfuse.reports()[-1].fused), float((got - exact).norm() / exact.norm())


@pytest.mark.parametrize("when", [pytest.param("first", marks=pytest.mark.nightly), "later"])
def test_one_rank_on_which_the_pass_fails_goes_with_its_peers(when, tmp_path):
    ended = outcomes(2, broken_on_rank_one, str(tmp_path), when)
    assert [o.error for o in ended] == ["", ""], ended
    assert ended[0].value[0] > 0 and ended[1].value[0] == 0
    assert max(o.value[1] for o in ended) < 1e-5


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
