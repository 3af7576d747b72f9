"""Floats that modules hold are constants of a compiled graph, with a guard, also under `dynamic=True`."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import tpfuse
from tests.graphs import fake_world
from tpfuse.passes.facts.graph import symbols_told

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


@pytest.mark.parametrize("told", [False, True])
def test_a_size_that_is_the_same_for_several_numbers_does_not_make_them_equal(compiled, told: bool) -> None:
    """Ranks may take other rows of the sum, and as many: (1 + rows - first) // 2 of them are sent later. Where it is
    rows - first, the number is equal on all ranks, or nothing runs."""
    block, _ = compiled

    def program(x: Tensor, first: int) -> Tensor:
        total = funcol.all_reduce(block.down(x), "sum", dist.group.WORLD)
        own = total[first:] if told else total[first::2]
        return own + funcol.all_reduce(block.norm(own).sin(), "sum", dist.group.WORLD)

    fn = torch.compile(program, backend="tpfuse", dynamic=True, fullgraph=True, options={"inner": "aot_eager"})
    x = torch.randn(9, H)
    for first in (2, 3):
        torch.testing.assert_close(fn(x, first), program(x, first))
    assert fused()[0] == told
    assert told or "each call brings anew" in tpfuse.reports()[-1].boundaries[0].reason


def test_which_symbols_equal_numbers_tell() -> None:
    shapes = ShapeEnv()
    s, k, b = (shapes.create_unbacked_symint() for _ in range(3))

    def told(*numbers: object) -> set[str]:
        names = {str(number.node.expr): name for number, name in ((s, "s"), (k, "k"), (b, "b"))}
        return {names[symbol] for symbol in symbols_told(numbers)}

    assert told(3) == told((1 + s - k) // 2) == told(s - k) == told(s % 2) == told(s * s) == set()
    assert told(s) == told(2 * s + 7) == told(s, (1 + s - k) // 2) == {"s"}
    assert told(s, s - k) == told(s - k, s + k, 2 * s) == {"s", "k"}
    assert told(b * s) == told(2 * b * (s + 1)) == told(b * s + b) == {"b", "s"}
