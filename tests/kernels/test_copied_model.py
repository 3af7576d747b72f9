"""The protocol of copies, model-checked, and whether calls ask for their steps in the model's order."""

from __future__ import annotations

import pytest

from .copies_model import RULES, Call, Violation, explore
from .copies_trace import Trace

COPIED, COPIED_2, COPIED_3 = (Call("copied", chunks) for chunks in (1, 2, 3))
EXCHANGED, EXCHANGED_2, EXCHANGED_3 = (Call("exchanged", chunks) for chunks in (1, 2, 3))
MIXED = [
    [COPIED, EXCHANGED, COPIED],
    [COPIED_2, EXCHANGED, COPIED_2],  # y lies where x of the others does
    [EXCHANGED, COPIED_2, EXCHANGED],
    [COPIED_2, EXCHANGED_2, COPIED_3],
    [COPIED, EXCHANGED, COPIED_2, EXCHANGED, EXCHANGED_2],
    [COPIED_3, EXCHANGED_3, COPIED_3],
]
ALONE = [[COPIED] * 3, [COPIED_2] * 2, [EXCHANGED] * 3, [EXCHANGED_2] * 2]
SIZES = [EXCHANGED, EXCHANGED_3, EXCHANGED_2, EXCHANGED_3]


def name_of(calls: list[Call]) -> str:
    return " ".join(f"{call.kind}/{call.chunks}" for call in calls)


one_at_a_time = pytest.mark.parametrize("in_turn", [False, True], ids=["two streams", "one step at a time"])


@pytest.mark.parametrize("calls", [*ALONE, SIZES, *MIXED], ids=name_of)
@one_at_a_time
def test_rows_are_those_of_the_call_and_nobody_waits_for_ever(calls: list[Call], in_turn: bool) -> None:
    assert explore(calls, in_turn=in_turn) > 100


@pytest.mark.parametrize("calls", [ALONE[0], ALONE[2], [EXCHANGED, EXCHANGED_2], MIXED[1]], ids=name_of)
@pytest.mark.parametrize("give_ups", [(0,), (0, 1)], ids=str)
@one_at_a_time
def test_after_a_wait_that_was_given_up_rows_are_right_or_nan(
    calls: list[Call], give_ups: tuple[int, ...], in_turn: bool
) -> None:
    assert explore(calls, in_turn=in_turn, give_ups=give_ups) > 500


WITHOUT_DEATH = [rule for rule in RULES if not rule.startswith("dead")]
#: What calls of one kind and size need of that: "y" is of exchanges.
NEEDED = {
    "copied": [rule for rule in WITHOUT_DEATH if rule != "y behind finish"],
    "exchanged": [rule for rule in WITHOUT_DEATH if rule != "slot"],
}


@pytest.mark.parametrize(("kind", "rule"), [(kind, rule) for kind, rules in NEEDED.items() for rule in rules])
def test_each_rule_is_needed_by_calls_of_one_kind(kind: str, rule: str) -> None:
    with pytest.raises(Violation, match="both ranks wait" if rule == "own send first" else "reads rows"):
        explore([Call(kind, 1)] * 3, (rule,), in_turn=rule == "own send first")


@pytest.mark.parametrize("rule", WITHOUT_DEATH)
@pytest.mark.parametrize("calls", MIXED, ids=name_of)
def test_each_rule_is_needed_where_kinds_are_mixed(calls: list[Call], rule: str) -> None:
    with pytest.raises(Violation):
        explore(calls, (rule,), in_turn=rule == "own send first")


@pytest.mark.parametrize("calls", ALONE[2:], ids=name_of)
@one_at_a_time
def test_exchanges_of_one_size_need_no_word_of_the_peers_slot(calls: list[Call], in_turn: bool) -> None:
    """The peer's x of this call, which y is sent behind, comes behind all that the peer did in the call before; and the
    peer's y of the call before came behind its finish of what x of this call runs over."""
    assert explore(calls, ("slot",), in_turn=in_turn) > 100


@pytest.mark.parametrize("calls", [[EXCHANGED, EXCHANGED_2], [EXCHANGED, COPIED_2], [COPIED, EXCHANGED]], ids=name_of)
def test_exchanges_need_it_where_x_runs_over_the_y_of_a_smaller_one_or_kinds_are_mixed(calls: list[Call]) -> None:
    with pytest.raises(Violation, match="reads rows"):
        explore(calls, ("slot",))


@pytest.mark.parametrize("rule", ["dead x", "dead y", "dead take"])
def test_each_rule_of_the_dead_is_needed(rule: str) -> None:
    with pytest.raises(Violation, match="reads rows"):
        explore([EXCHANGED] * 3, (rule,), give_ups=(0,))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_a_call_asks_for_its_steps_in_the_order_of_the_model(
    rows: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = Trace(rank, 8, monkeypatch)
    trace.run("copied", rows, [(0, rows)])
    trace.check()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("rows", "held", "pieces"),
    [(16, 16, [(0, 8)]), (2, 16, [(0, 1)]), (6, 64, [(0, 3)]), (26, 10, [(0, 4), (4, 8), (8, 13)])],
)
def test_so_does_an_exchange_in_each_of_its_calls(
    rows: int, held: int, pieces: list[tuple[int, int]], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`held`: the rows that the slot holds, of x and of y together."""
    trace = Trace(rank, held, monkeypatch)
    trace.run("exchanged", rows, pieces)
    trace.check()
