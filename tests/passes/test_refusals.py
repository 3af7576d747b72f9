"""What cannot be fused stays as it was, computes the same, and says why in one sentence."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

import tpfuse
from tpfuse.passes.rewrite import all_reduce_norm as rewrite

from ..graphs import all_reduce, fake_world, fused, on_ranks, trace
from . import spellings
from .test_all_reduce_norm import HIDDEN, boundary, inputs


def refused(run, world: int = 4, draw=inputs, dtype=torch.float32):
    """Fuse the graph of `run`; it must be unchanged and right. Returns the report."""
    partials, *rest = draw(0, dtype)
    before = trace(run, partials[0], *rest)
    after, report = fused(before)
    assert [n.target for n in after.graph.nodes] == [n.target for n in before.graph.nodes]
    torch.testing.assert_close(on_ranks(after, world, partials, *rest), on_ranks(before, world, partials, *rest))
    assert not report.fused and all(b.reason and b.rewrite is None for b in report.boundaries)
    return report


@pytest.mark.parametrize("op", ["max", "min", "product"])
def test_a_reduce_op_that_is_no_sum(four_ranks, op):
    def run(x, r, weight, bias):
        return spellings.rms_llama(all_reduce(x, op=op) + r, weight, bias)

    (verdict,) = refused(run).boundaries
    assert f"reduce op is {op!r}" in verdict.reason


@pytest.mark.parametrize(
    "mix", [lambda x, r: x.unsqueeze(-2) * r[..., :2, None], lambda x, r: x.unsqueeze(-2).expand(-1, -1, 2, -1)]
)
def test_a_sum_that_is_spread_over_several_residual_streams(four_ranks, mix):
    """Hyper-connections: every stream gets its share of the sum."""

    def run(x, r, weight, bias):
        return spellings.rms_llama(mix(all_reduce(x), r), weight, bias)

    (verdict,) = refused(run).boundaries
    assert "spreads the all-reduced value of shape" in verdict.reason


def test_an_average_is_a_sum_divided_by_the_group(four_ranks):
    def run(x, r, weight, bias):
        h = all_reduce(x, op="avg") + r
        return spellings.rms_llama(h, weight, bias), h

    partials, *rest = inputs(0, torch.float32)
    before = trace(run, partials[0], *rest)
    after, report = fused(before)
    assert report.fused
    mean = sum(partials) / 4 + rest[0]
    torch.testing.assert_close(on_ranks(after, 4, partials, *rest)[1][1], mean)


def test_a_group_that_does_not_exist(four_ranks):
    partials, *rest = inputs(0, torch.float32)
    before = trace(boundary(spellings.rms_llama), partials[0], *rest)
    for node in before.graph.nodes:
        if "all_reduce" in str(node.target):
            node.args = (*node.args[:2], "no-such-group")
    after, report = fused(before)
    assert "no-such-group" in report.boundaries[0].reason and not report.fused
    assert [n.target for n in after.graph.nodes] == [n.target for n in before.graph.nodes]


def test_no_process_group_at_all():
    with fake_world(2):
        partials, *rest = inputs(0, torch.float32)
        graph = trace(boundary(spellings.rms_llama), partials[0], *rest)
    assert not dist.is_initialized()
    _, report = fused(graph)
    (verdict,) = report.boundaries
    assert not verdict.fused and "cannot be resolved" in verdict.reason


def test_a_norm_over_another_dimension(four_ranks):
    def run(x, r, weight, bias):
        h = all_reduce(x) + r
        return h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + 1e-5)

    (verdict,) = refused(run).boundaries
    assert "not over the last one only" in verdict.reason and verdict.feeds_norm


def test_a_norm_over_two_dimensions(four_ranks):
    def run(x, r, weight, bias):
        return torch.nn.functional.layer_norm(all_reduce(x) + r, (3, HIDDEN))

    (verdict,) = refused(run).boundaries
    assert "not over the last one only" in verdict.reason


def test_an_addition_of_mixed_dtypes_is_fused_in_the_wider_one(four_ranks):
    def run(x, r, weight, bias):
        return spellings.rms_llama(all_reduce(x) + r.double(), weight, bias)

    partials, *rest = inputs(0, torch.float32)
    before = trace(run, partials[0], *rest)
    after, report = fused(before)
    assert len(report.fused) == 1
    expected, got = on_ranks(before, 4, partials, *rest), on_ranks(after, 4, partials, *rest)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)  # float64's, not float32's


def test_an_operator_in_the_way_is_named(four_ranks):
    def run(x, r, weight, bias):
        return spellings.rms_llama(torch.relu(all_reduce(x)) + r, weight, bias)

    (verdict,) = refused(run).boundaries
    assert "aten.relu.default" in verdict.reason and verdict.feeds_norm


def test_a_value_returned_before_any_norm(four_ranks):
    def run(x, r, weight, bias):
        return all_reduce(x) + r

    (verdict,) = refused(run).boundaries
    assert "leaves the graph before any norm reads it" in verdict.reason and verdict.norm is None


def test_a_residual_computed_from_the_sum(four_ranks):
    def run(x, r, weight, bias):
        s = all_reduce(x)
        return spellings.rms_llama(s + torch.tanh(s), weight, bias)

    (verdict,) = refused(run).boundaries
    assert "computed from the all-reduced sum" in verdict.reason


def test_a_write_between_the_all_reduce_and_the_norm(four_ranks):
    """Fusing would read `x` later than the graph did, after it was overwritten."""

    def run(x, r, weight, bias):
        s = all_reduce(x)
        r.add_(1)
        return spellings.rms_llama(s + r, weight, bias)

    partials, *rest = inputs(0, torch.float32)
    before = trace(run, partials[0], *rest, decompose=False)
    _, report = fused(before)
    assert "writes in place" in report.boundaries[0].reason


def test_groups_of_equal_size_and_other_members_are_not_merged():
    with fake_world(4):
        a, b = dist.new_group([0, 1]), dist.new_group([0, 2])

        def run(x, r, weight, bias):
            return spellings.rms_llama(all_reduce(x, a) + all_reduce(r, b), weight, bias)

        partials, *rest = inputs(0, torch.float32)
        _, report = fused(trace(run, partials[0], *rest))
    assert [v.rewrite for v in report.boundaries] == [None, "all_reduce_norm"]
    assert "different ranks, [0, 1] and [0, 2]" in report.boundaries[0].reason


@pytest.mark.parametrize("apart", ["float16", "used alone"])
def test_a_sum_that_stays_by_itself_is_not_lost_where_a_residual_follows_the_norm(four_ranks, apart):
    dtype = torch.float16 if apart == "float16" else torch.float32

    def run(x, r, weight, bias):
        first, second = all_reduce(x.sin()), all_reduce(x)
        out = r + spellings.rms_llama(first + second, weight, bias)
        return (out, first) if apart == "used alone" else (out,)

    partials, *rest = inputs(0, dtype)
    before = trace(run, partials[0], *rest)
    after, report = fused(before)
    got, want = (on_ranks(graph, 4, partials, *rest) for graph in (after, before))
    torch.testing.assert_close(got, want, rtol=1e-2 if dtype is torch.float16 else 1e-5, atol=1e-2)
    assert [v.rewrite for v in report.boundaries] == [None, "all_reduce_norm"]


def test_an_internal_error_keeps_the_graph_and_says_so(four_ranks, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("tpfuse.passes.pipeline.apply", broken)
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        report = refused(boundary(spellings.rms_llama))
    assert "internal error" in report.boundaries[0].reason and "a bug" in report.boundaries[0].reason
    partials, *rest = inputs(0, torch.float32)
    graph = trace(boundary(spellings.rms_llama), partials[0], *rest)
    with pytest.raises(tpfuse.FusionError, match="ZeroDivisionError: a bug") as raised:
        tpfuse.fuse_graph(graph, strict=True)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_other_collectives_get_a_verdict(four_ranks):
    def run(x, r, weight, bias):
        c10d = torch.ops._c10d_functional
        gathered = c10d.wait_tensor(c10d.all_gather_into_tensor(x, 4, dist.group.WORLD.group_name))
        shared = c10d.wait_tensor(c10d.reduce_scatter_tensor(gathered, "sum", 4, dist.group.WORLD.group_name))
        return spellings.rms_llama(shared, weight, bias)

    partials, *rest = inputs(0, torch.float32)
    _, report = fused(trace(run, partials[0], *rest))
    gather, scatter = report.boundaries
    assert (gather.collective, gather.fused, bool(gather.reason)) == ("all_gather", False, True)
    assert (scatter.collective, scatter.rewrite) == ("reduce_scatter", "reduce_scatter_norm")


def test_a_collective_of_no_tensor_parallel_model_is_listed_by_its_operators_name(four_ranks):
    def run(x):
        return funcol.wait_tensor(torch.ops._c10d_functional.broadcast(x, 0, "0")) * 2

    _, report = fused(trace(run, torch.randn(3, HIDDEN)))
    ((collective, rewrite_name, reason),) = ((b.collective, b.rewrite, b.reason) for b in report.boundaries)
    assert (collective, rewrite_name) == ("broadcast", None) and "broadcast" in reason


def test_the_old_order_is_kept_where_it_was_right(four_ranks):
    partials, *rest = inputs(0, torch.float32)
    graph = trace(boundary(spellings.rms_llama), partials[0], *rest).graph
    names = [n.name for n in graph.nodes]
    rewrite.restore_order(graph)
    assert [n.name for n in graph.nodes] == names
