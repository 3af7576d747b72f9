"""One call of a fused boundary: its tensors, its options, and where its results go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..boundary_spec import Options
from ..quantisation import Quantisation, read_quantisation
from .compat import HAVE_TRITON, INTERPRETED
from .device import LAYER, NONE, RMS

NORMS = {"rms_norm": RMS, "layer_norm": LAYER, "none": NONE}
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HIDDEN = 16384


@dataclass(frozen=True)
class AddNormOut:
    """`y` and `residual_out` have the shape of `x`; `mean` and `rstd` are float32 (float64 when an input is) of
    shape x.shape[:-1] + (1,); `q` and `scale` are as in `Quantisation`.
    What was not asked for is None (and `mean` always is for RMSNorm)."""

    y: Tensor
    residual_out: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    q: Tensor | None = None
    scale: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Call(Options):
    """What a boundary computes on: the arguments of the operators of ops.py, as every kernel, its reference and every
    harness take them.

    x, residual: [..., H] of one shape; pre_bias, weight, bias: [H]; eps_tensor: 0-d, in place of `eps`; the options as
    in `Options`. `x` is this rank's part of the sum, or what is to be added and normalised where nothing is owed.
    `out`, `sum_out`: contiguous tensors to fill, else new. `product(first, stop)`: fills these rows of `x`, which holds
    nothing before (`multiplied`), and may be the memory of `out.y` then.
    """

    x: Tensor = field(kw_only=False)
    residual: Tensor | None = field(default=None, kw_only=False)
    pre_bias: Tensor | None = field(default=None, kw_only=False)
    weight: Tensor | None = field(default=None, kw_only=False)
    bias: Tensor | None = field(default=None, kw_only=False)
    eps_tensor: Tensor | None = field(default=None, kw_only=False)
    out: AddNormOut | None = None
    sum_out: Tensor | None = None
    product: Callable[[int, int], None] | None = None

    @property
    def eps_given(self) -> float | Tensor:
        return self.eps if self.eps_tensor is None else self.eps_tensor

    @cached_property  # asked for many times a call, which is all Python
    def hidden(self) -> int:
        return self.x.shape[-1]

    @cached_property
    def rows(self) -> int:
        return self.x.numel() // max(self.hidden, 1)

    @cached_property
    def row_words(self) -> int:
        """32-bit words in one row of x."""
        return self.hidden * self.x.element_size() // 4

    def supported(self) -> bool:
        """Whether the symmetric-memory kernels take these tensors at all (size of the workspace apart)."""
        return self.hidden % 8 == 0 and self.norm in NORMS and self.kernels_take()

    def kernels_take(self) -> bool:
        """Whether a Triton kernel of this package, the local one too, takes tensors of these dtypes and sizes."""
        if self.hidden == 0 or self.hidden > MAX_HIDDEN or self.out_dtype not in KERNEL_DTYPES:
            return False
        if self.hidden_dtype is not None and self.hidden_dtype not in KERNEL_DTYPES:
            return False
        return kernel_takes(self.x, self.residual, self.pre_bias, self.weight, self.bias)

    def outputs(self) -> tuple[AddNormOut, Tensor | None]:
        """The results, and the sum where it is wanted: those given, or new ones, uninitialised and contiguous whatever
        the strides of x."""
        if self.out is not None:
            return self.out, self.sum_out
        x, one = self.x, (*self.x.shape[:-1], 1)

        def empty(wanted: bool, shape: Any, dtype: torch.dtype | None) -> Tensor | None:
            return torch.empty(shape, dtype=dtype, device=x.device) if wanted else None

        out = AddNormOut(
            torch.empty(x.shape, dtype=self.out_dtype, device=x.device),
            empty(self.hidden_dtype is not None, x.shape, self.hidden_dtype),
            empty(self.stats and self.norm == "layer_norm", one, torch.float32),
            empty(self.stats, one, torch.float32),
            *self.quantised_outputs(),
        )
        return out, empty(self.want_sum, x.shape, x.dtype)

    @cached_property
    def quantisation(self) -> Quantisation | None:
        return read_quantisation(self.quant) if self.quant else None

    def quantised_outputs(self) -> tuple[Tensor | None, Tensor | None]:
        """(q, scale), uninitialised; None where y is not quantised."""
        how, x = self.quantisation, self.x
        if how is None:
            return None, None
        q = torch.empty(x.shape, dtype=how.q_dtype, device=x.device)
        return q, torch.empty(how.scales_of(x.shape), dtype=how.scale_dtype, device=x.device)

    def multiplied(self) -> Call:
        """The same call with its x there, in memory of its own."""
        if self.product is None:
            return self
        self.product(0, self.rows)
        in_place = self.out is not None and self.out.y.data_ptr() == self.x.data_ptr()
        return replace(self, x=self.x.clone() if in_place else self.x, product=None)

    @property
    def addends(self) -> tuple[Tensor | None, ...]:
        return self.residual, self.pre_bias, self.weight, self.bias


def kernel_takes(*tensors: Tensor | None) -> bool:
    """Whether a Triton kernel of this package can run on these tensors: float16/32 or bfloat16, one device, not CPU
    (unless Triton interprets)."""
    given = [t for t in tensors if t is not None]
    if not HAVE_TRITON or any(t.dtype not in KERNEL_DTYPES for t in given):
        return False
    return all(t.device == given[0].device for t in given) and (given[0].is_cuda or INTERPRETED)
