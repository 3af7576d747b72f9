"""reduce_scatter_norm in a training graph: rows that stay scattered, and all that may stand in front of their norm."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from tpfuse.passes.facts.groups import resolve_group
from tpfuse.passes.pipeline import PassOptions, fuse

from ..graphs import all_reduce, executed_collectives, fake_world, on_ranks, relative_error, trace
from .test_norm_backward import BF16, EPS, F32, H, exact, example, reduce_scatter

ROWS, BATCH = 4, 3


@pytest.fixture(params=[2, 4])
def ranks(request):
    with fake_world(request.param):
        yield request.param


def normed(h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(y, rstd), as it is decomposed."""
    x = h.float() if h.dtype is BF16 else h
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return (x * rstd * weight).to(h.dtype), rstd


def residual(s, r, weight):
    h = r + s
    return h, *normed(h, weight)


def numbers(s, r, weight):
    h = r - 0.5 * s
    return h, *normed(h, weight)


def none(s, r, weight):
    return s, *normed(s, weight)


def bias(s, r, weight):
    h = (s + weight) + r
    return h, *normed(h, weight)


def wider(s, r, weight):
    h = s.double() + r if s.dtype is torch.float64 else s.float() + r
    return h, *normed(h, weight)


def permuted(s, r, weight):
    h = r.permute(1, 0, 2) + s.permute(1, 0, 2).view(BATCH, ROWS, H)
    return h, *normed(h, weight)


def copied(s, r, weight):
    h = r.permute(1, 0, 2) + s.permute(1, 0, 2).contiguous()
    return h, *normed(h, weight)


def chosen(s, r, weight):
    h = r + s
    return h, *normed(h[1:3], weight)


def flat(s, r, weight):
    h = r.view(-1, H) + s.view(-1, H)
    return h, *normed(h, weight)


def read_by_others(s, r, weight):
    h = r + s
    return h, *normed(h, weight), s.sin()


def layer(s, r, weight):
    h = r + s
    return h, *torch.ops.aten.native_layer_norm(h, [H], weight.to(h.dtype), None, EPS)


def added_behind(s, r, weight):
    y, rstd = normed(s, weight)
    return r + y, rstd


FORMS = [residual, numbers, none, bias, wider, permuted, copied, chosen, flat, read_by_others, layer, added_behind]


class Program:
    """A forward pass, and a tangent that makes it a joint graph; every rank has its own rows."""

    def __init__(self, form, world: int, dtype: torch.dtype) -> None:
        self.form, self.world, self.dtype = form, world, dtype

    def traced(self, inputs: list):
        def run(tangents, partial, r, weight):
            return (*self.form(reduce_scatter(partial * 1.25, self.world), r, weight), tangents.exp())

        return trace(run, *example(inputs))

    def inputs(self, seed: int) -> list:
        g = torch.Generator().manual_seed(seed)

        def each(rows: int) -> list:
            return [torch.randn(rows, BATCH, H, generator=g).to(self.dtype) for _ in range(self.world)]

        return [each(1), each(ROWS * self.world), each(ROWS), torch.randn(H, generator=g)]


def rewritten(gm, **options):
    outcome = fuse(gm.graph, resolve_group, PassOptions(strict=True, **options))
    return torch.fx.GraphModule(gm, outcome.graph), outcome.report


def follows_the_error_rule(program, before, after, seeds: int) -> None:
    """Errors against float64 of the graph `after`, a mean over ranks and seeds for each output, are at most 1.1 times
    those of `before` and a rounding. program: what was traced, with the ranks and the dtype of its inputs."""
    wide = program.traced(exact(program.inputs(0)))
    old, new = [], []
    for seed in range(seeds):
        inputs = program.inputs(seed)
        reference = on_ranks(wide, program.world, *exact(inputs))
        was, now = (on_ranks(graph, program.world, *inputs) for graph in (before, after))
        assert [(t.dtype, t.shape) for t in was[0]] == [(t.dtype, t.shape) for t in now[0]]
        for errors, outputs in ((old, was), (new, now)):
            errors += [relative_error(o, r) for o, r in zip(outputs, reference, strict=True)]
    old, new = torch.tensor(old).mean(0), torch.tensor(new).mean(0)
    rounding = torch.finfo(program.dtype).eps / 2
    assert (new <= 1.1 * old + rounding).all(), f"errors {new.tolist()} against {old.tolist()}"


