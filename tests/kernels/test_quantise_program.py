"""Which operations of a quantisation the kernels leave out, and where they may not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.passes.test_quantised import recognised
from tests.quantisations import E4M3, by_hand, float8_per_row, groups, int8_per_row
from tpfuse.kernels.quantise_program import CLAMPED, CONVERTED, KEPT, OPS, encoded

BF16 = torch.bfloat16


def steps(spelling: Callable[[Tensor], tuple[Tensor, Tensor]], y: torch.dtype = BF16, **card: bool) -> list[tuple]:
    """(operator, rounding) of each step, for a card that converts to FP8 unless said otherwise."""
    program = encoded(recognised(spelling, y), y, **{"on_gpu": True, "converts": True, **card})
    return [(OPS[program[at]], program[at + 5]) for at in range(4, len(program), 6)]


def operators(spelling: Callable[[Tensor], tuple[Tensor, Tensor]], **card: bool) -> list[str]:
    return [op for op, _ in steps(spelling, **card)]


def clamped_to(least: float, most: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def spelling(y: Tensor) -> tuple[Tensor, Tensor]:
        scale = (y.abs().amax(-1, keepdim=True) / 448).float()
        return (y.float() / scale).clamp(least, most).to(E4M3), scale

    return spelling


@pytest.mark.parametrize("spelling", [float8_per_row, by_hand, groups, int8_per_row])
def test_one_reduction_finds_the_greatest_magnitude(spelling: Callable) -> None:
    found = operators(spelling)
    assert found.count("peak") == 1 and not {"amax", "amin", "abs", "neg"} & set(found)


def test_least_and_greatest_of_two_different_rows_stay_two_reductions() -> None:
    def spelling(y: Tensor) -> tuple[Tensor, Tensor]:
        zero = torch.zeros((), dtype=y.dtype)
        least = torch.minimum((y * 0.5).amin(-1, keepdim=True), zero)
        most = torch.maximum(y.amax(-1, keepdim=True), zero)
        scale = torch.maximum(-least, most).float() / 127 + 1e-6
        return torch.clamp(torch.round(y.float() / scale), -128, 127).to(torch.int8), scale

    assert "peak" not in operators(spelling)


def test_a_greatest_value_that_is_no_magnitude_stays_one() -> None:
    def spelling(y: Tensor) -> tuple[Tensor, Tensor]:
        scale = y.amax(-1, keepdim=True).float() / 127 + 1e-6
        return torch.clamp(torch.round(y.float() / scale), -128, 127).to(torch.int8), scale

    found = operators(spelling)
    assert "amax" in found and "div" in found and "peak" not in found


def test_the_conversion_stops_at_448_by_itself_and_at_nothing_else() -> None:
    assert steps(float8_per_row)[-1] == ("to", CLAMPED) and "min" not in operators(float8_per_row)
    for bounds in ((-240.0, 240.0), (-448.0, 240.0), (-500.0, 500.0)):
        assert steps(clamped_to(*bounds))[-1] == ("to", CONVERTED)
        assert {"max", "min"} <= set(operators(clamped_to(*bounds)))
    assert {"max", "min"} <= set(operators(float8_per_row, converts=False))


def test_a_division_by_the_row_s_scale_is_a_quotient_only_where_few_bits_come_of_it() -> None:
    assert "quotient_of_16_bits" in operators(float8_per_row)
    assert "quotient" in operators(by_hand)
    assert "div" in operators(float8_per_row, on_gpu=False)

    def of_a_square(y: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing says how large y² / s may get."""
        scale = (y.abs().amax(-1, keepdim=True) / 448).float()
        return (y.float() * y.float() / scale).clamp(-448, 448).to(E4M3), scale

    assert "div" in operators(of_a_square)

    def with_more_behind_it(y: Tensor) -> tuple[Tensor, Tensor]:
        """The last bit of y / s counts: what is made of it is near zero."""
        scale = (y.abs().amax(-1, keepdim=True) / 448).float()
        return ((y.float() / scale + -3.0) * 4096.0).clamp(-448, 448).to(E4M3), scale

    assert "div" in operators(with_more_behind_it)


def test_only_what_is_not_rounded_yet_is_rounded() -> None:
    assert dict(steps(float8_per_row))["peak"] == KEPT
    assert [rounding != KEPT for op, rounding in steps(int8_per_row) if op == "to"] == [False, True, False, True]
