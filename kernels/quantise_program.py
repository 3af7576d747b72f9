"""A quantisation as the kernels take it: `tpfuse.quantisation`'s steps, written with fewer operations where that gives
the same bits, and then as a flat tuple of numbers.

    amax(|v|), and max(-min(amin(v), 0), max(amax(v), 0))   the greatest magnitude, one reduction ("peak")
    a rounding to a dtype that holds the value already      nothing
    clamp to ±448, then to e4m3, on a card that converts    the conversion, which stops there by itself
    y / s, of which only e4m3 or INT8 is kept               a reciprocal of the row's s, and corrections ("quotient")

One multiprocessor does a whole row, so each operation for each element costs: 4096 columns take 32 cycles of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..quantisation import Quantisation, QuantStep
from .compat import INTERPRETED

OPS = ("to", "abs", "neg", "amax", "amin", "max", "min", "mul", "div", "add", "reciprocal", "round", "floor", "ceil",
       "log2", "exp2", "peak", "quotient", "quotient_of_16_bits")  # fmt: skip
#: The step does not round: its value is one of its dtype already.
KEPT = -1
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8)
#: FP8 where the card has an instruction for it; the same of a value that was to be clamped to ±448.
CONVERTED, CLAMPED = len(DTYPES), len(DTYPES) + 1
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SAME_VALUES = ("to", "abs", "neg", "amax", "amin", "peak", "max", "min")


@lru_cache(maxsize=256)
def encoded(how: Quantisation, y: torch.dtype, on_gpu: bool, converts: bool = False) -> tuple:
    """`how` of a row of dtype `y`.

    `on_gpu`: eager mode divides by a number as it does there, by its reciprocal in the
    dtype that it computes in. `converts`: the card has an instruction from float32 to FP8.

    Flat, because Triton takes no tuple in a constant tuple: the numbers of the values that are q and scale, the group,
    the count of steps, and six entries a step: (operator, first, second, third, constant, rounding); first to third are
    numbers of values, -1 the constant, and `rounding` an index of DTYPES, CONVERTED, CLAMPED or KEPT.
    """
    chain = _with_peaks(_Chain(how.steps, how.q, how.scale, y))
    if on_gpu and not INTERPRETED and not how.group:
        chain = _with_quotient(chain)
    clamped = _clamped(chain) if converts else None
    if clamped is not None:
        chain = chain.changed(chain.q, chain.step(chain.q), (clamped,))
    chain, roundings = _without_unread(chain)
    program: list[int | float] = [chain.q, chain.scale, how.group, len(chain.steps)]
    for number, (step, rounding) in enumerate(zip(chain.steps, roundings, strict=True), 1):
        op, given = step.op, [-1 if isinstance(arg, float) else arg for arg in step.args]
        constants = [arg for arg in step.args if isinstance(arg, float)]
        constant = constants[0] if constants else 0.0
        if on_gpu and op == "div" and given[-1] == -1:
            wide = torch.float64 if step.dtype == torch.float64 else torch.float32
            op, constant = "mul", float(torch.tensor(1.0, dtype=wide) / torch.tensor(constant, dtype=wide))
        if converts and step.dtype is torch.float8_e4m3fn:
            rounding = CLAMPED if clamped is not None and number == chain.q else CONVERTED
        first, second, third = (*given, 0, 0)[:3]
        program += (OPS.index(op), first, second, third, constant, rounding)
    return tuple(program)


@lru_cache(maxsize=64)
def converts_fp8(device: torch.device) -> bool:
    """Whether `device` converts float32 to FP8 by itself: NVIDIA's cards from compute capability 8.9 on."""
    on_nvidia = device.type == "cuda" and torch.version.hip is None
    return on_nvidia and torch.cuda.get_device_capability(device) >= (8, 9)


