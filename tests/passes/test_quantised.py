"""Quantisations behind a normed value: found in each spelling, merged, and what they compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from tests.quantisations import E4M3, SPELLINGS, same
from tpfuse.errors import OpError
from tpfuse.passes.recognise.quantised import Quantised, find_quantised
from tpfuse.quantisation import Quantisation, read_quantisation

BF16 = torch.bfloat16


def found(function: Callable, dtype: torch.dtype = BF16, shape: tuple[int, ...] = (2, 3, 384)) -> Quantised | None:
    """What is found behind the input of a function, in the graph as it arrives at the pass."""
    y = torch.randn(shape).to(dtype)
    graph = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(y).graph
    return find_quantised(next(iter(graph.nodes)))


def recognised(function: Callable, dtype: torch.dtype = BF16) -> Quantisation:
    quantised = found(function, dtype)
    assert quantised is not None
    return quantised.how


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", SPELLINGS)
def test_each_spelling_is_found_and_computed_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    how = recognised(SPELLINGS[name], dtype)
    y = torch.randn(5, 384).to(dtype)
    y[1] = 0.0
    (q, scale), (right, right_scale) = how.of(y), SPELLINGS[name](y)
    assert same(q, right) and same(scale, right_scale.reshape(scale.shape))
    assert how.group == (128 if name == "groups" else 0)
    assert read_quantisation(how.text()) == how


def test_equal_chains_are_one_and_views_are_seen_through() -> None:
    def thrice(y: Tensor) -> list[Tensor]:
        flat = y.reshape(-1, 384)
        return [*SPELLINGS["float8_per_row"](y), *SPELLINGS["float8_per_row"](flat), *SPELLINGS["float8_per_row"](flat)]

    quantised = found(thrice)
    assert quantised is not None and len(quantised.q) == len(quantised.scale) == 3 and not quantised.left


def test_a_dtype_of_a_step_is_part_of_the_quantisation() -> None:
    """bf16 / 448 is not f32 / 448."""
    in_bf16, in_f32 = recognised(SPELLINGS["float8_per_row"]), recognised(SPELLINGS["by_hand"])
    assert next(s.dtype for s in in_bf16.steps if s.op == "div") == BF16
    assert next(s.dtype for s in in_f32.steps if s.op == "div") == torch.float32


@pytest.mark.parametrize(
    "other",
    [
        lambda y: ((y.float() / (y.abs().amax() / 448).float()).to(E4M3), y),  # one scale for all rows
        lambda y: ((y.float() / (y.abs().amax(-2, keepdim=True) / 448).float()).to(E4M3), y),  # one for a column
        lambda y: (y.to(E4M3), y),  # none at all
        lambda y: ((y.float() / torch.rand(2, 3, 1)).to(E4M3), y),  # another tensor's
    ],
    ids=["per tensor", "per column", "no scale", "foreign scale"],
)
def test_what_is_no_quantisation_of_rows_is_left(other: Callable) -> None:
    assert found(other) is None


@pytest.mark.parametrize(
    "text", ["", "1:1:0", "1:1:0;nonsense:0:float8_e4m3fn", "1:1:0;to:3:int8", "1:1:0;to:0:bfloat16"]
)
def test_a_text_that_is_no_quantisation_is_refused(text: str) -> None:
    with pytest.raises(OpError, match="is no quantisation"):
        read_quantisation(text)


def test_the_graph_is_only_read() -> None:
    graph = fx.Graph()
    assert find_quantised(graph.placeholder("y")) is None
