"""Everything linear between the all-reduce and the norm is looked through, whatever form it has, and keeps its numbers.

Steps move in front of the all-reduce (sums are linear), so a step that could differ between ranks is refused.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ..graphs import all_reduce, executed_collectives, fused, on_ranks, trace
from . import spellings
from .test_all_reduce_norm import HIDDEN, ROWS, assert_error_rule, inputs
from .test_refusals import refused


def normed(h, weight, bias):
    return spellings.rms_llama(h, weight, bias), h


def by_buffer(s, r, weight, bias):
    """Gemma's normalizer: a 0-d tensor."""
    return s * weight[0] + r


def by_wider_scalar(s, r, weight, bias):
    """A multiplier that became a graph input of its own: a 0-d float64 tensor, cast."""
    return r + bias[1].double().to(s.dtype) * s


def divided_by_buffer(s, r, weight, bias):
    return s / weight[2] + r


def by_layer_scale(s, r, weight, bias):
    """One number per hidden unit."""
    return s * bias + r


def by_row_gate(s, r, weight, bias):
    """Qwen2-MoE's gate on a shared expert: one number per row, computed from replicated values."""
    return torch.sigmoid(r.mean(-1, keepdim=True)) * s + r


def gate_over_a_sum(s, r, weight, bias):
    return torch.sigmoid(r[..., :1]) * (s + r) + bias


def half_of_two(s, r, weight, bias):
    return 0.5 * (s + r)


def masked(s, r, weight, bias):
    return (s + r).masked_fill(r[..., :1] > 0, 0.0)


def chosen(s, r, weight, bias):
    return torch.where(r[..., :1] > 0, s, torch.zeros_like(s)) + r


def last_token(s, r, weight, bias):
    """Only the last position goes on to the norm; the sum needs to be paid for it alone."""
    return (s + r)[:, -1]


def experts_added_up(s, r, weight, bias):
    """Llama 4: every expert sees every token, and what they say is added up behind the all-reduce."""
    return s.sum(0) + r[0]


def averaged_rows(s, r, weight, bias):
    return s.reshape(2, 3, 1, HIDDEN).mean((-3, 2)) + r[:, 0]


def transposed(s, r, weight, bias):
    return (s.transpose(0, 1) + r.transpose(0, 1)).transpose(0, 1)


def rolled(s, r, weight, bias):
    """Swin's windows: shifted back before the residual is added."""
    return r + torch.roll(s, 1, 0)


def in_another_order(s, r, weight, bias):
    return r + s[torch.arange(s.shape[0] - 1, -1, -1)]


def bias_then_view(s, r, weight, bias):
    """A linear layer's bias, added where the rows are still flat."""
    return (s.reshape(-1, HIDDEN) + bias).view(*ROWS, HIDDEN) + r


def bias_of_another_width(s, r, weight, bias):
    """The bias is as long as the rows are wide where it is added, not where the norm runs."""
    h = (s.view(2, 3 * HIDDEN) + bias.repeat(3)).view(*ROWS, HIDDEN)
    return h + r


def position_embedding(s, r, weight, bias):
    return s + r[:1]


def eval_dropout(s, r, weight, bias):
    return torch.nn.functional.dropout(s + bias, 0.5, training=False) + r


def no_dropout(s, r, weight, bias):
    return torch.nn.functional.dropout(s + bias, 0.0, training=True) + r


STEPS = [fn for name, fn in list(globals().items()) if callable(fn) and getattr(fn, "__module__", "") == __name__]
STEPS.remove(normed)