@dataclass(frozen=True)
class _Chain:
    """The steps of a quantisation of a y of dtype `y`; value 0 is y, step i makes value i + 1."""

    steps: tuple[QuantStep, ...]
    q: int
    scale: int
    y: torch.dtype

    def step(self, value: int | float) -> QuantStep | None:
        """What made the value; None of y and of a constant."""
        return self.steps[value - 1] if isinstance(value, int) and value > 0 else None

    def dtype(self, value: int) -> torch.dtype:
        made = self.step(value)
        return self.y if made is None else made.dtype

    def changed(self, value: int, step: QuantStep | None, args: tuple[int | float, ...], op: str = "") -> _Chain:
        """With another step making `value`."""
        assert step is not None
        new = replace(step, args=args, op=op or step.op)
        return replace(self, steps=(*self.steps[: value - 1], new, *self.steps[value:]))

    def readers(self, value: int) -> list[int]:
        return [n for n, step in enumerate(self.steps, 1) if value in [a for a in step.args if isinstance(a, int)]]

    def source(self, value: int) -> tuple[int, bool]:
        """The value that this one's magnitude is, behind casts that change no number, and whether `abs` was among
        them."""
        seen_abs = False
        while (made := self.step(value)) is not None:
            read = made.args[0]
            if made.op not in ("to", "abs") or not isinstance(read, int) or not _holds(made.dtype, self.dtype(read)):
                break
            seen_abs |= made.op == "abs"
            value = read
        return value, seen_abs


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of `narrow` is one of `wide`."""
    if wide not in _FLOATS or narrow not in _FLOATS:
        return False
    return wide == narrow or (wide.itemsize > narrow.itemsize)


def _with_peaks(chain: _Chain) -> _Chain:
    for number, step in enumerate(chain.steps, 1):
        if step.op == "amax" and isinstance(step.args[0], int):
            value, seen_abs = chain.source(step.args[0])
            if seen_abs:
                chain = chain.changed(number, step, (value,), "peak")
        elif step.op == "max" and (both := _both_sides(chain, step)) is not None:
            chain = chain.changed(number, step, (both,), "peak")
    return chain


def _both_sides(chain: _Chain, step: QuantStep) -> int | None:
    """v, where the step is max(-min(amin(v), 0), max(amax(v), 0)): the greatest of |v|. A zero may lose its sign."""
    sides = {}
    for arg in step.args:
        made, name = chain.step(arg), "max"
        if made is not None and made.op == "neg":
            made, name = chain.step(made.args[0]), "min"
        if made is None or made.op != name or len(made.args) != 2 or made.args[1] != 0.0:
            return None
        least = chain.step(made.args[0])
        if least is None or least.op != "a" + name or {made.dtype, least.dtype} != {step.dtype}:
            return None
        sides[name] = least.args[0]
    same = set(sides.values())
    value = same.pop() if len(sides) == 2 and len(same) == 1 else None
    return value if isinstance(value, int) and chain.dtype(value) == step.dtype else None


def _with_quotient(chain: _Chain) -> _Chain:
    """y / s for a scale of the whole row, where nothing but FP8 or INT8 comes of it. The kernel must know the row's
    greatest magnitude as well, which says that no quotient leaves the range."""
    peaks = [n for n, step in enumerate(chain.steps, 1) if step.op == "peak" and not chain.source(int(step.args[0]))[0]]
    for number, step in enumerate(chain.steps, 1):
        if not peaks or step.op != "div" or step.dtype != torch.float32 or any(isinstance(a, float) for a in step.args):
            continue
        above, below = int(step.args[0]), int(step.args[1])
        if chain.source(above)[0] == 0 and _of_a_row(chain, below) and _ends_small(chain, number):
            short = all(chain.dtype(chain.source(value)[0]).itemsize == 2 for value in (above, below))
            op = "quotient_of_16_bits" if short else "quotient"
            chain = chain.changed(number, step, (above, below, peaks[0]), op)
    return chain


def _of_a_row(chain: _Chain, value: int) -> bool:
    """Whether there is one such value for a row: everything it comes from goes through a reduction."""
    made = chain.step(value)
    if made is None:
        return False
    if made.op in ("amax", "amin", "peak"):
        return True
    return all(isinstance(arg, float) or _of_a_row(chain, arg) for arg in made.args)


def _ends_small(chain: _Chain, value: int) -> bool:
    """Whether nothing but q is made of the value, a number of few bits, by way of clamps and rounding at most."""
    if value == chain.q:
        return True
    readers = [(n, chain.steps[n - 1]) for n in chain.readers(value)]
    if value == chain.scale or not readers:
        return False
    passes = all(n == chain.q or step.op in ("max", "min", "round") for n, step in readers)
    return passes and all(_ends_small(chain, n) for n, _ in readers)


def _clamped(chain: _Chain) -> int | None:
    """The value before the clamp, where q is e4m3 of a value that was clamped to ±448."""
    made, bounds = chain.step(chain.q), {}
    if made is None or made.op != "to" or made.dtype is not torch.float8_e4m3fn:
        return None
    value = made.args[0]
    while (step := chain.step(value)) is not None and step.op in ("max", "min") and step.op not in bounds:
        constants = [arg for arg in step.args if isinstance(arg, float)]
        if len(constants) != 1:
            return None
        bounds[step.op] = constants[0]
        value = next(arg for arg in step.args if isinstance(arg, int))
    return int(value) if bounds == {"max": -448.0, "min": 448.0} and chain.dtype(int(value)) == torch.float32 else None


def _without_unread(chain: _Chain) -> tuple[_Chain, list[int]]:
    """Only what q and the scale come from, and the rounding of each step."""
    needed, todo = set(), [chain.q, chain.scale]
    while todo:
        value = todo.pop()
        if value not in needed:
            needed.add(value)
            made = chain.step(value)
            todo += [] if made is None else [arg for arg in made.args if isinstance(arg, int)]
    kept = [0, *sorted(needed - {0})]
    number = {value: i for i, value in enumerate(kept)}
    steps, roundings = [], []
    for value in kept[1:]:
        step = chain.steps[value - 1]
        roundings.append(KEPT if _is_exact(chain, step) else DTYPES.index(step.dtype))
        args = tuple(number[arg] if isinstance(arg, int) else arg for arg in step.args)
        steps.append(replace(step, args=args))
    return _Chain(tuple(steps), number[chain.q], number[chain.scale], chain.y), roundings


def _is_exact(chain: _Chain, step: QuantStep) -> bool:
    """Whether the step's value is a number of its dtype without rounding, and is held in the same register type."""
    if step.op not in _SAME_VALUES or step.dtype not in _FLOATS[:3]:
        return False
    values = [arg for arg in step.args if isinstance(arg, int)]
    fit = all(float(torch.tensor(arg, dtype=torch.float64).to(step.dtype)) == arg for arg in step.args
              if isinstance(arg, float))  # fmt: skip
    return fit and all(_holds(step.dtype, chain.dtype(value)) for value in values)
