"""The kernels' quantisation of a y that is fed to them, against the program's own steps. Interpreted."""

from __future__ import annotations

import pytest
import torch

from tests.passes.test_quantised import recognised
from tests.quantisations import OPERATORS, SPELLINGS, same
from tpfuse.kernels.add_norm import add_norm
from tpfuse.kernels.call import Call
from tpfuse.kernels.compat import next_power_of_2, tl, triton
from tpfuse.kernels.quantise import quantise_row
from tpfuse.kernels.quantise_program import converts_fp8, encoded
from tpfuse.kernels.symmetric.dispatch import bind
from tpfuse.kernels.symmetric.entries import Entry
from tpfuse.quantisation import Quantisation

from .protocol import Seat, run


@triton.jit
def _kernel(y_ptr, q_ptr, scale_ptr, H: tl.constexpr, BLOCK: tl.constexpr, PROGRAM: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < H
    y = tl.load(y_ptr + row * H + cols, mask=mask, other=0.0).to(tl.float32)
    quantise_row(y, mask, cols, row, q_ptr, scale_ptr, H, PROGRAM)


def quantised(y: torch.Tensor, how: Quantisation) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, scale) of the rows y [N, H], by the kernels' device code."""
    (rows, hidden), on_gpu = y.shape, y.is_cuda
    q = torch.empty(y.shape, dtype=how.q_dtype, device=y.device)
    scale = torch.empty(how.scales_of(y.shape), dtype=how.scale_dtype, device=y.device)
    program = encoded(how, y.dtype, on_gpu=on_gpu, converts=converts_fp8(y.device))
    block = next_power_of_2(hidden)
    _kernel[(rows,)](y, q.view(torch.int8), scale, H=hidden, BLOCK=block, PROGRAM=program)
    return q, scale


def special_rows(hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """Usual rows, one of zeros, one tiny, one with a NaN, one with an infinity, and powers of two."""
    y = torch.randn(9, hidden, generator=torch.Generator().manual_seed(3)) * torch.logspace(-4, 4, 9)[:, None]
    y[1] = 0.0
    y[2] *= 1e-30
    y[3, 5], y[4, 7] = float("nan"), float("inf")
    y[5] = 2.0 ** torch.randint(-9, 9, (hidden,), generator=torch.Generator().manual_seed(4))
    return y.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", SPELLINGS)
def test_each_spelling_is_quantised_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    y = special_rows(384, dtype)
    q, scale = quantised(y, recognised(SPELLINGS[name], dtype))
    right, right_scale = SPELLINGS[name](y)
    assert same(scale, right_scale.reshape(scale.shape))
    assert same(q, right)


@pytest.mark.parametrize("name", ["fbgemm", "triton", "bitsandbytes"])
def test_each_operators_steps_are_done_bit_for_bit(name: str) -> None:
    y = special_rows(384, torch.bfloat16)[5:].contiguous()  # what INT8 makes of NaN and infinity may be anything
    q, scale = quantised(y, recognised(OPERATORS[name]))
    right, right_scale = OPERATORS[name](y)
    assert same(scale, right_scale.reshape(scale.shape)) and same(q, right)


@pytest.mark.parametrize("name", ["float8_per_row", "int8_per_row", "groups"])
def test_the_local_kernel_quantises_the_y_it_gives(name: str) -> None:
    s, residual = special_rows(384, torch.float32)[5:8], torch.randn(3, 384)
    how = recognised(SPELLINGS[name])
    call = Call(s, residual, norm="rms_norm", eps=1e-6, out_dtype=torch.bfloat16, quant=how.text())
    out = add_norm(call)
    q, scale = SPELLINGS[name](out.y)
    assert same(out.q, q) and same(out.scale, scale.reshape(out.scale.shape))


def _quantised(seat: Seat, name: str, text: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    xs = torch.randn(2, 3, 256, generator=generator).to(torch.bfloat16)
    call = Call(xs[seat.ws.rank], xs[0], norm="rms_norm", eps=1e-6, out_dtype=torch.bfloat16, quant=text)
    out, _ = bind(Entry("H", 2, 256, 8, name), call, seat.ws).run()
    return [out.y, out.q.view(torch.int8), out.scale]


@pytest.mark.parametrize("kernel", ["one_shot", "two_shot", "barrier", "copied"])
@pytest.mark.parametrize("name", ["float8_per_row", "int8_per_row"])
def test_each_kernel_quantises_the_y_it_gives(kernel: str, name: str) -> None:
    how = recognised(SPELLINGS[name])
    for ((y, q, scale),) in run(2, _quantised, kernel, how.text()):
        right, right_scale = SPELLINGS[name](y)
        assert same(q.view(how.q_dtype), right) and same(scale, right_scale)
