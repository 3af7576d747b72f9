"""Whether an optimizer works element by element: only then is its step on a slice the slice of its step on the whole.

Adam, SGD and their like do. Adafactor takes means of rows and columns, LAMB and LARS a norm, Muon the matrix, L-BFGS
products over all parameters: of a slice each of these is another number, and on parameters that every rank holds
whole it would be another one on each rank. What an optimizer does is seen from two steps that it makes, with its
settings, on two random matrices, whole and in halves; nothing of the optimizer itself is changed.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from tpfuse._torch_private import under_dispatch_mode

log = logging.getLogger(__name__)

#: Large enough for optimizers that factor moments of large matrices alone (from 16 or 32 on), and small enough for
#: those that keep moments of 4096 elements and more in 8 bits: their rounding is no difference that counts.
_SHAPE = (62, 66)
_STEPS = 2
_RATE = 0.01
_TOLERANCE = 1e-2


def by_element(optimizer: torch.optim.Optimizer, like: Tensor) -> bool:
    """Whether its steps are element by element, as far as they can be tried; `like`: one of its parameters.

    True also where it makes random steps, and with a warning where it cannot be tried.
    """
    if under_dispatch_mode() or like.is_meta:
        return True
    failed: Exception | None = None
    for dtype in dict.fromkeys((torch.float64, like.dtype)):  # in float64 no rounding looks like another step
        try:
            whole, again = (_after(optimizer, like, dtype, None) for _ in range(2))
            halves = [_after(optimizer, like, dtype, dim) for dim in (0, 1)]
        except Exception as error:
            failed = error
            continue
        moved = float((whole - _drawn(like, dtype, 0).double()).abs().amax())
        other = max(float((one - whole).abs().amax()) for one in halves)
        return not torch.equal(whole, again) or other <= _TOLERANCE * moved
    log.warning(
        "%s could not be tried on a small matrix (%s: %s), and is taken for one that works element by element: what it "
        "makes of cut weights would be wrong otherwise", type(optimizer).__name__, type(failed).__name__, failed,
    )  # fmt: skip
    return True


def _after(optimizer: torch.optim.Optimizer, like: Tensor, dtype: torch.dtype, dim: int | None) -> Tensor:
    """Two matrices after the optimizer's steps, [2, *_SHAPE]; both cut in halves along `dim`, stepped half by half."""
    parts = []
    for half in (0,) if dim is None else (0, 1):
        drawn = [_drawn(like, dtype, number) for number in range(1 + _STEPS)]
        own = [t if dim is None else t.chunk(2, dim + 1)[half].contiguous() for t in drawn]
        parameters = [torch.nn.Parameter(t.clone()) for t in own[0]]
        trial = _trial(optimizer, like, parameters)
        for grads in own[1:]:
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad.clone()
            _step(trial, like)
        parts.append(torch.stack([p.detach() for p in parameters]))
    return torch.cat(parts, 0 if dim is None else dim + 1).double()


def _trial(optimizer: Any, like: Tensor, parameters: list[Any]) -> Any:
    """An optimizer with the same settings, and with nothing that leads to the parameters of the other one."""
    group = next(g for g in optimizer.param_groups if any(p is like for p in g["params"]))
    settings = {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")}
    if isinstance(settings.get("lr"), (int, float, Tensor)):
        settings["lr"] = settings["lr"] * 0 + _RATE  # a schedule may begin with 0
    trial = object.__new__(type(optimizer))
    vars(trial).update({k: v for k, v in vars(optimizer).items() if _plain(v)})
    lists = [name for name, value in vars(optimizer).items() if value is group["params"]]  # L-BFGS keeps one
    vars(trial).update(dict.fromkeys(lists, parameters))
    trial.defaults, trial.state = dict(optimizer.defaults), defaultdict(dict)
    trial.param_groups = [{**settings, "params": parameters}]
    return trial


def _plain(value: object) -> bool:
    """Whether it is a setting, as far as can be seen: nothing that leads to parameters."""
    if isinstance(value, (tuple, list)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (int, float, str, torch.dtype, torch.device))


def _step(trial: Any, like: Tensor) -> None:
    step = type(trial).step
    step = getattr(step, "__wrapped__", step)  # without hooks on steps
    with torch.no_grad():
        try:
            step(trial, lambda: like.new_zeros(()))
        except TypeError:
            step(trial)


def _drawn(like: Tensor, dtype: torch.dtype, number: int) -> Tensor:
    """[2, *_SHAPE]"""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(2, *_SHAPE, generator=generator).to(like.device, dtype)
