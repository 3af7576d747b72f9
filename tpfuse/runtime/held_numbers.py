"""Floats that modules hold (a residual multiplier, a norm's eps) are constants of the compiled graph, also where
Dynamo makes numbers symbolic (`dynamic=True`).

A symbolic number may be another one at any later call of one rank, without anything being compiled, so nothing that
depends on one moves in front of a sum. As a constant it has a guard: another value is another graph, and ranks agree on
that one before it runs. A number that was seen to change stays symbolic from then on, so a schedule does not compile
again at every step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import fx

from tpfuse import _state as state
from tpfuse import _torch_private as private


def make_constant(gm: fx.GraphModule) -> None:
    """Let Dynamo trace again where a graph's held numbers can be constants; once a compilation."""
    compilation = code, before = private.compilation()
    if code is None or compilation in state.MADE_CONSTANT or not (held := private.held_numbers(gm)):
        return
    constant = []
    with state.LOCK:
        for name, (symbol, value) in held.items():
            if before == 0:  # new code, or Dynamo was reset and counts anew
                state.HELD_NUMBERS[code, name] = value
            if state.HELD_NUMBERS.setdefault((code, name), value) == value:
                constant.append(symbol)
        if constant:
            state.MADE_CONSTANT[compilation] = constant
    if constant:
        private.trace_again_with_constants(constant)


@contextlib.contextmanager
def until_compiled() -> Iterator[None]:
    """Behind it the compilation is over, unless Dynamo traces once more: what other graphs call by the same names was
    not meant, and a compilation that failed begins anew."""
    try:
        yield
    except private.restarts_tracing():
        raise
    except BaseException:
        _over()
        raise
    _over()


def _over() -> None:
    with state.LOCK:
        symbols = state.MADE_CONSTANT.pop(private.compilation(), None)
    if symbols:
        private.symbolic_again(symbols)
