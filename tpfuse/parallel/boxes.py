"""Where the elements that a rank holds of a cut weight lie in the uncut one. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tpfuse.parallel.cuts import Cut


@dataclass(frozen=True)
class Box:
    """One block of elements: where it starts in the rank's own tensor and in the uncut one, and its sizes.

    Args:
        own: offsets in the tensor that the rank holds.
        full: offsets in the uncut tensor.
        sizes: the same in both.
        copies: how many ranks of the cut's group hold these elements.
    """

    own: tuple[int, ...]
    full: tuple[int, ...]
    sizes: tuple[int, ...]
    copies: int


def boxes(cut: Cut, offsets: Sequence[int], sizes: Sequence[int]) -> list[Box]:
    """The blocks of what a rank holds: one for each matrix of the weight, none that is empty.

    Args:
        cut: how the weight is cut; its slices of all matrices lie side by side along `cut.dim`.
        offsets, sizes: the part of those slices that the rank holds: all of them, or what FSDP has left of them.
    """
    dim, found, at = cut.dim, [], 0
    first, last = offsets[dim], offsets[dim] + sizes[dim]
    for (start, stop), count in zip(cut.ranges(), cut.counts, strict=True):
        begin, end = max(at, first), min(at + stop - start, last)
        if begin < end and all(sizes):
            own, full, shape = [0] * len(sizes), list(offsets), list(sizes)
            own[dim], full[dim], shape[dim] = begin - first, start + begin - at, end - begin
            found.append(Box(tuple(own), tuple(full), tuple(shape), cut.size // count))
        at += stop - start
    return found
