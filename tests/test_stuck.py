"""A rank that dies, sleeps, skips a call or brings other rows: its peers get an error that says so, and can exit."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import tpfuse
from tpfuse.report import Step
from tpfuse.runtime.heartbeat import EXIT_STUCK, Beat

from .faults import mark, outcomes
from .models import HIDDEN, Stack

LIMIT = 2.0


def waited(folder: Path, outcome) -> float:
    return outcome.seconds - float(Path(folder, "fault").read_text())


def compiled_stack(rows=(3,), **options):
    torch.manual_seed(0)
    fn = torch.compile(
        Stack(2, layers=2).eval(), backend="tpfuse", options={"inner": "aot_eager", **options}, dynamic=False
    )
    for count in rows:
        for _ in range(2):
            fn(torch.ones(count, HIDDEN))
    return fn


def die(rank: int, folder: str, how: str) -> None:
    with torch.no_grad():
        fn = compiled_stack(peer_timeout=LIMIT)
        if rank == 1:
            mark(folder)
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGSTOP)  # alive for the kernel, dead for its peers
        fn(torch.ones(3, HIDDEN))


@pytest.mark.parametrize("how", ["killed", pytest.param("stopped", marks=pytest.mark.nightly)])
def test_a_peer_that_dies(how, tmp_path):
    survivor, dead = outcomes(2, die, str(tmp_path), how, unending=(1,))
    assert survivor.error == "PeerTimeoutError" and survivor.exitcode == 0, survivor
    assert "rank 0 of group [0, 1] waited in vain at layers.0 (all_reduce_norm" in survivor.message
    assert "rank 1 is gone" in survivor.message
    assert waited(tmp_path, survivor) < 3 * LIMIT
    assert dead.exitcode in (-signal.SIGKILL, None), dead


def skip(rank: int, folder: str) -> None:
    with torch.no_grad():
        fn = compiled_stack(peer_timeout=LIMIT)
        if rank == 1:
            mark(folder)
        for step in range(3):
            if rank == 1 and step == 1:
                continue
            fn(torch.ones(3, HIDDEN))
        if rank == 1:
            time.sleep(4 * LIMIT)
            fn(torch.ones(3, HIDDEN))


def test_a_peer_that_skips_a_call(tmp_path):
    """Nobody can tell before the end that one rank is a call behind; then the counts say it."""
    waiting, skipping = outcomes(2, skip, str(tmp_path))
    assert [waiting.error, skipping.error] == ["PeerTimeoutError"] * 2
    assert "rank 1 is alive, outside compiled graphs after 4 calls (this rank: after 4)" in waiting.message
    assert waited(tmp_path, waiting) < 3 * LIMIT
    assert waiting.exitcode == skipping.exitcode == 0


def other_rows(rank: int, folder: str) -> None:
    with torch.no_grad():
        fn = compiled_stack(rows=(3, 5), peer_timeout=LIMIT)
        mark(folder)
        fn(torch.ones(3 if rank == 0 else 5, HIDDEN))


def test_a_peer_with_other_rows_under_the_groups_own_checks(tmp_path):
    ended = outcomes(2, other_rows, str(tmp_path), environment={"TORCH_DISTRIBUTED_DEBUG": "DETAIL"})
    for outcome in ended:
        assert outcome.error == "PlanMismatchError" and outcome.exitcode == 0, outcome
        assert "layers.0 (all_reduce_norm" in outcome.message
        assert "[3, 64]" in outcome.message and "[5, 64]" in outcome.message
        assert waited(tmp_path, outcome) < LIMIT


@pytest.mark.nightly
def test_a_peer_with_other_rows(tmp_path):
    """Gloo itself ends the rank that gets more than it asked for; the other one names it."""
    ended = outcomes(2, other_rows, str(tmp_path))
    aborted = [o for o in ended if o.exitcode == -signal.SIGABRT]
    survivors = [o for o in ended if o.exitcode == 0]
    assert len(aborted) + len(survivors) == 2 and aborted
    assert all("collective mismatch" in o.stderr for o in aborted)
    for outcome in survivors:
        assert outcome.error == "PeerTimeoutError" and "waited in vain at layers.0" in outcome.message
        assert waited(tmp_path, outcome) < 3 * LIMIT


def recompile(rank: int, folder: str, seconds: float) -> float:
    """Rank 1 meets new rows, and takes its time to compile; rank 0 knows them all. The sum is over equal rows."""
    import torch.nn.functional as F

    from .graphs import all_reduce

    def fn(x):
        padded = F.pad(x * 2, (0, 0, 0, 8 - x.shape[0]))
        return F.rms_norm(all_reduce(padded), (HIDDEN,), torch.ones(HIDDEN))[: x.shape[0]]

    options = {"inner": "aot_eager", "peer_timeout": LIMIT}
    from tpfuse.runtime import report_store

    with torch.no_grad():
        compiled = torch.compile(fn, backend="tpfuse", options=options, dynamic=False)
        for count in (5, 5, 5):
            result = compiled(torch.ones(count, HIDDEN))
        mark(folder)
        if rank == 1:
            key = report_store.key
            report_store.key = lambda *args: time.sleep(seconds) or key(*args)
        result = compiled(torch.ones(5 if rank == 0 else 7, HIDDEN))
    return result.sum().item() / result.shape[0]


@pytest.mark.nightly
def test_a_peer_that_recompiles_in_time_is_waited_for(tmp_path):
    ended = outcomes(2, recompile, str(tmp_path), 0.3 * LIMIT)
    assert [o.error for o in ended] == ["", ""], ended
    assert ended[0].value == pytest.approx(ended[1].value)


@pytest.mark.nightly
def test_a_peer_that_compiles_for_longer_than_the_limit_is_said_to_compile(tmp_path):
    waiting, compiling = outcomes(2, recompile, str(tmp_path), 4 * LIMIT)
    assert waiting.error == "PeerTimeoutError" and "rank 1 is alive, compiling" in waiting.message
    assert compiling.error == "PeerTimeoutError"
    assert waited(tmp_path, waiting) < 3 * LIMIT


def never_returns(rank: int, folder: str) -> None:
    """As with a group whose waits nothing ends."""
    from tpfuse.runtime import limits

    limits.set_group_timeout = lambda *_: None
    with torch.no_grad():
        fn = compiled_stack(peer_timeout=LIMIT)
        if rank == 1:
            mark(folder)
            time.sleep(100)
        fn(torch.ones(3, HIDDEN))


def test_a_wait_that_the_group_does_not_end_ends_the_process(tmp_path):
    stuck, _ = outcomes(2, never_returns, str(tmp_path), unending=(1,))
    assert stuck.exitcode == EXIT_STUCK
    assert "PeerTimeoutError: rank 0 of group [0, 1] waited in vain at layers.0" in stuck.stderr
    assert "rank 1 is alive, outside compiled graphs" in stuck.stderr
    assert waited(tmp_path, stuck) < 6 * LIMIT


def without_a_limit(rank: int, folder: str) -> None:
    with torch.no_grad():
        fn = compiled_stack()
        if rank == 1:
            mark(folder)
            os.kill(os.getpid(), signal.SIGKILL)
        fn(torch.ones(3, HIDDEN))


@pytest.mark.nightly
def test_without_a_limit_the_groups_own_errors_still_name_the_boundary(tmp_path):
    survivor, _ = outcomes(2, without_a_limit, str(tmp_path))
    assert survivor.error == "PeerTimeoutError" and "at layers.0 (all_reduce_norm" in survivor.message
    assert "peer_timeout" in survivor.message


def test_an_error_of_the_model_stays_what_it_is():
    from tpfuse.options import parse_options
    from tpfuse.report import Report
    from tpfuse.runtime.guard import guard

    def fails(*_):
        raise RuntimeError("shapes do not match")

    guarded = guard(fails, Report(steps=[Step("all_reduce", (0, 1))]), parse_options({}))
    with pytest.raises(RuntimeError, match="shapes") as found:
        guarded()
    assert not isinstance(found.value, tpfuse.TPFuseError)


@pytest.fixture
def limits(monkeypatch) -> dict[str, float]:
    """The timeouts of groups as they are set, by the groups' names. A fake group has no pulse, and no timeout."""
    from tpfuse.runtime import heartbeat as stuck
    from tpfuse.runtime import limits as module

    now = {}
    monkeypatch.setattr(module, "set_group_timeout", lambda group, seconds: now.update({group.group_name: seconds}))
    monkeypatch.setattr(module, "group_timeout", lambda group: 1800.0)
    monkeypatch.setattr(stuck, "pulse", lambda _: SimpleNamespace(began=lambda *_: None, ended=lambda: None))
    return now


