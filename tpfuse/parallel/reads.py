"""Looks at a cut model while it runs for the first time: who reads the parameters of its cut modules, and from where.

Every operator of that call is seen. A parameter that is read outside of its place (`places`) is refused there and then,
on all ranks alike, since all of them run the same program; and so is a model that returns what this rank's slices gave,
for which nobody paid a sum. The call is looked at once for training and evaluation, with and without gradients, in
eager code; afterwards one look-up a call is left.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor

from tpfuse import _state as state
from tpfuse._torch_private import (
    compiled_wrapper,
    is_view,
    operator_full_name,
    seeing_operators,
    storage_identity,
    storage_reference,
    tensor_leaves,
    under_dispatch_mode,
    written_arguments,
)
from tpfuse.errors import PlanError
from tpfuse.parallel.containers import tensors_in
from tpfuse.parallel.hooks import AllRows, OwnRows
from tpfuse.parallel.places import Place
from tpfuse.parallel.uncut import class_before

#: Operators whose results are equal on all ranks of a group, or speak of rows and not of slices.
_COLLECTIVES = ("c10d::", "_c10d_functional::", "_c10d_functional_autograd::", "tpfuse::")
_OVERWRITES = ("aten::copy_", "aten::zero_", "aten::fill_")


@dataclass(frozen=True)
class LookAtReads:
    """Before a model's forward: the first call of each kind is looked at."""

    places: tuple[Place, ...] = field(compare=False)

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        kind = (module.training, torch.is_grad_enabled())
        known = state.LOOKED_AT.get(module, frozenset())
        if kind in known:
            return
        with state.LOCK:
            state.LOOKED_AT[module] = known | {kind}
        if not under_dispatch_mode() and not _compiles_inside(module):
            _start(module, self.places)


def _compiles_inside(model: nn.Module) -> bool:
    """Whether a part of the model is compiled by itself: under a mode that sees operators it would run eagerly, flex
    attention with all its scores in memory."""
    wrapper = compiled_wrapper()
    if getattr(getattr(model, "config", None), "_attn_implementation", None) == "flex_attention":
        return True
    for part in model.modules():
        if (wrapper is not None and isinstance(part, wrapper)) or getattr(part, "_compiled_call_impl", None):
            return True
    return any(isinstance(p, DTensor) for p in model.parameters())  # FSDP2 has put other tensors in their place


def _start(model: nn.Module, places: tuple[Place, ...]) -> None:
    look = _Look(model, places)
    if not look.of:
        return
    handles, around = [], []
    for name, part in model.named_modules(remove_duplicate=False):
        if part is not model:
            handles.append(part.register_forward_pre_hook(look.enter(name), prepend=True))
            handles.append(part.register_forward_hook(look.leave(name), always_call=True))
        boundary = vars(part).get("_tpfuse_boundary")
        if isinstance(boundary, (OwnRows, AllRows)):  # around the forward itself, which may be called without hooks
            around.append((part, boundary))
            part._tpfuse_boundary = look.around(name, boundary)

    def end(module: nn.Module, args: tuple, output: Any) -> None:
        for handle in handles:
            handle.remove()
        for part, boundary in around:
            part._tpfuse_boundary = boundary
        stop()
        look.returned(output)

    handles.append(model.register_forward_hook(end, always_call=True))
    look.enter("")(model, ())
    stop = seeing_operators(look.before, look.after)