@pytest.mark.parametrize("steps", STEPS, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_steps_fuse_within_the_error_rule(four_ranks, steps, dtype):
    def run(x, r, weight, bias):
        return normed(steps(all_reduce(x), r, weight, bias), weight, bias)

    report = assert_error_rule(run, four_ranks, dtype, seeds=20 if dtype is torch.bfloat16 else 3)
    assert [b.fused for b in report.boundaries] == [True], report


SYMBOLIC = [by_buffer, by_row_gate, last_token, half_of_two, experts_added_up]


@pytest.mark.parametrize("steps", SYMBOLIC, ids=lambda fn: fn.__name__)
def test_linear_steps_with_symbolic_shapes(four_ranks, steps):
    def run(x, r, weight, bias):
        return normed(steps(all_reduce(x), r, weight, bias), weight, bias)

    partials, *rest = inputs(0, torch.float32)
    before = trace(run, partials[0], *rest, dynamic=True)
    after, report = fused(before)
    assert [b.fused for b in report.boundaries] == [True], report
    expected, got = (on_ranks(gm, 4, partials, *rest)[1] for gm in (before, after))
    torch.testing.assert_close(got, expected)


def test_a_gate_of_a_wider_dtype_does_not_widen_the_all_reduce(four_ranks):
    def run(x, r, weight, bias):
        return normed((all_reduce(x) * r[..., :1].float().sigmoid()).to(x.dtype) + r, weight, bias)

    partials, *rest = inputs(0, torch.bfloat16)
    after, report = fused(trace(run, partials[0], *rest))
    assert report.fused
    (operation,) = [n for n in after.graph.nodes if "all_reduce_norm" in str(n.target)]
    assert operation.args[0].meta["val"].dtype == torch.bfloat16


def test_gated_and_plain_sums_merge(four_ranks):
    """A gated shared expert beside routed experts: two sums over the same ranks, one of them gated."""

    def run(x, r, weight, bias):
        gate = torch.sigmoid(r[..., :1])
        return normed(r + all_reduce(x) + gate * all_reduce(torch.tanh(x)), weight, bias)

    report = assert_error_rule(run, four_ranks, torch.bfloat16)
    assert [b.rewrite for b in report.boundaries] == ["merge_all_reduces"] * 2
    partials, *rest = inputs(0, torch.float32)
    after, _ = fused(trace(run, partials[0], *rest))
    assert executed_collectives(after, partials[0], *rest) == {"all_reduce": 1}


def test_rows_are_added_up_before_they_are_sent(four_ranks):
    """Llama 4's routed experts beside its shared one: one all-reduce of the tokens, not one of experts x tokens."""

    def run(x, r, weight, bias):
        shared, routed = all_reduce(x[0]), all_reduce(torch.tanh(x).reshape(-1, HIDDEN))
        return normed(r[0] + (shared + routed.reshape(2, -1, HIDDEN).sum(dim=0)), weight, bias)

    report = assert_error_rule(run, four_ranks, torch.bfloat16)
    assert [b.rewrite for b in report.boundaries] == ["merge_all_reduces"] * 2
    partials, *rest = inputs(0, torch.float32)
    after, _ = fused(trace(run, partials[0], *rest))
    (operation,) = [n for n in after.graph.nodes if "all_reduce_norm" in str(n.target)]
    assert operation.args[0].meta["val"].shape == (3, HIDDEN)


# -- what must not move -----------------------------------------------------------------------------------------------


def test_a_random_mask_stays_behind_its_sum(four_ranks):
    """Each rank draws its own mask unless the user sees to it; sum(mask_r * x_r) would be no dropout of the sum."""

    def run(x, r, weight, bias):
        return normed(torch.nn.functional.dropout(all_reduce(x), 0.5, training=True) + r, weight, bias)

    partials, *rest = inputs(0, torch.float32)
    before = trace(run, partials[0], *rest)
    _, report = fused(before)
    (verdict,) = report.boundaries
    assert not verdict.fused and verdict.feeds_norm
    assert "random mask" in verdict.reason and "eval mode" in verdict.reason


@pytest.mark.parametrize("add_up", [lambda s: s.sum(-1, keepdim=True), lambda s: s.sum(), lambda s: s.mean((0, 2))[0]])
def test_a_sum_over_hidden_units_is_no_sum_of_rows(four_ranks, add_up):
    def run(x, r, weight, bias):
        return normed(add_up(all_reduce(x)) + r, weight, bias)

    (verdict,) = refused(run).boundaries
    assert "between the all-reduce and the norm" in verdict.reason


def test_a_gate_computed_from_the_sum(four_ranks):
    def run(x, r, weight, bias):
        s = all_reduce(x)
        return spellings.rms_llama(s * torch.sigmoid(s) + r, weight, bias)

    (verdict,) = refused(run).boundaries
    assert "multiplied by a value that is itself computed from that sum" in verdict.reason


def test_a_gate_from_a_ranks_own_rows(four_ranks):
    def run(x, r, weight, bias):
        c10d = torch.ops._c10d_functional
        own = c10d.wait_tensor(c10d.reduce_scatter_tensor(r.reshape(-1)[:16], "sum", 4, dist.group.WORLD.group_name))
        return spellings.rms_llama(all_reduce(x) * own[0], weight, bias)

    partials, *rest = inputs(0, torch.float32)
    _, report = fused(trace(run, partials[0], *rest))
    reason = next(b.reason for b in report.boundaries if b.collective == "all_reduce")
    assert "differs between ranks" in reason


@pytest.mark.parametrize("gate", [lambda x, r: x, lambda x, r: (x + r).sigmoid(), lambda x, r: x[:1].exp()])
def test_a_gate_from_what_is_to_be_summed(four_ranks, gate):
    """A rank's own part of a sum is nobody else's gate."""

    def run(x, r, weight, bias):
        partial = x.reshape(-1, HIDDEN) * 0.5
        return normed(all_reduce(partial).reshape(x.shape) * gate(x, r) + r, weight, bias)

    (verdict,) = refused(run).boundaries
    assert "is what they have to sum up" in verdict.reason


def test_a_gate_from_what_is_to_be_summed_and_scattered(four_ranks):
    def run(x, r, weight, bias):
        c10d, partial = torch.ops._c10d_functional, x.reshape(-1, HIDDEN)[:4] * 2
        group = dist.group.WORLD.group_name
        own = c10d.wait_tensor(c10d.reduce_scatter_tensor(partial, "sum", 4, group))
        return spellings.rms_llama(all_reduce(torch.tanh(x)) * partial.mean(), weight, bias), own

    partials, *rest = inputs(0, torch.float32)
    _, report = fused(trace(run, partials[0], *rest))
    assert not report.fused and "is what they have to sum up" in report.boundaries[-1].reason


@pytest.mark.parametrize("own", [True, False])
def test_an_addend_that_is_a_ranks_own_is_added_by_that_rank(four_ranks, own):
    """Every kernel hands each rank the whole sum, so nothing has to be pinned to one of them."""

    def run(x, r, weight, bias):
        return normed(all_reduce(x) + (x * 2 if own else r), weight, bias)

    assert assert_error_rule(run, four_ranks, torch.bfloat16).fused
    partials, *rest = inputs(0, torch.float32)
    after, _ = fused(trace(run, partials[0], *rest))
    (operation,) = [n for n in after.graph.nodes if "all_reduce_norm" in str(n.target)]
    assert not operation.kwargs.get("batch_invariant", False)


@pytest.mark.parametrize("steps", [by_row_gate, transposed], ids=lambda fn: fn.__name__)
def test_the_sum_before_such_a_step_is_not_handed_out(four_ranks, steps):
    """The fused operation ends with the gated sum; whoever reads the sum before the gate needs the other one."""

    def run(x, r, weight, bias):
        s = all_reduce(x)
        return spellings.rms_llama(steps(s, r, weight, bias), weight, bias), s * 2

    (verdict,) = refused(run).boundaries
    assert "reads the sum before it as well" in verdict.reason


def test_such_a_sum_is_left_alone_and_the_others_of_its_norm_are_fused(four_ranks):
    """A gated shared expert in training: backward reads its sum for the gate's gradient. The routed ones' is free."""

    def run(x, r, weight, bias):
        shared = all_reduce(torch.tanh(x))
        h = r + all_reduce(x) + torch.sigmoid(r[..., :1]) * shared
        return *normed(h, weight, bias), shared * 2

    report = assert_error_rule(run, four_ranks, torch.bfloat16)
    alone, free = sorted(report.boundaries, key=lambda boundary: boundary.fused)
    assert free.rewrite == "all_reduce_norm" and "reads the sum before it as well" in alone.reason


def test_a_sum_that_is_left_alone_does_not_stop_the_norms_after_it(four_ranks):
    """They read the hidden states behind it, where it is finished."""

    def run(x, r, weight, bias):
        shared = all_reduce(x)
        h = r + torch.sigmoid(r[..., :1]) * shared
        for _ in range(2):
            h = h + all_reduce(torch.tanh(spellings.rms_llama(h, weight, bias)))
        return *normed(h, weight, bias), shared * 2

    report = assert_error_rule(run, four_ranks, torch.bfloat16)
    assert [b.fused for b in report.boundaries] == [False, True, True]


def test_hidden_states_that_cannot_be_taken_apart_do_not_stop_the_norms_after_them(four_ranks):
    """What is made of the sum itself is refused; what comes later adds to its result."""

    def run(x, r, weight, bias):
        s = all_reduce(x)
        h = s + torch.tanh(s) + r
        for _ in range(2):
            h = h + all_reduce(torch.tanh(spellings.rms_llama(h, weight, bias)))
        return normed(h, weight, bias)

    partials, *rest = inputs(0, torch.bfloat16)
    _, report = fused(trace(run, partials[0], *rest))
    assert [b.fused for b in report.boundaries] == [False, True, True]
    assert "computed from the all-reduced sum" in report.boundaries[0].reason


def test_a_norm_that_cannot_be_fused_leaves_its_sum_to_the_next_one(four_ranks):
    def run(x, r, weight, bias):
        h = all_reduce(x) + r
        over_rows = h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + 1e-6)
        return *normed(h * 2, weight, bias), over_rows

    (verdict,) = assert_error_rule(run, four_ranks, torch.bfloat16).boundaries
    assert verdict.fused, verdict.reason


