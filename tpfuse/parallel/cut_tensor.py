"""What a cut weight is in a state dict: a DTensor that knows which blocks of the uncut weight this rank holds.

`torch.distributed.checkpoint` asks a tensor for its blocks, so it saves and loads any cut, packed weights and slices
that several ranks hold included. Nothing computes with these tensors: element by element operations work on the rank's
slice, everything else is refused, and so is writing a slice where a whole weight is expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from tpfuse import _state as state
from tpfuse._torch_private import (
    call_plainly,
    local_of,
    map_tensors,
    new_dtensor,
    operator_name,
    part_of,
    process_group,
    tensor_leaves,
)
from tpfuse.errors import PlanError
from tpfuse.parallel.boxes import Box, boxes
from tpfuse.parallel.collectives import all_gather
from tpfuse.parallel.cuts import Cut
from tpfuse.parallel.mesh import Group

#: Operators beside the pointwise ones that treat all elements alike; results of `_LOCAL` ones speak of this rank.
_ALIKE = {"detach", "alias", "clone", "_to_copy", "copy_", "zero_", "fill_", "empty_like", "zeros_like", "ones_like",
          "full_like", "rand_like", "randn_like", "normal_", "uniform_", "_pin_memory", "is_pinned"}  # fmt: skip
_LOCAL = {"equal", "allclose"}
_NEW = {"new_empty", "new_zeros", "new_ones", "new_full"}


@dataclass(frozen=True)
class Sharded:
    """How FSDP2 has cut this rank's slice once more: the slice as a DTensor over FSDP's mesh."""

    mesh: DeviceMesh
    placements: tuple[Any, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self, local: Tensor) -> DTensor:
        """The slice, of which this rank holds `local`."""
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=torch.Size(self.shape), stride=self.stride
        )


@dataclass(frozen=True)
class Held:
    """What a rank holds of a cut weight.

    Args:
        cut, group: its slice, and the ranks that hold the others.
        offsets, sizes: the part of that slice that it holds; all of it without FSDP2.
        sharded: how FSDP2 has cut the slice; None without it.
    """

    cut: Cut
    group: Group
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    sharded: Sharded | None = None

    @property
    def boxes(self) -> list[Box]:
        return boxes(self.cut, self.offsets, self.sizes)

    @property
    def full_shape(self) -> tuple[int, ...]:
        return widened(self.sizes if self.sharded is None else self.sharded.shape, self.cut)

    @property
    def words(self) -> str:
        """What a message says of it."""
        cut = self.cut
        return f"slice {cut.index} of {cut.size} along dim {cut.dim} of a weight of shape {list(self.full_shape)}"

    @property
    def place(self) -> tuple[Any, ...]:
        """The same without groups and meshes, for files."""
        cut = self.cut
        return cut.dim, cut.over, cut.parts, cut.counts, cut.size, cut.index, self.offsets, self.sizes

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        return self

    def same_place(self, other: Held) -> bool:
        """Whether both are the same elements of the same weight."""
        return (self.cut, self.offsets, self.sizes) == (other.cut, other.offsets, other.sizes)

    def of_full(self, full: Tensor) -> Tensor:
        """What this rank holds of the uncut weight."""
        part = self.cut.take(full)
        for dim, (start, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            part = part.narrow(dim, start, size)
        return part.contiguous()


def held(tensor: Tensor, cut: Cut, group: Group) -> Held:
    """What this rank holds of a weight whose slice is `tensor`: a plain tensor, or FSDP2's DTensor."""
    if not isinstance(tensor, DTensor):
        return Held(cut, group, (0,) * tensor.ndim, tuple(tensor.shape))
    sharded = Sharded(tensor.device_mesh, tuple(tensor.placements), tuple(tensor.shape), tensor.stride())
    shared = set(tensor.device_mesh.mesh.flatten().tolist()) & set(group.ranks)
    if len(shared) > 1:
        raise PlanError(
            f"FSDP2 cuts over ranks {sorted(shared)}, which hold different slices of one weight (cut over ranks "
            f"{list(group.ranks)}); give fully_shard a mesh dimension that parallelize does not cut over"
        )
    return Held(cut, group, *part_of(tensor), sharded)


