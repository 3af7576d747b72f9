"""norm_backward: a gradient's collective, the norm's backward in whatever spelling, and the residual's gradient."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from tpfuse.passes.facts.groups import resolve_group
from tpfuse.passes.pipeline import PassOptions, fuse
from tpfuse.passes.plan.sites import DEFAULT_REWRITES, REWRITES
from tpfuse.passes.rewrite.lower import lower

from ..graphs import all_reduce, executed_collectives, fake_world, on_ranks, relative_error, trace

H, EPS = 16, 1e-5
BF16, F32 = torch.bfloat16, torch.float32
RESULT = "norm_backward"


def fused(gm: torch.fx.GraphModule):
    """With the rewrite named: it is off unless it is."""
    outcome = fuse(gm.graph, resolve_group, PassOptions(rewrites=REWRITES, strict=True))
    return torch.fx.GraphModule(gm, outcome.graph), outcome.report


def reduce_scatter(x: Tensor, world: int) -> Tensor:
    name = torch.distributed.group.WORLD.group_name
    pending = torch.ops._c10d_functional.reduce_scatter_tensor(x, "sum", world, name)
    return torch.ops._c10d_functional.wait_tensor(pending)


# -- spellings: (y, the gradients of h, weight and bias) --------------------------------------------------------------


def composite(h: Tensor, weight: Tensor, bias: Tensor, dy: Tensor):
    """RMSNorm as autograd differentiates what is written out."""
    x = h.float()
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    y = (x * rstd * weight).to(h.dtype)
    g = dy.float() * weight
    inner = (g * x).sum(-1, keepdim=True) * -0.5 * rstd.pow(3)
    dx = g * rstd + inner.expand(x.shape) / H * (x.pow(1.0) * 2.0)
    return y, dx.to(h.dtype), (dy.float() * (x * rstd)).sum(tuple(range(h.dim() - 1))), None


def decomposed(h: Tensor, weight: Tensor, bias: Tensor, dy: Tensor):
    """`_fused_rms_norm_backward` as it is decomposed, and the partitioner's alias of rstd."""
    x = h.float()
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    y = (x * rstd * weight).to(h.dtype)
    alias = torch.ops.aten.alias(rstd)
    normed = x * alias
    g = dy.float() * weight
    dx = (g - normed / H * (normed * g).sum(-1, keepdim=True)) * alias
    return y, dx.to(h.dtype), (dy.float() * normed).sum(list(range(h.dim() - 1)), keepdim=True).view(H), None


def hugging_face(h: Tensor, weight: Tensor, bias: Tensor, dy: Tensor):
    """The normed value is rounded before it is multiplied, so products of backward are in the model's dtype."""
    x = h.float()
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    normed = (x * rstd).to(h.dtype)
    y = weight.to(h.dtype) * normed
    g = (dy * weight.to(h.dtype)).float()
    dx = g * rstd + ((g * x).sum(-1, keepdim=True) * (rstd.pow(3) * -0.5) / H) * 2 * x
    return y, dx.to(h.dtype), (dy * normed).sum(tuple(range(h.dim() - 1))), None


def gemma(h: Tensor, weight: Tensor, bias: Tensor, dy: Tensor):
    x = h.float()
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    y = (x * rstd * (1.0 + weight)).to(h.dtype)
    normed, g = x * rstd, dy.float() * (1.0 + weight)
    dx = rstd * (g - normed * (normed * g).mean(-1, keepdim=True))
    return y, dx.to(h.dtype), (dy.float() * normed).sum(tuple(range(h.dim() - 1))), None


def layer(h: Tensor, weight: Tensor, bias: Tensor, dy: Tensor):
    """LayerNorm's own backward, decomposed."""
    weight, bias = weight.to(h.dtype), bias.to(h.dtype)
    y, mean, rstd = torch.ops.aten.native_layer_norm(h, [H], weight, bias, EPS)
    grads = torch.ops.aten.native_layer_norm_backward(dy, h, [H], mean, rstd, weight, bias, [True, True, True])
    return y, *grads


