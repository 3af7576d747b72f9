"""norm_gather: a norm of a rank's own rows and their gather, where no sum stands in front of the norm."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy

from tpfuse.passes.facts.refusals import Code
from tpfuse.passes.plan.sites import DEFAULT_REWRITES
from tpfuse.passes.rewrite.lower import lower

from ..graphs import all_reduce, executed_collectives, fake_world, on_ranks, taken_apart_with_the_same_bits, trace
from .test_gathers import all_gather, world_size
from .test_norm_backward import BF16, EPS, F32, H, example, reduce_scatter
from .test_scattered_norm import BATCH, ROWS, follows_the_error_rule, normed, rewritten


def plain(h, r, weight):
    y, rstd = normed(h, weight)
    return all_gather(y, world_size()).sin(), rstd


def added_to_first(h, r, weight):
    stream = h + r
    y, rstd = normed(stream, weight)
    return stream, all_gather(y, world_size()), rstd


def layer(h, r, weight):
    bias = r[0, 0].to(h.dtype)
    y, mean, rstd = torch.ops.aten.native_layer_norm(h, [H], weight.to(h.dtype), bias, EPS)
    return all_gather(y, world_size()), mean, rstd


def nobody_reads_statistics(h, r, weight):
    return all_gather(normed(h, weight)[0], world_size()).cos()


def flat(h, r, weight):
    y, rstd = normed(h.view(-1, H), weight)
    return all_gather(y, world_size()), rstd.view(BATCH, ROWS)


def flattened_behind(h, r, weight):
    y, rstd = normed(h, weight)
    return all_gather(y.view(-1, H), world_size()), rstd


def along_the_sequence(h, r, weight):
    """DTensor's form: blocks of the batch are gathered, split and put side by side."""
    y, rstd = normed(h, weight)
    return torch.cat(all_gather(y, world_size()).chunk(world_size()), 1), rstd


def permuted(h, r, weight):
    """torchtitan's form: the sequence is put first for the gather, and back."""
    stream = h.permute(1, 0, 2)
    y, rstd = normed(stream, weight)
    first = y.permute(1, 0, 2).clone(memory_format=torch.contiguous_format)
    return stream, all_gather(first, world_size()).permute(1, 0, 2), rstd


def permuted_and_flattened(h, r, weight):
    y, rstd = normed(h, weight)
    return all_gather(y.permute(1, 0, 2).reshape(-1, H), world_size()), rstd


def read_besides(h, r, weight):
    y, rstd = normed(h, weight)
    return all_gather(y, world_size()), y.cos(), rstd


def read_permuted(h, r, weight):
    y, rstd = normed(h, weight)
    return all_gather(y.permute(1, 0, 2).contiguous(), world_size()), y.cos(), (h * rstd).exp()


def waited_for_here(h, r, weight):
    """What an earlier graph sent: its first reader waits for it, and the others read it as it came."""
    waited = torch.ops._c10d_functional.wait_tensor(h)
    rstd = torch.rsqrt(waited.to(weight.dtype).pow(2).mean(-1, keepdim=True) + EPS)
    return all_gather((h.to(weight.dtype) * rstd * weight).to(h.dtype), world_size()), h.sin(), rstd


FORMS = [
    plain, waited_for_here, added_to_first, layer, nobody_reads_statistics, flat, flattened_behind, along_the_sequence,
    permuted, permuted_and_flattened, read_besides, read_permuted,
]  # fmt: skip


class Program:
    """A forward pass over rows of each rank's own, and a tangent that makes it a joint graph."""

    def __init__(self, form, world: int, dtype: torch.dtype) -> None:
        self.form, self.world, self.dtype = form, world, dtype

    def traced(self, inputs: list, **how):
        def run(tangents, h, r, weight):
            return (*self._results(h, r, weight), tangents.exp())

        return trace(run, *example(inputs), **how)

    def _results(self, h, r, weight):
        found = self.form(h, r, weight)
        return found if isinstance(found, tuple) else (found,)

    def inputs(self, seed: int, rows: int = ROWS) -> list:
        g = torch.Generator().manual_seed(seed)

        def each(count: int) -> list:
            return [torch.randn(count, rows, H, generator=g).to(self.dtype) for _ in range(self.world)]

        return [each(1), each(BATCH), each(BATCH), torch.randn(H, generator=g)]


