"""On a GPU the kernels quantise as eager PyTorch does there, bit for bit."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from tests.kernels.case_quantise import quantised
from tests.passes.test_quantised import recognised
from tests.quantisations import SPELLINGS, same
from tpfuse.kernels.add_norm import add_norm
from tpfuse.kernels.bench.virtual import VirtualRanks
from tpfuse.kernels.call import Call
from tpfuse.kernels.symmetric.dispatch import bind
from tpfuse.kernels.symmetric.entries import Entry

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def rows_of(count: int, hidden: int) -> torch.Tensor:
    """Usual rows, and one each of zeros, of tiny numbers, with a NaN, with an infinity, and of powers of two."""
    generator = torch.Generator(device="cuda").manual_seed(3)
    s = torch.randn(count, hidden, device="cuda", generator=generator) * torch.logspace(-4, 4, count).cuda()[:, None]
    s[1], s[3, 5], s[4, 7] = 0.0, float("nan"), float("inf")
    s[2] *= 1e-30
    s[5] = 2.0 ** torch.randint(-9, 9, (hidden,), device="cuda", generator=generator)
    return s


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("hidden", [384, 4096])
@pytest.mark.parametrize("name", SPELLINGS)
def test_the_local_kernel(name: str, hidden: int, dtype: torch.dtype) -> None:
    how = recognised(SPELLINGS[name], dtype)
    out = add_norm(Call(rows_of(9, hidden), None, norm="rms_norm", eps=1e-6, out_dtype=dtype, quant=how.text()))
    q, scale = SPELLINGS[name](out.y)
    assert same(out.scale, scale.reshape(out.scale.shape))
    assert same(out.q, q)


@pytest.mark.parametrize("rows", [1, 9, 300])
@pytest.mark.parametrize("kernel", ["one_shot", "two_shot", "barrier"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_the_kernels_of_ranks(name: str, kernel: str, rows: int) -> None:
    ranks, hidden = VirtualRanks(2), 4096
    how = recognised(SPELLINGS[name], BF16)
    xs = [torch.randn(rows, hidden, device="cuda").to(BF16) for _ in range(2)]
    calls = [Call(x, xs[0], norm="rms_norm", eps=1e-6, out_dtype=BF16, quant=how.text()) for x in xs]
    entry = Entry("H", 2, hidden, rows, kernel)
    launches = ranks.bind(lambda ws: bind(entry, calls[ws.rank], ws))
    ranks.run(launches)
    torch.cuda.synchronize()
    for launch in launches:
        q, scale = SPELLINGS[name](launch.out.y)
        assert same(launch.out.scale, scale.reshape(launch.out.scale.shape)) and same(launch.out.q, q)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["float8_per_row", "by_hand", "int8_per_row"])
def test_a_quotient_is_the_division_s_to_the_last_bit_and_sign(name: str, dtype: torch.dtype) -> None:
    """Rows of every size, and numbers near the middle between two quantised ones."""
    generator = torch.Generator(device="cuda").manual_seed(11)
    y = torch.randn(8192, 4096, device="cuda", generator=generator)
    y *= torch.logspace(-30, 4, 8192, device="cuda")[:, None]
    most = y[1::2].abs().amax(-1, keepdim=True)
    halves = torch.randint(-1792, 1793, y[1::2].shape, device="cuda", generator=generator) / 4
    y[1::2] = (most / (448 if "int8" not in name else 127.5)).to(dtype).float() * halves
    y = y.to(dtype)
    q, scale = quantised(y, recognised(SPELLINGS[name], dtype))
    right, right_scale = SPELLINGS[name](y)
    assert same(scale, right_scale.reshape(scale.shape))
    assert torch.equal(q.view(torch.int8), right.view(torch.int8))
