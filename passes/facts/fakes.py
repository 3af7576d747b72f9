"""What an operator returns for fake values: shapes, strides, dtypes and devices, and no real work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tpfuse import _state as state
from tpfuse._torch_private import map_tensors, new_fake_like, new_fake_mode, tensor_leaves


def call_on_fakes(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], given: Sequence[Any]) -> Any:
    """`function` of fake values, under their fake mode. `given`: those among its arguments that come from the graph.

    Graphs traced with real tensors have a fake mode of its own for every value, and some graphs have real tensors for
    values; both are described anew in one fake mode, so that a collective can never really run here.
    """
    leaves = given if all(isinstance(v, torch.Tensor) for v in given) else tensor_leaves(given)
    modes = {id(mode): mode for v in leaves if (mode := getattr(v, "fake_mode", None))}
    if len(modes) == 1 and all(hasattr(v, "fake_mode") for v in leaves):
        (mode,) = modes.values()
        alike = _alike(function, args, kwargs)
        if alike is not None:
            return _like_before(mode, alike, lambda: function(*args, **kwargs))
    else:
        mode = new_fake_mode()
        with mode:
            args, kwargs = map_tensors(_described_anew, (args, kwargs))
    # A graph that was exported holds parameters, and nobody differentiates here.
    with mode, torch.no_grad():
        return function(*args, **kwargs)


def _alike(target: Any, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """What tells a call of one of our operators from calls with other results; None where that is not known.

    Their results are new tensors whose description follows from their arguments' descriptions.
    """
    if getattr(target, "namespace", "") != "tpfuse":
        return None
    told: list[Any] = [target]
    for arg in (*args, *kwargs.items()):
        if isinstance(arg, torch.Tensor):
            if not all(isinstance(size, int) for size in (*arg.shape, *arg.stride())):
                return None
            told.append((arg.shape, arg.stride(), arg.dtype, arg.device))
        elif isinstance(arg, (list, dict, torch.SymInt, torch.SymFloat)):
            return None
        else:
            told.append(arg)
    return tuple(told)


def _like_before(mode: Any, alike: tuple, ask: Callable[[], Any]) -> Any:
    """The boundaries of a model are alike, and asking the operator costs a hundred times as much as describing its
    results once more."""
    with state.LOCK:
        known = state.FAKE_RESULTS.setdefault(mode, {})
    if alike in known:
        return [new_fake_like(val) for val in known[alike]]
    with mode, torch.no_grad():
        found = ask()
    if isinstance(found, list) and all(isinstance(size, int) for val in found for size in val.shape):
        with state.LOCK:
            known[alike] = found
    return found


def _described_anew(val: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=val.device)