class CutTensor(DTensor):
    """A cut weight, of the uncut shape, of which this rank holds a slice.

    `full_tensor()` gathers it (all ranks of the group call it), `to_local()` is the slice. `placements` are honest for
    a weight that is cut evenly; for others they are `Replicate()`, since DTensor has no word for them: what is
    distributed by them is whole, and loading it takes the slice.
    """

    _held: Held  # in no slot of this class: DTensor's own list of slots is what asynchronous saving copies

    @staticmethod
    def of(local: Tensor, what: Held) -> CutTensor:
        """The tensor whose part `what` is `local`; they share memory."""
        mesh = _mesh(what.group, "cpu" if local.is_meta else local.device.type)
        even = what.sharded is None and what.cut.disjoint and len(what.cut.parts) == 1
        placements = [Shard(what.cut.dim) if even else Replicate()]
        self = new_dtensor(CutTensor, local, mesh, placements, what.full_shape)
        self._held = what
        return self

    @property
    def slice(self) -> Tensor:
        """What the module holds: the slice itself, or FSDP2's DTensor of it."""
        local, sharded = local_of(self), self._held.sharded
        return local if sharded is None else sharded.tensor(local)

    @torch.no_grad()
    def full_tensor(self, *, grad_placements: Any = None) -> Tensor:
        """The uncut weight, on every rank. All ranks of the group call it, and those of FSDP2's mesh."""
        cut, part = self._held.cut, self.slice
        whole = part.full_tensor() if isinstance(part, DTensor) else part
        whole = whole.to(self.device_mesh.device_type)
        shards = all_gather(whole.contiguous().reshape(1, -1), cut.size, self._held.group.name)
        return cut.merge(list(shards.view(cut.size, *whole.shape).unbind(0)))

    def redistribute(self, device_mesh: Any = None, placements: Any = None, **kwargs: Any) -> DTensor:
        """The uncut weight on every rank, and nothing else."""
        if placements is None or any(not p.is_replicate() for p in placements):
            raise PlanError(f"redistribute({placements}) of {self._held.words}; allowed: Replicate(), which gathers it")
        return DTensor.from_local(self.full_tensor(), self.device_mesh, [Replicate()], run_check=False)

    def to_local(self, *, grad_placements: Any = None) -> Tensor:
        """What this rank holds; the memory is shared."""
        return local_of(self)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CutTensor({self._held.words}: {local_of(self)})"

    # -- torch.distributed.checkpoint ---------------------------------------------------------------------------------

    def __create_write_items__(self, fqn: str, object: Any) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        kind = TensorProperties.create_from_tensor(local_of(self))
        return [
            WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD,
                      tensor_data=TensorWriteData(chunk, kind, self.size()))
            for chunk in self.__create_chunk_list__()
        ]  # fmt: skip

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(torch.Size(b.full), torch.Size(b.sizes)) for b in self._held.boxes]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        box = next(b for b in self._held.boxes if torch.Size(b.full) == index.offset)
        part = local_of(self)
        for dim, (start, size) in enumerate(zip(box.own, box.sizes, strict=True)):
            part = part.narrow(dim, start, size)
        return part

    # -- files and copies of other kinds ------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> CutTensor:
        memo[id(self)] = out = CutTensor.of(local_of(self).clone(), self._held)
        return out

    def __copy__(self) -> CutTensor:
        return CutTensor.of(local_of(self), self._held)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return saved_slice, (local_of(self), self._held.place)

    def untyped_storage(self) -> Any:
        raise PlanError(_not_whole(self._held.words))

    def numpy(self, *, force: bool = False) -> Any:
        raise PlanError(_not_whole(self._held.words))

    # -- operations ---------------------------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Releases of torch differ in whether they ask a subclass of DTensor about operators; all of them ask here.
        return call_plainly(func, args, kwargs, None if getattr(func, "__name__", "") == "__get__" else _operate)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:  # type: ignore[override]
        return _operate(func, args, kwargs or {})


