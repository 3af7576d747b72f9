"""The gather behind a fused reduce-scatter, in training graphs: which one is taken in, and what becomes of it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from tpfuse.passes.plan.sites import REWRITES
from tpfuse.passes.rewrite.lower import lower
from tpfuse.passes.rewrite.take_apart import take_apart

from ..graphs import all_reduce, executed_collectives, fake_world, on_ranks, taken_apart_with_the_same_bits, trace
from .test_norm_backward import BF16, F32, composite, example, reduce_scatter
from .test_scattered_norm import BATCH, Program, follows_the_error_rule, layer, normed, residual, rewritten

BOTH = Counter(reduce_scatter=1, all_gather=1)


def all_gather(x: Tensor, world: int) -> Tensor:
    pending = torch.ops._c10d_functional.all_gather_into_tensor(x, world, torch.distributed.group.WORLD.group_name)
    return torch.ops._c10d_functional.wait_tensor(pending)


def world_size() -> int:
    return torch.distributed.get_world_size()


def gathered(s, r, weight):
    h, y, rstd = residual(s, r, weight)
    return h, all_gather(y, world_size()).sin(), rstd


def gathered_layer(s, r, weight):
    h, y, *_ = layer(s, r, weight)
    return h, all_gather(y, world_size()).sin()


def gathered_flat(s, r, weight):
    h, y, rstd = residual(s, r, weight)
    return h, all_gather(y.view(-1, y.shape[-1]), world_size()), rstd


def gathered_along_the_sequence(s, r, weight):
    h, y, rstd = residual(s, r, weight)
    return h, torch.cat(all_gather(y, world_size()).chunk(world_size()), 1), rstd


def gathered_permuted(s, r, weight):
    """torchtitan's form: rows are permuted behind the reduce-scatter, and back for the gather."""
    h = r.permute(1, 0, 2) + s.permute(1, 0, 2)
    y, rstd = normed(h, weight)
    first = y.permute(1, 0, 2).clone(memory_format=torch.contiguous_format)
    return h, all_gather(first, world_size()).permute(1, 0, 2), rstd


def along_the_batch(s, r, weight):
    """torchtitan's `spmd_types`: scattered along the sequence, put first for that, and gathered batch by batch."""
    h = r.permute(1, 0, 2) + s.permute(1, 0, 2)
    y, rstd = normed(h, weight)
    return h, torch.cat(all_gather(y.contiguous(), world_size()).chunk(world_size()), 1), rstd


def transposed(s, r, weight):
    h, y, rstd = residual(s, r, weight)
    return h, all_gather(y.permute(1, 0, 2).contiguous(), world_size()), rstd


def permuted_and_regrouped(s, r, weight):
    h, y, rstd = residual(s, r, weight)
    first = y.permute(1, 0, 2).contiguous().view(y.shape[0], BATCH, y.shape[-1])
    return h, all_gather(first, world_size()), rstd


def read_besides(s, r, weight):
    h, y, rstd = residual(s, r, weight)
    return h, all_gather(y, world_size()), y.cos(), rstd


FORMS = [
    gathered, gathered_layer, gathered_flat, gathered_along_the_sequence, gathered_permuted, along_the_batch,
    transposed, permuted_and_regrouped, read_besides,
]  # fmt: skip


def judged(form, world: int, dtype: torch.dtype, seeds: int) -> None:
    program = Program(form, world, dtype)
    inputs = program.inputs(0)
    before = program.traced(inputs)
    after, report = rewritten(before)
    assert [(b.collective, b.rewrite, b.reason) for b in report.boundaries] == [
        ("reduce_scatter", "reduce_scatter_norm", ""), ("all_gather", "reduce_scatter_norm", ""),
    ]  # fmt: skip
    assert executed_collectives(before, *example(inputs)) == executed_collectives(after, *example(inputs)) == BOTH
    assert [b.before for b in report.boundaries] == [b.after for b in report.boundaries], "collectives and bytes"
    assert [(s.op, s.sends) for s in report.steps] == [("reduce_scatter_norm", "#0"), ("all_gather_into_tensor", "#1")]
    assert not any("c10d" in str(node.target) for node in after.graph.nodes)
    follows_the_error_rule(program, before, after, seeds)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_is_one_operation(two_ranks, form):
    judged(form, 2, F32, seeds=2)