def judged(form, world: int, dtype: torch.dtype, seeds: int) -> None:
    program = Program(form, world, dtype)
    inputs = program.inputs(0)
    before = program.traced(inputs)
    after, report = rewritten(before)
    (boundary,) = report.boundaries
    assert (boundary.collective, boundary.rewrite, boundary.reason) == ("all_gather", "norm_gather", "")
    assert boundary.norm == ("layer_norm" if form is layer else "rms_norm")
    assert report.fused_forward == 1
    one = Counter(all_gather=1)
    assert executed_collectives(before, *example(inputs)) == executed_collectives(after, *example(inputs)) == one
    assert boundary.before == boundary.after, "bytes"
    assert [(s.op, s.sends) for s in report.steps] == [("all_gather_into_tensor", "#0")]
    assert not any("c10d" in str(node.target) for node in after.graph.nodes if form is not waited_for_here)
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


@pytest.mark.parametrize("form", [added_to_first, read_permuted, layer], ids=lambda form: form.__name__)
def test_taken_apart_nothing_of_ours_is_left(two_ranks, form):
    """The compiler's own passes see the gather, and plain operations in front of it."""
    program = Program(form, 2, BF16)
    inputs = program.inputs(0)
    after, _ = rewritten(program.traced(inputs))
    taken_apart_with_the_same_bits(after, inputs)
    called = [str(node.target) for node in after.graph.nodes if "c10d" in str(node.target)]
    assert called == ["_c10d_functional.all_gather_into_tensor.default", "_c10d_functional.wait_tensor.default"]
    assert not any("tpfuse" in str(node.target) for node in after.graph.nodes)
    assert lower(after.graph) == 0


@pytest.mark.parametrize(("form", "rows"), [(flattened_behind, ROWS), (permuted, ROWS), (permuted, 0), (plain, 0)])
def test_rows_whose_number_is_symbolic(two_ranks, form, rows):
    program = Program(form, 2, F32)
    before = program.traced(program.inputs(0, rows), dynamic=True)
    after, report = rewritten(before)
    assert [b.rewrite for b in report.boundaries] == ["norm_gather"]
    for count in (rows, 3 * rows):
        inputs = program.inputs(1, count)
        for old, new in zip(on_ranks(before, 2, *inputs), on_ranks(after, 2, *inputs), strict=True):
            torch.testing.assert_close(new, old)


