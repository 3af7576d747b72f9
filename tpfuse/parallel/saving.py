"""What a cut model cannot do as its class would: each method does it right, or says what to do in its place.

`save_pretrained` and `push_to_hub` take whole weights, `resize_token_embeddings` comes before the cut, and a model is
saved by its state and not by pickling the object.
"""

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
        if own and callable(getattr(type(module), "resize_token_embeddings", None)):
            module.resize_token_embeddings = types.MethodType(resize_token_embeddings, module)  # type: ignore[assignment]


def guard_copies(model: nn.Module) -> None:
    """Lets no part of the model be pickled; copy.deepcopy goes on working."""
    for module in model.modules():
        module.__reduce_ex__ = types.MethodType(reduce_for_copies, module)  # type: ignore[method-assign]


def reduce_for_copies(module: nn.Module, protocol: Any) -> Any:
    """What copy.copy and copy.deepcopy ask for.

    Raises:
        PlanError: for pickle, torch.save and whoever else asks.
    """
    here = inspect.currentframe()
    asker = here.f_back if here is not None else None
    if asker is None or asker.f_globals.get("__name__") != "copy":
        raise PlanError(
            f"this {type(module).__name__} belongs to a model that parallelize cut; it holds this process's groups and "
            "cannot be pickled or saved as an object. Save its state: torch.save(tpfuse.full_state_dict(model), path) "
            "(on all ranks) for whole weights, torch.distributed.checkpoint or torch.save(model.state_dict(), path of "
            "this rank) for slices; to load, build the model, parallelize it, and load the state"
        )
    return type(module).__reduce_ex__(module, protocol)


def resize_token_embeddings(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Without arguments the embedding, as the class's own.

    Raises:
        PlanError: for a new size.
    """
    new = args[0] if args else kwargs.get("new_num_tokens")
    if new is None:
        return type(model).resize_token_embeddings(model, *args, **kwargs)
    raise PlanError(
        f"resize_token_embeddings({new}): this {type(model).__name__} is cut, and new rows would be drawn by each rank "
        "for itself; resize the whole model, with the same random seed on all ranks, and parallelize it then"
    )


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
