"""A group whose kernel gave up stays given up, on the host's side: every look, every later call, growth and limits."""

from __future__ import annotations

import gc
import pickle
import threading
import time

import pytest
import torch
import torch.distributed as dist

import tpfuse
from tests.graphs import fake_world
from tests.ranks import run_processes
from tpfuse.errors import PeerTimeoutError
from tpfuse.kernels import entry, facts
from tpfuse.kernels import rendezvous as groups
from tpfuse.kernels.call import Call
from tpfuse.kernels.rendezvous import WORKSPACE_REGISTRY, injected, limit_waits, workspace_of
from tpfuse.kernels.symmetric.timeout import GONE, LATE
from tpfuse.kernels.symmetric.workspace import virtual_ranks

from .test_groups import CPU, FACTS, meetings  # noqa: F401

SMALL, LARGE = 1 << 12, 1 << 16
STEPS = ("facts_of", "_allocate", "_map")


def give_up(ws, missing: int = 1, call: int = 7) -> None:
    ws.watch[LATE + missing], ws.watch[GONE] = call + 1, 1


def test_the_error_has_what_its_message_says(four_ranks, meetings):  # noqa: F811
    pair = dist.new_group([0, 2])
    give_up(workspace_of(pair.group_name, CPU))
    with pytest.raises(PeerTimeoutError, match=r"rank 0, at layers.3.mlp: .* for rank 2 \(call 7\)") as found:
        tpfuse.check_peers(pair.group_name, "layers.3.mlp")
    error = found.value
    assert (error.rank, error.group, error.boundary, error.missing) == (0, (0, 2), "layers.3.mlp", (2,))
    assert error.seconds == pytest.approx(600, abs=1)
    copied = pickle.loads(pickle.dumps(error))
    assert str(copied) == str(error) and vars(copied) == vars(error)


def test_every_workspace_of_every_group_is_looked_at_until_the_group_is_destroyed(meetings):  # noqa: F811
    with fake_world(2):
        tpfuse.check_peers()
        small = workspace_of("0", CPU)
        workspace_of("0", CPU, LARGE)
        tpfuse.check_peers()
        give_up(small)  # as a captured graph does that was captured before the group grew
        for again in range(2):
            with pytest.raises(PeerTimeoutError):
                tpfuse.check_peers(*[] if again else ["0"])
        held = dist.group.WORLD
    tpfuse.check_peers()  # still referenced, but destroyed
    assert held is not None


def test_a_call_raises_where_an_older_workspace_gave_up(four_ranks, meetings, monkeypatch):  # noqa: F811
    small = workspace_of("0", CPU)
    workspace_of("0", CPU, LARGE)
    give_up(small)
    monkeypatch.setattr(Call, "supported", lambda call: True)
    monkeypatch.setattr(entry, "on_gpu", lambda x: True)
    x = torch.ones(2, 8)
    with pytest.raises(PeerTimeoutError):
        entry.all_reduce_add_norm(
            Call(x, eps=1e-6, group_name="0", norm="rms_norm", out_dtype=torch.bfloat16, hidden_dtype=None)
        )


def test_a_limit_reaches_outgrown_workspaces_and_stays_until_another_is_given(four_ranks, meetings):  # noqa: F811
    small = workspace_of("0", CPU)
    limit_waits("0", 3.0)
    large = workspace_of("0", CPU, LARGE)
    limit_waits("0", None)
    three = int(3e9 / 2**20) + 1
    assert int(small.watch[0]) == int(large.watch[0]) == three
    limit_waits("0", 6.0)
    assert int(small.watch[0]) == int(large.watch[0]) > three


