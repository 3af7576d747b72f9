"""Checkpoints of a parallelized model: the uncut state dict back, and loading one, each rank reading only its slice."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor

from tpfuse._torch_private import local_of, own_tensors, part_of
from tpfuse.errors import PlanError, PolicyError
from tpfuse.parallel.checkpoint_files import Reader, ShapeOf, opened, some
from tpfuse.parallel.cut_tensor import CutTensor
from tpfuse.parallel.cuts import Cut
from tpfuse.parallel.gradient_sums import sum_gradients
from tpfuse.parallel.record import Parallelized

# Fused expert weights [experts, features, ...] that checkpoints on the hub hold expert by expert.
_PER_EXPERT = {
    "gate_up_proj": ("gate_proj.weight", "up_proj.weight"),
    "down_proj": ("down_proj.weight",),
}


@torch.no_grad()
def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the uncut model, whole on every rank. All ranks call it; one gather for each cut tensor.

    Args:
        model: a parallelized one, or what DDP, FSDP2 or torch.compile made of it, or a part of it.

    Returns:
        name to tensor, with the names of `model.state_dict()`; detached, on the model's device. Tensors that are not
        cut are the model's own, as in `state_dict`.

    Raises:
        PolicyError: for a model that was not parallelized.
    """
    tensors = model.state_dict()
    if not any(isinstance(t, CutTensor) for t in tensors.values()):
        _state(model)
    out: dict[str, Tensor] = {}
    gathered: dict[int, Tensor] = {}
    variables = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            out[name] = tensor
            continue
        key = id(variables[name])
        if key not in gathered:  # tied weights travel once
            gathered[key] = tensor.full_tensor()
        out[name] = gathered[key]
    return out


