"""Residual streams with leading ones, of another dtype, with rows in another order, or with other strides."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F

from ..graphs import all_reduce, fused, on_ranks, relative_error, trace

H = 16


def norm(h, weight):
    return F.layer_norm(h, h.shape[-1:], weight)


def leading_one(x, r, weight):
    """Hooks that reduce `output[0]` of a batch of one."""
    h = r[None] + all_reduce(x[None][0])
    return norm(h, weight), h


def positions(x, r, weight):
    """Learned positions, the same for every sequence."""
    h = all_reduce(x) + r[:1, :, :]
    return norm(h, weight), h


def sequence_first(x, r, weight):
    h = all_reduce(x).transpose(0, 1).contiguous()
    return norm(h, weight), h


def transposed_stem(x, r, weight):
    """Two boundaries of a stream that begins as the transposed output of a convolution."""
    h = r.transpose(1, 2).contiguous().transpose(1, 2) + all_reduce(x)
    h = h + all_reduce(torch.tanh(norm(h, weight)))
    return norm(h, weight), h, h.transpose(1, 2).reshape(h.shape[0], -1)


def wide_residual(x, r, weight):
    h = r.float() + all_reduce(x)
    return norm(h, weight.float()).to(x.dtype), h


def waited_for_twice(x, r, weight):
    h = r + funcol.wait_tensor(funcol.all_reduce(x, "sum", dist.group.WORLD))
    return norm(h, weight), h


PROGRAMS = {
    leading_one: 1,
    positions: 1,
    sequence_first: 1,
    transposed_stem: 2,
    wide_residual: 1,
    waited_for_twice: 1,
}


@pytest.mark.parametrize(
    ("dtype", "dynamic"),
    [
        (torch.bfloat16, False),
        (torch.float32, True),
        pytest.param(torch.float32, False, marks=pytest.mark.nightly),
        pytest.param(torch.bfloat16, True, marks=pytest.mark.nightly),
    ],
)
@pytest.mark.parametrize("run", PROGRAMS, ids=lambda fn: fn.__name__)
def test_the_boundary_fuses_and_its_outputs_keep_strides_dtypes_and_numbers(four_ranks, run, dtype, dynamic):
    torch.manual_seed(0)
    shape = (3, 5, H) if run is not leading_one else (5, H)
    partials = [torch.randn(shape).to(dtype) for _ in range(four_ranks)]
    rest = torch.randn(shape).to(dtype), (torch.randn(H) + 1).to(dtype)
    before = trace(run, partials[0], *rest, dynamic=dynamic)
    after, report = fused(before, strict=True)
    assert [b.fused for b in report.boundaries] == [True] * PROGRAMS[run], report
    exact = on_ranks(trace(run, partials[0].double(), *(t.double() for t in rest)), four_ranks,
                     [p.double() for p in partials], *(t.double() for t in rest))  # fmt: skip
    was, now = on_ranks(before, four_ranks, partials, *rest), on_ranks(after, four_ranks, partials, *rest)
    for old, new, reference in zip(was, now, exact, strict=True):
        assert [(t.dtype, t.shape, t.stride()) for t in new] == [(t.dtype, t.shape, t.stride()) for t in old]
        for out, a, b in zip(new, relative_error(new, reference), relative_error(old, reference), strict=True):
            assert a <= 1.1 * b + torch.finfo(out.dtype).eps / 2


def two_wide_sums(x, r, weight):
    """Added up in float32: as one they would be rounded to bfloat16 once more on every rank."""
    h = r.float() + all_reduce(x) + all_reduce(x.flip(0))
    return norm(h, weight.float()), h


def wide_gate(x, r, weight):
    h = all_reduce(x) * r[..., :1].float() + r
    return norm(h, weight.float()), h


def wide_row_sum(x, r, weight):
    h = all_reduce(x).float().sum(1) + r[:, 0]
    return norm(h, weight.float()), h


def wide_sums_rounded(x, r, weight):
    h = (all_reduce(x).float() + all_reduce(x.flip(0)).float()).to(x.dtype) + r
    return norm(h, weight), h


@pytest.mark.parametrize(
    ("run", "wide", "own"),
    [(two_wide_sums, 1, 2), (wide_gate, 0, 1), (wide_row_sum, 0, 1), (wide_sums_rounded, 2, 2)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_nothing_is_rounded_in_front_of_a_sum_that_was_not_rounded_behind_it(four_ranks, run, wide, own):
    """`wide`, `own`: how many boundaries are fused where the sum is bfloat16, and where it is float32 itself."""
    for dtype, count in ((torch.bfloat16, wide), (torch.float32, own)):
        old, new = [], []
        for seed in range(20):
            torch.manual_seed(seed)
            partials = [torch.randn(3, 5, H).to(dtype) for _ in range(four_ranks)]
            rest = torch.randn(3, 5, H).to(dtype), (torch.randn(H) + 1).to(dtype)
            if not seed:
                before, exact = trace(run, partials[0], *rest), trace(run, *(t.double() for t in (partials[0], *rest)))
                after, report = fused(before, strict=True)
                assert len(report.fused) == count, report
            reference = on_ranks(exact, four_ranks, [p.double() for p in partials], *(t.double() for t in rest))[0]
            results = [on_ranks(gm, four_ranks, partials, *rest)[0] for gm in (before, after)]
            old.append(relative_error(results[0], reference))
            new.append(relative_error(results[1], reference))
        roundings = torch.tensor([torch.finfo(t.dtype).eps / 2 for t in results[0]])
        assert (torch.tensor(new).mean(0) <= 1.1 * torch.tensor(old).mean(0) + roundings).all(), report
