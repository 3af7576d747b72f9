"""The local kernel in Triton's interpreter against its reference and a float64 reference."""

import itertools

import pytest
import torch

from tpfuse.kernels import add_norm as module
from tpfuse.kernels.add_norm import add_norm, add_norm_reference
from tpfuse.kernels.call import Call
from tpfuse.kernels.compat import INTERPRETED

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def kernel_only(monkeypatch):
    """A silent fall-back to the reference would make these tests compare the reference with itself."""
    assert INTERPRETED

    def refuse(*args, **kwargs):
        raise AssertionError("fell back to the reference")

    monkeypatch.setattr(module, "add_norm_reference", refuse)


def make(shape, dtype, seed, hidden_dtype=None, vector_dtype=None):
    g = torch.Generator().manual_seed(seed)
    H = shape[-1]

    def vector(scale, shift):
        return (torch.randn(H, generator=g) * scale + shift).to(vector_dtype or dtype)

    s = torch.randn(shape, generator=g).to(dtype)
    residual = torch.randn(shape, generator=g).to(hidden_dtype or dtype)
    return s, residual, vector(0.2, 0.1), vector(0.3, 1.0), vector(0.3, 0.0)


def same(out, ref, dtype):
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == F32 else {"rtol": 1e-2, "atol": 1e-2}
    for name in ("y", "residual_out", "mean", "rstd"):
        a, b = getattr(out, name), getattr(ref, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape and a.is_contiguous(), name
            torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm", pytest.param("none", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize(
    ("H", "megabytes", "rows"),
    [(96, 0, 6), *(pytest.param(*sizes, marks=pytest.mark.nightly) for sizes in [(600, 4, 6), (600, 6, 1000)])],
)
def test_every_combination_of_operands(H, megabytes, rows, norm, post, monkeypatch):
    """In a row's three ways: at once, with the weight after the statistics, and in two pieces as well."""
    own = module.tuning
    used = []

    def tuning(block, _rows, _size, *others):
        used.append(own(block, rows, megabytes << 20, *others))
        return used[-1]

    monkeypatch.setattr(module, "tuning", tuning)
    s, residual, pre_bias, weight, bias = make((2, 3, H), F32, 0)
    for use in itertools.product([False, True], repeat=4):
        r, p, w, b = (t if u else None for t, u in zip((residual, pre_bias, weight, bias), use, strict=True))
        options = {"norm": norm, "post": post, "weight_offset": 1.0, "alpha": 0.5, "out_dtype": BF16}
        for hidden_dtype, stats in ((F32, True), (None, False)):
            more = {"hidden_dtype": hidden_dtype, "stats": stats, **options}
            same(
                add_norm(Call(s, r, p, w, b, eps=1e-5, **more)),
                add_norm_reference(Call(s, r, p, w, b, eps=1e-5, **more)),
                BF16,
            )
    assert {(o["LATE"], o["PIECES"]) for o in used} == {(megabytes > 0, 2 if rows > 6 else 1)}


@pytest.mark.parametrize("H", [1, 8, 100, 1000, 4096])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_error_against_float64(H, dtype, norm):
    """At most 1.1 times the error of the unfused graph, plus one rounding of the output dtype."""
    s, residual, _, weight, bias = make((5, H), dtype, H)
    options = {"norm": norm, "out_dtype": dtype, "hidden_dtype": dtype}
    out = add_norm(Call(s, residual, None, weight, bias, eps=1e-5, **options))
    wide = [t.double() for t in (s, residual, weight, bias)]
    truth = add_norm_reference(
        Call(
            wide[0],
            wide[1],
            None,
            wide[2],
            wide[3],
            eps=1e-5,
            norm=norm,
            out_dtype=torch.float64,
            hidden_dtype=torch.float64,
        )
    )
    h = s + residual
    hf = h.float()
    if norm == "rms_norm":
        plain = (hf * torch.rsqrt(hf.square().mean(-1, keepdim=True) + 1e-5)).to(dtype) * weight + bias
    else:
        plain = torch.nn.functional.layer_norm(h, (H,), weight, bias, 1e-5)

    def error(a, b):
        return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()

    one_rounding = torch.finfo(dtype).eps / 2
    assert error(out.y, truth.y) <= 1.1 * error(plain, truth.y) + one_rounding
    assert error(out.residual_out, truth.residual_out) <= 1.1 * error(h, truth.residual_out) + one_rounding


def test_mixed_dtypes_strides_and_eps_tensors():
    s, residual, pre_bias, weight, bias = make((6, 64), BF16, 3, hidden_dtype=F32, vector_dtype=F32)
    options = {"norm": "rms_norm", "out_dtype": BF16, "hidden_dtype": F32}
    padded = torch.zeros(6, 80, dtype=BF16)
    padded[:, 8:72] = s
    view, turned = padded[:, 8:72], residual.t().contiguous().t()
    for eps in (1e-6, torch.tensor(1e-6), torch.tensor(1e-6, dtype=torch.float64)):
        out = add_norm(Call(view, turned, pre_bias, weight, bias, eps=eps, **options))
        same(out, add_norm_reference(Call(s, residual, pre_bias, weight, bias, eps=1e-6, **options)), BF16)


def test_zero_rows_and_no_aliasing():
    s, _, _, weight, _ = make((0, 64), BF16, 4)
    out = add_norm(Call(s, s, None, weight, eps=1e-6, norm="rms_norm", out_dtype=BF16, hidden_dtype=F32, stats=True))
    assert out.y.shape == (0, 64) and out.residual_out.dtype == F32 and out.rstd.shape == (0, 1)
    s = torch.randn(2, 64)
    out = add_norm(Call(s, eps=1e-6, norm="rms_norm", out_dtype=F32, hidden_dtype=F32))
    assert out.residual_out.data_ptr() != s.data_ptr()
    torch.testing.assert_close(out.residual_out, s)


def test_nan_and_inf_stay_in_their_rows():
    s = torch.randn(3, 64)
    s[0, 5], s[1, 7] = float("nan"), float("inf")
    out = add_norm(Call(s, eps=1e-6, norm="rms_norm", out_dtype=F32, hidden_dtype=F32))
    assert out.y[0].isnan().all() and out.y[1].isnan().any() and out.y[2].isfinite().all()
    assert out.residual_out[1, 7] == float("inf")


@pytest.mark.parametrize("batch_invariant", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_a_rows_bits_do_not_depend_on_the_batch(batch_invariant):
    """400 rows go in two pieces, 100 in one; without the option that shows."""
    s, residual, _, weight, _ = make((400, 2000), F32, 5)
    options = {"norm": "rms_norm", "out_dtype": F32, "hidden_dtype": F32, "batch_invariant": batch_invariant}
    many = add_norm(Call(s, residual, None, weight, eps=1e-6, **options))
    few = add_norm(Call(s[:100], residual[:100], None, weight, eps=1e-6, **options))
    assert torch.equal(many.y[:100], few.y) == batch_invariant
    assert torch.equal(many.residual_out[:100], few.residual_out)
