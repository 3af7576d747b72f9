"""all_reduce_norm: every spelling of a norm, with the residual in every place, fuses and keeps its numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ..graphs import all_reduce, executed_collectives, fused, on_ranks, relative_error, trace
from . import spellings

ROWS, HIDDEN = (2, 3), 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(seed: int, dtype: torch.dtype, world: int = 4, hidden: int = HIDDEN):
    """(one partial sum per rank, residual, weight, bias)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return [draw(*ROWS, hidden) for _ in range(world)], draw(*ROWS, hidden), draw(hidden) + 1, draw(hidden)


def boundary(norm, residual: str = "second"):
    """all-reduce → + residual → norm; returns the normed value and the residual stream."""

    def run(x, r, weight, bias):
        s = all_reduce(x)
        h = {"first": lambda: r + s, "second": lambda: s + r, "absent": lambda: s, "unused": lambda: s + r}[residual]()
        y = norm(h, weight, bias)
        return (y,) if residual == "unused" else (y, h)

    return run


def assert_error_rule(run, world: int, dtype: torch.dtype, draw=inputs, seeds: int = 20, **trace_options):
    """Over `seeds` seeds, on all ranks: error against float64 at most 1.1 x that of the old graph plus one rounding."""
    partials, *rest = draw(0, dtype)
    before = trace(run, partials[0], *rest, **trace_options)
    after, report = fused(before)
    exact = trace(run, partials[0].double(), *(t.double() for t in rest))
    rounding = torch.finfo(dtype).eps / 2
    old, new = [], []
    for seed in range(seeds):
        partials, *rest = draw(seed, dtype)
        reference = on_ranks(exact, world, [p.double() for p in partials], *(t.double() for t in rest))
        for errors, graph in ((old, before), (new, after)):
            got = on_ranks(graph, world, partials, *rest)
            errors.append([relative_error(got[rank], reference[rank]) for rank in range(world)])
    old, new = torch.tensor(old).mean(0), torch.tensor(new).mean(0)  # [rank, output]
    assert (new <= 1.1 * old + rounding).all(), f"errors of each rank {new.tolist()} against {old.tolist()} unfused"
    return report


#: Every spelling in two dtypes, and one of each norm in the third; the others of the third are nightly.
IN_DTYPES = [
    pytest.param(norm, dtype, id=f"{dtype}-{norm.__name__}", marks=() if always else pytest.mark.nightly)
    for dtype in DTYPES
    for norm in spellings.ALL
    for always in [dtype is not torch.float16 or norm in (spellings.rms_llama, spellings.layer_functional)]
]


@pytest.mark.parametrize(("norm", "dtype"), IN_DTYPES)
def test_every_spelling_fuses_within_the_error_rule(four_ranks, norm, dtype):
    report = assert_error_rule(boundary(norm), four_ranks, dtype)
    (verdict,) = report.boundaries
    assert verdict.fused and verdict.rewrite == "all_reduce_norm", verdict.reason
    assert verdict.norm == ("layer_norm" if norm in spellings.LAYER else "rms_norm")
    assert verdict.reason == "" and verdict.group == (0, 1, 2, 3)


@pytest.mark.parametrize("residual", ["first", "second", "absent", "unused"])
@pytest.mark.parametrize("norm", [spellings.rms_llama, spellings.layer_functional], ids=lambda fn: fn.__name__)
def test_the_residual_may_be_anywhere(four_ranks, norm, residual):
    report = assert_error_rule(boundary(norm, residual), four_ranks, torch.bfloat16)
    assert [b.fused for b in report.boundaries] == [True]


@pytest.mark.parametrize("norm", spellings.ALL, ids=lambda fn: fn.__name__)
def test_symbolic_shapes(four_ranks, norm):
    partials, *rest = inputs(0, torch.float32)
    _, report = fused(trace(boundary(norm), partials[0], *rest, dynamic=True))
    assert [b.fused for b in report.boundaries] == [True], report