SPELLINGS = [composite, decomposed, hugging_face, gemma, layer]


# -- graphs -----------------------------------------------------------------------------------------------------------


class Case:
    """`form`: which collective finishes the gradient, and how the rows lie; `first`: the residual's gradient is the
    first operand of the addition. Every rank has its own gradient; of scattered rows, its own hidden states too."""

    def __init__(self, spelling, form: str = "all_reduce", world: int = 2, first: bool = True, dtype=F32):
        self.spelling, self.form, self.world, self.first, self.dtype = spelling, form, world, first, dtype

    def traced(self, inputs: list):
        def run(tangents, residual, h, weight, bias):
            return self(tangents, residual, h, weight, bias)

        return trace(run, *example(inputs))

    def __call__(self, tangents: Tensor, residual: Tensor, h: Tensor, weight: Tensor, bias: Tensor):
        partial = tangents * 1.25
        if self.form == "all_reduce":
            dy = all_reduce(partial)
        elif self.form == "rows":  # scattered along the first dimension
            dy = reduce_scatter(partial, self.world)
        elif self.form == "sequence":  # DTensor's, along the second one
            dy = reduce_scatter(torch.cat(partial.chunk(self.world, 1)), self.world)
        else:  # torchtitan's: permuted, scattered along the first, permuted back
            dy = reduce_scatter(partial.permute(1, 0, 2).clone(memory_format=torch.contiguous_format), self.world)
            dy = dy.permute(1, 0, 2)
        y, dx, dweight, dbias = self.spelling(h, weight, bias, dy)
        out = residual + dx if self.first else dx + residual
        return [y, out, dweight.to(weight.dtype), *([] if dbias is None else [dbias])]

    def inputs(self, seed: int) -> list:
        g = torch.Generator().manual_seed(seed)
        own = (4, 3, H) if self.form != "all_reduce" else (2, 3, H)
        scattered = {"all_reduce": (2, 3, H), "rows": (4 * self.world, 3, H)}.get(self.form, (4, 3 * self.world, H))

        def make(shape, each=True):
            made = [torch.randn(shape, generator=g).to(self.dtype) for _ in range(self.world)]
            return made if each else [made[0]] * self.world

        apart = self.form != "all_reduce"
        vectors = [make((H,), False)[0].float() for _ in range(2)]
        return [make(scattered), make(own, apart), make(own, apart), *vectors]


def exact(inputs: list) -> list:
    return [[t.double() for t in each] if isinstance(each, list) else each.double() for each in inputs]


def example(inputs: list) -> list:
    return [each[0] if isinstance(each, list) else each for each in inputs]


def judged(case: Case, seeds: int = 6) -> None:
    """Fuse `case`: one collective as before, within the error rule on every rank."""
    before, wide = case.traced(case.inputs(0)), case.traced(exact(case.inputs(0)))
    after, report = fused(before)
    kind = "all_reduce" if case.form == "all_reduce" else "reduce_scatter"
    assert executed_collectives(after, *example(case.inputs(0))) == Counter({kind: 1})
    old, new = [], []
    for seed in range(seeds):
        inputs = case.inputs(seed)
        reference = on_ranks(wide, case.world, *exact(inputs))
        was, now = (on_ranks(graph, case.world, *inputs) for graph in (before, after))
        assert [t.dtype for t in was[0]] == [t.dtype for t in now[0]]
        for errors, outputs in ((old, was), (new, now)):
            errors.append([relative_error(o, r) for o, r in zip(outputs, reference, strict=True)])
    old, new = torch.tensor(old).mean((0, 1)), torch.tensor(new).mean((0, 1))
    assert (new <= 1.1 * old + torch.finfo(case.dtype).eps / 2).all(), f"errors {new.tolist()} against {old.tolist()}"
    (boundary,) = report.boundaries
    assert boundary.fused and boundary.direction == "backward" and not boundary.reason
    assert (boundary.rewrite, boundary.collective) == (RESULT, kind)
    (node,) = [n for n in after.graph.nodes if "norm_backward" in str(n.target)]
    assert not any(word in str(n.target) for n in after.graph.nodes for word in ("c10d", "sum.dim"))
    assert node.kwargs["want_weight"] and not node.kwargs["want_sum"] and node.args[5] is not None


