"""The local kernel of a norm's backward on a GPU, against its reference."""

import pytest
import torch

from tpfuse.kernels.norm_backward import NormBackwardCall, norm_backward, norm_backward_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BF16 = torch.bfloat16


def case(rows, H, dtype, *, columns=None):
    """dy, h and residual: every row of a wider matrix from `columns` columns, so that rows do not follow each other."""
    g = torch.Generator("cuda").manual_seed(0)
    draw = (torch.randn(rows, columns or H, generator=g, device="cuda").to(dtype)[:, :H] for _ in range(3))
    return *draw, torch.randn(H, generator=g, device="cuda").to(dtype)


def assert_right(dy, h, residual, weight, norm):
    options = {"norm": norm, "eps": 1e-5, "out_dtype": dy.dtype, "want_weight": True, "want_bias": True}
    out = norm_backward(NormBackwardCall(dy, h, None, None, weight, residual, **options))
    wide = [t.double() for t in (dy, h, weight, residual)]
    reference = norm_backward_reference(NormBackwardCall(wide[0], wide[1], None, None, wide[2], wide[3], **options))
    tolerance = 4e-3 if dy.dtype == BF16 else 1e-5
    for got, expected in zip((out.dx, out.dweight, out.dbias), vars(reference).values(), strict=True):
        assert (got.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize(("rows", "H"), [(1, 4096), (131, 8192), (1000, 4096), (8192, 4096), (300, 5000)])
def test_it_agrees_with_the_reference(rows, H, norm):
    assert_right(*case(rows, H, BF16), norm)


@pytest.mark.parametrize("H", [8192, 12288, 16384])
def test_rows_that_leave_no_room_for_more_under_way(H):
    assert_right(*case(700, H, torch.float32), "rms_norm")


def test_rows_with_a_stride_are_loaded_ahead_as_well():
    assert_right(*case(2000, 2048, BF16, columns=2056), "layer_norm")


def test_the_same_call_gives_the_same_bits():
    dy, h, residual, weight = case(4096, 4096, BF16)
    options = {"norm": "rms_norm", "eps": 1e-5, "out_dtype": BF16, "want_weight": True, "want_bias": False}
    one, two = (norm_backward(NormBackwardCall(dy, h, None, None, weight, residual, **options)) for _ in range(2))
    assert torch.equal(one.dx, two.dx) and torch.equal(one.dweight, two.dweight)