@pytest.mark.parametrize("norm", spellings.ALL, ids=lambda fn: fn.__name__)
def test_graphs_of_make_fx_without_decompositions(four_ranks, norm):
    """Whole norms and in-place steps, as make_fx leaves them."""
    partials, *rest = inputs(0, torch.float32)
    before = trace(boundary(norm), partials[0], *rest, decompose=False)
    after, report = fused(before)
    assert [b.fused for b in report.boundaries] == [True], report
    expected, got = (on_ranks(gm, 4, partials, *rest)[0] for gm in (before, after))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("norm", spellings.ALL, ids=lambda fn: fn.__name__)
def test_graphs_of_torch_export(four_ranks, norm):
    class Boundary(torch.nn.Module):
        def forward(self, x, r, weight, bias):
            return boundary(norm)(x, r, weight, bias)

    partials, *rest = inputs(0, torch.float32)
    before = torch.export.export(Boundary(), (partials[0], *rest)).module()
    after, report = fused(before)
    assert [b.fused for b in report.boundaries] == [True], report
    expected, got = (on_ranks(gm, 4, partials, *rest)[0] for gm in (before, after))
    torch.testing.assert_close(got, expected)


LENGTHS = [
    lambda h, w: F.normalize(h, dim=-1) * HIDDEN**0.5 * w,
    lambda h, w: F.normalize(h, dim=-1) * (w * HIDDEN**0.5),
    lambda h, w: F.normalize(h, dim=-1) * HIDDEN**0.5 * (w + 1),
    lambda h, w: h * HIDDEN**0.5 / torch.linalg.vector_norm(h, dim=-1, keepdim=True),
    lambda h, w: h / (h.norm(2, dim=-1, keepdim=True) * HIDDEN**-0.5) * w,
    lambda h, w: F.normalize(h - h.mean(-1, keepdim=True), dim=-1) * HIDDEN**0.5 * w,
]


@pytest.mark.parametrize("norm", LENGTHS, ids=range(len(LENGTHS)))
def test_rows_that_are_divided_by_their_length(four_ranks, norm):
    def run(x, r, weight, bias):
        h = all_reduce(x) + r
        return norm(h, weight), h

    (verdict,) = assert_error_rule(run, four_ranks, torch.float32).boundaries
    assert verdict.fused, verdict.reason
    partials, *rest = inputs(0, torch.float32)
    partials, rest[0] = (
        [p.index_fill(1, torch.tensor(0), 0) for p in partials],
        rest[0].index_fill(1, torch.tensor(0), 0),
    )
    before = trace(run, partials[0], *rest, decompose=False)  # a row of zeros stays one
    after, report = fused(before)
    assert report.fused
    expected, got = (on_ranks(gm, 4, partials, *rest)[0] for gm in (before, after))
    torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize(
    "norm",
    [
        lambda h: F.normalize(h, dim=-1) * 2,
        lambda h: F.normalize(h, dim=-1, eps=1e-3) * HIDDEN**0.5,
        lambda h: F.normalize(h, dim=1) * HIDDEN**0.5,
        lambda h: F.normalize(h, p=1, dim=-1) * HIDDEN**0.5,
        lambda h: h * torch.rsqrt(torch.einsum("bsh,bsh->bh", h, h)[:, None] / HIDDEN + 1e-5),
        lambda h: h * torch.rsqrt(h.pow(2).mean(-1).view(-1, 2).mT.reshape(3, 2, 1) + 1e-5).view(2, 3, 1),
        lambda h: h[:, :2] * torch.rsqrt(h[:, :2].pow(2).mean(-1).mT[..., None] + 1e-5),
    ],
    ids=["another factor", "a large least", "another dim", "p = 1", "sums of columns", "rows moved", "rows transposed"],
)
def test_what_divides_rows_by_something_else_is_left(four_ranks, norm):
    partials, *rest = inputs(0, torch.float32)
    run = lambda x, r, weight, bias: norm(all_reduce(x) + r)  # noqa: E731
    assert not fused(trace(run, partials[0], *rest))[1].fused


def test_views_and_casts_between(four_ranks):
    def run(x, r, weight, bias):
        s = all_reduce(x.reshape(-1, HIDDEN)).view(2, 3, HIDDEN).float()
        h = (r.float() + s).to(torch.bfloat16)
        return spellings.rms_llama(h.reshape(6, HIDDEN), weight, bias), h

    report = assert_error_rule(run, four_ranks, torch.bfloat16)
    assert [b.fused for b in report.boundaries] == [True], report


