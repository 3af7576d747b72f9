"""`state_dict` and `load_state_dict` of cut models and of their optimizers.

What comes out holds each cut weight as a `CutTensor`, so that torch.distributed.checkpoint knows where a slice lies.
What goes in may be that, a slice of one's own, FSDP2's DTensor of one, or the uncut weight, of which the rank takes its
slice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor

from tpfuse._torch_private import own_tensors, part_of, process_group, wrap_optimizer_state
from tpfuse.errors import PlanError
from tpfuse.parallel.cut_tensor import CutTensor, Held, SavedSlice, held, saved_slice
from tpfuse.parallel.cuts import Cut
from tpfuse.parallel.earlier_state import cut_moments
from tpfuse.parallel.gradient_sums import sum_gradients
from tpfuse.parallel.mesh import Group
from tpfuse.parallel.owners import owned_tensors
from tpfuse.parallel.record import Parallelized

#: The cut of each of a module's own tensors, by name.
Cuts = dict[str, tuple[Cut, Group]]


def keep_state(model: nn.Module) -> None:
    """Let the state dict of a cut model, of its parts and of its optimizers say how tensors are cut, and load what
    such a state dict holds. Once for each model."""
    state: Parallelized = model._tpfuse  # type: ignore[assignment]
    owners: dict[nn.Module, Cuts] = {}
    for name, cut in state.cuts.items():
        if cut.size > 1:
            owner, _, leaf = name.rpartition(".")
            owners.setdefault(model.get_submodule(owner), {})[leaf] = (cut, state.groups.of(cut.over))
    for module, cuts in owners.items():
        module.register_state_dict_post_hook(functools.partial(_save, cuts))
        module.register_load_state_dict_pre_hook(functools.partial(_load, cuts))
    model.register_load_state_dict_post_hook(_hook_again)
    wrap_optimizer_state(_save_optimizer, _load_optimizer)


def _hook_again(model: nn.Module, incompatible_keys: Any) -> None:
    """`load_state_dict(assign=True)` puts other parameters in place of these."""
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        sum_gradients(model)


def _save(cuts: Cuts, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    own = _own(module)
    for leaf, (cut, group) in cuts.items():
        tensor = state_dict.get(prefix + leaf)
        if isinstance(tensor, Tensor) and tensor is not own.get(leaf):  # itself: the caller wants the variables
            state_dict[prefix + leaf] = placed(tensor, cut, group)


def _load(cuts: Cuts, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    own = _own(module)
    for leaf, (cut, group) in cuts.items():
        tensor = state_dict.get(prefix + leaf)
        if isinstance(tensor, Tensor) and leaf in own:
            state_dict[prefix + leaf] = own_part(prefix + leaf, tensor, own[leaf], cut, group)


def _own(module: nn.Module) -> dict[str, Tensor]:
    return {leaf: tensor for table in own_tensors(module) for leaf, tensor in table.items() if tensor is not None}


def placed(tensor: Tensor, cut: Cut, group: Group) -> Tensor:
    """A rank's slice (FSDP2's DTensor of it) as the cut weight; they share memory."""
    if isinstance(tensor, CutTensor):
        return tensor
    what = held(tensor, cut, group)
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if process_group(group.name) is None:  # destroyed: what is left can be written to a file of this rank's own
        return saved_slice(local, what.place)
    return CutTensor.of(local, what)


def own_part(name: str, given: Tensor, like: Tensor, cut: Cut, group: Group) -> Tensor:
    """What a rank loads into `like`, its slice of a weight (FSDP2's DTensor of it), when it is given `given`.

    Raises:
        PlanError: for a slice that another rank saved, or that was cut otherwise.
    """
    want = held(like, cut, group)
    if isinstance(given, CutTensor | SavedSlice):
        have = given._held if isinstance(given, CutTensor) else given.held(group)
        if have.cut != cut:
            raise PlanError(
                f"{name}: the state dict has {have.words}, and this rank holds {want.words}; save and load with "
                "torch.distributed.checkpoint, or give the uncut weights (tpfuse.full_state_dict)"
            )
        if not have.same_place(want):
            raise PlanError(f"{name}: the state dict's slice was cut by FSDP2 otherwise than this rank's; {_DCP}")
        return _local(given) if want.sharded is None else want.sharded.tensor(_local(given))
    elsewhere = isinstance(given, DTensor) and not _lies_as(given, want)
    if tuple(given.shape) == want.full_shape and (elsewhere or want.full_shape != tuple(like.shape)):
        full = given.full_tensor() if isinstance(given, DTensor) else given
        part = want.of_full(full)
        return part if want.sharded is None else want.sharded.tensor(part)
    if want.sharded is not None and not isinstance(given, DTensor) and given.shape == like.shape:
        for dim, (start, size) in enumerate(zip(*part_of(like), strict=True)):
            given = given.narrow(dim, start, size)
        return want.sharded.tensor(given.contiguous())
    return given


def _lies_as(given: DTensor, want: Held) -> bool:
    """Whether a DTensor is cut as FSDP2 cuts this rank's slice."""
    to = want.sharded
    return to is not None and (given.device_mesh, tuple(given.placements)) == (to.mesh, to.placements)


_DCP = "save and load with torch.distributed.checkpoint"


def _local(given: CutTensor | SavedSlice) -> Tensor:
    return given.to_local() if isinstance(given, CutTensor) else given.as_subclass(Tensor)


# -- optimizers -------------------------------------------------------------------------------------------------------


def _save_optimizer(optimizer: Any, save_state: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    cut_moments(optimizer)

    def save(name: str, value: Tensor, parameter: Tensor, cut: Cut, group: Group) -> Tensor:
        if value.shape == parameter.shape:
            return placed(value, cut, group)
        return value if value.numel() == 1 else UnplacedState.of(value, name)

    return _each_state(optimizer, save_state(optimizer), save)


def _load_optimizer(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    def load(name: str, value: Tensor, parameter: Tensor, cut: Cut, group: Group) -> Tensor:
        return value.as_subclass(Tensor) if isinstance(value, UnplacedState) else own_part(
            name, value, parameter, cut, group
        )  # fmt: skip

    return _each_state(optimizer, state_dict, load)


def _each_state(optimizer: Any, state_dict: dict[str, Any], change: Callable[..., Tensor]) -> dict[str, Any]:
    """The state dict with every tensor that belongs to a cut parameter changed; other dicts than those given."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    known = {id(p) for p in parameters}
    cuts = {
        id(t): (o.cut, o.over) for t, o in owned_tensors() if o.cut is not None and o.cut.size > 1 and id(t) in known
    }
    groups, states = state_dict.get("param_groups"), state_dict.get("state")
    if not cuts or not isinstance(groups, list) or not isinstance(states, dict):
        return state_dict
    names = [name for group in groups for name in group.get("params", ())]
    of = dict(zip(names, parameters, strict=False))

    def changed(name: str, value: Any, parameter: Tensor) -> Any:
        if isinstance(value, dict):
            return {key: changed(f"{name}.{key}", each, parameter) for key, each in value.items()}
        if isinstance(value, Tensor) and value.ndim:
            return change(name, value, parameter, *cuts[id(parameter)])
        return value

    return state_dict | {
        "state": {
            key: changed(f"the optimizer's state of parameter {key}", state, of[key])
            if id(of.get(key)) in cuts
            else state
            for key, state in states.items()
        }
    }


class UnplacedState(Tensor):
    """An optimizer's tensor of a cut parameter, of another shape than the parameter: each rank has its own."""

    _name: str

    @staticmethod
    def of(tensor: Tensor, name: str) -> UnplacedState:
        out = tensor.as_subclass(UnplacedState)
        out._name = name
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __create_write_items__(self, fqn: str, object: Any) -> list[Any]:
        raise PlanError(
            f"{fqn}: {self._name} has shape {list(self.shape)}, which is not its parameter's: it belongs to one rank's "
            "slice and fits no other; save it with torch.save, one file a rank"
        )