class _Look:
    """Sees every operator of one call of a model.

    `of`: the places of each storage. `own`: storages that hold what this rank's slices gave, and of which parameter.
    """

    def __init__(self, model: nn.Module, places: tuple[Place, ...]) -> None:
        self.model = model
        self.running: list[str] = []
        self.active: Counter[str] = Counter()
        self.of: dict[int, list[Place]] = {}
        self.own: dict[int, tuple[Any, Place]] = {}
        tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        by_name = {place.name: place for place in places if place.ranks > 1}
        starts: dict[int, set[int]] = {}
        for name, tensor in tensors.items():
            key = storage_identity(tensor)
            if key is None or not tensor.numel():
                continue
            starts.setdefault(key, set()).add(int(tensor.storage_offset()))
            if name in by_name:
                self.of.setdefault(key, []).append(by_name[name])
        for key, offsets in starts.items():
            if len(offsets) > 1:
                self.of.pop(key, None)  # several parameters in one storage: nobody can tell them apart

    def enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            self.running.append(name)
            self.active[name] += 1

        return hook

    def leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            while self.running:
                last = self.running.pop()
                self.active[last] -= 1
                if last == name:
                    return

        return hook

    def around(self, name: str, boundary: Any) -> Any:
        def call(forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            self.active[name] += 1
            try:
                return boundary(forward, args, kwargs)
            finally:
                self.active[name] -= 1

        return call

    def before(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        name = operator_full_name(func)
        if is_view(func) or _about_shape(name):
            return
        for tensor in tensor_leaves((args, kwargs)):
            places = self.of.get(storage_identity(tensor) or 0)
            if places is None or any(self.active[place.inside] for place in places):
                continue
            if places[0].cut is not None or (torch.is_grad_enabled() and tensor.requires_grad):
                raise PlanError(self._words(places[0]))

    def after(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        name = operator_full_name(func)
        if is_view(func) or _about_shape(name):
            return
        given = tensor_leaves((args, kwargs))
        if name.startswith(_COLLECTIVES):
            for tensor in (*given, *tensor_leaves(out)):
                self.own.pop(storage_identity(tensor) or 0, None)
            return
        written = written_arguments(func, args, kwargs)
        read = [t for t in given if not (name in _OVERWRITES and t is args[0])]
        place = next((p for t in read if (p := self._slice_in(t)) is not None), None)
        for tensor in (*written, *tensor_leaves(out)):
            key = storage_identity(tensor)
            if key is None:
                continue
            if place is not None:
                self.own.setdefault(key, (storage_reference(tensor), place))
            elif name in _OVERWRITES and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes():
                self.own.pop(key, None)

    def _slice_in(self, tensor: Tensor) -> Place | None:
        key = storage_identity(tensor) or 0
        if key in self.own:
            return self.own[key][1]
        return next((place for place in self.of.get(key, ()) if place.cut is not None), None)

    def returned(self, output: Any) -> None:
        """Refuses a model whose result was made of a slice, with no sum behind it."""
        first = next((t for t in tensors_in(output) if t.is_floating_point()), None)
        place = None if first is None else self._slice_in(first)
        if place is not None and place.cut is not None:
            raise PlanError(
                f"{class_before(type(self.model)).__name__} returned what this rank's slice of {place.name} gave "
                f"({_slice(place)}), and no sum over the {place.ranks} ranks was paid for it: "
                f"{self._named(place.site)} gives away more than its output. Return its output alone, or leave it "
                "whole (give it no role, or plan={...} without it)"
            )

    def _named(self, name: str) -> str:
        return f"{name or 'the model'} ({class_before(type(self.model.get_submodule(name))).__name__})"

    def _words(self, place: Place) -> str:
        owner = place.name.rpartition(".")[0]
        outer = [name for name in self.running if name != owner]
        called = owner in self.running
        reader = f"{self._named((outer or [''])[-1])} {'calls ' + owner if called else 'reads ' + place.name}"
        if place.cut is None:
            return (
                f"{reader} outside of {self._named(place.site)}, which parallelize gave to {place.ranks} ranks: each "
                f"of them holds {place.name} whole, and its gradient would be counted once for each. {_advice(place)}, "
                f"or read {place.name}.detach()"
            )
        if place.inside != place.site and self.active[place.site]:
            return (
                f"{reader} without calling {place.inside}, where the sum over the {place.ranks} ranks is paid that it "
                f"is cut over ({_slice(place)}). Call {place.inside} as a module, or leave {place.site} whole (give it "
                "no role, or plan={...} without it)"
            )
        return (
            f"{reader} outside of {self._named(place.site)}, which parallelize cut: this rank holds {_slice(place)} "
            f"of {place.name}, and only in there are inputs brought in and sums over the {place.ranks} ranks paid. "
            f"{_advice(place)}"
        )


def _slice(place: Place) -> str:
    assert place.cut is not None
    return f"slice {place.cut.index} of {place.cut.size} along dim {place.cut.dim}"


def _advice(place: Place) -> str:
    return (
        f"Call {place.site or 'the model'} itself (the module, not its forward), move what reads the parameter in "
        "there, or leave it whole (give it no role, or plan={...} without it)"
    )


def _about_shape(name: str) -> bool:
    """Operators that read sizes, dtype and device of what they are given, and no value."""
    leaf = name.rpartition("::")[2].partition(".")[0]
    return leaf.endswith("_like") or leaf.startswith(("new_", "sym_")) or leaf in ("is_same_size", "_version")