def test_a_view_that_splits_the_hidden_dimension(four_ranks):
    """A norm over heads of an all-reduced value is a norm over the last dimension like any other."""

    def run(x, r, weight, bias):
        return (spellings.rms_llama(all_reduce(x).view(2, 3, 4, 4), weight[:4], bias),)

    report = assert_error_rule(run, four_ranks, torch.bfloat16)
    assert [b.fused for b in report.boundaries] == [True], report


def test_the_fused_graph_executes_one_all_reduce(four_ranks):
    """A dead all-reduce left in the graph counts as a side effect and would run a second time."""
    partials, *rest = inputs(0, torch.float32)
    before = trace(boundary(spellings.rms_llama), partials[0], *rest)
    after, _ = fused(before)
    assert executed_collectives(before, partials[0], *rest) == {"all_reduce": 1}
    assert executed_collectives(after, partials[0], *rest) == {"all_reduce": 1}
    assert not [n for n in after.graph.nodes if "c10d" in str(n.target)]


def test_the_sum_itself_may_be_read_as_well(four_ranks):
    def run(x, r, weight, bias):
        s = all_reduce(x)
        h = s + r
        return spellings.rms_llama(h, weight, bias), h, s * 2

    report = assert_error_rule(run, four_ranks, torch.bfloat16)
    assert [b.fused for b in report.boundaries] == [True]


def test_a_chain_of_layers_fuses_every_boundary(four_ranks):
    """The residual stream of one boundary is the residual of the next; each sum is paid once."""

    def run(x, r, weight, bias):
        h = all_reduce(x)
        y = spellings.rms_llama(h, weight, bias)
        for _ in range(3):
            h = h + all_reduce(torch.tanh(y))
            y = spellings.rms_llama(h, weight, bias)
        return y, h

    partials, *rest = inputs(0, torch.float32)
    before = trace(run, partials[0], *rest)
    after, report = fused(before)
    assert len(report.fused) == 4 and report.collectives_after == 4
    expected, got = (on_ranks(gm, 4, partials, *rest)[2] for gm in (before, after))
    torch.testing.assert_close(got, expected)
    assert executed_collectives(after, partials[0], *rest) == {"all_reduce": 4}


@pytest.mark.parametrize("swapped", [False, True])
def test_of_two_norms_whose_values_are_added_up_one_takes_the_addition(four_ranks, swapped):
    """The one whose sum is sent last: all are sent in the order of the program."""

    def run(x, r, weight, bias):
        a, b = all_reduce(x), all_reduce(torch.tanh(x))
        terms = [spellings.rms_llama(each, weight, bias) for each in ((b, a) if swapped else (a, b))]
        h = r + (terms[0] + terms[1])
        return spellings.rms_llama(h, weight, bias), h

    first, second = assert_error_rule(run, four_ranks, torch.bfloat16).boundaries
    assert (first.rewrite, second.rewrite) == ("all_reduce_norm", "all_reduce_post_norm")


def test_an_addition_behind_the_norm_does_not_make_a_sum_wait_for_another(four_ranks):
    """What is added waits for a sum that is sent later; taken in, it would have this one sent after that."""

    def run(x, r, weight, bias):
        y = spellings.rms_llama(all_reduce(x), weight, bias)
        z = spellings.rms_llama(all_reduce(torch.tanh(x)), weight, bias) * 2
        return spellings.rms_llama(r + (y + z), weight, bias)

    partials, *rest = inputs(0, torch.float32)
    _, report = fused(trace(run, partials[0], *rest), alike=False)
    assert [b.rewrite for b in report.boundaries] == ["all_reduce_norm"] * 2, report


def test_zero_rows(four_ranks):
    partials = [torch.zeros(0, HIDDEN) for _ in range(4)]
    rest = torch.zeros(0, HIDDEN), torch.ones(HIDDEN), torch.ones(HIDDEN)
    after, report = fused(trace(boundary(spellings.rms_llama), partials[0], *rest))
    assert report.fused
    assert [t.shape for t in on_ranks(after, 4, partials, *rest)[0]] == [(0, HIDDEN), (0, HIDDEN)]
