"""Floats that modules hold are constants of a compiled graph, with a guard, also under `dynamic=True`."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn

import tpfuse
from tests.graphs import fake_world

H = 16


class Block(nn.Module):
    """Granite's residual: the sum times a number that the module holds."""

    def __init__(self, factor: float = 0.25) -> None:
        super().__init__()
        self.factor = factor
        self.down = nn.Linear(H, H, bias=False)
        self.norm = nn.RMSNorm(H, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.factor * funcol.all_reduce(self.down(x), "sum", dist.group.WORLD))


@pytest.fixture
def compiled():
    """A compiled block in a fake world of two ranks, in which an all-reduce changes nothing."""
    with fake_world(2), torch.no_grad():
        torch._dynamo.reset()
        block = Block()
        options = {"inner": "aot_eager"}
        yield block, torch.compile(block, backend="tpfuse", dynamic=True, fullgraph=True, options=options)


def fused() -> list[bool]:
    return [boundary.fused for boundary in tpfuse.reports()[-1].boundaries]


def test_a_sum_times_a_held_number_is_fused_with_dynamic_numbers(compiled) -> None:
    block, fn = compiled
    x = torch.randn(3, H)
    torch.testing.assert_close(fn(x), block(x))
    assert fused() == [True]


def test_another_number_is_another_graph_and_from_then_on_none_is_compiled_for_it(compiled) -> None:
    block, fn = compiled
    x = torch.randn(3, H)
    fn(x)
    before = len(tpfuse.reports())
    for factor in (0.5, 0.75, 1.0, 0.25):
        block.factor = factor
        torch.testing.assert_close(fn(x), block(x))
    assert len(tpfuse.reports()) == before + 1, "one graph for all numbers to come"
    assert fused() == [False]
    assert "each call brings anew" in tpfuse.reports()[-1].boundaries[0].reason


def test_a_number_that_is_an_argument_stays_symbolic(compiled) -> None:
    block, _ = compiled

    def program(x: Tensor, factor: float) -> Tensor:
        return block.norm(x + factor * funcol.all_reduce(block.down(x), "sum", dist.group.WORLD))

    fn = torch.compile(program, backend="tpfuse", dynamic=True, fullgraph=True, options={"inner": "aot_eager"})
    before = len(tpfuse.reports())
    for factor in (0.5, 0.75):
        torch.testing.assert_close(fn(torch.ones(3, H), factor), program(torch.ones(3, H), factor))
    assert len(tpfuse.reports()) == before + 1 and fused() == [False]


def test_after_a_reset_another_number_is_a_constant_as_well(compiled) -> None:
    block, fn = compiled
    x = torch.randn(3, H)
    for factor in (0.25, 0.5):
        torch._dynamo.reset()
        block.factor = factor
        torch.testing.assert_close(fn(x), block(x))
        assert fused() == [True]