def judged(form, world: int, dtype: torch.dtype, seeds: int, **options) -> None:
    program = Program(form, world, dtype)
    before = program.traced(program.inputs(0))
    after, report = rewritten(before, **options)
    assert [(b.rewrite, b.fused, b.reason) for b in report.boundaries] == [("reduce_scatter_norm", True, "")]
    assert executed_collectives(after, *example(program.inputs(0))) == Counter(reduce_scatter=1)
    assert not any("c10d" in str(node.target) for node in after.graph.nodes)
    follows_the_error_rule(program, before, after, seeds)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_is_fused_where_it_stands(two_ranks, form):
    judged(form, 2, F32, seeds=2)


@pytest.mark.nightly
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_every_form_over_many_seeds(ranks, form, dtype):
    judged(form, ranks, dtype, seeds=20)


def test_a_rank_that_sends_as_written_fuses_it_too(two_ranks):
    """Nothing moves in front of the sum, so no other rank need have the same graph behind it."""
    judged(permuted, 2, F32, seeds=1, as_written="its peers have other graphs")


def gated(s, r, weight):
    h = r + s * torch.sigmoid(r)
    return h, *normed(h, weight)


def flipped(s, r, weight):
    h = r + s.flip(0)
    return h, *normed(h, weight)


def two_of_them(s, r, weight):
    h = r + s + reduce_scatter(torch.cat([r.sin()] * 2), 2)
    return h, *normed(h, weight)


@pytest.mark.parametrize(
    ("form", "fused"), [(gated, 0), (flipped, 0), (two_of_them, 1)], ids=["gated", "flipped", "two_of_them"]
)
def test_what_is_more_than_rows_and_an_addition_stays(two_ranks, form, fused):
    program = Program(form, 2, F32)
    inputs = program.inputs(0)
    before = program.traced(inputs)
    after, report = rewritten(before)
    assert sum(b.fused for b in report.boundaries) == fused
    assert all(b.fused or b.reason for b in report.boundaries)
    for old, new in zip(on_ranks(before, 2, *inputs), on_ranks(after, 2, *inputs), strict=True):
        torch.testing.assert_close(new, old)


def test_scattered_rows_do_not_move_in_front_of_another_sum(two_ranks):
    """What a fused reduce-scatter hands out is a rank's own, as what the program's gave was."""

    def program(tangents, partial, r, weight):
        h, y, _ = residual(reduce_scatter(partial, 2), r, weight)
        return normed(h + all_reduce(r.cos()) * torch.sigmoid(y), weight)[0], tangents.exp()

    inputs = Program(residual, 2, F32).inputs(0)
    before = trace(program, *example(inputs))
    after, report = rewritten(before)
    scattered, summed = report.boundaries
    assert scattered.rewrite == "reduce_scatter_norm" and not summed.fused and "differs between ranks" in summed.reason
    for old, new in zip(on_ranks(before, 2, *inputs), on_ranks(after, 2, *inputs), strict=True):
        torch.testing.assert_close(new, old)


def test_sizes_that_are_known_only_when_it_runs(two_ranks):
    def program(tangents, partial, weight):
        h = (partial[: partial.shape[0] // 2].sin() + reduce_scatter(partial, 2)).permute(1, 0, 2)
        return h, *normed(h, weight), tangents.exp()

    tangents, partial, _, weight = Program(residual, 2, F32).inputs(0)
    before = trace(program, *example([tangents, partial, weight]), dynamic=True)
    after, report = rewritten(before)
    assert [b.rewrite for b in report.boundaries] == ["reduce_scatter_norm"]
    g = torch.Generator().manual_seed(1)
    for rows, batch in ((4, 3), (6, 5)):
        given = [[torch.randn(n, batch, H, generator=g) for _ in range(2)] for n in (1, 2 * rows)]
        for old, new in zip(on_ranks(before, 2, *given, weight), on_ranks(after, 2, *given, weight), strict=True):
            torch.testing.assert_close(new, old)
