"""The backward of a norm by copy engines: real processes, delayed ranks, Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.graphs import relative_error
from tpfuse.kernels.norm_backward import NormBackwardCall, norm_backward_reference
from tpfuse.kernels.symmetric.norm_backward_by_copies import norm_backward_by_copies

from .case_copied import AS_IT_IS, IN_PLACE, PRODUCT
from .protocol import Seat, run

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
EPS = 1e-5


def operands(rows: int, dtype: torch.dtype, norm: str, seed: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """x of both ranks, and what is replicated or of all rows; of many rows with a mean."""
    g = torch.Generator().manual_seed(seed)
    parts = [torch.randn(rows, 64, generator=g).to(dtype) for _ in range(2)]
    h, residual = (torch.randn(rows, 64, generator=g).to(dtype) for _ in range(2))
    weight = (1 + 0.2 * torch.randn(64, generator=g)).to(dtype)
    mean = h.double().mean(-1, keepdim=True)
    wide = h.double() if norm == "rms_norm" else h.double() - mean
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS).float()
    given = {"h": h, "rstd": rstd, "weight": weight, "residual": residual}
    return parts, given | ({"mean": mean.float()} if norm == "layer_norm" and rows > 2 else {})


def exact(parts: list[torch.Tensor], given: dict[str, torch.Tensor], norm: str, own: slice | None = None) -> Any:
    """In float64; of own rows, or of all."""
    rows = own or slice(None)
    total = sum(part.double() for part in parts)[rows]
    tensors = {name: t.double() if name == "weight" else t[rows].double() for name, t in given.items()}
    call = NormBackwardCall(total, **tensors, norm=norm, eps=EPS, out_dtype=F64, want_weight=True, want_bias=True)
    return total, norm_backward_reference(call)


def play(seat: Seat, calls: list[tuple], products: tuple[str, str], scattered: bool) -> list[float]:
    errors = []
    for seed, (rows, dtype, norm, want_sum) in enumerate(calls):
        rank, share = seat.ws.rank, rows // 2
        parts, given = operands(rows, dtype, norm, seed)
        own = slice(rank * share, (rank + 1) * share) if scattered else slice(None)
        x, gathered = parts[rank].clone(), torch.full_like(parts[rank], float("nan"))
        total = torch.empty_like(x[own]) if want_sum else None
        product, what = None, products[rank]
        if what != AS_IT_IS:
            filled, x = x, gathered if what == IN_PLACE else torch.full_like(x, float("nan"))

            def product(first: int, stop: int, x: Any = x, filled: Any = filled) -> None:
                seat.dawdle()
                x[first:stop] = filled[first:stop]

        tensors = {name: t if name == "weight" else t[own] for name, t in given.items()}
        call = NormBackwardCall(
            x[own], **tensors, norm=norm, eps=EPS, out_dtype=dtype, want_weight=True, want_bias=norm == "layer_norm"
        )
        seat.dawdle()
        out = norm_backward_by_copies(x, gathered, call, seat.ws, product, total, scattered)
        _, right = exact(parts, given, norm)
        sums, mine = exact(parts, given, norm, own)
        errors.extend(relative_error([gathered.double()], [right.dx]))
        errors.extend(relative_error([out.dweight.double()], [mine.dweight]))
        if out.dbias is not None:
            errors.extend(relative_error([out.dbias.double()], [mine.dbias]))
        if total is not None:
            errors.extend(relative_error([total.double()], [sums]))
    return errors


CALLS = [
    (8, BF16, "rms_norm", False), (2, BF16, "layer_norm", True), (26, F32, "rms_norm", True),
    (0, BF16, "rms_norm", False), (6, F32, "layer_norm", False), (10, F64, "rms_norm", True),
]  # fmt: skip


@pytest.mark.parametrize("products", [(AS_IT_IS, AS_IT_IS), (PRODUCT, IN_PLACE), (IN_PLACE, AS_IT_IS)], ids=", ".join)
@pytest.mark.parametrize("slot_bytes", [1 << 16, 2048])
@pytest.mark.parametrize("scattered", [True, False], ids=["own rows", "all rows"])
def test_gradients_are_right_whatever_is_multiplied_and_however_calls_are_cut(
    products: tuple[str, str], slot_bytes: int, scattered: bool
) -> None:
    for answers in run(2, play, CALLS, products, scattered, slot_bytes=slot_bytes):
        assert all(error < 5e-3 for error in answers[0]), answers  # NaN is not
