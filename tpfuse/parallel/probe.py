"""Run the inside of a module, whole and cut, and see whether the cut computes slices of the whole.

A module may be cut if what reaches its row-wise projection on a rank is that rank's slice of what reaches it in the
whole module. Source text does not tell: `F.glu`, a helper that chunks, a softmax over features, a roll. So the module's
forward runs on a few rows, with its column-wise projections replaced by fixed random outputs, once whole and once for
each rank's slices. Nothing is multiplied, nothing is communicated, and nothing of the module is left changed.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from tpfuse.parallel.cuts import Cut
from tpfuse.parallel.guesses import guesses

ROWS = (1, 3)
_ENOUGH = 3  # guesses that let a module run whole
_TOLERANCE = 1e-2  # of 16-bit elements; what is computed from other elements is off by far more


class _Failed(Exception):
    """A projection that is not called as a module."""


def miscut(
    module: nn.Module, colwise: Mapping[str, Cut], rowwise: Mapping[str, Cut],
    attributes: Sequence[tuple[nn.Module, dict[str, Any]]], *, guess: bool = False,
) -> str:  # fmt: skip
    """Why a module that is cut like this would give wrong numbers, as one sentence; '' where it would not, and where it
    cannot be run by itself (nobody knows what else it takes, or it lies on the meta device).

    Args:
        colwise, rowwise: the cuts of the projections' weights, by their names in the module; a column-wise one may be a
            parameter [out, in].
        attributes: what is rewritten when it is cut.
        guess: whether to guess what it takes beside its hidden states. It is then refused only where each guess that
            lets it run whole, of the first few, says so.
    """
    first: Any = _target(module, next(iter(colwise)))
    weight = first if isinstance(first, Tensor) else first.weight
    real = type(weight.detach()) is Tensor and not weight.is_meta  # fake tensors hold no values to compare
    alone = takes_hidden_states_alone(module)
    if not real or not weight.is_floating_point() or not (alone or guess):
        return ""
    with as_it_was(module), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module.eval()
        x = torch.randn(*ROWS, weight.shape[1]).to(weight)
        outputs = {leaf: torch.randn(*ROWS, sum(cut.parts)).to(weight) for leaf, cut in colwise.items()}
        problem, ran = "", 0
        for more in guesses(module, x) if guess else ({},):
            run = _Run(module, x, more, outputs, colwise, rowwise, attributes)
            found = run.problem()
            if found == "":
                return ""
            if found is not None:
                problem, ran = problem or found, ran + 1
            if ran == _ENOUGH:
                break
    return problem


@dataclass(frozen=True)
class _Run:
    """A module with fixed outputs of its column-wise projections, and what else it is called with."""

    module: nn.Module
    x: Tensor
    more: Mapping[str, Any]
    outputs: Mapping[str, Tensor]
    colwise: Mapping[str, Cut]
    rowwise: Mapping[str, Cut]
    attributes: Sequence[tuple[nn.Module, dict[str, Any]]]

    def problem(self) -> str | None:
        """None where the whole module does not run with these arguments."""
        try:
            whole = _reaching(self, self.outputs)
        except _Failed as error:
            return str(error)
        except Exception:
            return None  # nothing is known
        with _rewritten(self.attributes):
            if self._fits(self.colwise, whole):
                return ""
            for leaf, cut in self.colwise.items():
                if len(cut.parts) > 1 and sum(cut.parts) % cut.size == 0:
                    one = replace(cut, parts=(sum(cut.parts),), counts=(cut.size,))
                    if self._fits({**self.colwise, leaf: one}, whole):
                        return f"the matrices of {leaf} alternate, so it is cut as one: leave {leaf} out of packed="
                for parts in (2, 3):
                    width = sum(cut.parts)
                    if len(cut.parts) == 1 and width % (parts * cut.size) == 0:
                        packed = replace(cut, parts=(width // parts,) * parts, counts=(cut.size,) * parts)
                        if self._fits({**self.colwise, leaf: packed}, whole):
                            return f"{leaf} holds {parts} matrices in one weight; say so: packed={{{leaf!r}: {parts}}}"
        return "what reaches its row-wise projection on a rank is no slice of what reaches it in the whole module"

    def _fits(self, colwise: Mapping[str, Cut], whole: Mapping[str, Tensor]) -> bool:
        size = next(iter(colwise.values())).size
        for index in range(size):
            own = {leaf: _slice(self.outputs[leaf], cut, index) for leaf, cut in colwise.items()}
            try:
                with _own_parameters(self.module, colwise, index):
                    reached = _reaching(self, own)
            except Exception:
                return False
            for leaf, cut in self.rowwise.items():
                want = _slice(whole[leaf], cut, index).double()
                got = reached[leaf].double()
                if got.shape != want.shape or not torch.allclose(got, want, rtol=_TOLERANCE, atol=_TOLERANCE):
                    return False
        return True


@contextmanager
def _own_parameters(module: nn.Module, colwise: Mapping[str, Cut], index: int) -> Iterator[None]:
    """Bare parameters among the column-wise weights hold a rank's slices meanwhile."""
    before = [(t, t.data, cut) for leaf, cut in colwise.items() if isinstance(t := _target(module, leaf), nn.Parameter)]
    try:
        for parameter, full, cut in before:
            parameter.data = replace(cut, index=index).take(full)
        yield
    finally:
        for parameter, full, _ in before:
            parameter.data = full


def _target(module: nn.Module, leaf: str) -> Any:
    return functools.reduce(getattr, leaf.split("."), module)


def _slice(full: Tensor, cut: Cut, index: int) -> Tensor:
    return torch.cat([full[..., start:stop] for start, stop in cut.ranges(index)], dim=-1)


def _reaching(run: _Run, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What reaches each row-wise projection when the column-wise ones give `outputs`."""
    module, x, rowwise = run.module, run.x, run.rowwise
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

    modules = [leaf for leaf in outputs if isinstance(_target(module, leaf), nn.Module)]
    for leaf in modules:
        module.get_submodule(leaf).forward = given(leaf)
    for leaf in rowwise:
        module.get_submodule(leaf).forward = taken(leaf)
    module.forward(x, **run.more)
    missing = [leaf for leaf in (*modules, *rowwise) if leaf not in called and leaf not in reached]
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