def test_a_sum_added_to_itself_and_read_alone(four_ranks):
    """One and a half times the sum enters the norm, and the sum itself is handed out."""

    def run(x, r, weight, bias):
        s = all_reduce(x)
        return spellings.rms_llama(s * 0.5 + r + s, weight, bias), s * 2

    report = assert_error_rule(run, four_ranks, torch.float32, seeds=3)
    assert [b.fused for b in report.boundaries] == [True], report


def test_a_product_of_two_sums_is_not_linear(four_ranks):
    def run(x, r, weight, bias):
        return spellings.rms_llama(all_reduce(x) * all_reduce(x + 1), weight, bias)

    report = refused(run)
    assert len(report.boundaries) == 2


def test_a_sum_that_a_matrix_product_needs_first_does_not_feed_the_norm(four_ranks):
    """OLMo2: the embedding goes into a projection, and its residual ends in a norm that reads the projection too."""

    def run(x, r, weight, bias):
        s = all_reduce(x)
        return spellings.rms_llama(s + torch.tanh(s @ torch.ones(HIDDEN, HIDDEN, dtype=s.dtype)), weight, bias)

    (verdict,) = refused(run).boundaries
    assert not verdict.feeds_norm and verdict.norm is None
    assert "before any norm does" in verdict.reason
