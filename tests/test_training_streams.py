"""Gradients through boundaries of streams with leading ones, of another dtype, with other strides, or waited for twice:
every output and gradient of the joint graph against float64, and laid out as without the pass."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, fx

from tpfuse import backend

from .graphs import fake_world, on_ranks, relative_error

H, ROWS, SEEDS, WORLD = 16, (1, 24), 20, 2


class OnRanks:
    """The sums of a program, as it is compiled."""

    def first(self, x: Tensor) -> Tensor:
        return funcol.all_reduce(x, "sum", dist.group.WORLD)

    then = first


class InOneProcess:
    """The same for the oracle, which is given the sum of all partials: ranks hold the same from there on, and the
    gradient of an all-reduce is the all-reduced gradient."""

    def first(self, x: Tensor) -> Tensor:
        return x * WORLD - (x * (WORLD - 1)).detach()

    def then(self, x: Tensor) -> Tensor:
        return x * WORLD


def rms(h: Tensor, weight: Tensor) -> Tensor:
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5) * weight


def wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def leading_one(sums, x, r, weight):
    h = r + sums.first(x[0])
    return rms(h, weight), h


def wide_residual(sums, x, r, weight):
    h = wide(r) + sums.first(x)
    return rms(h, wide(weight)), h


def wide_residual_of_two(sums, x, r, weight):
    """Two addends of the sum's own dtype, added up in the wider one."""
    h = wide(sums.first(x)) + r + r.sin() * 0.3
    return rms(h, weight), h


def wide_sum(sums, x, r, weight):
    h = r + sums.first(wide(x))
    return rms(h, wide(weight)).to(r.dtype), h


def wide_stream(sums, x, r, weight):
    """Two boundaries of a float32 stream between products in the weights' dtype."""
    h = wide(r) + sums.first(x)
    h = h + sums.then(torch.tanh(F.layer_norm(h, (H,), wide(weight)).to(x.dtype)))
    return F.layer_norm(h, (H,), wide(weight)), h


def transposed_stem(sums, x, r, weight):
    h = r.transpose(1, 2).contiguous().transpose(1, 2) + sums.first(x)
    h = h + sums.then(torch.tanh(F.layer_norm(h, (H,), weight)))
    return F.layer_norm(h, (H,), weight), h, h.transpose(1, 2).reshape(h.shape[0], -1)


def transposed_wide_stem(sums, x, r, weight):
    h = sums.first(x) + wide(r.transpose(1, 2).contiguous().transpose(1, 2))
    return rms(h, wide(weight)), h


def waited_for_twice(sums, x, r, weight):
    s = sums.first(x)
    h = r + (funcol.wait_tensor(s) if isinstance(sums, OnRanks) else s)
    return rms(h, weight), h


PROGRAMS = {
    leading_one: 1,
    wide_residual: 1,
    wide_residual_of_two: 1,
    wide_sum: 1,
    wide_stream: 2,
    transposed_stem: 2,
    transposed_wide_stem: 1,
    waited_for_twice: 1,
}


def drawn(seed: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """A partial for each rank, r and weight."""
    torch.manual_seed(seed)
    parts = [torch.randn(*ROWS, H).to(dtype) for _ in range(WORLD)]
    return parts, torch.randn(*ROWS, H).to(dtype), (torch.randn(H) + 1).to(dtype)


def tangents_of(outs) -> list[Tensor]:
    return [torch.arange(o.numel(), dtype=torch.float64).cos().view(o.shape).to(o.dtype) for o in outs]


def step(fn, *given: Tensor) -> list[Tensor]:
    """Outputs, then the gradients of x, r and weight."""
    given = tuple(t.detach().requires_grad_() for t in given)
    outs = fn(*given)
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, given, tangents_of(outs))]


def laid_out(t: Tensor) -> tuple:
    """Dtype, shape, and the strides that mean something."""
    return t.dtype, tuple(t.shape), tuple(stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1)


@dataclasses.dataclass
class Kept:
    """The joint graph before and after the pass, as something that can be called."""

    before: fx.GraphModule
    after: fx.GraphModule


def called(joint_graph: fx.GraphModule):
    """A joint graph takes two lists and gives two."""
    return lambda *given: [t for some in joint_graph(list(given[:3]), list(given[3:])) for t in some]


@pytest.fixture
def joint(monkeypatch):
    """The joint graphs that the backend is given, as they come."""
    kept: list[Kept] = []
    fuse = backend.fuse

    def keeping(graph, *args):
        outcome = fuse(graph, *args)
        kept.append(Kept(*(fx.GraphModule(graph.owning_module, copy.deepcopy(g)) for g in (graph, outcome.graph))))
        return outcome

    monkeypatch.setattr("tpfuse.backend.fuse", keeping)
    torch._dynamo.reset()
    return kept


NIGHTLY = {waited_for_twice, transposed_wide_stem, wide_sum}
CASES = [
    *(pytest.param(r, torch.bfloat16, marks=[pytest.mark.nightly] if r in NIGHTLY else []) for r in PROGRAMS),
    (transposed_stem, torch.float32),
]


@pytest.mark.parametrize(("run", "dtype"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_outputs_and_gradients_are_as_exact_and_laid_out_as_without_the_pass(joint, run, dtype):
    def program(x, r, weight):
        x, r, weight = x.view_as(x), r.view_as(r), weight.view_as(weight)  # inputs of the graph in this order
        return run(OnRanks(), x, r, weight)

    with fake_world(WORLD):
        options = {"inner": "aot_eager", "expect_fused": PROGRAMS[run]}
        parts, r, weight = drawn(0, dtype)
        expected = program(parts[0], r, weight)
        got = step(torch.compile(program, backend="tpfuse", fullgraph=True, options=options), parts[0], r, weight)
        (graphs,) = joint
        assert [laid_out(t) for t in got[: len(expected)]] == [laid_out(t) for t in expected]
        for graph in (graphs.before, graphs.after):
            (returned,) = graph.graph.output_node().args
            assert [laid_out(node.meta["val"]) for node in returned] == [laid_out(t) for t in got]
        old, new = [], []
        for seed in range(SEEDS):
            parts, r, weight = drawn(seed, dtype)
            total = sum(part.double() for part in parts)
            exact = step(lambda *given: run(InOneProcess(), *given), total, r.double(), weight.double())
            given = (parts, r, weight, *tangents_of(expected))
            for errors, graph in ((old, graphs.before), (new, graphs.after)):
                errors.append(relative_error(on_ranks(called(graph), WORLD, *given)[0], exact))
    roundings = torch.tensor([torch.finfo(t.dtype).eps / 2 for t in got])
    old, new = torch.tensor(old).mean(0), torch.tensor(new).mean(0)
    assert (new <= 1.1 * old + roundings).all(), f"{new.tolist()} against {old.tolist()}"