@pytest.mark.parametrize("late", [0, 1])
def test_a_group_of_which_any_rank_gave_up_does_not_grow(late, four_ranks, monkeypatch):
    """All ranks hear of it, those too whose own kernels saw nothing."""
    pair = dist.new_group([0, 1])
    name, ws = pair.group_name, virtual_ranks(2, "cpu", 4, SMALL)[0]
    if late == 0:
        give_up(ws)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(groups, "facts_of", lambda device, size, late: {**FACTS, "late": late})
    seen = lambda own: [own, {**FACTS, "late": late == 1}]  # noqa: E731
    monkeypatch.setattr(groups, "Exchange", lambda *_: seen)
    monkeypatch.setattr(groups, "_allocate", lambda *_: pytest.fail("allocated"))
    with injected(name, ws):
        with pytest.raises(PeerTimeoutError, match="create the group anew") as found:
            groups._meet(pair, name, CPU, LARGE)
        assert found.value.group == (0, 1) and WORKSPACE_REGISTRY[name].workspace is ws


def test_two_threads_at_a_groups_first_call_meet_once(four_ranks, meetings, monkeypatch):  # noqa: F811
    meet = groups._meet
    monkeypatch.setattr(groups, "_meet", lambda *args: time.sleep(0.1) or meet(*args))
    got: list = []
    threads = [threading.Thread(target=lambda: got.append(workspace_of("0", CPU))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meetings == [SMALL] and got[0] is got[1] is not None


def test_memory_that_graphs_address_outlives_its_group(meetings, monkeypatch):  # noqa: F811
    monkeypatch.setattr(groups, "CAPTURED", [])
    with fake_world(2):
        first = workspace_of("0", CPU)
        groups.note_capture(first)
        groups.note_capture(first)
    gc.collect()
    assert not WORKSPACE_REGISTRY and len(groups.CAPTURED) == 1 and groups.CAPTURED[0] is first


# -- what ranks tell each other ---------------------------------------------------------------------------------------


def without_memory(rank: int, which: str) -> tuple[str, float]:
    """Rank 1 fails in one step of the rendezvous; every other part of it is as on GPUs."""
    began = time.monotonic()
    torch.cuda.set_device = lambda _: None

    def works(made, *_):
        if isinstance(made, dict):
            made["workspace"] = None
        return {**FACTS, "uuid": str(rank)}

    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory: é\nmore")

    for name in STEPS:
        setattr(groups, name, fails if (name, rank) == (which, 1) else works)
    _, refusal = groups._meet(dist.group.WORLD, "0", CPU, SMALL)
    return refusal, time.monotonic() - began


def all_failures(rank: int) -> list[tuple[str, float]]:
    return [without_memory(rank, which) for which in (*STEPS, "")]


def test_a_rank_that_fails_on_the_way_is_heard_by_its_peers():
    for which, *said in zip((*STEPS, ""), *run_processes(2, all_failures), strict=True):
        assert said[0][0] == said[1][0] and max(seconds for _, seconds in said) < 20
        refusal = said[0][0]
        assert ("ank 1" in refusal and "OutOfMemoryError: CUDA out of memory: é)" in refusal) if which else not refusal


def test_facts_travel_as_json_and_nothing_is_unpickled(four_ranks, monkeypatch):
    sent = []

    def all_gather(out, own, group):
        sent.append(bytes(own.tolist()))
        for block in out:
            block.copy_(own)

    monkeypatch.setattr(dist, "all_gather", all_gather)
    monkeypatch.setattr(dist, "all_gather_object", lambda *_, **__: pytest.fail("pickled"))
    exchange = facts.Exchange(dist.group.WORLD, "0", CPU)
    long, short = {"error": "\x01" * facts.WORDS}, FACTS
    for word in (long, short):  # a shorter word after a longer one
        assert exchange(word) == [{**word, "capability": [9, 0]} if word is FACTS else word] * 4
    assert sent[0][2:9] == b'{"error' and len(sent[0]) == facts.BLOCK


def test_ranks_that_cannot_meet_hear_it_as_a_peer_timeout(four_ranks, monkeypatch):
    def closed(*_, **__):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dist, "all_gather", closed)
    with pytest.raises(PeerTimeoutError, match=r"could not meet .*Connection closed") as found:
        facts.Exchange(dist.group.WORLD, "0", CPU)(FACTS)
    assert found.value.group == (0, 1, 2, 3)