@pytest.fixture(params=[2, 4])
def ranks(request):
    with fake_world(request.param):
        yield request.param


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.__name__)
@pytest.mark.parametrize(("form", "dtype"), [("all_reduce", BF16), ("sequence", F32)], ids=["sum", "scattered"])
def test_every_spelling(two_ranks, spelling, form, dtype):
    judged(Case(spelling, form, dtype=dtype))


@pytest.mark.nightly
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.__name__)
@pytest.mark.parametrize("form", ["all_reduce", "rows", "sequence", "permuted"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_every_spelling_in_every_form(ranks, spelling, form, dtype, first):
    judged(Case(spelling, form, ranks, first, dtype), seeds=20)


@pytest.mark.parametrize("form", ["all_reduce", "rows", "sequence", "permuted"])
@pytest.mark.parametrize("first", [True, False])
def test_every_form_with_the_residual_on_either_side(ranks, form, first):
    judged(Case(decomposed, form, ranks, first), seeds=2)


def test_the_residual_may_be_added_in_between(two_ranks):
    """The engine adds gradients in the order in which they come."""

    def run(tangents, residual, h, weight, bias):
        rstd = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
        g = all_reduce(tangents * 2) * weight
        inner = (g * h).sum(-1, keepdim=True) * -0.5 * rstd.pow(3)
        return h * rstd * weight, (residual + g * rstd) + inner / H * 2 * h

    inputs = Case(composite).inputs(0)
    before = trace(run, *example(inputs))
    after, report = fused(before)
    assert [b.rewrite for b in report.boundaries] == [RESULT]
    for old, new in zip(on_ranks(before, 2, *inputs), on_ranks(after, 2, *inputs), strict=True):
        torch.testing.assert_close(new, old)


def test_a_gradient_that_something_else_reads_is_handed_out(two_ranks):
    def run(tangents, residual, h, weight, bias):
        dy = all_reduce(tangents * 2)
        y, dx, dweight, _ = decomposed(h, weight, bias, dy)
        return y, residual + dx, dweight, dy.sin()

    inputs = Case(composite).inputs(0)
    before = trace(run, *example(inputs))
    after, report = fused(before)
    assert [b.rewrite for b in report.boundaries] == [RESULT]
    assert executed_collectives(after, *example(inputs)) == Counter(all_reduce=1)
    for old, new in zip(on_ranks(before, 2, *inputs), on_ranks(after, 2, *inputs), strict=True):
        torch.testing.assert_close(new, old)


def test_three_gradients_become_one_and_then_the_norm_backward(two_ranks):
    def run(tangents, residual, h, weight, bias):
        dy = all_reduce(tangents * 2) + all_reduce(tangents * weight) + all_reduce(tangents + 1)
        y, dx, dweight, _ = composite(h, weight, bias, dy)
        return y, residual + dx, dweight

    inputs = Case(composite).inputs(0)
    before = trace(run, *example(inputs))
    after, report = fused(before)
    assert Counter(b.rewrite for b in report.boundaries) == {"merge_all_reduces": 2, RESULT: 1}
    assert executed_collectives(after, *example(inputs)) == Counter(all_reduce=1)
    for old, new in zip(on_ranks(before, 2, *inputs), on_ranks(after, 2, *inputs), strict=True):
        torch.testing.assert_close(new, old)


def test_the_norm_of_a_fused_forward_boundary(two_ranks):
    """Forward's sum, norm and statistics are one operation, whose statistics backward's reads."""

    def run(tangents, residual, h, weight, bias):
        own = h + all_reduce(h.cos())
        y, dx, dweight, _ = composite(own, weight, bias, all_reduce(tangents * 2))
        return y, residual + dx, dweight

    inputs = Case(composite, dtype=BF16).inputs(0)
    before = trace(run, *example(inputs))
    after, report = fused(before)
    assert [b.rewrite for b in report.boundaries] == ["all_reduce_norm", RESULT]
    (node,) = [n for n in after.graph.nodes if "norm_backward" in str(n.target)]
    assert node.args[3] is not None and node.args[1].meta["val"].dtype is BF16
    reference = on_ranks(trace(run, *example(exact(inputs))), 2, *exact(inputs))
    for old, new, r in zip(on_ranks(before, 2, *inputs), on_ranks(after, 2, *inputs), reference, strict=True):
        pairs = zip(relative_error(new, r), relative_error(old, r), strict=True)
        assert all(one <= 1.1 * other + 0.004 for one, other in pairs)


# -- what looks alike -------------------------------------------------------------------------------------------------


def other_factor(h, weight, bias, dy):
    y, _, dweight, _ = composite(h, weight, bias, dy)
    rstd = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    g = dy * weight
    return y, (g - h * rstd / H * (h * rstd * g).sum(-1, keepdim=True) * 1.001) * rstd, dweight, None


def two_eps(h, weight, dy, eps):
    """Another eps in one of the places where forward's statistics should stand."""
    rstd, other = (torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + each) for each in (eps, 2 * eps))
    y = h * rstd * weight
    g = dy * weight
    dx = (g - h * other / H * (h * rstd * g).sum(-1, keepdim=True)) * rstd
    return y, dx, (dy * h * rstd).sum((0, 1)), None


def other_eps(h, weight, bias, dy):
    return two_eps(h, weight, dy, EPS)


def far_smaller_eps(h, weight, bias, dy):
    """The same where rows have numbers around one, and not where they are small."""
    return two_eps(h, weight, dy, 1e-12)


def of_other_rows(h, weight, bias, dy):
    y, dx, dweight, _ = composite(h, weight, bias, dy.flip(0))
    return y, dx, dweight, None


def without_correction(h, weight, bias, dy):
    y, _, dweight, _ = composite(h, weight, bias, dy)
    return y, dy * weight * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS), dweight, None


