"""What optimizers and gradients hold from before the cut: it is cut like the parameters that it belongs to.

Nobody knows a model's optimizers when it is cut, so each is looked at before its next step, once for each cut.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tpfuse import _state as state
from tpfuse._torch_private import see_overflows
from tpfuse.parallel.cut_tensor import widened
from tpfuse.parallel.cuts import Cut
from tpfuse.parallel.owners import owned_tensors
from tpfuse.parallel.steps import compare_gradients, overflows_of_all, refuse_unless_by_element


def cut_gradient(tensor: Tensor, cut: Cut) -> None:
    """Cuts the gradient that a parameter has when it is cut; training goes on accumulating."""
    if tensor.grad is not None:
        grad, tensor.grad = tensor.grad, None
        tensor.grad = cut.take(grad)


def watch_optimizers() -> None:
    """A model was just cut: every optimizer is looked at again before its next step."""
    with state.LOCK:
        state.CUT_MODELS.count += 1
        if state.CUT_MODELS.count == 1:
            register_optimizer_step_pre_hook(_before_step)
            see_overflows(overflows_of_all)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    if state.CUT_MODELS.seen_by.get(optimizer) != state.CUT_MODELS.count:
        refuse_unless_by_element(optimizer)
    cut_moments(optimizer)
    state.CUT_MODELS.steps[optimizer] = step = state.CUT_MODELS.steps.get(optimizer, 0) + 1
    if step & (step - 1) == 0:  # 1, 2, 4, 8, ...
        compare_gradients(optimizer, step)


@torch.no_grad()
def cut_moments(optimizer: Any) -> None:
    """Cuts what the optimizer remembers of parameters that were whole then (momentum, second moments)."""
    if state.CUT_MODELS.seen_by.get(optimizer) == state.CUT_MODELS.count:
        return
    state.CUT_MODELS.seen_by[optimizer] = state.CUT_MODELS.count
    for tensor, owned in owned_tensors():
        if owned.cut is None or isinstance(tensor, DTensor) or not isinstance(of := optimizer.state.get(tensor), dict):
            continue
        full = widened(tensor.shape, owned.cut)
        for key, value in of.items():
            if isinstance(value, Tensor) and tuple(value.shape) == full != tuple(tensor.shape):
                of[key] = owned.cut.take(value)
