"""The local kernel of a norm's backward in Triton's interpreter, against autograd in float64."""

import pytest
import torch

from tpfuse.kernels import norm_backward as module
from tpfuse.kernels.compat import INTERPRETED
from tpfuse.kernels.norm_backward import NormBackwardCall, norm_backward

BF16, F32 = torch.bfloat16, torch.float32
EPS = 1e-3


@pytest.fixture(autouse=True)
def kernel_only(monkeypatch):
    assert INTERPRETED

    def refuse(*args, **kwargs):
        raise AssertionError("fell back to the reference")

    monkeypatch.setattr(module, "norm_backward_reference", refuse)


def expected(dy, h, weight, bias, residual, norm, offset):
    dy, h, weight, bias, residual = (t.double().requires_grad_() for t in (dy, h, weight, bias, residual))
    if norm == "layer_norm":
        y = torch.nn.functional.layer_norm(h, h.shape[-1:], weight + offset, bias, EPS)
    else:
        y = torch.nn.functional.rms_norm(h, h.shape[-1:], weight + offset, EPS) + bias
    dh, dweight, dbias = torch.autograd.grad(y, (h, weight, bias), dy)
    return dh + residual, dweight, dbias


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("saved", ["mean and rstd", "rstd", ""])
@pytest.mark.parametrize(("rows", "H"), [(1, 64), (19, 96)])
def test_gradients_are_those_of_autograd(rows, H, saved, norm, dtype):
    g = torch.Generator().manual_seed(rows)
    dy, h, residual = (torch.randn(rows, H, generator=g).to(dtype) for _ in range(3))
    weight, bias = (torch.randn(H, generator=g).to(dtype) for _ in range(2))
    layer = norm == "layer_norm"
    mean = h.float().mean(-1, keepdim=True) if layer else None
    centred = h.float() - (mean if layer else 0.0)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)
    offset = 1.0 if not layer else 0.0
    given = (mean if "mean" in saved else None, rstd if "rstd" in saved else None)
    call = NormBackwardCall(
        dy, h, *given, weight, residual, norm=norm, eps=EPS,
        weight_offset=offset, out_dtype=dtype, want_weight=True, want_bias=True,
    )  # fmt: skip
    out = norm_backward(call)
    for got, reference in zip(
        (out.dx, out.dweight, out.dbias), expected(dy, h, weight, bias, residual, norm, offset), strict=True
    ):
        tolerance = 4e-3 if got.dtype == BF16 else 1e-5
        assert (got.double() - reference).norm() <= tolerance * reference.norm()
    assert out.dx.dtype == dtype and out.dweight.dtype == out.dbias.dtype == F32


def test_strided_rows_and_nothing_but_the_gradient():
    g = torch.Generator().manual_seed(0)
    dy, h = torch.randn(6, 2, 64, generator=g)[:, 1], torch.randn(64, 6, generator=g).t()
    call = NormBackwardCall(
        dy, h, None, None, None, None, norm="rms_norm", eps=EPS, out_dtype=F32, want_weight=False, want_bias=False
    )
    out = norm_backward(call)
    ones, zeros = torch.ones(64), torch.zeros(64)
    reference, _, _ = expected(dy, h, ones, zeros, torch.zeros(6, 64), "rms_norm", 0.0)
    assert (out.dx.double() - reference).norm() <= 1e-5 * reference.norm()
    assert out.dweight is None and out.dbias is None