def test_a_norm_whose_sum_is_fused_is_no_boundary_of_its_own(two_ranks):
    def behind_a_sum(h, r, weight):
        stream = r[:1] + reduce_scatter(h[: 2 * (BATCH // 2)], 2)
        y, rstd = normed(stream, weight)
        return stream, all_gather(y, 2), rstd

    inputs = Program(behind_a_sum, 2, F32).inputs(0)
    _, report = rewritten(Program(behind_a_sum, 2, F32).traced(inputs))
    assert [b.rewrite for b in report.boundaries] == ["reduce_scatter_norm"] * 2


def test_a_norm_whose_sum_cannot_be_fused_still_is_one_with_its_gather(two_ranks):
    def behind_a_sine(h, r, weight):
        stream = r[:1] + reduce_scatter(h[: 2 * (BATCH // 2)], 2).sin()
        y, rstd = normed(stream, weight)
        return stream, all_gather(y, 2), rstd

    inputs = Program(behind_a_sine, 2, F32).inputs(0)
    _, report = rewritten(Program(behind_a_sine, 2, F32).traced(inputs))
    assert [b.rewrite for b in report.boundaries] == [None, "norm_gather"]
    assert report.boundaries[0].reason


def test_switched_off_it_stays(two_ranks):
    program = Program(plain, 2, F32)
    others = tuple(name for name in DEFAULT_REWRITES if name != "norm_gather")
    _, report = rewritten(program.traced(program.inputs(0)), rewrites=others)
    assert [(b.fused, bool(b.reason)) for b in report.boundaries] == [(False, True)]


# -- what looks alike -------------------------------------------------------------------------------------------------


def flipped(h, r, weight):
    return all_gather(normed(h, weight)[0].flip(0), 2)


def regrouped(h, r, weight):
    """The same numbers in rows of another length."""
    return all_gather(normed(h, weight)[0].view(-1, 2 * H), 2)


def last_dimension_first(h, r, weight):
    return all_gather(normed(h, weight)[0].permute(2, 0, 1).contiguous(), 2)


def split_and_permuted(h, r, weight):
    y = normed(h, weight)[0].view(-1, H).view(BATCH, ROWS // 2, 2, H)
    return all_gather(y.permute(2, 0, 1, 3).contiguous(), 2)


def doubled(h, r, weight):
    return all_gather(2 * normed(h, weight)[0], 2)


def of_the_stream(h, r, weight):
    return all_gather(h, 2), normed(h, weight)[0]


def behind_another(h, r, weight):
    y, rstd = normed(h, weight)
    between = all_reduce(r.exp())
    return between, all_gather(y, 2), rstd


LOOK_ALIKES = [flipped, regrouped, last_dimension_first, split_and_permuted, doubled, of_the_stream, behind_another]


@pytest.mark.parametrize("form", LOOK_ALIKES, ids=lambda form: form.__name__)
def test_what_gathers_something_else_or_later_stays(two_ranks, form):
    program = Program(form, 2, F32)
    inputs = program.inputs(0)
    before = program.traced(inputs)
    after, report = rewritten(before)
    assert not any(b.fused for b in report.boundaries)
    assert all(b.reason for b in report.boundaries)
    for old, new in zip(on_ranks(before, 2, *inputs), on_ranks(after, 2, *inputs), strict=True):
        torch.testing.assert_close(new, old)


def test_a_collective_in_between_is_named_as_the_reason(two_ranks):
    program = Program(behind_another, 2, F32)
    _, report = rewritten(program.traced(program.inputs(0)))
    (gather,) = (b for b in report.boundaries if b.collective == "all_gather")
    assert gather.code == Code.APART and "another collective stands between" in gather.reason


def test_it_waits_where_a_checkpoint_saves_the_gather_and_recomputes_the_norm(two_ranks):
    """In the forward half of the split graph the two are fused, and the statistics are handed out."""
    program = Program(plain, 2, F32)
    inputs = program.inputs(0)
    joint, half = program.traced(inputs), trace(lambda _, *given: plain(*given), *example(inputs))
    for node in (*joint.graph.nodes, *half.graph.nodes):
        if node.op == "call_function":
            saved = "c10d" in str(node.target)
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE
            node.meta["ac_graph_id"] = 0
    _, report = rewritten(joint)
    assert [b.code for b in report.boundaries] == [Code.ASTRIDE]
    after, report = rewritten(half, split=True)
    assert [b.rewrite for b in report.boundaries] == ["norm_gather"]
    for old, new in zip(on_ranks(half, 2, *inputs), on_ranks(after, 2, *inputs), strict=True):
        torch.testing.assert_close(new, old)


def test_two_gathers_of_one_norm_are_one_operation_and_a_gather(two_ranks):
    def twice(h, r, weight):
        y, rstd = normed(h, weight)
        return all_gather(y, 2).sin(), all_gather(y, 2).cos(), rstd

    program = Program(twice, 2, F32)
    inputs = program.inputs(0)
    before = program.traced(inputs)
    after, report = rewritten(before)
    assert [b.rewrite for b in report.boundaries] == ["norm_gather", None]
    assert executed_collectives(after, *example(inputs)) == Counter(all_gather=2)
    for old, new in zip(on_ranks(before, 2, *inputs), on_ranks(after, 2, *inputs), strict=True):
        torch.testing.assert_close(new, old)


def test_every_node_knows_its_value(two_ranks):
    """What the graph says of shapes, dtypes and strides is what comes out."""
    for form in (permuted, read_permuted, layer):
        program = Program(form, 2, BF16)
        inputs = program.inputs(0)
        after, _ = rewritten(program.traced(inputs))
        (output,) = (node for node in after.graph.nodes if node.op == "output")
        told = [node.meta["val"] for node in output.args[0]]
        for fake, real in zip(told, after(*example(inputs)), strict=True):
            assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def gated_by_own_rows(h, r, weight):
    """An all-reduce whose sum is multiplied by the normed rows before the next norm."""
    y, rstd = normed(h, weight)
    return all_gather(y, 2), normed(all_reduce(r * 2) * y, weight)[0], rstd


def gated_by_gathered_rows(h, r, weight):
    y, rstd = normed(h, weight)
    every = all_gather(y, 2)
    return y, normed(all_reduce(r * 2) * every[:BATCH].sin(), weight)[0], rstd


@pytest.mark.parametrize("form", [gated_by_own_rows, gated_by_gathered_rows], ids=lambda form: form.__name__)
def test_ranks_compare_as_much_as_without_it(two_ranks, form):
    """What moves in front of a sum has to be the same on all ranks: gathered rows are, own rows by their inputs."""
    before = Program(form, 2, F32).traced(Program(form, 2, F32).inputs(0))
    others = tuple(name for name in DEFAULT_REWRITES if name != "norm_gather")
    sums = []
    for rewrites in (others, DEFAULT_REWRITES):
        _, report = rewritten(before, rewrites=rewrites)
        assert [b.rewrite for b in report.boundaries if b.collective == "all_reduce"] == ["all_reduce_norm"]
        sums += [step for step in report.steps if step.op == "all_reduce_norm"]
    without, with_it = sums
    assert with_it.relies == without.relies
    assert len(with_it.relies) == (2 if form is gated_by_own_rows else 0), "the rows and the norm's weight, or nothing"
