"""What steps are said to send: the program's tensors as they were, or how something else was made of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F

from tpfuse import ops
from tpfuse.passes.verdict.steps import with_late_steps
from tpfuse.report import Step
from tpfuse.runtime.plan_check import records

from ..graphs import all_reduce, fused, trace

HIDDEN = 16
X, Y, Z = (torch.randn(2, 3, HIDDEN) for _ in range(3))


def sent(run, *args):
    _, report = fused(trace(run, *args))
    (record,) = records(report).values()
    return [step.sends for step in report.steps], record


def test_a_sum_that_is_fused_and_handed_out_is_sent_as_written(four_ranks):
    def run(x, r):
        total = all_reduce(x)
        return F.rms_norm(r + total.view(2, 3, HIDDEN) * 2, (HIDDEN,)), total

    words, record = sent(run, X, X)
    assert words == ["#0"] and record.as_written and record.boundaries[0].fused


@pytest.mark.parametrize("between", ["a sine", "a sum", "an operation of ours"])
def test_a_sum_that_another_would_overtake_is_left_where_ranks_may_differ(four_ranks, between):
    """Its norm's weight is there only behind the other, and so would be the fused operation."""
    made = {
        "a sine": torch.sin,
        "a sum": lambda w: all_reduce(w.sin()),
        "an operation of ours": lambda w: ops.all_reduce_rms_norm(w[None], None, 1e-6, dist.group.WORLD)[0][0],
    }[between]

    def run(x, r, w):
        total = all_reduce(x)
        return F.rms_norm(r + total, (HIDDEN,), made(w))

    _, report = fused(trace(run, X, X, torch.randn(HIDDEN)), alike=False)
    assert report.boundaries[0].fused == (between == "a sine"), report.boundaries[0].reason


def test_merged_sums_are_sent_as_something_else_that_says_how(four_ranks):
    def merged(factor):
        return lambda x, r: F.rms_norm(r + all_reduce(x) * factor + all_reduce(x.sin()), (HIDDEN,))

    found = [sent(merged(factor), X, X) for factor in (2, 2, 3)]
    assert all(words[0].endswith(":#0,#1") and not record.as_written for words, record in found)
    plans = [record.sent for _, record in found]
    assert plans[0] == plans[1] != plans[2], "another number is another plan"


def test_nothing_of_what_is_sent_depends_on_rows_or_names(four_ranks):
    def one(x, r):
        return F.rms_norm(r + all_reduce(x) + all_reduce(x.sin()), (HIDDEN,))

    def other(x, r):
        unused = r.cos().sum()
        a, b = all_reduce(x), all_reduce(x.sin())
        return F.rms_norm((r + a) + b, (HIDDEN,)), unused

    rows = torch.randn(5, 3, HIDDEN)
    assert sent(one, X, X)[1].sent == sent(other, rows, rows)[1].sent


def test_what_the_forward_half_changes_later_is_part_of_the_plan():
    steps = [Step("all_reduce", (0, 1), sends="#0"), Step("all_reduce", (0, 1), sends="#1")]
    same = [Step("all_reduce_norm", (0, 1), sends="#0"), Step("all_reduce_norm", (0, 1), sends="#1")]
    assert with_late_steps(steps, same) == steps
    merged = with_late_steps(steps, [Step("all_reduce_norm", (0, 1), sends="a:#0,#1")])
    assert merged[0].sends.endswith(":#0") and merged[0] != steps[0] and merged[1] == steps[1]


def taken_for_equal(run, *args):
    """(what the last step of a program relies on, the sizes it was viewed in, what it sends)."""
    _, report = fused(trace(run, *args), alike=True)
    step = next(step for step in reversed(report.steps) if not step.sends.startswith("#"))
    return step.relies, step.shapes, step.sends


