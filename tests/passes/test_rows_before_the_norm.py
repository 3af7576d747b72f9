"""Rows that are added up with weights between the all-reduce and the norm, or chosen there while all are read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ..graphs import all_reduce, fused, trace
from .test_all_reduce_norm import assert_error_rule

H, TOKENS, TOP = 16, 6, 2


def normed(h, weight):
    return F.layer_norm(h, (H,), weight)


def top_k(seed: int, dtype: torch.dtype, world: int = 4):
    """(the top experts' rows, one tensor a rank, the residual, the norm's weight, the experts' weights)"""
    torch.manual_seed(seed)
    parts = [torch.randn(TOKENS, TOP, H).to(dtype) for _ in range(world)]
    rest = torch.randn(1, TOKENS, H), torch.randn(H) + 1, torch.rand(TOKENS, TOP)
    return parts, *(t.to(dtype) for t in rest)


def weighted(x, r, weight, gate):
    """gpt-fast's mixtral."""
    h = r + torch.einsum("tai,ta -> ti", all_reduce(x), gate)
    return normed(h, weight), h


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_einsum_over_the_top_experts_moves_in_front_of_the_sum(four_ranks, dtype):
    (verdict,) = assert_error_rule(weighted, four_ranks, dtype, draw=top_k).boundaries
    assert verdict.fused, verdict.reason
    (before,), (after,) = verdict.before, verdict.after
    assert before.bytes == TOP * after.bytes


def test_it_stays_where_the_weights_are_each_ranks_own(four_ranks):
    def run(x, r, weight, gate):
        return weighted(x, r, weight, torch.rand_like(gate))

    parts, *rest = top_k(0, torch.float32)
    _, report = fused(trace(run, parts[0], *rest))
    assert not report.fused


def test_a_product_with_a_matrix_stays_behind_the_sum(four_ranks):
    def run(x, r, weight, gate):
        h = r + torch.bmm(all_reduce(x), r.mT.expand(TOKENS, H, TOKENS)).mean(1) @ r[0]
        return normed(h, weight), h

    parts, *rest = top_k(0, torch.float32)
    _, report = fused(trace(run, parts[0], *rest))
    assert not report.fused


def first_row(h):
    return h[:, 0, :]


def some_rows(h):
    return h[:, 1:]


@pytest.mark.parametrize("choose", [first_row, some_rows])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_of_chosen_rows_is_chosen_from_the_norm_of_all(four_ranks, choose, dtype):
    """CLIP's pooled output: all rows are returned, and the first is normed."""

    def run(x, r, weight, bias):
        h = all_reduce(x) + r
        return normed(choose(h), weight), h

    (verdict,) = assert_error_rule(run, four_ranks, dtype).boundaries
    assert verdict.fused, verdict.reason


def test_chosen_rows_are_chosen_before_they_are_sent_where_no_other_is_read(four_ranks):
    def run(x, r, weight, bias):
        return normed(first_row(all_reduce(x) + r), weight)

    (verdict,) = assert_error_rule(run, four_ranks, torch.float32).boundaries
    assert verdict.fused and verdict.after[0].bytes < verdict.before[0].bytes


def test_statistics_of_chosen_rows_are_those_rows(four_ranks):
    def run(x, r, weight, bias):
        h = all_reduce(x) + r
        rows = first_row(h)
        rstd = torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-5)
        return rows * rstd * weight, h, rstd

    (verdict,) = assert_error_rule(run, four_ranks, torch.float32).boundaries
    assert verdict.fused, verdict.reason
