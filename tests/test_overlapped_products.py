"""overlap_all_reduce_norm: a large product in front of a boundary becomes a part of it; a small one never does."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import fresh_cache, run_and_get_code

from tpfuse.kernels.symmetric import dispatch
from tpfuse.passes.plan.sites import DEFAULT_REWRITES, OVERLAP

from .graphs import fake_world
from .kernels.stub_kernel import in_place_of_gpus
from .models import HIDDEN, Stack, loss

SMALL = 4 * HIDDEN * 4  # bytes of four rows in float32
NAMED = {"rewrites": [*DEFAULT_REWRITES, OVERLAP]}


@pytest.fixture
def kernel(monkeypatch):
    torch._dynamo.reset()
    for module in ("tpfuse.product_ops", "tpfuse.passes.rewrite.overlap"):
        monkeypatch.setattr(f"{module}.FROM_BYTES", SMALL)
    with fresh_cache(), fake_world(2):
        yield in_place_of_gpus(monkeypatch)
    dispatch.default_table.cache_clear()
    dispatch.choose.cache_clear()
    torch._dynamo.reset()


def calls_of(code: str) -> list[str]:
    return re.findall(r"torch\.ops\.tpfuse\.(\w*all_reduce_norm)\.", code)


def compiled_code(model: nn.Module, x: torch.Tensor, options: dict = NAMED, dynamic: bool = False) -> tuple:
    fn = torch.compile(model, backend="tpfuse", options=options, dynamic=dynamic)
    with torch.no_grad():
        _, (code, *_) = run_and_get_code(fn, x)
    return fn, code


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_products_of_many_rows_are_part_of_their_boundaries(kernel, norm, dynamic):
    model = Stack(1, layers=1, norm=norm).eval()
    fn, code = compiled_code(model, torch.randn(6, HIDDEN), dynamic=dynamic)
    assert calls_of(code) == ["product_all_reduce_norm"] * 2
    with torch.no_grad():
        for rows in (6, 3, 9) if dynamic else (6, 6):  # 3: too few for the product to be handed on
            x = torch.randn(rows, HIDDEN)
            torch.testing.assert_close(fn(x), model(x), rtol=1e-5, atol=1e-5)


def test_products_of_few_rows_stay_where_they_were(kernel):
    model = Stack(1, layers=1).eval()
    _, code = compiled_code(model, torch.randn(3, HIDDEN))
    assert calls_of(code) == ["all_reduce_norm"] * 2


@pytest.mark.parametrize(
    "options", [{}, {**NAMED, "inductor": {"max_autotune_gemm": True}}], ids=["not named", "products are tuned"]
)
def test_products_are_left_alone_without_the_name_and_where_they_are_tuned(kernel, options):
    _, code = compiled_code(Stack(1, layers=1).eval(), torch.randn(6, HIDDEN), options)
    assert calls_of(code) == ["all_reduce_norm"] * 2


def test_a_training_step_has_the_gradients_of_eager_mode(kernel):
    model = Stack(1, layers=1)
    x = torch.randn(6, HIDDEN)
    gradients = []
    for fn in (model, torch.compile(model, backend="tpfuse", dynamic=False, options=NAMED)):
        model.zero_grad()
        loss(fn(x)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for right, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
