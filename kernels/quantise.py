"""A row's quantisation, step by step as `tpfuse.quantisation` has it. Triton device code.

A value is held in float32 (float64 where a step says so), rounded after each step to the dtype of the step, so results
are bit for bit those of the same steps in plain PyTorch on the same device. The steps come as the flat program of
quantise_program.py.
"""

from __future__ import annotations

from .compat import INTERPRETED, tl, triton

if not INTERPRETED and getattr(triton, "language", None) is not None:
    from triton.language.extra import libdevice
else:
    libdevice = None

_FINE = tl.constexpr(not INTERPRETED)  # the device's own library, whose logarithm is that of eager mode
_LEAST = tl.constexpr(-(1 << 31))


@triton.jit
def _ordered(v):
    """float32 as int32 in the same order, NaN above all; the same again is the reverse."""
    bits = tl.where(v != v, 0x7FC00000, v.to(tl.int32, bitcast=True))
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _greatest(v, mask, GROUP: tl.constexpr):
    keys = _ordered(v)
    if mask is not None:
        keys = tl.where(mask, keys, _LEAST)
    most = tl.max(keys, axis=0) if GROUP == 0 else tl.max(keys, axis=1, keep_dims=True)
    bits = most ^ ((most >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _greatest_magnitude(v, mask, GROUP: tl.constexpr):
    """The same of |v|, whose bits are in order as they are, NaN above all."""
    keys = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if mask is not None:
        keys = tl.where(mask, keys, 0)
    most = tl.max(keys, axis=0) if GROUP == 0 else tl.max(keys, axis=1, keep_dims=True)
    return most.to(tl.float32, bitcast=True)


@triton.jit
def _rounded(v, DTYPE: tl.constexpr):
    """A value as a step of this dtype leaves it. FP8 and INT8 come last, as bytes."""
    if DTYPE == -1:
        out = v
    elif DTYPE == 1:
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
    elif DTYPE == 7:
        out = v.to(tl.float8e4nv).to(tl.int8, bitcast=True)
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
def _extreme(a, b, LARGER: tl.constexpr):
    """The larger or the smaller one, NaN where either is."""
    if a.dtype == tl.float64 or b.dtype == tl.float64:
        first = a > b if LARGER else a < b
        out = tl.where((a != a) | first, a, b)
        out = tl.where(b != b, b, out)
    elif LARGER:
        out = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    else:
        out = tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
    return out


@triton.jit
def _divided(a, b):
    wide: tl.constexpr = a.dtype == tl.float64 or b.dtype == tl.float64
    return a.to(tl.float64) / b.to(tl.float64) if wide else tl.div_rn(a, b)


@triton.jit
def _quotient(a, b, most, SHORT: tl.constexpr):
    """a / b for e4m3 or INT8, of one b a row; no |a| is above `most`.

    q = a (1/b), corrected by its remainder: q - (b q - a) (1/b). Two corrections give what the division gives
    (Markstein), where it is not too small to count. Of 16-bit a and b one is enough: in the middle between two results,
    numbers of few bits, a quotient is exact after it, and elsewhere it is far from the middle. Numbers near the ends of
    the range, NaN and infinities are divided.
    """
    inverse = tl.div_rn(1.0, b)
    if (b > 1e-25) & (b < 1e25) & (most * inverse < 1e18):
        q = a * inverse  # and what is added to it below is -0 where it is exact, so -0 stays -0
        q = tl.fma(tl.fma(b, q, -a), -inverse, q)
        if not SHORT:
            q = tl.fma(tl.fma(b, q, -a), -inverse, q)
    else:
        q = tl.div_rn(a, b)
    return q


@triton.jit
def _step(OP: tl.constexpr, a, b, c, mask, GROUP: tl.constexpr):
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
        out = _extreme(a, b, True)
    elif OP == 6:
        out = _extreme(a, b, False)
    elif OP == 7:
        out = a * b
    elif OP == 8:
        out = _divided(a, b)
    elif OP == 9:
        out = a + b
    elif OP == 10:
        out = _divided(tl.where(a != a, a, 1.0), a)
    elif OP == 11:
        out = libdevice.rint(a) if _FINE else _to_even(a)
    elif OP == 12:
        out = tl.floor(a)
    elif OP == 13:
        out = tl.ceil(a)
    elif OP == 14:
        out = libdevice.log2(a) if _FINE else tl.log2(a)
    elif OP == 15:
        out = libdevice.exp2(a) if _FINE else tl.exp2(a)
    elif OP == 16:
        out = _greatest_magnitude(a, mask, GROUP)
    else:
        out = _quotient(a, b, c, OP == 18)
    return out


@triton.jit
def _next(values, mask, GROUP: tl.constexpr, PROGRAM: tl.constexpr, i: tl.constexpr):
    """What step `i` of the program makes of the values so far."""
    OP: tl.constexpr = PROGRAM[4 + 6 * i]
    A: tl.constexpr = PROGRAM[5 + 6 * i]
    B: tl.constexpr = PROGRAM[6 + 6 * i]
    C: tl.constexpr = PROGRAM[7 + 6 * i]
    CONSTANT: tl.constexpr = PROGRAM[8 + 6 * i]
    ROUNDING: tl.constexpr = PROGRAM[9 + 6 * i]
    if A == -1:
        b = values[B]
        a = _of_constant(CONSTANT, b)
    else:
        a = values[A]
        b = _of_constant(CONSTANT, a) if B == -1 else values[B]
    return _rounded(_step(OP, a, b, values[C], mask, GROUP), ROUNDING)


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
    within = None if GROUP == 0 and y.shape[0] == H else mask
    values = (y,)
    STEPS: tl.constexpr = PROGRAM[3]
    for i in tl.static_range(STEPS):
        values = values + (_next(values, within, GROUP, PROGRAM, i),)  # type: ignore[assignment]  # noqa: RUF005
    tl.store(q_ptr + row * H + cols, values[Q], mask=mask)
    if GROUP == 0:
        tl.store(scale_ptr + row, values[S].to(scale_ptr.dtype.element_ty))
    else:
        which = tl.arange(0, COUNT)[:, None]
        at = scale_ptr + row * (H // GROUP) + which
        tl.store(at, values[S].to(scale_ptr.dtype.element_ty), mask=which < H // GROUP)