def a_call_with_limit(limit: float | None):
    from tpfuse.options import parse_options
    from tpfuse.report import Report
    from tpfuse.runtime.guard import guard

    options = parse_options({"peer_timeout": limit, "check_plans": False})
    return guard(lambda: None, Report(steps=[Step("all_reduce", (0, 1))]), options)


def test_the_limit_is_set_on_every_group_with_the_graphs_ranks(four_ranks, limits):
    """A plan knows a group by its ranks; which of the groups with those ranks the graph uses is not said."""
    pairs = [dist.new_group([0, 1]) for _ in range(2)]
    dist.new_group([0, 2])
    a_call_with_limit(7.0)()
    assert limits == {group.group_name: 7.0 for group in pairs}


def test_each_graphs_calls_keep_their_own_limit(four_ranks, limits):
    name = dist.new_group([0, 1]).group_name
    short, long, without = a_call_with_limit(2.0), a_call_with_limit(60.0), a_call_with_limit(None)
    for call, seconds in ((short, 2.0), (long, 60.0), (without, 1800.0), (short, 2.0), (without, 1800.0)):
        call()
        assert limits[name] == seconds


def test_a_pulse_beats_often_enough_for_the_shortest_limit(four_ranks):
    from tpfuse.runtime.heartbeat import Pulse

    pulse = Pulse(dist.group.WORLD)
    beats = []
    for limit in (60.0, 0.8, 60.0):
        pulse.keep_up_with(limit)
        beats.append(pulse.every)
    assert beats == [2.0, 0.1, 0.1]


def test_words_of_a_group_in_an_error_of_the_model_are_not_a_groups_error():
    """A generated function raises on a line that does not communicate, and on one that does."""
    import linecache

    from tpfuse.runtime.heartbeat import from_the_group

    source = "def call(fail):\n    fail(0)\n    torch.ops._c10d_functional.all_reduce(fail(1))\n"
    linecache.cache["<generated>"] = (len(source), None, source.splitlines(True), "<generated>")
    names: dict = {"torch": torch, "__name__": "generated"}
    exec(compile(source, "<generated>", "exec"), names)
    said = "[gloo/transport/tcp/pair.cc] Connection closed by peer"
    found = []
    for line in (0, 1):

        def fail(at, line=line):
            if at == line:
                raise RuntimeError(said)

        with pytest.raises(RuntimeError) as raised:
            names["call"](fail)
        found.append(from_the_group(raised.value))
    assert found == [False, True]
    assert not from_the_group(RuntimeError("the NCCL table has no such row"))
    assert from_the_group(dist.DistBackendError("anything"))


def test_a_beat_is_read_like_any_other_json():
    with pytest.raises(tpfuse.OptionError):
        Beat.from_json(json.dumps({"number": "1", "doing": "", "calls": 0}))