@torch.no_grad()
def load_full_state_dict(model: nn.Module, source: Mapping[str, Tensor] | str | Path, *, strict: bool = True) -> None:
    """Loads an uncut checkpoint into a parallelized model; no communication.

    Every rank reads the slices it holds and nothing else of a cut weight. Parameters on the meta device become real,
    with the checkpoint's device and dtype; others keep their own. Non-persistent buffers are in no checkpoint: a model
    built on the meta device needs its own way to fill them (rotary frequencies, for instance). Fused expert
    weights are also found under their per-expert names (`experts.0.gate_proj.weight`).

    Args:
        source: the tensors by name, or a `.safetensors` file, or a folder with one or with an index of several.
        strict: whether every name of the model must be there, and no other.

    Raises:
        PolicyError: for a model that was not parallelized.
        PlanError: for a source that is none of these, missing or unexpected names, and shapes that differ from the
            uncut model's. The model is then as it was.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's name for it is in no checkpoint
    state = _state(model)
    with opened(source) as (names, read, shape_of):
        loads, missing, unexpected = _match(model, state, names)
        if strict and (missing or unexpected):
            raise PlanError(
                f"the checkpoint does not fit {type(model).__name__}: missing {some(missing)}; unexpected "
                f"{some(unexpected)}"
            )
        for load in loads:
            load.check(shape_of)
        replaced = False
        for load in loads:
            replaced |= _assign(model, load.tensor, load.read(read))
    if replaced:
        sum_gradients(model)


def _state(model: nn.Module) -> Parallelized:
    state = getattr(model, "_tpfuse", None)
    if state is None:
        raise PolicyError(f"this {type(model).__name__} was not parallelized; call tpfuse.parallelize first")
    return state


@dataclass(frozen=True)
class _Load:
    """One tensor of the model, and the checkpoint's names that hold it: one, or one for each expert and part."""

    name: str
    tensor: Tensor
    cut: Cut | None
    sources: list[str]

    @property
    def parts(self) -> list[list[str]]:
        """The sources of each expert."""
        leaves = len(_PER_EXPERT[self.name.rpartition(".")[2]])
        return [self.sources[i : i + leaves] for i in range(0, len(self.sources), leaves)]

    def check(self, shape_of: ShapeOf) -> None:
        """Raises PlanError when the checkpoint's shapes are not those of the uncut model."""
        if self.sources != [self.name]:
            return self._check_experts(shape_of)
        want = list(self.tensor.shape)
        if self.cut is not None:
            want[self.cut.dim] = sum(self.cut.parts)
        if (found := list(shape_of(self.name))) != want:
            raise PlanError(f"{self.name} has shape {found} in the checkpoint; the uncut model has {want}")

    def _check_experts(self, shape_of: ShapeOf) -> None:
        count, *want = self.tensor.shape
        leaves = len(self.parts[0])
        dim = 0 if self.cut is None else self.cut.dim - 1
        widths = self.cut.parts if self.cut is not None else (want[0] // leaves,) * leaves
        if len(self.parts) != count:
            raise PlanError(f"{self.name}: the checkpoint holds {len(self.parts)} experts, the model {count}")
        if len(widths) != leaves:
            raise PlanError(
                f"{self.name} is one matrix in the model and {leaves} in the checkpoint ({', '.join(self.parts[0])})"
            )
        for parts in self.parts:
            for part, width in zip(parts, widths, strict=True):
                if (found := list(shape_of(part))) != [*want[:dim], width, *want[dim + 1 :]]:
                    raise PlanError(
                        f"{part} has shape {found} in the checkpoint; the uncut model has "
                        f"{[*want[:dim], width, *want[dim + 1 :]]}"
                    )

    def read(self, read: Reader) -> Tensor:
        """This rank's slice."""
        cut = self.cut
        if self.sources == [self.name]:
            if cut is None:
                return read(self.name, None)
            return cut.read(lambda start, stop: read(self.name, (cut.dim, start, stop)))
        if cut is None:
            return torch.stack([torch.cat([read(n, None) for n in parts]) for parts in self.parts])
        return torch.stack([_own_part(parts, cut, read) for parts in self.parts])


def _own_part(parts: list[str], cut: Cut, read: Reader) -> Tensor:
    """This rank's slice of one expert's matrices, side by side."""
    pieces, offset = [], 0
    for part, (start, stop), width in zip(parts, cut.ranges(), cut.parts, strict=True):
        pieces.append(read(part, (cut.dim - 1, start - offset, stop - offset)))
        offset += width
    return torch.cat(pieces, cut.dim - 1) if len(pieces) > 1 else pieces[0]


def _match(model: nn.Module, state: Parallelized, names: Mapping[str, Any]) -> tuple[list[_Load], list[str], list[str]]:
    """What to load from where, the names that are missing, and those that nobody asked for."""
    loads: list[_Load] = []
    missing: list[str] = []
    tensors = model.state_dict(keep_vars=True)
    tied = {id(tensor) for name, tensor in tensors.items() if name in names}
    for name, tensor in tensors.items():
        if sources := _sources(name, tensor, names):
            loads.append(_Load(name, tensor, state.cuts.get(name), sources))
        elif id(tensor) not in tied:
            missing.append(name)
    used = {source for load in loads for source in load.sources}
    return loads, missing, sorted(set(names) - used - set(_aliases(model, names)))


def _sources(name: str, tensor: Tensor, names: Mapping[str, Any]) -> list[str]:
    """The checkpoint's names that hold this tensor: its own, or one for each expert and part."""
    if name in names:
        return [name]
    owner, _, leaf = name.rpartition(".")
    if leaf not in _PER_EXPERT or tensor.ndim != 3:
        return []
    pattern = re.compile(re.escape(owner) + r"\.(\d+)\." + re.escape(_PER_EXPERT[leaf][0]))
    experts = sorted(int(match[1]) for n in names if (match := pattern.fullmatch(n)))
    found = [f"{owner}.{e}.{part}" for e in experts for part in _PER_EXPERT[leaf]]
    return [] if any(n not in names for n in found) else found


def _aliases(model: nn.Module, names: Mapping[str, Any]) -> Iterator[str]:
    """Names of the checkpoint that the model knows but does not save (tied weights, non-persistent buffers)."""
    known = {n for n, _ in model.named_parameters(remove_duplicate=False)} | {n for n, _ in model.named_buffers()}
    return (n for n in names if n in known)


def _assign(model: nn.Module, tensor: Tensor, value: Tensor) -> bool:
    """Puts the value into the model; True when the tensor had to be replaced by a new one."""
    if isinstance(tensor, DTensor):
        if tensor.device.type == "meta":
            raise PlanError("fully_shard has cut a model on the meta device; call to_empty(device=...) before loading")
        for dim, (start, size) in enumerate(zip(*part_of(tensor), strict=True)):
            value = value.narrow(dim, start, size)
        local_of(tensor).copy_(value)
        return False
    if tensor.device.type != "meta":
        tensor.copy_(value)
        return False
    new = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    for module in model.modules():  # every place that shares it
        for tensors in own_tensors(module):
            for leaf, other in tensors.items():
                if other is tensor:
                    tensors[leaf] = new  # type: ignore[assignment]
    return True
