"""Workspaces of process groups: one each, grown together, gone with the group. Rendezvous itself needs GPUs."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
import torch.distributed as dist

from tests.graphs import fake_world
from tpfuse.kernels import rendezvous as groups
from tpfuse.kernels.rendezvous import WORKSPACE_REGISTRY, injected, judge, why_not, workspace_of
from tpfuse.kernels.symmetric.workspace import virtual_ranks

CPU = torch.device("cpu")
FACTS = {
    "host": "a", "boot": "1", "device": "H", "uuid": "0", "multiprocessors": 132, "capability": (9, 0), "torch": "2",
    "table": "t", "slot_bytes": 1024, "overlap": False,
}  # fmt: skip


@pytest.fixture
def meetings(monkeypatch):
    """Ranks always agree on a workspace of the size asked for, unless told to refuse; the sizes asked for."""
    asked: list[int] = []

    def meet(group, group_name, device, slot_bytes, copies):
        asked.append(slot_bytes)
        refusal = "No memory is left." if slot_bytes > 1 << 20 else ""
        return (None if refusal else virtual_ranks(2, "cpu", 4, slot_bytes)[0]), refusal

    monkeypatch.setattr(groups, "_meet", meet)
    monkeypatch.setattr(groups, "_static_refusal", lambda group: "")
    monkeypatch.setattr(groups, "DEFAULT_SLOT_BYTES", 1 << 12)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return asked


def test_the_first_call_of_a_group_sets_up_and_later_ones_reuse(four_ranks, meetings):
    first = workspace_of("0", CPU)
    assert workspace_of("0", CPU) is first and meetings == [1 << 12]
    pair = dist.new_group([0, 1])
    assert workspace_of(pair.group_name, CPU) is not first and len(meetings) == 2


def test_an_injected_workspace_stands_in_for_the_groups_own(four_ranks, meetings):
    """One process plays every rank in turn: nothing is set up, and afterwards all is as before."""
    played = virtual_ranks(2, "cpu", 4, 1 << 12)
    for workspace in (*played, None):  # None: the functional path
        with injected("0", workspace):
            assert workspace_of("0", CPU) is workspace
    assert not meetings and "0" not in WORKSPACE_REGISTRY
    own = workspace_of("0", CPU)
    with pytest.raises(ZeroDivisionError), injected("0", played[1]):
        raise ZeroDivisionError
    assert workspace_of("0", CPU) is own


def test_growth_keeps_the_old_workspace_for_graphs_that_address_it(four_ranks, meetings):
    small = workspace_of("0", CPU)
    large = workspace_of("0", CPU, 1 << 16)
    assert large.slot_words * 4 == 1 << 16 and workspace_of("0", CPU, 1 << 13) is large
    assert WORKSPACE_REGISTRY["0"].outgrown == [small]


def test_growth_that_fails_leaves_the_workspace_in_use(four_ranks, meetings):
    small = workspace_of("0", CPU)
    assert workspace_of("0", CPU, 1 << 21) is small
    assert why_not("0", "cuda") == "" and workspace_of("0", CPU) is small


def test_a_copy_slot_is_made_when_it_is_asked_for_and_stays(four_ranks, meetings, monkeypatch):
    given = []
    meet = groups._meet
    monkeypatch.setattr(groups, "_meet", lambda *a: given.append(a[-1]) or meet(*a))
    small = workspace_of("0", CPU)
    WORKSPACE_REGISTRY["0"].workspace = dataclasses.replace(small, copy_words=0)
    with_copies = workspace_of("0", CPU, copies=True)
    assert with_copies.copy_words and given == [False, True]
    assert workspace_of("0", CPU, copies=True) is with_copies and workspace_of("0", CPU) is with_copies
    workspace_of("0", CPU, 1 << 16)
    assert given == [False, True, True]  # a larger one has it too


def test_a_copy_slot_that_there_is_no_memory_for_is_asked_for_once(four_ranks, meetings, monkeypatch):
    small = dataclasses.replace(workspace_of("0", CPU), copy_words=0)
    WORKSPACE_REGISTRY["0"].workspace = small
    monkeypatch.setattr(groups, "_meet", lambda *a: meetings.append(0) or (None, "No memory is left."))
    before = len(meetings)
    assert workspace_of("0", CPU, copies=True) is small and workspace_of("0", CPU, copies=True) is small
    assert len(meetings) == before + 1


def test_a_first_call_without_memory_for_a_copy_slot_has_all_but_that(four_ranks, monkeypatch):
    pair, tried = dist.new_group([0, 1]), []
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(groups, "facts_of", lambda *_: FACTS)
    monkeypatch.setattr(groups, "_static_refusal", lambda group: "")
    monkeypatch.setattr(groups, "DEFAULT_SLOT_BYTES", 1 << 12)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(groups, "Exchange", lambda *_: lambda own: [own, {**own, "uuid": "1"}])

    def allocate(made, facts, group_name, device, slot_bytes, copies):
        tried.append(copies > 0)
        if copies:
            raise torch.OutOfMemoryError
        made["workspace"] = dataclasses.replace(virtual_ranks(2, "cpu", 4, 1 << 12)[0], copy_words=0)
        return {}

    monkeypatch.setattr(groups, "_allocate", allocate)
    monkeypatch.setattr(groups, "_map", lambda *_: {})
    made = workspace_of(pair.group_name, CPU, copies=True)
    assert made is not None and tried == [True, False]
    assert workspace_of(pair.group_name, CPU, copies=True) is made and len(tried) == 2


def test_nothing_is_allocated_inside_capture(four_ranks, meetings, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert workspace_of("0", CPU) is None and not meetings
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    small = workspace_of("0", CPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    caplog.clear()
    assert workspace_of("0", CPU, 1 << 16) is small  # it does not grow there either
    assert "does not grow" in caplog.text and "functional" not in caplog.text


def test_a_workspace_goes_with_its_group_and_a_new_group_of_that_name_gets_its_own(meetings):
    with fake_world(2):
        first = workspace_of("0", CPU)
        assert set(WORKSPACE_REGISTRY) == {"0"}
    gc.collect()
    assert not WORKSPACE_REGISTRY
    with fake_world(2):
        assert workspace_of("0", CPU) is not first


def test_ranks_conclude_from_facts_alone():
    def verdict(**changes):
        return judge([FACTS, {**FACTS, "uuid": "1", **changes}])

    assert verdict() == ""
    assert "spans several hosts (a, b)" in verdict(host="b")
    assert "differ in table" in verdict(table="u")
    assert "differ in slot_bytes" in verdict(slot_bytes=2048)
    assert "differ in overlap_all_reduce_norm" in verdict(overlap_all_reduce_norm=True)
    assert "share one GPU" in verdict(uuid="0")
    assert "older" in judge([{**FACTS, "capability": (7, 5)}])


@pytest.mark.parametrize(("world", "taken"), [(1, False), (3, True), (7, True), (9, False)])
def test_groups_of_two_to_eight_ranks_are_taken(world, taken):
    pytest.importorskip("triton")
    with fake_world(world):
        said = why_not("0", "cuda")
    refusal = f"The group has {world} ranks; the symmetric-memory kernels take 2 to 8."
    assert said.startswith("The group communicates through fake") if taken else said == refusal


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("0", "cpu"), "Tensors are on cpu"),
        (("0", "cuda", 12), "Hidden size 12 is not a multiple of 8"),
        (("0", "cuda", 16, torch.float64), "The dtype is torch.float64"),
        (("nobody", "cuda", 16), "No process group is named 'nobody'"),
        (("0", "cuda", 16), "The group communicates through fake"),
    ],
)
def test_why_not_answers_on_one_rank_alone(four_ranks, arguments, reason):
    pytest.importorskip("triton")
    assert reason in why_not(*arguments)