def test_sizes_that_rows_are_viewed_in_are_compared_where_they_say_which_rows_are_meant(four_ranks):
    def turned(parts):
        def program(y, r):
            rows = all_reduce(y).view(parts, 12 // parts, HIDDEN).transpose(0, 1)
            return F.rms_norm(r + rows.reshape(12, HIDDEN), (HIDDEN,))

        return program

    y, r = torch.randn(12, HIDDEN), torch.randn(12, HIDDEN)
    (_, two, words), (_, three, same), (_, again, _) = [taken_for_equal(turned(n), y, r) for n in (2, 3, 2)]
    assert two == again != three and two and words == same, "the words are those of any number of rows"


def test_a_number_made_of_sizes_is_compared_too(four_ranks):
    def counted(rows):
        return lambda y: F.rms_norm(all_reduce(y) * torch.ones(rows, 1).sum(0), (HIDDEN,))

    assert taken_for_equal(counted(3), X)[1] != taken_for_equal(counted(4), X)[1]


def test_a_gate_that_is_gathered_elsewhere_is_compared(four_ranks):
    def run(y, z):
        gathered = funcol.all_gather_tensor(z, 0, dist.group.WORLD)
        return F.rms_norm(all_reduce(y) * z, (HIDDEN,)), gathered

    assert taken_for_equal(run, X, Y)[0] == (-1,), "an input that no index tells is never agreed on"


def test_a_gate_made_of_a_fused_norm_relies_on_the_norms_own_operands(four_ranks):
    def run(y, z, r, w, eps):
        n = F.rms_norm(r + all_reduce(y), (HIDDEN,), w, eps)
        return F.rms_norm(all_reduce(z) * n.mean(-1, keepdim=True).sigmoid(), (HIDDEN,))

    w = torch.ones(HIDDEN)
    relies, _, words = taken_for_equal(lambda y, z, r, w: run(y, z, r, w, 1e-5), X, Y, Z, w)
    assert len(relies) == 2, "residual and weight"
    assert words != taken_for_equal(lambda y, z, r, w: run(y, z, r, w, 1e-3), X, Y, Z, w)[2]


def test_what_a_norm_hands_out_besides_is_no_part_of_what_its_readers_send(four_ranks):
    def run(more):
        def program(y, z, r):
            h = r + all_reduce(y)
            n = F.rms_norm(h, (HIDDEN,))
            gate = (n * h).mean(-1, keepdim=True).sigmoid()
            out = F.rms_norm(all_reduce(z) * gate, (HIDDEN,))
            return (out, *more(h, n))

        return program

    assert taken_for_equal(run(lambda h, n: (n,)), X, Y, Z) == taken_for_equal(run(lambda h, n: (h * 2,)), X, Y, Z)


def test_operators_that_may_ask_for_their_rank_are_alike_on_no_two_ranks(four_ranks):
    with torch.library._scoped_library("sent_tests", "FRAGMENT") as library:
        library.define("mine(Tensor x) -> Tensor")
        library.impl("mine", lambda x: x * 2, "CompositeExplicitAutograd")

        def run(y):
            return F.rms_norm(all_reduce(y) * torch.ops.sent_tests.mine(torch.ones(3, 1)), (HIDDEN,))

        assert taken_for_equal(run, X)[2] != taken_for_equal(run, X)[2]


def test_norms_that_finish_rows_for_other_ranks_rely_on_their_operands(four_ranks):
    def layer(rows, n, w):
        group = dist.group.WORLD
        rows = rows + funcol.reduce_scatter_tensor(n * 2, "sum", 0, group)
        return rows, funcol.all_gather_tensor(F.rms_norm(rows, (HIDDEN,), w), 0, group)

    def run(y, r, w):
        return layer(*layer(r[:2], y, w), w)[1]

    _, report = fused(trace(run, torch.randn(8, HIDDEN), torch.randn(8, HIDDEN), torch.ones(HIDDEN)), alike=True)
    assert [b.rewrite for b in report.boundaries] == ["share_attention_group"] * 4
    assert all(-1 in step.relies for step in report.steps if step.op == "all_reduce_norm")


def test_numbers_of_a_norm_that_finishes_rows_for_other_ranks_are_part_of_what_is_sent(four_ranks):
    """The rank that has a row finishes it for all: with its eps, and its factor of the sum."""

    def words(eps, factor):
        def run(y, r, w):
            group = dist.group.WORLD
            rows = r[:2] + funcol.reduce_scatter_tensor(y, "sum", 0, group) * factor
            n = funcol.all_gather_tensor(F.rms_norm(rows, (HIDDEN,), w, eps), 0, group)
            rows = rows + funcol.reduce_scatter_tensor(n * 2, "sum", 0, group)
            return funcol.all_gather_tensor(F.rms_norm(rows, (HIDDEN,), w), 0, group)

        _, report = fused(trace(run, torch.randn(8, HIDDEN), torch.randn(8, HIDDEN), torch.ones(HIDDEN)), alike=True)
        assert [b.rewrite for b in report.boundaries] == ["share_attention_group"] * 4
        return next(step.sends for step in report.steps if step.op == "all_reduce_norm")

    assert words(1e-5, 2.0) == words(1e-5, 2.0)
    assert words(1e-5, 2.0) != words(2e-5, 2.0)
    assert words(1e-5, 2.0) != words(1e-5, 3.0)


def test_a_sum_over_some_of_the_ranks_is_as_different_as_what_went_into_it(four_ranks):
    """What finishes rows for four ranks is not made of a sum over two of them, unless their tensors are compared."""
    pair = dist.new_group([0, 1])

    def run(group):
        def program(v, z, y, w):
            whole = z + all_reduce(v.cos(), group)
            rows = whole.chunk(4)[0] + funcol.reduce_scatter_tensor(y, "sum", 0, dist.group.WORLD)
            return funcol.all_gather_tensor(F.rms_norm(rows, (HIDDEN,), w), 0, dist.group.WORLD)

        rows = [torch.randn(8, HIDDEN) for _ in range(3)]
        _, report = fused(trace(program, *rows, torch.ones(HIDDEN)), alike=True)
        assert "share_attention_group" in [b.rewrite for b in report.boundaries]
        return next(step.relies for step in report.steps if step.op == "all_reduce_norm")

    assert len(run(dist.group.WORLD)) == 2, "z and w"
    assert len(run(pair)) == 3, "v as well"


def test_what_a_reduce_scatter_gives_finishes_no_rows_of_other_ranks(four_ranks):
    def run(y, r, v):
        w = funcol.reduce_scatter_tensor(v, "sum", 0, dist.group.WORLD)
        rows = r.chunk(4)[0] + funcol.reduce_scatter_tensor(y, "sum", 0, dist.group.WORLD)
        return funcol.all_gather_tensor(F.rms_norm(rows, (HIDDEN,), w), 0, dist.group.WORLD)

    def words():
        rows = [torch.randn(8, HIDDEN) for _ in range(2)]
        _, report = fused(trace(run, *rows, torch.randn(4 * HIDDEN)), alike=True)
        return next(step.sends for step in report.steps if step.op == "all_reduce_norm")

    assert words() != words(), "as if it were another operation on every rank"
