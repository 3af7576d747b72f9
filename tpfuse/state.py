"""Checkpoints of a parallelized model: the uncut state dict back, and loading one, each rank reading only its slice."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import safe_open
from torch import Tensor

from tpfuse._torch_private import own_tensors
from tpfuse.collectives import all_gather
from tpfuse.errors import PlanError, PolicyError
from tpfuse.parallelize import Parallelized, sum_gradients
from tpfuse.sharding import Cut
from tpfuse.strict_json import parse

# Reads `name` whole, or a part of it: (dim, start, stop).
Reader = Callable[[str, tuple[int, int, int] | None], Tensor]

# Fused expert weights [experts, features, ...] that checkpoints on the hub hold expert by expert.
_PER_EXPERT = {
    "gate_up_proj": ("gate_proj.weight", "up_proj.weight"),
    "down_proj": ("down_proj.weight",),
}


@torch.no_grad()
def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the uncut model, whole on every rank. All ranks call it; one gather for each cut tensor.

    Returns:
        name to tensor, with the names of `model.state_dict()`; detached, on the model's device. Tensors that are not
        cut are the model's own, as in `state_dict`.

    Raises:
        PolicyError: for a model that was not parallelized.
    """
    state = _state(model)
    out: dict[str, Tensor] = {}
    gathered: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        cut = state.cuts.get(name)
        if cut is None or cut.size == 1:
            out[name] = tensor.detach()
            continue
        if id(tensor) not in gathered:  # tied weights travel once
            group = state.groups.of(cut.over)
            flat = tensor.detach().contiguous().reshape(1, -1)
            shards = all_gather(flat, cut.size, group.name).view(cut.size, *tensor.shape)
            gathered[id(tensor)] = cut.merge(list(shards.unbind(0)))
        out[name] = gathered[id(tensor)]
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
        PlanError: for missing or unexpected names, and shapes that differ from the uncut model's.
    """
    state = _state(model)
    with _open(source) as (names, read, shape_of):
        used: set[str] = set()
        missing: list[str] = []
        replaced = False
        tensors = model.state_dict(keep_vars=True)
        tied = {id(tensor) for name, tensor in tensors.items() if name in names}
        for name, tensor in tensors.items():
            cut = state.cuts.get(name)
            sources = _sources(name, tensor, names)
            if not sources:
                if id(tensor) not in tied:
                    missing.append(name)
                continue
            used.update(sources)
            value = _read_experts(name, tensor, cut, sources, read, shape_of) if len(sources) > 1 else (
                _read_one(name, tensor, cut, read, shape_of)
            )  # fmt: skip
            replaced |= _assign(model, name, tensor, value)
        unexpected = sorted(set(names) - used - set(_aliases(model, names)))
    if strict and (missing or unexpected):
        raise PlanError(
            f"the checkpoint does not fit {type(model).__name__}: missing {_some(missing)}; unexpected "
            f"{_some(unexpected)}"
        )
    if replaced:
        sum_gradients(model)


def _state(model: nn.Module) -> Parallelized:
    state = getattr(model, "_tpfuse", None)
    if state is None:
        raise PolicyError(f"this {type(model).__name__} was not parallelized; call tpfuse.parallelize first")
    return state


def _read_one(name: str, tensor: Tensor, cut: Cut | None, read: Reader, shape_of: Callable[[str], list[int]]) -> Tensor:
    want = list(tensor.shape)
    if cut is not None:
        want[cut.dim] = sum(cut.parts)
    if (found := list(shape_of(name))) != want:
        raise PlanError(f"{name} has shape {found} in the checkpoint; the uncut model has {want}")
    if cut is None:
        return read(name, None)
    return cut.read(lambda start, stop: read(name, (cut.dim, start, stop)))


def _read_experts(
    name: str, tensor: Tensor, cut: Cut | None, sources: list[str], read: Reader, shape_of: Callable[[str], list[int]]
) -> Tensor:
    """A fused [experts, ...] weight from one tensor for each expert and part."""
    leaves = len(_PER_EXPERT[name.rpartition(".")[2]])
    experts = [sources[i : i + leaves] for i in range(0, len(sources), leaves)]
    if len(experts) != tensor.shape[0]:
        raise PlanError(f"{name}: the checkpoint holds {len(experts)} experts, the model {tensor.shape[0]}")
    if cut is None:
        return torch.stack([torch.cat([read(n, None) for n in parts]) for parts in experts])
    rows: list[Tensor] = []
    for parts in experts:
        pieces, offset = [], 0
        for part, (start, stop), width in zip(parts, cut.ranges(), cut.parts, strict=True):
            dim = cut.dim - 1
            if shape_of(part)[dim] != width:
                raise PlanError(
                    f"{part} has shape {shape_of(part)} in the checkpoint; dim {dim} of the model is {width}"
                )
            pieces.append(read(part, (dim, start - offset, stop - offset)))
            offset += width
        rows.append(torch.cat(pieces, cut.dim - 1) if len(pieces) > 1 else pieces[0])
    return torch.stack(rows)


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


def _assign(model: nn.Module, name: str, tensor: Tensor, value: Tensor) -> bool:
    """Puts the value into the model; True when the tensor had to be replaced by a new one."""
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


def _some(names: list[str]) -> str:
    return "nothing" if not names else ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextmanager
def _open(source: Mapping[str, Tensor] | str | Path):
    """(names, reader, shape of a name) of a checkpoint."""
    if isinstance(source, Mapping):

        def read(name: str, part: tuple[int, int, int] | None) -> Tensor:
            return source[name] if part is None else source[name].narrow(part[0], part[1], part[2] - part[1])

        yield source, read, lambda name: list(source[name].shape)
        return
    with ExitStack() as stack:
        files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in _files(Path(source))}
        where = {name: file for file in files.values() for name in file.keys()}  # noqa: SIM118

        def read_slice(name: str, part: tuple[int, int, int] | None) -> Tensor:
            if part is None:
                return where[name].get_tensor(name)
            index = (slice(None),) * part[0] + (slice(part[1], part[2]),)
            return where[name].get_slice(name)[index].contiguous()

        yield where, read_slice, lambda name: where[name].get_slice(name).get_shape()


def _files(path: Path) -> list[str]:
    if path.is_file():
        return [str(path)]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        fields = parse(index.read_bytes(), str(index), PlanError)
        shards = fields.get("weight_map") if isinstance(fields, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise PlanError(f"{index} has no 'weight_map' from weight names to file names")
        names = sorted(set(shards.values()))
        if any(Path(name).name != name or name == ".." for name in names):
            raise PlanError(f"{index} names files outside of its folder: {_some(names)}")
        return [str(path / name) for name in names]
    found = sorted(str(p) for p in path.glob("*.safetensors"))
    if not found:
        raise PlanError(f"{path} is no .safetensors file and no folder with any")
    return found
