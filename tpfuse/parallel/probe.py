"""Run the inside of a module, whole and cut, and see whether the cut computes slices of the whole.

A module may be cut if what reaches its row-wise projection on a rank is that rank's slice of what reaches it in the
whole module. Source text does not tell: `F.glu`, a helper that chunks, a softmax over features, a roll. So the module's
forward runs on a few rows, with its column-wise projections replaced by fixed random outputs, once whole and once for
each rank's slices. Nothing is multiplied, nothing is communicated, and nothing of the module is left changed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from tpfuse.parallel.cuts import Cut

ROWS = (1, 3)
_TOLERANCE = 1e-2  # of 16-bit elements; what is computed from other elements is off by far more


class _Failed(Exception):
    """A projection that is not called as a module."""


def miscut(
    module: nn.Module, colwise: Mapping[str, Cut], rowwise: Mapping[str, Cut],
    attributes: Sequence[tuple[nn.Module, dict[str, Any]]],
) -> str:  # fmt: skip
    """Why a module that is cut like this would give wrong numbers, as one sentence; '' where it would not, and where it
    cannot be run by itself (it takes more than its hidden states, or lies on the meta device).

    colwise, rowwise: the cuts of the projections' weights, by their names in the module. attributes: what is rewritten
    when it is cut.
    """
    weight: Any = module.get_submodule(next(iter(colwise))).weight
    real = type(weight.detach()) is Tensor and not weight.is_meta  # fake tensors hold no values to compare
    if not real or not weight.is_floating_point() or not takes_hidden_states_alone(module):
        return ""
    with as_it_was(module), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module.eval()
        x = torch.randn(*ROWS, weight.shape[1]).to(weight)
        outputs = {leaf: torch.randn(*ROWS, sum(cut.parts)).to(weight) for leaf, cut in colwise.items()}
        try:
            whole = _reaching(module, x, outputs, rowwise)
        except _Failed as error:
            return str(error)
        except Exception:
            return ""  # it does not run by itself: nothing is known
        with _rewritten(attributes):
            if _fits(module, x, outputs, colwise, rowwise, whole):
                return ""
            for leaf, cut in colwise.items():
                for parts in (2, 3):
                    width = sum(cut.parts)
                    if len(cut.parts) == 1 and width % (parts * cut.size) == 0:
                        packed = replace(cut, parts=(width // parts,) * parts, counts=(cut.size,) * parts)
                        if _fits(module, x, outputs, {**colwise, leaf: packed}, rowwise, whole):
                            return f"{leaf} holds {parts} matrices in one weight; say so: packed={{{leaf!r}: {parts}}}"
    return "what reaches its row-wise projection on a rank is no slice of what reaches it in the whole module"


def _fits(
    module: nn.Module, x: Tensor, outputs: Mapping[str, Tensor], colwise: Mapping[str, Cut],
    rowwise: Mapping[str, Cut], whole: Mapping[str, Tensor],
) -> bool:  # fmt: skip
    size = next(iter(colwise.values())).size
    for index in range(size):
        own = {leaf: _slice(outputs[leaf], cut, index) for leaf, cut in colwise.items()}
        try:
            reached = _reaching(module, x, own, rowwise)
        except Exception:
            return False
        for leaf, cut in rowwise.items():
            want = _slice(whole[leaf], cut, index).double()
            got = reached[leaf].double()
            if got.shape != want.shape or not torch.allclose(got, want, rtol=_TOLERANCE, atol=_TOLERANCE):
                return False
    return True


def _slice(full: Tensor, cut: Cut, index: int) -> Tensor:
    return torch.cat([full[..., start:stop] for start, stop in cut.ranges(index)], dim=-1)


def _reaching(
    module: nn.Module, x: Tensor, outputs: Mapping[str, Tensor], rowwise: Mapping[str, Cut]
) -> dict[str, Tensor]:
    """What reaches each row-wise projection when the column-wise ones give `outputs`."""
    reached: dict[str, Tensor] = {}
    called: set[str] = set()

    def given(leaf: str) -> Callable[..., Tensor]:
        def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            if hidden.isnan().any():
                raise _Failed(
                    f"its forward calls {leaf} on what {' or '.join(rowwise)} gave, whose gradient is then never summed"
                )
            called.add(leaf)
            # As many leading dimensions as the module works with.
            return outputs[leaf].reshape(*hidden.shape[:-1], -1)

        return forward

    def taken(leaf: str) -> Callable[..., Tensor]:
        def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            reached[leaf] = hidden.reshape(*ROWS, -1)
            weight: Any = module.get_submodule(leaf).weight
            return hidden.new_full((*hidden.shape[:-1], weight.shape[0]), math.nan)  # whatever reads it shows

        return forward

    for leaf in outputs:
        module.get_submodule(leaf).forward = given(leaf)
    for leaf in rowwise:
        module.get_submodule(leaf).forward = taken(leaf)
    type(module).forward(module, x) if "forward" not in vars(module) else module.forward(x)
    missing = [leaf for leaf in (*outputs, *rowwise) if leaf not in called and leaf not in reached]
    if missing:
        raise _Failed(f"its forward does not call {', '.join(missing)} as a module, so no sum could be paid there")
    return reached


def takes_hidden_states_alone(module: nn.Module) -> bool:
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return False
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.default is p.empty and p.kind in (*named, inspect.Parameter.KEYWORD_ONLY)]
    return len(needed) == 1 and needed[0].kind in named


@contextmanager
def as_it_was(module: nn.Module) -> Iterator[None]:
    """Afterwards every submodule has its own forward again, and its mode."""
    before = [(each, vars(each).get("forward"), each.training) for each in module.modules()]
    try:
        yield
    finally:
        for each, forward, training in before:
            vars(each).pop("forward", None)
            if forward is not None:
                each.forward = forward
            each.training = training


@contextmanager
def _rewritten(attributes: Sequence[tuple[nn.Module, dict[str, Any]]]) -> Iterator[None]:
    before = [(owner, name, getattr(owner, name)) for owner, values in attributes for name in values]
    try:
        for owner, values in attributes:
            for name, value in values.items():
                setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
