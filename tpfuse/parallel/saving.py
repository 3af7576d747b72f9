"""`save_pretrained` and `push_to_hub` of a cut Hugging Face model: whole weights, or a word on what to give them."""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch.nn as nn
from torch import Tensor

from tpfuse.errors import PlanError
from tpfuse.parallel.cut_tensor import CutTensor, SavedSlice, widened
from tpfuse.parallel.record import Parallelized


def guard_saving(model: nn.Module) -> None:
    """Puts a check in front of each `save_pretrained` of the model and its parts, which Trainer calls too.

    Weights are not gathered there: programs call `save_pretrained` on one rank, and gathering needs all of them.
    """
    state: Parallelized = model._tpfuse  # type: ignore[assignment]
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    whole = {n: widened(tensors[n].shape, cut) for n, cut in state.cuts.items() if cut.size > 1}
    for name, module in model.named_modules():
        start = f"{name}." if name else ""
        own = {n.removeprefix(start): shape for n, shape in whole.items() if n.startswith(start)}
        if own and callable(getattr(type(module), "save_pretrained", None)):
            module._tpfuse_whole_shapes = own  # type: ignore[assignment]
            # Bound, so that a copy of the model has its own.
            module.save_pretrained = types.MethodType(save_pretrained, module)  # type: ignore[assignment]
            if callable(getattr(type(module), "push_to_hub", None)):
                module.push_to_hub = types.MethodType(push_to_hub, module)  # type: ignore[assignment]


def save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The class's own `save_pretrained`, where it is given whole weights.

    Raises:
        PlanError: without a `state_dict`, and for one that holds slices of cut weights.
    """
    original = type(model).save_pretrained
    given = kwargs.get("state_dict")  # peft's has no parameter of that name
    if given is None:
        given = inspect.signature(original).bind(model, *args, **kwargs).arguments.get("state_dict")
    if given is None:
        raise PlanError(
            f"save_pretrained: this {type(model).__name__} is cut, and this rank's slices would be written as if they "
            f"were its weights; {_REMEDY}"
        )
    for name, tensor in given.items():
        shape = model._tpfuse_whole_shapes.get(name)
        slice_of_it = isinstance(tensor, Tensor) and shape not in (None, tuple(tensor.shape))
        if isinstance(tensor, CutTensor | SavedSlice) or slice_of_it:
            raise PlanError(f"save_pretrained(state_dict=...): {name} is this rank's slice; {_REMEDY}")
    return original(model, *args, **kwargs)


def push_to_hub(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuses before a repository is made: the class's own takes no state dict.

    Raises:
        PlanError: always.
    """
    raise PlanError(
        f"push_to_hub: this {type(model).__name__} is cut, and this rank's slices would be written as if they were its "
        f"weights; {_REMEDY}. With push_to_hub=True it pushes as well"
    )


_REMEDY = (
    "gather them on all ranks with tpfuse.full_state_dict(model), and give them to it: "
    "save_pretrained(folder, state_dict=tpfuse.full_state_dict(model)). To save from a Trainer, do so in a callback's "
    "on_save, or after train()"
)
