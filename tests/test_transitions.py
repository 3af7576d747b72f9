"""The planner's table: every producer × consumer × policy × residual, with its collectives, groups and rows."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import pytest

from tpfuse import PolicyError, SharingPolicy
from tpfuse.passes.plan import layouts
from tpfuse.passes.plan.layouts import SCATTERED, TP_ATTN_FULL

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from transitions import CONSUMERS, PRODUCERS, transition

# Two replicas of four ranks with eight rows each: a rank holds 2, 8 or all 16 rows.
TP, DP, ROWS = 8, 2, 8
DENSE = {"whole": None, "attention": 4, "1": 1}
PREFERENCE = {TP_ATTN_FULL: "replicated", SCATTERED: "scattered"}

#: Between ranks: the name, the group (A: attention, D: the replicas, T: the whole TP group), rows before → after.
AR_A, RS_A, AG_A = "all_reduce A 8→8", "reduce_scatter A 8→2", "all_gather A 2→8"
RS_D, AG_D = "reduce_scatter D 16→8", "all_gather D 8→16"
AR_T, RS_T, AG_T = "all_reduce T 16→16", "reduce_scatter T 16→2", "all_gather T 2→16"

#: (producer, policy) -> as written in eager mode; rewritten with the residual replicated; with the residual scattered.
OWED = {
    ("embedding", "any"): ([AR_A], [AR_A], [RS_A]),
    ("attention", "any"): ([AR_A], [AR_A], [RS_A]),
    ("dense_mlp", "attention"): ([AR_A], [AR_A], [RS_A]),
    ("dense_mlp", "1"): ([AG_A], [AG_A], []),
    ("dense_mlp", "whole"): ([AR_T], [RS_D, AR_A], [RS_T]),
    ("moe", "any"): ([AR_T], [RS_D, AR_A], [RS_T]),
    # A block of two sums keeps its residual replicated; what both owe to one group is paid at once.
    ("attention∥dense_mlp", "attention"): ([AR_A, AR_A], [AR_A], [AR_A]),
    ("attention∥dense_mlp", "1"): ([AR_A, AG_A], [AR_A, AG_A], [AR_A, AG_A]),
    ("attention∥dense_mlp", "whole"): ([AR_A, AR_T], [RS_D, AR_A], [RS_D, AR_A]),
}
#: (consumer, policy) -> from TP_ATTN_FULL; from SCATTERED.
NEEDED = {
    ("attention", "any"): ([], [AG_A]),
    ("dense_mlp", "attention"): ([], [AG_A]),
    ("dense_mlp", "1"): ([], []),
    ("dense_mlp", "whole"): ([AG_D], [AG_T]),
    ("moe", "any"): ([AG_D], [AG_T]),
    ("final_norm", "any"): ([], [AG_A]),
    ("output", "any"): ([], []),
}

COMBINATIONS = list(product(PRODUCERS, CONSUMERS, DENSE, (TP_ATTN_FULL, SCATTERED)))
#: No residual arrives at an embedding, and a block of two sums keeps its own replicated.
IMPOSSIBLE = [c for c in COMBINATIONS if c[3] == SCATTERED and c[0] in ("embedding", "attention∥dense_mlp")]
VALID = [c for c in COMBINATIONS if c not in IMPOSSIBLE]


def look_up(table, block, policy):
    return table.get((block, "any")) or table[block, policy]


def rows_of(layout, policy):
    """How many of ROWS in each replica a rank holds: its own share, its replica's, or every replica's."""
    return {SCATTERED: -(-ROWS // policy.attn_tp_size), TP_ATTN_FULL: ROWS}.get(layout, ROWS * policy.dp_size)


def written(steps, policy):
    """Each step in the words of the tables above."""
    groups = {"attention": "A", "dp": "D", "whole": "T"}
    rows = [[rows_of(layout, policy) for layout in step.layouts] for step in steps]
    return [
        f"{step.collective} {groups[step.over]} {before}→{after}"
        for step, (before, after) in zip(steps, rows, strict=True)
    ]


@pytest.fixture
def many_rows(monkeypatch):
    """Bytes decide, and starting a collective costs nothing."""
    monkeypatch.setattr(layouts, "LATENCY_US", 0.0)


def test_the_table_is_whole():
    assert len(COMBINATIONS) == 5 * 5 * 3 * 2 and len(VALID) == 120


@pytest.mark.parametrize(("producer", "consumer", "dense", "residual"), VALID)
@pytest.mark.parametrize("kept", [TP_ATTN_FULL, SCATTERED])
def test_every_boundary_pays_what_the_table_says(producer, consumer, dense, residual, kept, many_rows):
    policy = SharingPolicy(TP, DP, DENSE[dense], residual=PREFERENCE[kept])
    got = transition(producer, consumer, policy, residual)
    if "∥" in producer or consumer == "output":
        kept = TP_ATTN_FULL  # outputs have the eager layout
    eager, full, scattered = look_up(OWED, producer, dense)
    from_full, from_scattered = look_up(NEEDED, consumer, dense)
    if consumer == "output":
        from_scattered = [AG_A]  # as written over a scattered residual
    assert (got.layout_in, got.layout_out) == (residual, kept)
    assert written(got.before, policy) == (
        eager + from_full if residual == TP_ATTN_FULL else scattered + from_scattered
    )
    moved = [AG_A] if (residual, kept) == (SCATTERED, TP_ATTN_FULL) else []
    there = full + from_full if kept == TP_ATTN_FULL else scattered + from_scattered
    assert written(got.after, policy) == moved + there


@pytest.mark.parametrize(("producer", "consumer", "dense", "residual"), VALID)
def test_a_sum_is_paid_once_and_over_the_group_that_owes_it(producer, consumer, dense, residual, many_rows):
    """The ranks of all reducing steps multiply up to what is owed, and rows of different layouts never meet."""
    for preference in ("replicated", "scattered", "auto"):
        policy = SharingPolicy(TP, DP, DENSE[dense], residual=preference)
        got = transition(producer, consumer, policy, residual)
        over = {step.over for step in got.after if "reduce" in step.collective}
        owes_whole = producer == "moe" or ("dense_mlp" in producer and dense == "whole")
        owes = not (producer == "dense_mlp" and dense == "1")
        assert over == (({"whole"} if "whole" in over else {"dp", "attention"}) if owes_whole else
                        {"attention"} if owes else set())  # fmt: skip
        own = [step for step in got.after if SCATTERED in step.layouts]
        if got.layout_out == TP_ATTN_FULL and residual == TP_ATTN_FULL and not (dense == "1" and "dense" in producer):
            assert not own


@pytest.mark.parametrize(("producer", "consumer", "dense", "residual"), IMPOSSIBLE)
def test_impossible_ones_raise(producer, consumer, dense, residual):
    with pytest.raises(PolicyError, match=r"no residual\s+arrives"):
        transition(producer, consumer, SharingPolicy(TP, DP, DENSE[dense]), residual)


@pytest.mark.parametrize("wrong", [("mlp", "attention"), ("attention", "embedding"), ("attention", "moe", "FULL")])
def test_unknown_blocks_and_layouts_raise(wrong):
    producer, consumer, residual = (*wrong, TP_ATTN_FULL)[:3]
    with pytest.raises(PolicyError, match="allowed: "):
        transition(producer, consumer, SharingPolicy(TP, DP), residual)


#: (producer, consumer, policy, residual arrives, is kept) -> the rewrite's name
REWRITES = [
    ("attention", "dense_mlp", "attention", TP_ATTN_FULL, TP_ATTN_FULL, "all_reduce_norm"),
    ("dense_mlp", "final_norm", "attention", TP_ATTN_FULL, TP_ATTN_FULL, "all_reduce_norm"),
    ("embedding", "attention", "1", TP_ATTN_FULL, TP_ATTN_FULL, "all_reduce_norm"),
    ("attention∥dense_mlp", "attention", "attention", TP_ATTN_FULL, TP_ATTN_FULL, "merge_all_reduces"),
    ("attention", "dense_mlp", "attention", SCATTERED, TP_ATTN_FULL, "share_attention_group"),
    ("attention", "dense_mlp", "attention", SCATTERED, SCATTERED, "reduce_scatter_norm"),
    ("attention", "dense_mlp", "1", TP_ATTN_FULL, SCATTERED, "scatter_dense"),
    ("dense_mlp", "attention", "1", TP_ATTN_FULL, SCATTERED, "scatter_dense"),
    ("dense_mlp", "attention", "1", TP_ATTN_FULL, TP_ATTN_FULL, None),
    ("attention", "dense_mlp", "whole", TP_ATTN_FULL, SCATTERED, "gather_full_tp"),
    ("attention", "moe", "attention", TP_ATTN_FULL, SCATTERED, "gather_full_tp"),
    ("dense_mlp", "attention", "whole", TP_ATTN_FULL, TP_ATTN_FULL, "gather_full_tp"),
    ("moe", "output", "1", TP_ATTN_FULL, TP_ATTN_FULL, "gather_full_tp"),
    ("attention", "output", "1", TP_ATTN_FULL, TP_ATTN_FULL, None),
]


@pytest.mark.parametrize(("producer", "consumer", "dense", "residual", "kept", "rewrite"), REWRITES)
def test_names_of_rewrites(producer, consumer, dense, residual, kept, rewrite, many_rows):
    policy = SharingPolicy(TP, DP, DENSE[dense], residual=PREFERENCE[kept])
    assert transition(producer, consumer, policy, residual).rewrite == rewrite


def test_degenerate_sizes_are_normalised_first():
    """With one replica the whole group is the attention group; with one attention rank, own rows are all rows."""
    for producer, consumer in product(PRODUCERS, CONSUMERS):
        one = [transition(producer, consumer, SharingPolicy(4, 1, dense)) for dense in (None, 4)]
        assert one[0] == one[1] and {step.over for step in one[0].before + one[0].after} <= {"attention"}
        policies = [SharingPolicy(4, 4, 1, residual=r) for r in ("scattered", "replicated")]
        alone = [transition(producer, consumer, policy) for policy in policies]
        assert alone[0] == alone[1] and {step.over for step in alone[0].before + alone[0].after} <= {"dp"}
        assert alone[0].layout_out == TP_ATTN_FULL
        nobody = transition(producer, consumer, SharingPolicy(1))
        assert nobody.before == nobody.after == ()


@pytest.mark.parametrize(("rows", "after"), [(1, [AR_T]), (16384, [RS_D, AR_A])])
def test_few_rows_are_paid_in_one_collective_and_many_in_factors(rows, after):
    """The bytes that factors save must be worth the start of one more collective."""
    policy = SharingPolicy(TP, DP, None, residual="replicated", max_rows=rows)
    got = transition("dense_mlp", "attention", policy)
    assert written(got.after, policy) == after
    assert got.rewrite == ("gather_full_tp" if rows > 1 else None)


def test_dense_layers_of_different_sizes_meet():
    """A whole-group layer before one that shares the attention group."""
    policy = SharingPolicy(TP, DP, None, residual="replicated", max_rows=16384)
    got = transition("dense_mlp", "dense_mlp", policy, dense=(8, 1))
    assert written(got.before, policy) == [AR_T] and written(got.after, policy) == [RS_D, AR_A]
