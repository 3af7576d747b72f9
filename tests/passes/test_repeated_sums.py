"""Learned positions: a sum of fewer rows, repeated where it is added to another sum, is sent with that one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ..graphs import all_reduce, fused, trace
from .test_all_reduce_norm import assert_error_rule

BATCH, LENGTH, H = 2, 3, 16


def embeddings(seed: int, dtype: torch.dtype, world: int = 4):
    """(one part of the tokens' and the positions' embeddings for each rank, as one tensor; the norm's weight)"""
    torch.manual_seed(seed)
    return [torch.randn(BATCH + 1, LENGTH, H).to(dtype) for _ in range(world)], (torch.randn(H) + 1).to(dtype)


def normed(h, weight):
    return F.layer_norm(h, (H,), weight), h


def added(x, weight):
    return normed(all_reduce(x[:BATCH]) + all_reduce(x[BATCH]), weight)


def added_first(x, weight):
    return normed(all_reduce(x[BATCH : BATCH + 1]) + all_reduce(x[:BATCH]) * 0.5, weight)


def expanded(x, weight):
    return normed(all_reduce(x[:BATCH]) + all_reduce(x[BATCH]).expand(BATCH, -1, -1), weight)


@pytest.mark.parametrize(
    "run, dtype, seeds", [(added, torch.bfloat16, 20), (added_first, torch.float32, 2), (expanded, torch.float32, 2)]
)
def test_one_sum_is_sent_for_both(four_ranks, run, dtype, seeds):
    report = assert_error_rule(run, four_ranks, dtype, draw=embeddings, seeds=seeds)
    assert [b.rewrite for b in report.fused] == ["merge_all_reduces"] * 2
    assert report.collectives_after == 1 and sum(b.bytes_after for b in report.boundaries) == max(
        b.bytes_before for b in report.boundaries
    )


def by_another_operation(x, weight):
    return normed(all_reduce(x[:BATCH]) + all_reduce(x[BATCH], op="avg"), weight)


@pytest.mark.parametrize(
    "run, dtype, reason",
    [(by_another_operation, torch.float32, "reduce ops"), (added, torch.float16, "could overflow")],
)
def test_where_they_cannot_be_one_the_larger_is_fused_and_the_other_finished_first(four_ranks, run, dtype, reason):
    report = assert_error_rule(run, four_ranks, dtype, draw=embeddings, seeds=2)
    assert [b.fused for b in report.boundaries] == [True, False] and reason in report.boundaries[1].reason


def alone(x, weight):
    return normed(x[0].relu() + all_reduce(x[BATCH]).expand(BATCH, -1, -1), weight)


def beside_a_paid_sum(x, weight):
    y, h = normed(all_reduce(x[:BATCH]), weight)
    return *normed(y.relu() + h + all_reduce(x[BATCH]), weight), h


@pytest.mark.parametrize("run", [alone, beside_a_paid_sum])
def test_alone_it_is_finished_before_it_is_repeated(four_ranks, run):
    (verdict,) = assert_error_rule(run, four_ranks, torch.float32, draw=embeddings, seeds=1).unfused
    assert f"spreads the all-reduced value of shape [{LENGTH}, {H}] to [{BATCH}, {LENGTH}, {H}]" in verdict.reason
    assert "aten.add.Tensor" in verdict.reason


def test_one_that_is_computed_from_the_other_stays_behind_it(four_ranks):
    def run(x, weight):
        tokens = all_reduce(x[:BATCH])
        return normed(tokens + all_reduce(tokens[0] * x[BATCH]), weight)

    assert not assert_error_rule(run, four_ranks, torch.float32, draw=embeddings, seeds=1).fused


def test_symbolic_sizes(four_ranks):
    parts, weight = embeddings(0, torch.float32)
    _, report = fused(trace(added, parts[0], weight, dynamic=True))
    assert report.fused and all(b.fused or b.reason for b in report.boundaries)