LOOK_ALIKES = [other_factor, other_eps, far_smaller_eps, of_other_rows, without_correction]


@pytest.mark.parametrize("spelling", LOOK_ALIKES, ids=lambda s: s.__name__)
def test_what_is_no_norms_backward_stays(two_ranks, spelling):
    case = Case(spelling)
    inputs = case.inputs(0)
    before = case.traced(inputs)
    after, report = fused(before)
    assert [b.fused for b in report.boundaries] == [False] and report.boundaries[0].reason
    for old, new in zip(on_ranks(before, 2, *inputs), on_ranks(after, 2, *inputs), strict=True):
        torch.testing.assert_close(new, old)


def test_it_is_off_unless_it_is_named(two_ranks):
    case = Case(composite)
    graph = case.traced(case.inputs(0)).graph
    assert RESULT not in DEFAULT_REWRITES
    (boundary,) = fuse(graph, resolve_group, PassOptions()).report.boundaries
    assert not boundary.fused and "off unless `rewrites` names it" in boundary.reason


def test_compiled_graphs_call_the_collective_and_one_local_operator(two_ranks):
    """A gradient that something else reads included: the collective's result is that."""

    def run(tangents, residual, h, weight, bias):
        dy = all_reduce(tangents * 2)
        y, dx, dweight, dbias = layer(h, weight, bias, dy)
        return y, residual + dx, dweight, dbias, dy.sin()

    inputs = Case(layer).inputs(0)
    after, _ = fused(trace(run, *example(inputs)))
    before = on_ranks(after, 2, *inputs)
    assert lower(after.graph) == 1
    after.recompile()
    names = [str(node.target) for node in after.graph.nodes if node.op == "call_function"]
    assert [n for n in names if "tpfuse" in n] == ["tpfuse.norm_backward.default"]
    assert executed_collectives(after, *example(inputs)) == Counter(all_reduce=1)
    for old, new in zip(before, on_ranks(after, 2, *inputs), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)
