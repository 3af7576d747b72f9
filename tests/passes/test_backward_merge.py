"""merge_all_reduces in the backward pass: gradients that are summed over the same ranks are summed over them once."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tpfuse.passes.facts.groups import resolve_group
from tpfuse.passes.pipeline import PassOptions, fuse
from tpfuse.passes.recognise.known import Known
from tpfuse.passes.rewrite.merge_backward import find_sums, plan_merges

from ..graphs import all_reduce, executed_collectives, fake_world, fused, on_ranks, relative_error, trace

HIDDEN = 8
RESULT = "merge_all_reduces"


def gradients(seed: int, dtype: torch.dtype, count: int, world: int = 4) -> list[list[torch.Tensor]]:
    """`count` partial gradients, each a tensor a rank."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(6, HIDDEN, generator=generator).to(dtype) for _ in range(world)] for _ in range(count)]


def judged(run, count: int, collectives: int, dtype: torch.dtype = torch.float32, world: int = 4):
    """Fuse `run(tangents, ...)`: that many collectives must remain, within the error rule. Returns the report."""
    before = trace(run, *(parts[0] for parts in gradients(0, dtype, count)))
    after, report = fused(before)
    example = [parts[0] for parts in gradients(0, dtype, count)]
    assert executed_collectives(after, *example) == {"all_reduce": collectives}
    assert report.collectives_after == collectives and report.fused_forward == 0
    assert all(boundary.direction == "backward" for boundary in report.boundaries)
    exact = trace(run, *(t.double() for t in example))
    old, new = [], []
    for seed in range(20):
        parts = gradients(seed, dtype, count)
        reference = on_ranks(exact, world, *([t.double() for t in p] for p in parts))[0]
        old.append(relative_error(on_ranks(before, world, *parts)[0], reference))
        new.append(relative_error(on_ranks(after, world, *parts)[0], reference))
    old, new = torch.tensor(old).mean(0), torch.tensor(new).mean(0)
    assert (new <= 1.1 * old + torch.finfo(dtype).eps / 2).all(), f"errors {new.tolist()} against {old.tolist()}"
    return report


def rewrites(report) -> list[str | None]:
    assert all(bool(boundary.reason) != boundary.fused for boundary in report.boundaries)
    return [boundary.rewrite for boundary in report.boundaries]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_query_key_and_value(four_ranks, dtype):
    def run(tangents, k, v):
        return (torch.tanh(all_reduce(tangents * 1.5) + all_reduce(tangents @ k.mT @ k) + all_reduce(tangents + v)),)

    assert rewrites(judged(run, 3, 1, dtype)) == [RESULT] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_casts_numbers_and_signs_in_between(four_ranks, dtype):
    def run(tangents, b):
        left = all_reduce(tangents * 1).view(2, 3, HIDDEN).float() * 0.5
        right = all_reduce((tangents * b).view(3, 2, HIDDEN)).reshape(2, 3, HIDDEN).float()
        return ((left - right).to(dtype).relu(),)

    assert rewrites(judged(run, 2, 1, dtype)) == [RESULT] * 2


def test_a_replicated_gradient_in_the_sum_is_added_once(four_ranks):
    """A router reads the value that the experts read; its gradient needs no sum over the ranks."""

    def run(tangents, b):
        replicated = b.sin()
        return (all_reduce(tangents * 2) + replicated - all_reduce(tangents * b) * 3,)

    report = judged(run, 2, 1)
    assert rewrites(report) == [RESULT] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_added_up(four_ranks, dtype):
    """Every expert reads every token (Llama 4): the gradient of a repeated value is the sum of its repetitions'."""

    def run(tangents, b):
        repeated = all_reduce(torch.cat((tangents * 2, tangents * b)))
        return ((repeated.view(2, -1, HIDDEN).sum(0) + all_reduce(tangents - b)).relu(),)

    assert rewrites(judged(run, 2, 1, dtype)) == [RESULT] * 2
    after, _ = fused(trace(run, *(parts[0] for parts in gradients(0, dtype, 2))))
    (collective,) = [n for n in after.graph.nodes if n.target is torch.ops._c10d_functional.all_reduce.default]
    assert collective.meta["val"].shape == (6, HIDDEN)


def test_rows_that_are_repeated_before_they_meet_are_merged_before_that_or_not_at_all(four_ranks):
    def run(tangents, k, v):
        one, other = all_reduce(tangents)[:1], all_reduce(tangents * 2 + k + v)[1:2]
        return ((one.expand(6, HIDDEN) + other.expand(6, HIDDEN)).sum(0),)

    assert rewrites(judged(run, 3, 2)) == [None] * 2

    def same(tangents, k):
        return ((all_reduce(tangents) + all_reduce(tangents * 3 + k))[:1].expand(6, HIDDEN).sum(0),)

    assert rewrites(judged(same, 2, 1)) == [RESULT] * 2


def test_the_wider_dtype_is_the_one_summed_in(four_ranks):
    def run(tangents, b):
        return (all_reduce((tangents * 1).to(torch.bfloat16)).float() + all_reduce(tangents * b),)

    parts = gradients(0, torch.float32, 2)
    graph, report = fused(trace(run, *(p[0] for p in parts)))
    assert rewrites(report) == [RESULT] * 2
    (node,) = [n for n in graph.graph.nodes if "all_reduce" in str(n.target)]
    assert node.meta["val"].dtype == torch.float32
    exact = sum(a.bfloat16().double() + (a * b).double() for a, b in zip(*parts, strict=True))
    torch.testing.assert_close(on_ranks(graph, 4, *parts)[0][0].double(), exact, rtol=1e-5, atol=1e-5)


