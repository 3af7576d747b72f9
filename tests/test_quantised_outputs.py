"""Boundaries that hand out their normed value quantised, in compiled programs. (On a fake group of ranks an all-reduce
changes nothing.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

import tpfuse
from tests.graphs import fake_world
from tests.quantisations import OPERATORS, SPELLINGS, same
from tpfuse.passes.plan.sites import REWRITES

H, BF16 = 256, torch.bfloat16
#: What the report says of those that are no FP8 per row.
SAID = {"groups": "FP8 (e4m3) per 128 columns", "int8_per_row": "INT8 per row", "bitsandbytes": "INT8 per row"}


def compiled(function: Callable, dynamic: bool = False, rewrites: tuple[str, ...] = REWRITES, **more: Any) -> Callable:
    torch._dynamo.reset()
    options = {"inner": "aot_eager", "rewrites": rewrites, **more}
    return torch.compile(function, backend="tpfuse", fullgraph=True, dynamic=dynamic, options=options)


def boundary(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    hidden = residual + funcol.all_reduce(x, "sum", dist.group.WORLD)
    return torch.nn.functional.rms_norm(hidden, (H,), weight, 1e-6), hidden


def drawn(rows: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    x, residual = (torch.randn(2, rows, H).to(BF16) for _ in range(2))
    return x, residual, torch.randn(H).to(BF16)


@pytest.fixture
def two_ranks():
    with fake_world(2), torch.no_grad():
        yield


@pytest.mark.parametrize("name", [*SPELLINGS, *OPERATORS])
def test_each_quantisation_is_one_with_its_boundary_and_bit_for_bit_that_of_y(two_ranks, name):
    """Also where it is written twice, as for q and k; y is read besides, and is still handed out. Operators are called
    on rows seen as [N, H]."""
    quantise = (SPELLINGS | OPERATORS)[name]

    def program(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y, hidden = boundary(x, residual, weight)
        return y, hidden, *quantise(y), *quantise(y)

    given = drawn()
    if name != "bitsandbytes":  # what it makes of a row of zeros is NaN as an integer, which may be anything
        given[0][0, 1] = given[1][0, 1] = 0.0  # others may divide by it, and give the same NaN
    y, hidden, *made = compiled(program, dynamic=name in ("float8_per_row", "triton"))(*given)
    [verdict] = tpfuse.reports()[-1].boundaries
    assert verdict.fused and verdict.quantised == SAID.get(name, "FP8 (e4m3) per row")
    torch.testing.assert_close(hidden, program(*given)[1])
    right = quantise(y)
    for q, scale in (made[:2], made[2:]):
        assert same(q, right[0]) and same(scale, right[1])


@pytest.mark.parametrize(
    "name, option",
    [
        ("fbgemm", (None, torch.ones(1))),
        ("bitsandbytes", (6.0,)),
        ("triton", (None, torch.zeros(10, dtype=torch.int64))),
        ("triton", (None, None, True, None, 16)),
    ],
)
def test_an_operator_with_an_option_set_stays(two_ranks, name, option):
    def program(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return OPERATORS[name](boundary(x, residual, weight)[0], *option)

    compiled(program)(*drawn())
    [verdict] = tpfuse.reports()[-1].boundaries
    assert verdict.fused and not verdict.quantised


def test_an_operator_that_gives_rows_back_in_their_dtype_stays_and_is_said(two_ranks):
    """ModelOpt's: behind it a product reads 16 bits."""

    def program(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y = boundary(x, residual, weight)[0].flatten(0, -2)
        return y, torch.ops.tensorrt.quantize_op(y, y.abs().amax(-1, keepdim=True), 8, 0, False, True)

    y, rounded = compiled(program)(*drawn())
    report = tpfuse.reports()[-1]
    [verdict] = report.boundaries
    assert verdict.fused and not verdict.quantised
    assert any("tensorrt::quantize_op rounds" in note for note in report.notes)
    assert same(rounded, torch.ops.tensorrt.quantize_op(y, y.abs().amax(-1, keepdim=True), 8, 0, False, True))


def test_nothing_is_quantised_unless_it_is_asked_for(two_ranks):
    def program(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return SPELLINGS["by_hand"](boundary(x, residual, weight)[0])

    given = drawn()
    without = tpfuse.options.parse_options({}).rewrites
    assert "quantised_outputs" not in without
    compiled(program, rewrites=without)(*given)
    [verdict] = tpfuse.reports()[-1].boundaries
    assert verdict.fused and not verdict.quantised


def test_a_second_quantisation_of_one_value_stays_and_is_said(two_ranks):
    def program(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y = boundary(x, residual, weight)[0]
        return y, *SPELLINGS["by_hand"](y), *SPELLINGS["int8_per_row"](y)

    y, *made = compiled(program)(*drawn())
    report = tpfuse.reports()[-1]
    assert [b.quantised != "" for b in report.boundaries] == [True]
    assert any("a second quantisation" in note for note in report.notes)
    for got, right in zip(made, (*SPELLINGS["by_hand"](y), *SPELLINGS["int8_per_row"](y)), strict=True):
        assert same(got, right)