@pytest.mark.nightly
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("world", [2, 4, 8])
def test_every_form_over_many_seeds(world, form, dtype):
    with fake_world(world):
        judged(form, world, dtype, seeds=20)


@pytest.mark.parametrize("form", [gathered_permuted, along_the_batch, read_besides], ids=lambda form: form.__name__)
def test_taken_apart_it_is_the_gather_of_the_program(two_ranks, form):
    """Before the compiler's own passes, and bit for bit the same."""
    program = Program(form, 2, BF16)
    inputs = program.inputs(0)
    after, _ = rewritten(program.traced(inputs))
    taken_apart_with_the_same_bits(after, inputs)
    called = [
        str(node.target) for node in after.graph.nodes if "tpfuse" in str(node.target) or "c10d" in str(node.target)
    ]
    assert called == [
        "tpfuse.reduce_scatter_norm.default", "_c10d_functional.all_gather_into_tensor.default",
        "_c10d_functional.wait_tensor.default",
    ]  # fmt: skip
    assert executed_collectives(after, *example(inputs)) == BOTH
    assert lower(after.graph) == 1  # which rows are read besides makes no difference


@pytest.mark.parametrize("apart", [False, True])
def test_a_swap_of_symbolic_sizes(two_ranks, apart):
    """Batches of a size that the graph does not know, none among them."""

    def program(tangents, partial, weight):
        h = (partial[: partial.shape[0] // 2].sin() + reduce_scatter(partial, 2)).permute(1, 0, 2)
        y = normed(h, weight)[0]
        return h, all_gather(y.contiguous(), 2).cos(), tangents.exp()

    tangents, partial, _, weight = Program(residual, 2, F32).inputs(0)
    before = trace(program, *example([tangents, partial, weight]), dynamic=True)
    after, report = rewritten(before)
    assert [b.fused for b in report.boundaries] == [True, True]
    if apart:
        take_apart(after.graph)
        after.recompile()
    g = torch.Generator().manual_seed(1)
    for rows, batch in ((4, 3), (6, 5), (4, 0)):
        given = [[torch.randn(n, batch, weight.numel(), generator=g) for _ in range(2)] for n in (1, 2 * rows)]
        for old, new in zip(on_ranks(before, 2, *given, weight), on_ranks(after, 2, *given, weight), strict=True):
            torch.testing.assert_close(new, old)


def test_sizes_that_are_known_only_when_it_runs(two_ranks):
    def program(tangents, partial, weight):
        h = (partial[: partial.shape[0] // 2].sin() + reduce_scatter(partial, 2)).permute(1, 0, 2)
        y = normed(h, weight)[0].permute(1, 0, 2).contiguous()
        return h, all_gather(y, 2).cos(), tangents.exp()

    tangents, partial, _, weight = Program(residual, 2, F32).inputs(0)
    before = trace(program, *example([tangents, partial, weight]), dynamic=True)
    after, report = rewritten(before)
    assert [b.fused for b in report.boundaries] == [True, True]
    g = torch.Generator().manual_seed(1)
    for rows, batch in ((4, 3), (6, 5)):
        given = [[torch.randn(n, batch, weight.numel(), generator=g) for _ in range(2)] for n in (1, 2 * rows)]
        for old, new in zip(on_ranks(before, 2, *given, weight), on_ranks(after, 2, *given, weight), strict=True):
            torch.testing.assert_close(new, old)


def test_no_rows_where_their_number_is_symbolic(two_ranks):
    """A batch of 0 besides: then no size follows from the others."""

    def program(tangents, partial, weight):
        h = partial[: partial.shape[0] // 2].sin() + reduce_scatter(partial, 2)
        y = normed(h, weight)[0]
        return h, all_gather(y, 2).cos(), tangents.exp()

    tangents, partial, _, weight = Program(residual, 2, F32).inputs(0)
    inputs = example([tangents, [each[:, :0] for each in partial], weight])
    before = trace(program, *inputs, dynamic=True)
    after, report = rewritten(before)
    assert [b.fused for b in report.boundaries] == [True, True]
    assert [out.shape for out in after(*inputs)] == [out.shape for out in before(*inputs)]


def test_the_gather_of_a_gradient(two_ranks):
    """Behind the norm's backward and the residual's gradient; its own rows are read on as well."""

    def program(tangents, partial, h, weight):
        y, dx, dweight, _ = composite(h, weight, None, reduce_scatter(partial * tangents.sum(), 2))
        dx = partial[: h.shape[0]] + dx
        return y, all_gather(dx, 2).sin(), dx, dweight

    tangents, partial, h, weight = Program(residual, 2, F32).inputs(0)
    inputs = [tangents, partial, h, weight]
    before = trace(program, *example(inputs))
    after, report = rewritten(before, rewrites=REWRITES)
    assert [(b.collective, b.direction, b.rewrite) for b in report.boundaries] == [
        ("reduce_scatter", "backward", "norm_backward"), ("all_gather", "backward", "norm_backward"),
    ]  # fmt: skip
    assert [b.before for b in report.boundaries] == [b.after for b in report.boundaries]
    assert executed_collectives(after, *example(inputs)) == BOTH
    whole = on_ranks(after, 2, *inputs)
    for old, new in zip(on_ranks(before, 2, *inputs), whole, strict=True):
        torch.testing.assert_close(new, old)
    assert take_apart(after.graph) == 2, "the gather, and the gradient's reduce-scatter"
    after.recompile()
    for old, new in zip(whole, on_ranks(after, 2, *inputs), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


# -- what looks alike -------------------------------------------------------------------------------------------------


def flipped(s, r, weight):
    h, y, rstd = residual(s, r, weight)
    return h, all_gather(y.flip(0), 2), rstd


def regrouped(s, r, weight):
    """The same numbers in rows of another length."""
    h, y, rstd = residual(s, r, weight)
    return h, all_gather(y.view(-1, 2 * y.shape[-1]), 2), rstd


def turned_twice(s, r, weight):
    """The batch first, seen in the shape that it had, and turned once more."""
    h, y, rstd = residual(s, r, weight)
    first = y.permute(1, 0, 2).contiguous().view(y.shape).permute(1, 0, 2)
    return h, all_gather(first.contiguous(), 2), rstd


def doubled(s, r, weight):
    h, y, rstd = residual(s, r, weight)
    return h, all_gather(2 * y, 2), rstd


def of_the_stream(s, r, weight):
    h, y, rstd = residual(s, r, weight)
    return all_gather(h, 2), y, rstd


def behind_another(s, r, weight):
    h, y, rstd = residual(s, r, weight)
    between = all_reduce(r.exp())
    return h, between, all_gather(y, 2), rstd


LOOK_ALIKES = [flipped, regrouped, turned_twice, doubled, of_the_stream, behind_another]


@pytest.mark.parametrize("form", LOOK_ALIKES, ids=lambda form: form.__name__)
def test_what_gathers_something_else_or_later_stays(two_ranks, form):
    program = Program(form, 2, F32)
    inputs = program.inputs(0)
    before = program.traced(inputs)
    after, report = rewritten(before)
    fused = {b.collective: b.fused for b in report.boundaries}
    assert fused["reduce_scatter"] and not fused["all_gather"]
    assert all(b.fused or b.reason for b in report.boundaries)
    for old, new in zip(on_ranks(before, 2, *inputs), on_ranks(after, 2, *inputs), strict=True):
        torch.testing.assert_close(new, old)
