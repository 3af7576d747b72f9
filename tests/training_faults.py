"""Faults in the operations that training runs, so that a comparison can show that it finds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from tpfuse import backward_ops, ops


def _half_the_weight(call, run):
    out = run(call)
    return out if out.dweight is None else replace(out, dweight=out.dweight * 0.5)


def _no_residual(call, run):
    return run(replace(call, residual=None))


def _statistics_off(call, run):
    out = run(call)
    return out if out.rstd is None else replace(out, rstd=out.rstd * (1 + 2**-8))


#: By name: where the operation stands, its name, what is done in its place.
_PLACES: dict[str, tuple[object, str, Callable]] = {
    "half of the norm weights' gradients": (backward_ops, "norm_backward", _half_the_weight),
    "no gradient of the residual": (backward_ops, "norm_backward", _no_residual),
    "statistics for backward off by a rounding of bfloat16": (ops, "add_norm", _statistics_off),
}
#: Those in the operation of the backward pass.
OF_BACKWARD = tuple(name for name, (where, *_) in _PLACES.items() if where is backward_ops)
FAULTS = tuple(_PLACES)


@contextmanager
def planted(name: str) -> Iterator[None]:
    """With this fault; '' for none."""
    if not name:
        yield
        return
    where, operation, fault = _PLACES[name]
    right = getattr(where, operation)
    setattr(where, operation, lambda call: fault(call, right))
    try:
        yield
    finally:
        setattr(where, operation, right)
