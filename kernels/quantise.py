"""A row's quantisation, step by step as `tpfuse.quantisation` has it. Triton device code, and its encoding.

A value is held in float32 (float64 where a step says so), rounded after each step to the dtype of the step, so results
are bit for bit those of the same steps in plain PyTorch on the same device. A program is a flat tuple, because Triton
takes no tuple in a constant tuple: the numbers of the values that are q and scale, the group, the count of steps, and
five entries a step: (operator, first, second, constant, dtype), numbers of values, of which -1 is the constant.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ..quantisation import Quantisation
from .compat import INTERPRETED, tl, triton

if not INTERPRETED and getattr(triton, "language", None) is not None:
    from triton.language.extra import libdevice
else:
    libdevice = None

_OPS = ("to", "abs", "neg", "amax", "amin", "max", "min", "mul", "div", "add", "reciprocal", "round", "floor", "ceil",
        "log2", "exp2")  # fmt: skip
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8)
_CONVERTED = len(_DTYPES)  # FP8 where the card has an instruction for it
_FINE = tl.constexpr(not INTERPRETED)  # the device's own library, whose logarithm is that of eager mode
_LEAST = tl.constexpr(-(1 << 31))


@lru_cache(maxsize=256)
def encoded(how: Quantisation, on_gpu: bool, converts: bool = False) -> tuple:
    """`how` as the kernels take it. `on_gpu`: eager mode divides by a number as it does there, by its reciprocal in the
    dtype that it computes in. `converts`: the card has an instruction from float32 to FP8."""
    program: list[int | float] = [how.q, how.scale, how.group, len(how.steps)]
    for step in how.steps:
        op, given = step.op, [-1 if isinstance(arg, float) else arg for arg in step.args]
        constants = [arg for arg in step.args if isinstance(arg, float)]
        constant = constants[0] if constants else 0.0
        if on_gpu and op == "div" and given[-1] == -1:
            wide = torch.float64 if step.dtype == torch.float64 else torch.float32
            op, constant = "mul", float(torch.tensor(1.0, dtype=wide) / torch.tensor(constant, dtype=wide))
        first, second = (*given, 0)[:2]
        dtype = _DTYPES.index(step.dtype)
        if converts and step.dtype is torch.float8_e4m3fn:
            dtype = _CONVERTED
        program += (_OPS.index(op), first, second, constant, dtype)
    return tuple(program)


@lru_cache(maxsize=64)
def converts_fp8(device: torch.device) -> bool:
    """Whether `device` converts float32 to FP8 by itself: NVIDIA's cards from compute capability 8.9 on."""
    on_nvidia = device.type == "cuda" and torch.version.hip is None
    return on_nvidia and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def _ordered(v):
    """float32 as int32 in the same order, NaN above all; the same again is the reverse."""
    bits = tl.where(v != v, 0x7FC00000, v.to(tl.int32, bitcast=True))
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _greatest(v, mask, GROUP: tl.constexpr):
    keys = tl.where(mask, _ordered(v), _LEAST)
    most = tl.max(keys, axis=0) if GROUP == 0 else tl.max(keys, axis=1, keep_dims=True)
    bits = most ^ ((most >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _rounded(v, DTYPE: tl.constexpr):
    """A value as a step of this dtype leaves it. FP8 and INT8 come last, as bytes."""
    if DTYPE == 1:
        out = v.to(tl.float32).to(tl.bfloat16).to(tl.float32) if _FINE else _bf16(v.to(tl.float32))
    elif DTYPE == 2:
        out = v.to(tl.float32).to(tl.float16).to(tl.float32)
    elif DTYPE == 3:
        out = v.to(tl.float64)
    elif DTYPE == 4:
        out = _e4m3(v.to(tl.float32))
    elif DTYPE == 5:
        out = tl.where(v != v, 0.0, v).to(tl.int32).to(tl.int8)
    elif DTYPE == 6:
        wide = v.to(tl.float32)
        out = wide.to(tl.float8e4nv).to(tl.int8, bitcast=True)  # which stops at 448, where PyTorch's has NaN past 464
        out = tl.where(tl.abs(wide) > 464.0, ((wide.to(tl.int32, bitcast=True) >> 24) | 0x7F).to(tl.int8), out)
    else:
        out = v.to(tl.float32)
    return out


@triton.jit
def _bf16(v):
    """float32 rounded to bfloat16, ties to even, for the interpreter, whose cast does not round so."""
    bits = v.to(tl.int32, bitcast=True)
    near = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(v != v, bits, near).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(v):
    """The bytes of float8_e4m3fn, rounded to even, NaN past 464: as PyTorch casts, on every card and in the
    interpreter."""
    bits = v.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    small = (bits.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - (141 << 23)
    even = (bits >> 20) & 1
    usual = (bits + ((7 - 127) << 23) + 0x7FFFF + even) >> 20
    out = tl.where(bits < (121 << 23), small, usual)
    out = tl.where(bits >= (1087 << 20), 0x7F, out)
    return (out | sign).to(tl.int8)


@triton.jit
def _to_even(v):
    """Rounded to the nearest whole number, ties to even, whatever the sign; float32."""
    bits = v.to(tl.int32, bitcast=True)
    size = tl.abs(v)
    whole = (size + 8388608.0) - 8388608.0
    whole = tl.where(size < 8388608.0, whole, size)
    return (whole.to(tl.int32, bitcast=True) | (bits & _LEAST)).to(tl.float32, bitcast=True)


@triton.jit
def _of_constant(C: tl.constexpr, like):
    """A constant in the precision that is computed in."""
    return tl.full([], C, tl.float64 if like.dtype == tl.float64 else tl.float32)


@triton.jit
def _divided(a, b):
    wide: tl.constexpr = a.dtype == tl.float64 or b.dtype == tl.float64
    return a.to(tl.float64) / b.to(tl.float64) if wide else tl.div_rn(a, b)


@triton.jit
def _step(OP: tl.constexpr, a, b, mask, GROUP: tl.constexpr):
    if OP == 0:
        out = a
    elif OP == 1:
        out = tl.abs(a)
    elif OP == 2:
        out = -a
    elif OP == 3:
        out = _greatest(a, mask, GROUP)
    elif OP == 4:
        out = -_greatest(-a, mask, GROUP)
    elif OP == 5:
        out = tl.where((a != a) | (a > b), a, b)
        out = tl.where(b != b, b, out)
    elif OP == 6:
        out = tl.where((a != a) | (a < b), a, b)
        out = tl.where(b != b, b, out)
    elif OP == 7:
        out = a * b
    elif OP == 8:
        out = _divided(a, b)
    elif OP == 9:
        out = a + b
    elif OP == 10:
        out = _divided(tl.where(a != a, a, 1.0), a)
    elif OP == 11:
        out = _to_even(a)
    elif OP == 12:
        out = tl.floor(a)
    elif OP == 13:
        out = tl.ceil(a)
    elif OP == 14:
        out = libdevice.log2(a) if _FINE else tl.log2(a)
    else:
        out = libdevice.exp2(a) if _FINE else tl.exp2(a)
    return out


@triton.jit
def _next(values, mask, GROUP: tl.constexpr, PROGRAM: tl.constexpr, i: tl.constexpr):
    """What step `i` of the program makes of the values so far."""
    OP: tl.constexpr = PROGRAM[4 + 5 * i]
    A: tl.constexpr = PROGRAM[5 + 5 * i]
    B: tl.constexpr = PROGRAM[6 + 5 * i]
    C: tl.constexpr = PROGRAM[7 + 5 * i]
    DTYPE: tl.constexpr = PROGRAM[8 + 5 * i]
    if A == -1:
        b = values[B]
        a = _of_constant(C, b)
    else:
        a = values[A]
        b = _of_constant(C, a) if B == -1 else values[B]
    return _rounded(_step(OP, a, b, mask, GROUP), DTYPE)


@triton.jit
def quantise_row(y, mask, cols, row, q_ptr, scale_ptr, H: tl.constexpr, PROGRAM: tl.constexpr):
    """Store q and scale of one whole row `y`, float32 numbers that are as y is handed out."""
    Q: tl.constexpr = PROGRAM[0]
    S: tl.constexpr = PROGRAM[1]
    GROUP: tl.constexpr = PROGRAM[2]
    if GROUP != 0:
        COUNT: tl.constexpr = y.shape[0] // GROUP
        y = y.reshape(COUNT, GROUP)
        mask = mask.reshape(COUNT, GROUP)
        cols = cols.reshape(COUNT, GROUP)
    values = (y,)
    STEPS: tl.constexpr = PROGRAM[3]
    for i in tl.static_range(STEPS):
        values = values + (_next(values, mask, GROUP, PROGRAM, i),)  # type: ignore[assignment]  # noqa: RUF005
    tl.store(q_ptr + row * H + cols, values[Q], mask=mask)
    if GROUP == 0:
        tl.store(scale_ptr + row, values[S].to(scale_ptr.dtype.element_ty))
    else:
        which = tl.arange(0, COUNT)[:, None]
        at = scale_ptr + row * (H // GROUP) + which
        tl.store(at, values[S].to(scale_ptr.dtype.element_ty), mask=which < H // GROUP)
