"""Which products overlap_all_reduce_norm takes along: those whose rows are surely computed one without the other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.graphs import fake_world, trace
from tests.products import F8, of_float8
from tpfuse.passes.rewrite.overlap import find_product


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch):
    monkeypatch.setattr("tpfuse.passes.rewrite.overlap.FROM_BYTES", 1)
    with fake_world(2):
        yield


def found_in(fn: Callable, *factors: torch.Tensor, dynamic: bool = False) -> str | None:
    """The word for the product that `fn` of these factors returns, if it is taken."""
    [x] = trace(fn, *factors, dynamic=dynamic, decompose=False).graph.find_nodes(op="output")[0].all_input_nodes
    found = find_product({"x": x, "residual": None}, dist.group.WORLD.group_name)
    return None if found is None else found.word


def float8_product(*given: torch.Tensor, **more: object) -> torch.Tensor:
    return torch._scaled_mm(*given, out_dtype=torch.bfloat16, **more)


A, B, BIAS = torch.randn(7, 32), torch.randn(32, 16), torch.randn(16)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("fn", "factors", "word"), [
    (torch.addmm, (BIAS, A, B), "addmm"),
    (torch.addmm, (BIAS[None], A, B), "addmm"),
    (float8_product, of_float8((7, 1), (1, 16)), "scaled_mm"),
    (partial(torch.addmm, alpha=2), (BIAS, A, B), None),
    (partial(torch.addmm, beta=0.5), (BIAS, A, B), None),
    (torch.addmm, (torch.randn(7, 16), A, B), None),
    (torch.addmm, (torch.randn(7, 1), A, B), None),
    (torch.addmm, (torch.randn(()), A, B), None),
    (lambda bias, a, b: torch.addmm(bias.expand(-1, 16), a, b), (torch.randn(7, 1), A, B), None),
    (lambda a, b, s, t, r: float8_product(a, b, s, t, scale_result=r), [*of_float8((), ()), torch.ones(())], None),
    (lambda a, b, *scales: float8_product(a, b.contiguous(), *scales), of_float8((), ()), None),
    (lambda a, b, *scales: float8_product(a.t().contiguous().t(), b, *scales), of_float8((), ()), None),
], ids=str)  # fmt: skip
def test_which_products_are_taken(fn, factors, word, dynamic):
    assert found_in(fn, *factors, dynamic=dynamic) == word


@pytest.mark.parametrize(("dtype", "scale_dtype", "scale_a", "scale_b"), [
    (F8, torch.float8_e8m0fnu, (512,), (512,)),  # of blocks of 32
    (F8, torch.float32, (128, 2), (2, 128)),  # of blocks of 128
    (F8, torch.float32, (128, 1), (1, 1)),
    (torch.float4_e2m1fn_x2, torch.float32, (), ()),
], ids=str)  # fmt: skip
def test_products_with_scales_of_blocks_are_left_alone(dtype, scale_dtype, scale_a, scale_b):
    """As they stand in a graph, whether or not this torch has a kernel for them."""
    graph = fx.Graph()
    with FakeTensorMode():
        fakes = [torch.empty(128, 128, dtype=dtype), torch.empty(128, 128, dtype=dtype).t()]
        fakes += [torch.empty(shape, dtype=scale_dtype) for shape in (scale_a, scale_b)]
        out = torch.empty(128, 128, dtype=torch.bfloat16)
    factors = [graph.placeholder(f"factor_{i}") for i in range(4)]
    x = graph.call_function(torch.ops.aten._scaled_mm.default, (*factors, None, None, torch.bfloat16))
    graph.output(x)
    for node, fake in zip((*factors, x), (*fakes, out), strict=True):
        node.meta["val"] = fake
    assert find_product({"x": x}, dist.group.WORLD.group_name) is None