def test_an_average_stays_an_average(four_ranks):
    def run(tangents, b):
        return (all_reduce(tangents * 1, op="avg") + all_reduce(tangents * b, op="avg"),)

    assert rewrites(judged(run, 2, 1)) == [RESULT] * 2


def test_two_sums_in_a_row(four_ranks):
    """The gradient of one value is merged by itself, and goes on to be part of another one's."""

    def run(tangents, b):
        first = all_reduce(tangents * 1) + all_reduce(tangents * b)
        return (torch.tanh(all_reduce(first * 0.5) + all_reduce(first * b)), first)

    assert rewrites(judged(run, 2, 2)) == [RESULT] * 4


def test_a_sum_that_is_read_by_itself_stays(four_ranks):
    def run(tangents, b):
        single = all_reduce(tangents * 1)
        return (single + all_reduce(tangents * b) + all_reduce(tangents - b), single.relu())

    report = judged(run, 2, 2)
    assert rewrites(report) == [None, RESULT, RESULT]
    assert "backward" in report.boundaries[0].reason


def test_a_reduce_op_that_is_not_the_others(four_ranks):
    def run(tangents, b):
        return (all_reduce(tangents * 1) + all_reduce(tangents * b, op="avg"),)

    report = judged(run, 2, 2)
    assert rewrites(report) == [None, None]
    assert "'sum' and 'avg'" in report.boundaries[0].reason


def test_a_maximum_is_no_sum(four_ranks):
    def run(tangents, b):
        return (all_reduce(tangents * 1, op="max") + all_reduce(tangents * b, op="max"),)

    assert rewrites(judged(run, 2, 2)) == [None, None]


def test_groups_of_equal_size_and_other_members():
    """[0, 1] and [0, 2]: each group's all-reduces are merged among themselves, never across."""
    with fake_world(4):
        a, b = dist.new_group([0, 1]), dist.new_group([0, 2])

        def run(tangents, x):
            return (
                all_reduce(tangents * 1, a)
                + all_reduce(tangents * x, b)
                + all_reduce(tangents + x, a)
                + all_reduce(tangents - x, b),
                all_reduce(tangents * 3, a) + all_reduce(tangents * 4, b),
            )

        example = [parts[0] for parts in gradients(0, torch.float32, 2)]
        after, report = fused(trace(run, *example))
    assert rewrites(report) == [RESULT] * 4 + [None, None]
    assert [boundary.group for boundary in report.boundaries] == [(0, 1), (0, 2)] * 3
    assert report.collectives_after == 4
    assert "different ranks, [0, 1] and [0, 2]" in report.boundaries[4].reason
    groups = [node.args[2] for node in after.graph.nodes if "all_reduce" in str(node.target)]
    assert sorted(groups) == sorted([a.group_name, b.group_name] * 2)


def test_the_same_ranks_under_two_names_are_one_group():
    with fake_world(4):
        a, b = dist.new_group([0, 1, 2, 3]), dist.new_group([0, 1, 2, 3])
        assert a.group_name != b.group_name

        def run(tangents, x):
            return (all_reduce(tangents * 1, a) + all_reduce(tangents * x, b),)

        assert rewrites(judged(run, 2, 1)) == [RESULT] * 2


def across(row, column):
    def run(tangents, x):
        return (all_reduce(tangents * 1, row) + all_reduce(tangents * x, column) + all_reduce(tangents + x, row),)

    return run


def test_every_rank_decides_alike():
    """On each rank of a 2 x 2 mesh, by the names its own groups have there."""
    plans = []
    for rank in range(4):
        with fake_world(4, rank):
            rows = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
            columns = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
            row, column = rows[rank // 2], columns[rank % 2]

            graph = trace(across(row, column), *(parts[0] for parts in gradients(0, torch.float32, 2))).graph
            merges, refusals = plan_merges(find_sums(Known(graph, resolve_group)))
            plans.append(([[part.collective.node.name for part in merge.parts] for merge in merges], list(refusals)))
    assert plans == [([["all_reduce", "all_reduce_2"]], ["all_reduce_1"])] * 4


def test_a_forward_sum_without_a_norm_is_left_alone(four_ranks):
    def run(x, b):
        return (all_reduce(x * 1) + all_reduce(x * b),)

    _, report = fused(trace(run, *(parts[0] for parts in gradients(0, torch.float32, 2))))
    assert rewrites(report) == [None, None]


def test_it_can_be_switched_off(four_ranks):
    def run(tangents, b):
        return (all_reduce(tangents * 1) + all_reduce(tangents * b),)

    before = trace(run, *(parts[0] for parts in gradients(0, torch.float32, 2)))
    outcome = fuse(before.graph, resolve_group, PassOptions(rewrites=("all_reduce_norm",)))
    assert rewrites(outcome.report) == [None, None] and outcome.graph is before.graph


@pytest.mark.parametrize("dynamic", [False, True])
def test_symbolic_shapes(four_ranks, dynamic):
    def run(tangents, b):
        rows = tangents.shape[0]
        return (all_reduce(tangents * 1).view(rows, 2, -1) + all_reduce((tangents * b).view(rows, 2, -1)),)

    parts = gradients(0, torch.float32, 2)
    before = trace(run, *(p[0] for p in parts), dynamic=dynamic)
    after, report = fused(before)
    assert rewrites(report) == [RESULT] * 2
    torch.testing.assert_close(on_ranks(after, 4, *parts), on_ranks(before, 4, *parts))
