"""norm_backward in further spellings: forward hands x-hat to backward, or LayerNorm is written out. What reads the
norm's output in place of the hidden states is not fused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ..graphs import executed_collectives, fake_world, on_ranks, relative_error, trace
from .test_norm_backward import BF16, EPS, F32, RESULT, SPELLINGS, Case, H, all_reduce, example, fused, judged


def wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (BF16, torch.float16) else x


def rows_of(h: Tensor) -> tuple[int, ...]:
    return tuple(range(h.dim() - 1))


def of_normed_rows(h: Tensor, weight: Tensor, bias: Tensor, dy: Tensor):
    """x-hat is what forward hands over, and h is not read again."""
    x = wide(h)
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    normed = x * rstd
    g = wide(dy) * weight
    dx = (g - normed * (g * normed).mean(-1, keepdim=True)) * rstd
    return (normed * weight).to(h.dtype), dx.to(h.dtype), (wide(dy) * normed).sum(rows_of(h)), None


def of_the_output(h: Tensor, weight: Tensor, bias: Tensor, dy: Tensor):
    """Apex's `memory_efficient`: x-hat is had back from y, which the linears keep anyway."""
    x = wide(h)
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    y = x * rstd * weight
    normed = y / weight
    g = wide(dy) * weight
    dx = (g - normed * (g * normed).mean(-1, keepdim=True)) * rstd
    return y.to(h.dtype), dx.to(h.dtype), (wide(dy) * normed).sum(rows_of(h)), None


def layer_by_hand(h: Tensor, weight: Tensor, bias: Tensor, dy: Tensor):
    """LayerNorm as autograd differentiates what is written out."""
    x = wide(h)
    centred = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)
    y = centred * rstd * weight + bias
    g = wide(dy) * weight
    of_rstd = (g * centred).sum(-1, keepdim=True) * -0.5 * rstd.pow(3)
    of_centred = g * rstd + of_rstd / H * 2 * centred
    dx = of_centred - of_centred.mean(-1, keepdim=True)
    dweight = (wide(dy) * (centred * rstd)).sum(rows_of(h))
    return y.to(h.dtype), dx.to(h.dtype), dweight, wide(dy).sum(rows_of(h))


def layer_of_the_output(h: Tensor, weight: Tensor, bias: Tensor, dy: Tensor):
    x = wide(h)
    mean = x.mean(-1, keepdim=True)
    rstd = torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + EPS)
    y = (x - mean) * rstd * weight + bias
    normed = (y - bias) / weight
    g = wide(dy) * weight
    dx = (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True)) * rstd
    return y.to(h.dtype), dx.to(h.dtype), (wide(dy) * normed).sum(rows_of(h)), wide(dy).sum(rows_of(h))


FURTHER = [of_normed_rows, layer_by_hand]
OF_THE_OUTPUT = [of_the_output, layer_of_the_output]
FORMS = ["all_reduce", "rows", "sequence", "permuted"]


@pytest.mark.parametrize("spelling", FURTHER, ids=lambda s: s.__name__)
@pytest.mark.parametrize(("form", "dtype"), [("all_reduce", F32), ("permuted", BF16)], ids=["sum", "scattered"])
def test_every_further_spelling(two_ranks, spelling, form, dtype):
    judged(Case(spelling, form, dtype=dtype))


@pytest.mark.nightly
@pytest.mark.parametrize("spelling", FURTHER, ids=lambda s: s.__name__)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_every_further_spelling_in_every_form(two_ranks, spelling, form, dtype, first):
    judged(Case(spelling, form, 2, first, dtype), seeds=20)


@pytest.mark.nightly
@pytest.mark.parametrize("spelling", [*SPELLINGS, *FURTHER], ids=lambda s: s.__name__)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("world", [4, 8])
def test_every_spelling_over_more_ranks(world, form, spelling):
    with fake_world(world):
        judged(Case(spelling, form, world, dtype=BF16), seeds=6)


@pytest.mark.parametrize("spelling", OF_THE_OUTPUT, ids=lambda s: s.__name__)
def test_what_reads_the_output_stays_for_the_hidden_states_would_be_kept_besides(two_ranks, spelling):
    case = Case(spelling)
    before = case.traced(case.inputs(0))
    _, report = fused(before)
    (boundary,) = report.boundaries
    assert not boundary.fused and "the norm's backward reads what the norm gave" in boundary.reason


def test_a_residual_added_in_between_where_products_are_rounded(two_ranks):
    """Autograd adds gradients in the order in which they come, in Hugging Face's norm between products in bfloat16."""

    def run(tangents, residual, h, weight, bias):
        x = wide(h)
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        y = weight.to(h.dtype) * (x * rstd).to(h.dtype)
        g = wide(all_reduce(tangents * 2) * weight.to(h.dtype))
        inner = (g * x).sum(-1, keepdim=True) * -0.5 * rstd.pow(3)
        return y, (wide(residual) + g * rstd + inner / H * 2 * x).to(h.dtype)

    inputs = Case(of_normed_rows, dtype=BF16).inputs(0)
    before = trace(run, *example(inputs))
    after, report = fused(before)
    assert [b.rewrite for b in report.boundaries] == [RESULT]
    assert executed_collectives(after, *example(inputs)) == executed_collectives(before, *example(inputs))
    doubled = [[t.double() for t in each] if isinstance(each, list) else each.double() for each in inputs]
    reference = on_ranks(trace(run, *example(doubled)), 2, *doubled)
    for old, new, r in zip(on_ranks(before, 2, *inputs), on_ranks(after, 2, *inputs), reference, strict=True):
        pairs = zip(relative_error(new, r), relative_error(old, r), strict=True)
        assert all(one <= 1.1 * other + 0.004 for one, other in pairs)
