"""What steps are said to send: the program's tensors as they were, or how something else was made of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tpfuse.passes.verdict.steps import with_late_steps
from tpfuse.report import Step
from tpfuse.runtime.plan_check import records

from ..graphs import all_reduce, fused, trace

HIDDEN = 16
X = torch.randn(2, 3, HIDDEN)


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