def _operate(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What an operator makes of this rank's slice; one that does not treat all elements alike is refused."""
    name, leaves = operator_name(func), tensor_leaves((args, kwargs))
    what = next((t._held for t in leaves if isinstance(t, CutTensor)), None)
    if what is None:
        return func(*args, **kwargs)
    if name in _NEW:  # of the uncut shape: another cut weight; of any other: a plain tensor
        same = tuple(args[1]) == what.full_shape
        out = func(local_of(args[0]), what.sizes if same else args[1], *args[2:], **kwargs)
        return CutTensor.of(out, what) if same else out
    alike = name in _ALIKE or name in _LOCAL or torch.Tag.pointwise in func.tags
    if not alike or any(isinstance(t, CutTensor) and not t._held.same_place(what) for t in leaves):
        raise PlanError(
            f"{name} of {what.words}, which this rank does not hold whole; use .full_tensor() (on all ranks), or "
            ".to_local() for the slice"
        )
    target = args[0] if name.endswith("_") and args else None
    if isinstance(target, Tensor) and not isinstance(target, CutTensor) and target.shape != what.sizes:
        raise PlanError(_not_whole(what.words))
    out = func(*map_tensors(lambda t: _own(t, what), args), **map_tensors(lambda t: _own(t, what), kwargs))
    if target is not None:
        return target
    return CutTensor.of(out, what) if isinstance(out, Tensor) and tuple(out.shape) == what.sizes else out


def _own(tensor: Tensor, what: Held) -> Tensor:
    """What this rank's elements of an operand are."""
    if isinstance(tensor, DTensor):
        tensor = local_of(tensor)
    if tensor.ndim and tuple(tensor.shape) == what.full_shape != what.sizes:
        return what.of_full(tensor)
    return tensor


def _mesh(group: Group, kind: str) -> DeviceMesh:
    """The ranks of a group as a mesh; nothing is communicated."""
    ranks = process_group(group.name)
    if ranks is None:
        raise PlanError(f"the process group {group.name!r} that weights were cut over is no more")
    known = state.MESHES.get(ranks, {})
    if kind not in known:
        made = DeviceMesh.from_group(ranks, kind)
        with state.LOCK:
            known = state.MESHES.setdefault(ranks, {})
            known.setdefault(kind, made)
    return known[kind]


def _not_whole(words: str) -> str:
    return (
        f"this is {words}, and would be written as if it were the weight; use tpfuse.full_state_dict(model) (on all "
        "ranks) for the whole ones, or torch.distributed.checkpoint, which writes slices as slices"
    )


def widened(shape: Sequence[int], cut: Cut) -> tuple[int, ...]:
    """The shape of the uncut weight whose slice has `shape`."""
    return (*shape[: cut.dim], sum(cut.parts), *shape[cut.dim + 1 :])


class SavedSlice(Tensor):
    """A rank's slice as `torch.save` wrote it: a plain tensor that remembers whose slice of what it is."""

    _place: tuple[Any, ...]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return call_plainly(func, args, kwargs)

    def held(self, group: Group) -> Held:
        """Which elements these are."""
        dim, over, parts, counts, size, index, offsets, sizes = self._place
        return Held(Cut(dim, over, tuple(parts), tuple(counts), size, index), group, tuple(offsets), tuple(sizes))

    def __create_write_items__(self, fqn: str, object: Any) -> list[Any]:
        raise PlanError(
            f"{fqn} is one rank's slice, read from a file; load it into a model that is cut alike, and save that one"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> SavedSlice:
        return saved_slice(self.detach().clone(), self._place)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return saved_slice, (self.detach(), self._place)


def saved_slice(local: Tensor, place: tuple[Any, ...]) -> SavedSlice:
    """What a file's slice becomes when it is read."""
    out = local.as_subclass(SavedSlice)
    out._place = place
    return out


torch.serialization.add_safe_globals([saved_slice])
