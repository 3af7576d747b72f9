"""One call's operands and outputs, ready for a kernel: checked, flattened to rows, contiguous."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from ..add_norm import MAX_HIDDEN, NORMS, AddNormOut, empty_outputs, kernel_takes, on_device_of, scales, split_eps
from ..compat import INTERPRETED, next_power_of_2


@dataclass(frozen=True)
class Operands:
    """What the fused kernels compute on: the formula of add_norm with s = the sum of every rank's `x`.

    x, residual: [..., H] of one shape; pre_bias, weight, bias: [H]; the rest as in `add_norm`.
    `want_sum`: also return the sum itself, in the dtype of x. `out`, `sum_out`: contiguous tensors to fill, else new.
    """

    x: Tensor
    residual: Tensor | None
    pre_bias: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float | Tensor
    norm: str
    out_dtype: torch.dtype
    residual_dtype: torch.dtype | None
    weight_offset: float = 0.0
    alpha: float = 1.0
    post: bool = False
    want_sum: bool = False
    stats: bool = False
    out: AddNormOut | None = None
    sum_out: Tensor | None = None

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
        wide = (torch.float64,)
        if self.hidden == 0 or self.hidden % 8 or self.hidden > MAX_HIDDEN or self.norm not in NORMS:
            return False
        if self.out_dtype in wide or self.residual_dtype in wide:
            return False
        return kernel_takes(self.x, self.residual, self.pre_bias, self.weight, self.bias)


#: Kernels that were launched before -> (compiled, their constexprs in order). Triton's own way from a call's arguments
#: to the compiled kernel costs the host more than all the rest of a launch.
COMPILED_REGISTRY: dict[tuple, tuple[Any, list[Any]]] = {}


@dataclass(frozen=True)
class Launch:
    """One kernel, bound to its arguments, with the tensors it will fill. `kernel` is None where nothing is to be done.

    `run` launches it. `load` only compiles it and loads it on the device; a harness whose ranks share one device must
    do that for every kernel before the first `run`, because loading waits for running kernels, and those for peers."""

    kernel: Any
    programs: int
    args: tuple
    constants: dict[str, Any]  # the kernel's constexprs and Triton's launch options
    out: AddNormOut
    sum: Tensor | None

    def run(self) -> tuple[AddNormOut, Tensor | None]:
        if self.kernel is not None:
            with on_device_of(self.out.y):
                known = COMPILED_REGISTRY.get(key := self._specialisation())
                if known is not None:
                    compiled, constexprs = known
                    compiled[(self.programs, 1, 1)](*self.args, *constexprs)
                else:
                    compiled = self.kernel[(self.programs,)](*self.args, **self.constants)
                    if compiled is not None:  # the interpreter compiles nothing
                        names = self.kernel.arg_names[len(self.args) :]
                        COMPILED_REGISTRY[key] = compiled, [self.constants[name] for name in names]
        return self.out, self.sum

    def compiled(self) -> tuple[Any, list[Any]] | None:
        """What `run` launched, and the kernel's constexprs in order; None before it, and where nothing is compiled."""
        return COMPILED_REGISTRY.get(self._specialisation()) if self.kernel is not None else None

    def _specialisation(self) -> tuple:
        """All that Triton compiles a kernel for: of tensors the dtype and alignment, of integers whether they are 1 or
        multiples of 16 (told apart also where a kernel forbids it, which costs an entry and no compilation)."""
        marks = [
            (a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else (a == 1, a % 16 == 0) if isinstance(a, int) else
            a is None
            for a in self.args
        ]  # fmt: skip
        return self.kernel, self.out.y.device.index, *self.constants.items(), *marks

    def load(self) -> Any:
        """The compiled kernel (`n_regs`, `n_spills`, `metadata`), loaded; None where nothing is to be done."""
        if self.kernel is None:
            return None
        with on_device_of(self.out.y):
            compiled = self.kernel.warmup(*self.args, grid=(self.programs,), **self.constants)
            compiled._init_handles()
        return compiled


def launch_options(warps: int, registers: int) -> dict[str, int]:
    """Triton's launch options; `registers` (of a thread, 0: the compiler's choice) buys residency."""
    return {"num_warps": warps, **({"maxnreg": registers} if registers else {})}


@dataclass(frozen=True)
class Prepared:
    """Kernel arguments: inputs made contiguous and 16-byte aligned, outputs allocated."""

    inputs: tuple[Tensor | None, ...]  # x, residual, pre_bias, weight, bias
    out: AddNormOut
    sum: Tensor | None
    scalars: tuple  # eps tensor or None, eps, weight_offset, alpha; None where they change nothing

    @property
    def outputs(self) -> tuple[Tensor | None, ...]:
        return self.out.y, self.out.residual_out, self.sum, self.out.mean, self.out.rstd


def _ready(t: Tensor | None) -> Tensor | None:
    if t is None:
        return None
    t = t if t.is_contiguous() else t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def prepare(op: Operands) -> Prepared:
    """Allocate the outputs and bring the inputs into the form the kernels load."""
    inputs = tuple(_ready(t) for t in (op.x, op.residual, op.pre_bias, op.weight, op.bias))
    out, total = op.out, op.sum_out
    if out is None:
        out = empty_outputs(op.x, op.norm, op.out_dtype, op.residual_dtype, op.stats)
        total = torch.empty(op.x.shape, dtype=op.x.dtype, device=op.x.device) if op.want_sum else None
    eps_tensor, eps = split_eps(op.eps, op.x.device)
    return Prepared(inputs, out, total, (eps_tensor, eps, *scales(op.weight_offset, op.alpha)))


def default_warps(op: Operands, split: int) -> int:
    """One 16-byte load a thread and rank: the shortest code, and the most loads in flight. Never more threads than
    that, because a word must be read by one thread only."""
    return max(1, min(32, next_power_of_2(op.row_words // split) // 128))


def constants(op: Operands, world: int, split: int, many: bool, spin: bool | None) -> dict:
    """The constexprs of a kernel, a dict of the caller's own."""
    return dict(_constants(op.hidden, op.row_words, op.x.element_size(), op.norm, op.post, world, split, many, spin))


@lru_cache(maxsize=1024)
def _constants(
    hidden: int, row_words: int, itemsize: int, norm: str, post: bool, world: int, split: int, many: bool,
    spin: bool | None,
) -> dict:  # fmt: skip
    words = max(next_power_of_2(row_words // split), 4)
    return {
        "H": hidden, "ROW_WORDS": row_words, "W": words, "EL": words * (4 // itemsize), "SPLIT": split, "WORLD": world,
        "NORM": NORMS[norm], "POST": post, "MANY": many, "SPIN": not INTERPRETED if spin is None else spin,
    }  # fmt: skip
