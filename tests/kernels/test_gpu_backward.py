"""The local kernel of a norm's backward on a GPU, against its reference."""

import pytest
import torch

from tpfuse.kernels.norm_backward import NormBackwardCall, norm_backward, norm_backward_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BF16 = torch.bfloat16


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize(("rows", "H"), [(1, 4096), (1000, 4096), (8192, 4096), (300, 5000)])
def test_it_agrees_with_the_reference(rows, H, norm):
    g = torch.Generator("cuda").manual_seed(0)
    dy, h, residual = (torch.randn(rows, H, generator=g, device="cuda").to(BF16) for _ in range(3))
    weight = torch.randn(H, generator=g, device="cuda").to(BF16)
    options = {"norm": norm, "eps": 1e-5, "out_dtype": BF16, "want_weight": True, "want_bias": True}
    out = norm_backward(NormBackwardCall(dy, h, None, None, weight, residual, **options))
    wide = [t.double() for t in (dy, h, weight, residual)]
    reference = norm_backward_reference(NormBackwardCall(wide[0], wide[1], None, None, wide[2], wide[3], **options))
    for got, expected in zip((out.dx, out.dweight, out.dbias), vars(reference).values(), strict=True):
        assert (got.double() - expected.double()).norm() <= 4e-3 * expected.double().norm()
