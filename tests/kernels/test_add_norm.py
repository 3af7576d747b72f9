"""The reference of the local kernel: what runs on CPU, and what every kernel is compared with."""

import pytest
import torch

from tpfuse.kernels.add_norm import BANDS, MOST_ELEMENTS, add_norm, add_norm_reference, tuning
from tpfuse.kernels.call import Call

F32 = torch.float32


def test_reference_is_the_formula_in_torch_terms():
    s, residual, w, b = torch.randn(4, 3, 32), torch.randn(4, 3, 32), torch.randn(32), torch.randn(32)
    h = 2.0 * s + b + residual
    out = add_norm(Call(s, residual, b, w, eps=1e-5, norm="rms_norm", alpha=2.0, out_dtype=F32, hidden_dtype=F32))
    torch.testing.assert_close(out.residual_out, h)
    torch.testing.assert_close(out.y, torch.nn.functional.rms_norm(h, (32,), w, 1e-5))
    out = add_norm(
        Call(
            s,
            residual,
            None,
            w,
            b,
            eps=1e-5,
            norm="layer_norm",
            post=True,
            out_dtype=F32,
            hidden_dtype=None,
            stats=True,
        )
    )
    torch.testing.assert_close(out.y, residual + torch.nn.functional.layer_norm(s, (32,), w, b, 1e-5))
    assert out.residual_out is None
    torch.testing.assert_close(out.mean, s.mean(-1, keepdim=True))
    torch.testing.assert_close(out.rstd, (s.var(-1, keepdim=True, correction=0) + 1e-5).rsqrt())


def test_float64_is_kept_and_weight_offset_counts_without_a_weight():
    s = torch.randn(2, 16, dtype=torch.float64)
    options = {"norm": "rms_norm", "out_dtype": torch.float64, "hidden_dtype": None}
    plain = add_norm(Call(s, eps=1e-12, **options))
    torch.testing.assert_close(plain.y, s * (s.square().mean(-1, keepdim=True) + 1e-12).rsqrt(), rtol=1e-14, atol=0)
    twice = add_norm(Call(s, eps=1e-12, weight_offset=1.0, **options))
    torch.testing.assert_close(twice.y, 2 * plain.y)


def test_outputs_never_alias_and_an_unknown_norm_is_an_error():
    s = torch.randn(2, 16)
    out = add_norm_reference(Call(s, eps=1e-6, norm="rms_norm", out_dtype=F32, hidden_dtype=F32))
    assert out.residual_out.data_ptr() != s.data_ptr()
    with pytest.raises(KeyError):
        add_norm(Call(s, eps=1e-6, norm="group_norm", out_dtype=F32, hidden_dtype=F32))


@pytest.mark.parametrize("block", [1, 64, 512, 2048, 8192, 16384])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm", "none"])
def test_every_size_has_launch_options(block, norm):
    assert sorted(band.below for band in BANDS) == [band.below for band in BANDS]
    for size in (0, 1, *(band.below - 1 for band in BANDS[:-1]), *(band.below for band in BANDS[:-1]), 1 << 40):
        for itemsize in (2, 4):
            options = tuning(block, size // (block * itemsize), size, norm)
            assert options["num_warps"] in (1, 2, 4, 8, 16, 32) and options["num_warps"] * 256 <= max(block, 256)
            assert block // (32 * options["num_warps"]) <= MOST_ELEMENTS
            assert block % options["PIECES"] == 0


def test_rows_stay_resident_together_where_they_can():
    """4 and 8 MB of RMSNorm rows: 3.9 and 7.8 rows of 4096 a multiprocessor, half as many of 8192."""
    options = {(H, mb): tuning(H, (mb << 20) // (2 * H), mb << 20, "rms_norm") for H in (4096, 8192) for mb in (4, 8)}
    chosen = {size: (o["num_warps"], o["PIECES"]) for size, o in options.items()}
    assert chosen == {(4096, 4): (16, 2), (4096, 8): (8, 2), (8192, 4): (16, 1), (8192, 8): (16, 2)}


def test_layer_norm_has_fewer_warps_and_takes_two_pieces_later():
    """Its warps meet twice a row. 1/16 MB: eight rows of 4096."""
    sizes = [(megabytes << 20 if megabytes else 1 << 16) for megabytes in (0, 1, 4, 5, 6, 8)]
    options = [tuning(4096, size // 8192, size, "layer_norm") for size in sizes]
    chosen = [(o["num_warps"], o["PIECES"]) for o in options]
    assert chosen == [(8, 1), (8, 1), (8, 1), (8, 1), (8, 2), (4, 2)]


@pytest.mark.parametrize("block", [512, 4096, 16384])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_batch_invariant_rows_are_summed_in_one_order_whatever_their_number(block, norm):
    sizes = [1, *(band.below for band in BANDS[:-1]), 1 << 40]
    orders = {
        (o["PIECES"], o["num_warps"])
        for o in (tuning(block, size // (2 * block), size, norm, batch_invariant=True) for size in sizes)
    }
    assert len(orders) == 1
