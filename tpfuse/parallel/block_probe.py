"""Whether a module may pay one sum at its output: run it with partial sums in it, and see whether they add up.

Inside a routed block every expert and shared expert gives a partial sum on each rank, and one sum at the block's output
pays for all of them:

    f(a) + f(b) = f(a + b)      a, b: what the row-wise projections give on two ranks

That holds where the block does nothing to them but multiply by what is the same on all ranks, and add. A norm, a
residual, a bias, an activation, an MLP that stays whole beside them: each stands on the wrong side of such a sum. The
block's forward runs on a few rows with its projections replaced by fixed random outputs. Nothing is communicated, no
weight of an expert is read, and nothing of the block is left changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from tpfuse.parallel.probe import as_it_was, takes_hidden_states_alone

ROWS = (2, 7)
_TOLERANCE = 1e-3  # routers may work in float32, or round to less


class _Other(Exception):
    """Something that is to be whole is computed from partial sums."""


def adds_up(
    module: nn.Module, projections: Mapping[nn.Module, int], partial: Collection[nn.Module], widths: Sequence[int]
) -> bool | None:
    """True: `f(a) + f(b) = f(a + b)`. False: not so. None: the module cannot be run by itself.

    Args:
        projections: the modules that are cut, column-wise and row-wise, with the features that each gives; 0 for one
            that gives as many as it gets.
        partial: those of them that give partial sums.
        widths: hidden sizes that the module may have, the likeliest first.
    """
    if not takes_hidden_states_alone(module):
        return None
    with as_it_was(module), torch.no_grad(), torch.random.fork_rng(devices=[]):
        module.eval()
        for width in dict.fromkeys(widths):
            try:
                return _adds_up(module, projections, partial, width)
            except _Other:
                return False
            except Exception:
                continue  # another width, or nothing is known
    return None


def _adds_up(
    module: nn.Module, projections: Mapping[nn.Module, int], partial: Collection[nn.Module], width: int
) -> bool:
    values = _whole_tensors(module, projections)
    x = torch.randn(*ROWS, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen: dict[tuple[int, int], tuple[Any, ...]] = {}
    results = []
    for given in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        calls: Counter[int] = Counter()
        for number, (projection, features) in enumerate(projections.items()):
            projection.forward = _stub(number, features, given if projection in partial else None, calls, seen)
        out = torch.func.functional_call(module, values, (x,))
        results.append([t.double() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)])
        if not calls:
            raise RuntimeError("none of the projections is called as a module")
    (a, *rest_a), (b, *rest_b), (both, *rest) = results
    same = all(torch.allclose(x, y) and torch.allclose(y, z) for x, y, z in zip(rest_a, rest_b, rest, strict=True))
    return same and float((a + b - both).norm()) <= _TOLERANCE * float(a.norm() + b.norm())


def _stub(
    number: int, features: int, given: tuple[float, float] | None, calls: Counter[int],
    seen: dict[tuple[int, int], tuple[Any, ...]],
) -> Callable[..., Tensor]:  # fmt: skip
    def forward(hidden: Tensor, *more: Any, **named: Any) -> Tensor:
        calls[number] += 1
        at = (number, calls[number])
        read = (hidden, *more, *named.values())
        if not all(_same(x, y) for x, y in zip(read, seen.setdefault(at, read), strict=True)):
            raise _Other
        shape = (*hidden.shape[:-1], features or hidden.shape[-1])
        parts = []
        for which in range(2):
            generator = torch.Generator().manual_seed(1 + which + 2 * at[1] + 10_000 * number)
            # Of many sizes, so that whatever has a threshold meets values on either side of it.
            values = [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2)]
            parts.append(values[0] * (2 * values[1]).exp())
        first, second = given if given is not None else (1.0, 0.0)
        return (first * parts[0] + second * parts[1]).to(hidden.dtype)

    return forward


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.shape == y.shape and torch.allclose(x.double(), y.double())
    return not isinstance(x, Tensor) and not isinstance(y, Tensor)


def _whole_tensors(module: nn.Module, projections: Collection[nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers in float64, random where they hold no values; those of projections are not read."""
    skipped = {id(t) for p in projections for t in (*p.parameters(), *p.buffers())}
    found: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(7)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if id(tensor) in skipped or not tensor.is_floating_point():
            continue
        known = type(tensor.detach()) is Tensor and not tensor.is_meta and bool(tensor.any())
        drawn = torch.randn(tensor.shape, dtype=torch.float64, generator=generator)
        found[name] = tensor.detach().double().cpu() if known else drawn
    return found
