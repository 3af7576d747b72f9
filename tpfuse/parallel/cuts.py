"""Cuts: which slice of a weight a rank holds. Pure arithmetic over shapes, and its inverse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpfuse.errors import PlanError
from tpfuse.parallel.mesh import Groups
from tpfuse.parallel.roles import Parts

CutOver = str  # "attention" or "whole"


@dataclass(frozen=True)
class Units:
    """Into how many indivisible units (heads) a part divides, what they are called, and whether ranks may share one."""

    count: int
    name: str = "heads"
    shared: bool = False


@dataclass(frozen=True)
class Cut:
    """How one parameter is cut along one dimension over one group.

    Args:
        dim: the dimension that is cut.
        over: "attention" or "whole", the group.
        parts: sizes along `dim` of the matrices the weight holds side by side; each is cut by itself.
        counts: for each part, into how many distinct slices it is cut. Less than the group's size where neighbouring
            ranks hold the same slice (key/value heads fewer than ranks).
        size, index: the group's size and this rank's place in it.
    """

    dim: int
    over: CutOver
    parts: tuple[int, ...]
    counts: tuple[int, ...]
    size: int
    index: int

    def __str__(self) -> str:
        held = "" if len(self.parts) == 1 else f", {len(self.parts)} matrices of {self.parts} each by itself"
        return f"along dimension {self.dim} over {self.size} ranks of the {self.over} group{held}"

    @property
    def disjoint(self) -> bool:
        """Whether every rank of the group holds a slice of its own."""
        return all(count == self.size for count in self.counts)

    def ranges(self, index: int | None = None) -> list[tuple[int, int]]:
        """The (start, stop) along `dim` that a rank holds, this one when `index` is None; one range per part."""
        index = self.index if index is None else index
        out, offset = [], 0
        for part, count in zip(self.parts, self.counts, strict=True):
            width = part // count
            start = offset + index // (self.size // count) * width
            out.append((start, start + width))
            offset += part
        return out

    def take(self, full: Tensor) -> Tensor:
        """This rank's slice of the full tensor; a fresh, contiguous tensor."""
        return self.read(lambda start, stop: full.narrow(self.dim, start, stop - start)).clone(
            memory_format=torch.contiguous_format
        )

    def read(self, narrow: Callable[[int, int], Tensor]) -> Tensor:
        """This rank's slice, where `narrow(start, stop)` gives a range along `dim`; touches nothing else."""
        pieces = [narrow(start, stop) for start, stop in self.ranges()]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        """The full tensor from every rank's slice, in the group's order."""
        full = self._empty_full(shards[0])
        for index, shard in enumerate(shards):
            self.place(full, shard, index)
        return full

    def place(self, full: Tensor, shard: Tensor, index: int | None = None) -> None:
        """Writes a rank's slice into the full tensor."""
        offset = 0
        for start, stop in self.ranges(index):
            full.narrow(self.dim, start, stop - start).copy_(shard.narrow(self.dim, offset, stop - start))
            offset += stop - start

    def spread(self, shard: Tensor) -> Tensor:
        """This rank's slice in a full tensor of zeros."""
        full = self._empty_full(shard).zero_()
        self.place(full, shard)
        return full

    def _empty_full(self, shard: Tensor) -> Tensor:
        shape = list(shard.shape)
        shape[self.dim] = sum(self.parts)
        return shard.new_empty(shape)


def make_cut(
    name: str, full: int, dim: int, over: CutOver, groups: Groups, *,
    parts: Parts = 1, units: Sequence[Units] | None = None, block: int = 1,
) -> Cut:  # fmt: skip
    """The cut of `full` elements along `dim`, or a refusal with the numbers.

    Args:
        name: the parameter, for messages.
        parts: how many equal matrices the weight holds along `dim`, or their sizes.
        units: for each part; its elements when None. A part with fewer units than ranks that may be shared is
            replicated between neighbours when its units divide the ranks.
        block: elements of one quantization block along `dim`; a slice holds whole blocks.

    Raises:
        PlanError: when a part does not divide.
    """
    size = groups.of(over).size
    where = f"{name}: {{}} over the {size} ranks of the {over} group (dim {dim}, {full} elements)"
    sizes = _part_sizes(name, full, parts)
    counts = []
    for at, part in enumerate(sizes):
        unit = Units(part, "features") if units is None else units[at]
        if unit.count % size == 0:
            count = size
        elif unit.shared and size % unit.count == 0:
            count = unit.count
        else:
            also = f", or one that divides {size}" if unit.shared else ""
            raise PlanError(
                f"cannot cut {where.format(f'{unit.count} {unit.name}')}; allowed: a multiple of {size}{also}"
            )
        if part // count % block:
            raise PlanError(
                f"cannot cut {where.format(f'{part} features')}: {part // count} per rank is not a multiple of the "
                f"weight's quantization block of {block}; take fewer ranks, or leave the module whole"
            )
        counts.append(count)
    index = groups.of(over).index
    return Cut(dim, over, sizes, tuple(counts), size, index)


def _part_sizes(name: str, full: int, parts: Parts) -> tuple[int, ...]:
    if isinstance(parts, int):
        if full % parts:
            raise PlanError(f"cannot cut {name}: {full} features do not hold {parts} equal parts; give their sizes")
        return (full // parts,) * parts
    if sum(parts) != full:
        raise PlanError(
            f"cannot cut {name}: packed sizes {parts} add up to {sum(parts)}, the weight has {full}; give the sizes of "
            "its matrices, in features"
        )
    return parts
