"""The protocol of copies, model-checked: every order in which two ranks' streams and copies can take turns.

A rank's steps and what each stands behind are those of kernels/symmetric/copies.py. In one model the two streams of a
rank run beside each other; in the other a rank does one step at a time, in any order that its streams allow, and a wait
that was begun must end before anything else runs: so a device might run a captured graph.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tpfuse.kernels.call import Call
from tpfuse.kernels.symmetric import copied, copies
from tpfuse.kernels.symmetric.workspace import virtual_ranks

RULES = {
    "slot": "a copy stands behind the peer's beginning of this call",
    "flag behind rows": "a flag is copied behind its rows",
    "count": "a chunk waits for a flag that is not behind this call",
    "own send first": "the wait for a chunk stands behind the own send of it",
}
Step = tuple[str, int, int]


def steps_of(calls: int, chunks: int, rules: set[str]) -> dict[Step, list[Step]]:
    """Each step of a rank, and the own steps that it stands behind. A copy of rows is two steps: peers may see half."""
    behind: dict[Step, list[Step]] = {}
    for call in range(1, calls + 1):
        main: list[Step] = [("begin", call, 0)]
        main += [(name, call, chunk) for chunk in range(chunks) for name in ("multiply", "slot")]
        main += [(name, call, chunk) for chunk in range(chunks) for name in ("await", "finish")]
        before = [("finish", call - 1, chunks - 1)] if call > 1 else []
        for step in main:
            behind[step] = list(before)
            before = [step]
        sent: list[Step] = [("flag", call - 1, chunks - 1)] if call > 1 else []
        for chunk in range(chunks):
            order = ["half", "rows", "flag"] if "flag behind rows" in rules else ["flag", "half", "rows"]
            for name in order:
                behind[name, call, chunk] = [*sent, ("slot", call, chunk)]
                sent = [(name, call, chunk)]
            if "own send first" in rules:
                behind["await", call, chunk].append((order[-1], call, chunk))
    return behind


class Violation(Exception):
    pass


def explore(calls: int, chunks: int, rules: set[str], in_turn: bool) -> int:
    """How many states there are; raises Violation for wrong rows or for ranks that wait for ever."""
    behind = steps_of(calls, chunks, rules)
    everything = frozenset(behind)
    # A rank: the steps that it has done, and the wait that holds it up where it does one step at a time.
    begin = ((frozenset(), None), (frozenset(), None), (0, 0), ((0,) * chunks,) * 2, ((0,) * chunks,) * 2)
    seen, todo = {begin}, [begin]
    while todo:
        state = todo.pop()
        following = [after for rank in (0, 1) for after in _moves(state, rank, behind, rules, in_turn)]
        if not following and any(state[rank][0] != everything for rank in (0, 1)):
            raise Violation(f"both ranks wait: {state}")
        for after in following:
            if after not in seen:
                seen.add(after)
                todo.append(after)
    return len(seen)


def _moves(state: tuple, rank: int, behind: dict, rules: set[str], in_turn: bool) -> list[tuple]:
    done, held = state[rank]
    counts, slots, flags = state[2:]
    peer = 1 - rank
    out = []
    ready = [held] if held else [s for s in behind if s not in done and all(b in done for b in behind[s])]
    for step in ready:
        name, call, chunk = step
        new_counts, new_slots, new_flags = list(counts), [list(s) for s in slots], [list(f) for f in flags]
        waits = False
        if name == "begin":
            new_counts[rank] = call
        elif name == "slot":
            waits = "slot" in rules and counts[peer] < call
        elif name == "half":
            new_slots[peer][chunk] = -1
        elif name == "rows":
            new_slots[peer][chunk] = call
        elif name == "flag":
            new_flags[peer][chunk] = call
        elif name == "await":
            waits = flags[rank][chunk] < (call if "count" in rules else 1)
        elif name == "finish" and slots[rank][chunk] != call:
            raise Violation(f"rank {rank} reads rows of call {slots[rank][chunk]} in call {call}")
        ranks = [state[0], state[1]]
        if waits:
            if not in_turn or held:
                continue
            ranks[rank] = (done, step)
        else:
            ranks[rank] = (done | {step}, None)
        frozen = tuple(tuple(s) for s in new_slots), tuple(tuple(f) for f in new_flags)
        out.append((*ranks, tuple(new_counts), *frozen))
    return out


@pytest.mark.parametrize(("calls", "chunks"), [(3, 1), (2, 2)])
@pytest.mark.parametrize("in_turn", [False, True], ids=["two streams", "one step at a time"])
def test_rows_are_those_of_the_call_and_nobody_waits_for_ever(calls: int, chunks: int, in_turn: bool) -> None:
    assert explore(calls, chunks, set(RULES), in_turn) > 100


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_needed(rule: str) -> None:
    with pytest.raises(Violation):
        explore(3 if rule != "own send first" else 2, 1 if rule != "own send first" else 2, set(RULES) - {rule},
                in_turn=rule == "own send first")  # fmt: skip


class _Peer:
    """The peer's buffer: which words are copied to it."""

    def __init__(self, steps: list[tuple[str, int]], rows_end: int, chunks: dict[int, int]) -> None:
        self.steps, self.rows_end, self.chunks = steps, rows_end, chunks

    def __getitem__(self, words: slice) -> _Peer:
        at = words.start
        step = ("flag", at - self.rows_end) if at >= self.rows_end else ("rows", self.chunks[at])
        self.steps.append(step)
        return self

    def copy_(self, *_: Any, **__: Any) -> None:
        return None


def test_a_call_asks_for_its_steps_in_the_order_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    ws = virtual_ranks(2, "cpu", 4, 1 << 14)[0]
    rows, row_words = 8, 32
    chunks = copies.chunks_of(rows)
    firsts = {first: i for i, (first, _) in enumerate(chunks)}
    steps: list[tuple[str, int]] = []
    places = {ws.copies_offset + first * row_words: i for first, i in firsts.items()}
    ws = replace(ws, remote=_Peer(steps, ws.copies_offset + ws.copy_words, places))
    x = torch.zeros(rows, 2 * row_words, dtype=torch.bfloat16)
    product = lambda first, stop: steps.append(("multiply", firsts[first]))  # noqa: E731
    call = Call(x, x, norm="rms_norm", eps=1e-5, out_dtype=x.dtype, hidden_dtype=x.dtype, product=product)
    flags = ws.buffer[ws.copies_offset + ws.copy_words :].data_ptr()

    def launch(step: tuple, programs: int) -> None:
        kernel, args, _ = step
        if kernel is copies._begin_kernel:
            steps.append(("begin", 0))
        elif kernel is copied._finish_kernel:
            steps.append(("finish", firsts[args[-1]]))
        else:
            flag = (args[1].data_ptr() - flags) // 4
            steps.append(("slot", places[ws.copies_offset + args[4]]) if flag == copies.READY else ("await", flag))

    for module in (copied, copies):
        monkeypatch.setattr(module, "launch", launch)
    copied.copied(call, ws).run()
    assert len(chunks) == 3 and steps[0] == ("begin", 0) and len(set(steps)) == len(steps) == 1 + 6 * len(chunks)
    order = {step: i for i, step in enumerate(steps)}
    for chunk in range(len(chunks)):
        of_one = [order[name, chunk] for name in ("multiply", "slot", "rows", "flag", "await", "finish")]
        assert of_one == sorted(of_one), steps
