"""The shipped dispatch table, from benchmarks/results/kernels_linked_h200.json (2 GPUs) and kernels_tune_h200.json
(virtual ranks), by `benchmarks/entries.py` and `tune`; see docs/performance.md for what each source means.

"NVIDIA H200" is for GPUs with links. 2 ranks: measured over NVLink up to 128 rows; more rows run as two H100s run them
best, because the kernels of such calls have changed since. 4 ranks: measured over NVLink up to 8192 rows, in
kernels_linked_h200_x4.json. 8 ranks: how to run the one-shot is measured (on virtual ranks), where it ends is derived:
at 220 kB of one rank's tensor, where the smaller traffic of the two-shot outweighs its second trip over NVLink. Past
what was measured the largest size's kernel goes on, in pieces that fit the workspace: with 4 ranks the two-shot is
ahead of a plain all-reduce and a norm at every size up to 8192 rows. (Two ranks move as much either way.)
"virtual NVIDIA H200" is for virtual ranks on one such GPU, which have no other all-reduce: measured up to 512 rows,
with the kernels of then, and more rows run as 512 do. The H100's entries are those of the means over several runs
(kernels_linked_h100.json up to 4096 rows, kernels_h100.json at hidden 4096 and 8192 up to 128 rows); more rows run as
the last measured size does, and those for 4 and 8 of them are the H200's.
"*" is for every other device.

3, 5, 6 and 7 ranks have been measured nowhere. Of each device they take the entries of the nearest number of ranks on a
logarithmic scale, as a width between two measured ones does: 3 and 5 those of 4, 6 and 7 those of 8, as "derived".
"""

from __future__ import annotations

import dataclasses
import math

from .entries import Entry, Table
from .registry import KERNELS, worlds

H100 = "NVIDIA H100 80GB HBM3"

_LINKED = [
    Entry("NVIDIA H200", 2, 2048, 1, "one_shot", warps=4),
    Entry("NVIDIA H200", 2, 2048, 128, "one_shot", warps=8),
    Entry("NVIDIA H200", 2, 2048, 131072, "one_shot", warps=8, source="derived"),
    Entry("NVIDIA H200", 2, 4096, 8, "one_shot", warps=8),
    Entry("NVIDIA H200", 2, 4096, 128, "one_shot", warps=16),
    Entry("NVIDIA H200", 2, 4096, 65536, "one_shot", warps=16, source="derived"),
    Entry("NVIDIA H200", 2, 7168, 1, "one_shot", split=8, warps=4),
    Entry("NVIDIA H200", 2, 7168, 4, "one_shot", split=4, warps=8),
    Entry("NVIDIA H200", 2, 7168, 16, "one_shot", split=8, warps=4),
    Entry("NVIDIA H200", 2, 7168, 32, "one_shot", split=4, warps=8),
    Entry("NVIDIA H200", 2, 7168, 128, "one_shot", warps=32),
    Entry("NVIDIA H200", 2, 7168, 37449, "one_shot", warps=32, source="derived"),
    Entry("NVIDIA H200", 2, 8192, 1, "one_shot", split=8, warps=4),
    Entry("NVIDIA H200", 2, 8192, 4, "one_shot", split=4, warps=8),
    Entry("NVIDIA H200", 2, 8192, 16, "one_shot", split=8, warps=4),
    Entry("NVIDIA H200", 2, 8192, 32, "one_shot", split=4, warps=8),
    Entry("NVIDIA H200", 2, 8192, 128, "one_shot", warps=32),
    Entry("NVIDIA H200", 2, 8192, 32768, "one_shot", warps=32, source="derived"),
    Entry("NVIDIA H200", 4, 2048, 1, "one_shot", split=4, warps=2),
    Entry("NVIDIA H200", 4, 2048, 32, "one_shot", warps=8),
    Entry("NVIDIA H200", 4, 2048, 8192, "two_shot", warps=8),
    Entry("NVIDIA H200", 4, 2048, 131072, "two_shot", warps=8, source="derived"),
    Entry("NVIDIA H200", 4, 4096, 8, "one_shot", split=8, warps=2),
    Entry("NVIDIA H200", 4, 4096, 8192, "two_shot", warps=16),
    Entry("NVIDIA H200", 4, 4096, 65536, "two_shot", warps=16, source="derived"),
    Entry("NVIDIA H200", 4, 7168, 8, "one_shot", split=8, warps=4),
    Entry("NVIDIA H200", 4, 7168, 8192, "two_shot", warps=32),
    Entry("NVIDIA H200", 4, 7168, 37449, "two_shot", warps=32, source="derived"),
    Entry("NVIDIA H200", 4, 8192, 8, "one_shot", split=8, warps=4),
    Entry("NVIDIA H200", 4, 8192, 128, "two_shot", warps=16),
    Entry("NVIDIA H200", 4, 8192, 8192, "two_shot", warps=32),
    Entry("NVIDIA H200", 4, 8192, 32768, "two_shot", warps=32, source="derived"),
    Entry("NVIDIA H200", 8, 2048, 1, "one_shot", split=4, warps=2),
    Entry("NVIDIA H200", 8, 2048, 8, "one_shot", warps=8),
    Entry("NVIDIA H200", 8, 2048, 32, "one_shot", warps=4),
    Entry("NVIDIA H200", 8, 2048, 53, "one_shot", warps=8, source="derived"),
    Entry("NVIDIA H200", 8, 2048, 131072, "two_shot", source="derived"),
    Entry("NVIDIA H200", 8, 4096, 1, "one_shot", split=8, warps=2),
    Entry("NVIDIA H200", 8, 4096, 4, "one_shot", split=4, warps=4),
    Entry("NVIDIA H200", 8, 4096, 8, "one_shot", warps=16),
    Entry("NVIDIA H200", 8, 4096, 16, "one_shot", warps=8),
    Entry("NVIDIA H200", 8, 4096, 26, "one_shot", warps=16, source="derived"),
    Entry("NVIDIA H200", 8, 4096, 65536, "two_shot", source="derived"),
    Entry("NVIDIA H200", 8, 7168, 4, "one_shot", split=8, warps=4),
    Entry("NVIDIA H200", 8, 7168, 8, "one_shot", split=4, warps=8),
    Entry("NVIDIA H200", 8, 7168, 15, "one_shot", warps=32, source="derived"),
    Entry("NVIDIA H200", 8, 7168, 37449, "two_shot", source="derived"),
    Entry("NVIDIA H200", 8, 8192, 8, "one_shot", split=8, warps=4),
    Entry("NVIDIA H200", 8, 8192, 13, "one_shot", warps=32, source="derived"),
    Entry("NVIDIA H200", 8, 8192, 32768, "two_shot", source="derived"),
]

_VIRTUAL = [
    Entry("virtual NVIDIA H200", 2, 2048, 512, "one_shot", warps=8),
    Entry("virtual NVIDIA H200", 2, 2048, 4096, "one_shot", warps=8, source="derived"),
    Entry("virtual NVIDIA H200", 2, 4096, 1, "one_shot", split=4, warps=4),
    Entry("virtual NVIDIA H200", 2, 4096, 512, "one_shot", warps=16),
    Entry("virtual NVIDIA H200", 2, 4096, 4096, "one_shot", warps=16, source="derived"),
    Entry("virtual NVIDIA H200", 2, 7168, 1, "one_shot", split=8, warps=4),
    Entry("virtual NVIDIA H200", 2, 7168, 8, "one_shot", split=4, warps=8),
    Entry("virtual NVIDIA H200", 2, 7168, 32, "one_shot", warps=16),
    Entry("virtual NVIDIA H200", 2, 7168, 64, "one_shot", warps=32),
    Entry("virtual NVIDIA H200", 2, 7168, 512, "one_shot", warps=16),
    Entry("virtual NVIDIA H200", 2, 7168, 4096, "one_shot", warps=16, source="derived"),
    Entry("virtual NVIDIA H200", 2, 8192, 1, "one_shot", split=4, warps=8),
    Entry("virtual NVIDIA H200", 2, 8192, 4, "one_shot", split=8, warps=4),
    Entry("virtual NVIDIA H200", 2, 8192, 8, "one_shot", split=4, warps=8),
    Entry("virtual NVIDIA H200", 2, 8192, 16, "one_shot", split=8, warps=4),
    Entry("virtual NVIDIA H200", 2, 8192, 512, "one_shot", warps=16),
    Entry("virtual NVIDIA H200", 2, 8192, 4096, "one_shot", warps=16, source="derived"),
    Entry("virtual NVIDIA H200", 4, 2048, 32, "one_shot", warps=8),
    Entry("virtual NVIDIA H200", 4, 2048, 128, "two_shot", warps=8),
    Entry("virtual NVIDIA H200", 4, 2048, 512, "barrier"),
    Entry("virtual NVIDIA H200", 4, 2048, 4096, "barrier", source="derived"),
    Entry("virtual NVIDIA H200", 4, 4096, 8, "one_shot", split=4, warps=4),
    Entry("virtual NVIDIA H200", 4, 4096, 16, "one_shot", warps=16),
    Entry("virtual NVIDIA H200", 4, 4096, 32, "one_shot", warps=8),
    Entry("virtual NVIDIA H200", 4, 4096, 64, "two_shot", warps=16),
    Entry("virtual NVIDIA H200", 4, 4096, 512, "barrier"),
    Entry("virtual NVIDIA H200", 4, 4096, 4096, "barrier", source="derived"),
    Entry("virtual NVIDIA H200", 4, 7168, 4, "one_shot", split=8, warps=4),
    Entry("virtual NVIDIA H200", 4, 7168, 8, "one_shot", split=4, warps=8),
    Entry("virtual NVIDIA H200", 4, 7168, 16, "one_shot", warps=16),
    Entry("virtual NVIDIA H200", 4, 7168, 32, "two_shot", warps=32),
    Entry("virtual NVIDIA H200", 4, 7168, 128, "barrier"),
    Entry("virtual NVIDIA H200", 4, 7168, 512, "two_shot", warps=16),
    Entry("virtual NVIDIA H200", 4, 7168, 4096, "two_shot", warps=16, source="derived"),
    Entry("virtual NVIDIA H200", 4, 8192, 8, "one_shot", split=8, warps=4),
    Entry("virtual NVIDIA H200", 4, 8192, 16, "one_shot", warps=16),
    Entry("virtual NVIDIA H200", 4, 8192, 32, "two_shot", warps=32),
    Entry("virtual NVIDIA H200", 4, 8192, 128, "barrier"),
    Entry("virtual NVIDIA H200", 4, 8192, 512, "two_shot", warps=16),
    Entry("virtual NVIDIA H200", 4, 8192, 4096, "two_shot", warps=16, source="derived"),
    Entry("virtual NVIDIA H200", 8, 2048, 32, "two_shot", warps=8),
    Entry("virtual NVIDIA H200", 8, 2048, 64, "two_shot", warps=4),
    Entry("virtual NVIDIA H200", 8, 2048, 128, "two_shot", warps=8),
    Entry("virtual NVIDIA H200", 8, 2048, 512, "barrier"),
    Entry("virtual NVIDIA H200", 8, 2048, 4096, "barrier", source="derived"),
    Entry("virtual NVIDIA H200", 8, 4096, 1, "one_shot", split=8, warps=2),
    Entry("virtual NVIDIA H200", 8, 4096, 16, "two_shot", warps=16),
    Entry("virtual NVIDIA H200", 8, 4096, 32, "two_shot", warps=8),
    Entry("virtual NVIDIA H200", 8, 4096, 128, "barrier"),
    Entry("virtual NVIDIA H200", 8, 4096, 512, "two_shot", warps=8),
    Entry("virtual NVIDIA H200", 8, 4096, 4096, "two_shot", warps=8, source="derived"),
    Entry("virtual NVIDIA H200", 8, 7168, 1, "one_shot", split=8, warps=4),
    Entry("virtual NVIDIA H200", 8, 7168, 16, "two_shot", warps=32),
    Entry("virtual NVIDIA H200", 8, 7168, 32, "two_shot", warps=16),
    Entry("virtual NVIDIA H200", 8, 7168, 64, "barrier"),
    Entry("virtual NVIDIA H200", 8, 7168, 512, "two_shot", warps=16),
    Entry("virtual NVIDIA H200", 8, 7168, 4096, "two_shot", warps=16, source="derived"),
    Entry("virtual NVIDIA H200", 8, 8192, 1, "one_shot", split=8, warps=4),
    Entry("virtual NVIDIA H200", 8, 8192, 8, "two_shot", warps=16),
    Entry("virtual NVIDIA H200", 8, 8192, 16, "two_shot", warps=32),
    Entry("virtual NVIDIA H200", 8, 8192, 128, "barrier"),
    Entry("virtual NVIDIA H200", 8, 8192, 512, "two_shot", warps=16),
    Entry("virtual NVIDIA H200", 8, 8192, 4096, "two_shot", warps=16, source="derived"),
]

_H100 = [
    Entry(H100, 2, 2048, 4096, "one_shot", warps=8),
    Entry(H100, 2, 2048, 131072, "one_shot", warps=8, source="derived"),
    Entry(H100, 2, 4096, 8, "one_shot", warps=8),
    Entry(H100, 2, 4096, 4096, "one_shot", warps=16),
    Entry(H100, 2, 4096, 65536, "one_shot", warps=16, source="derived"),
    Entry(H100, 2, 7168, 16, "one_shot", split=8, warps=4),
    Entry(H100, 2, 7168, 4096, "one_shot", warps=32),
    Entry(H100, 2, 7168, 37449, "one_shot", warps=32, source="derived"),
    Entry(H100, 2, 8192, 16, "one_shot", split=8, warps=4),
    Entry(H100, 2, 8192, 4096, "one_shot", warps=32),
    Entry(H100, 2, 8192, 32768, "one_shot", warps=32, source="derived"),
    *(dataclasses.replace(entry, device=H100, source="derived") for entry in _LINKED if entry.world > 2),
    Entry(f"virtual {H100}", 2, 4096, 1, "one_shot", split=4, warps=4),
    Entry(f"virtual {H100}", 2, 4096, 8, "one_shot", warps=8),
    Entry(f"virtual {H100}", 2, 4096, 128, "one_shot", warps=16),
    Entry(f"virtual {H100}", 2, 4096, 4096, "one_shot", warps=16, source="derived"),
    Entry(f"virtual {H100}", 2, 8192, 8, "one_shot", split=4, warps=8),
    Entry(f"virtual {H100}", 2, 8192, 64, "one_shot", warps=16),
    Entry(f"virtual {H100}", 2, 8192, 128, "one_shot", warps=32),
    Entry(f"virtual {H100}", 2, 8192, 4096, "one_shot", warps=32, source="derived"),
    Entry(f"virtual {H100}", 4, 4096, 1, "one_shot", split=4, warps=4),
    Entry(f"virtual {H100}", 4, 4096, 8, "one_shot", split=8, warps=2),
    Entry(f"virtual {H100}", 4, 4096, 64, "two_shot", warps=16),
    Entry(f"virtual {H100}", 4, 4096, 128, "barrier"),
    Entry(f"virtual {H100}", 4, 4096, 4096, "barrier", source="derived"),
    Entry(f"virtual {H100}", 4, 8192, 8, "one_shot", split=8, warps=4),
    Entry(f"virtual {H100}", 4, 8192, 128, "barrier"),
    Entry(f"virtual {H100}", 4, 8192, 4096, "barrier", source="derived"),
    Entry(f"virtual {H100}", 8, 4096, 1, "one_shot", split=8, warps=2),
    Entry(f"virtual {H100}", 8, 4096, 32, "two_shot", warps=16),
    Entry(f"virtual {H100}", 8, 4096, 128, "barrier"),
    Entry(f"virtual {H100}", 8, 4096, 4096, "barrier", source="derived"),
    Entry(f"virtual {H100}", 8, 8192, 1, "one_shot", split=8, warps=4),
    Entry(f"virtual {H100}", 8, 8192, 8, "two_shot", warps=16),
    Entry(f"virtual {H100}", 8, 8192, 128, "barrier"),
    Entry(f"virtual {H100}", 8, 8192, 4096, "barrier", source="derived"),
]

_ELSEWHERE = [
    Entry("*", 2, 4096, 1, "one_shot", split=2, warps=8, source="derived"),
    Entry("*", 2, 4096, 1024, "one_shot", warps=16, source="derived"),
    Entry("*", 2, 8192, 1, "one_shot", split=8, warps=4, source="derived"),
    Entry("*", 2, 8192, 8, "one_shot", split=4, warps=8, source="derived"),
    Entry("*", 2, 8192, 512, "one_shot", warps=16, source="derived"),
    Entry("*", 4, 4096, 8, "one_shot", split=4, warps=4, source="derived"),
    Entry("*", 4, 4096, 32, "one_shot", warps=8, source="derived"),
    Entry("*", 4, 4096, 97, "one_shot", warps=16, source="derived"),
    Entry("*", 4, 4096, 1024, "two_shot", source="derived"),
    Entry("*", 4, 8192, 8, "one_shot", split=8, warps=4, source="derived"),
    Entry("*", 4, 8192, 32, "one_shot", warps=16, source="derived"),
    Entry("*", 4, 8192, 48, "one_shot", warps=32, source="derived"),
    Entry("*", 4, 8192, 512, "two_shot", source="derived"),
    Entry("*", 8, 4096, 1, "one_shot", split=8, warps=2, source="derived"),
    Entry("*", 8, 4096, 26, "one_shot", warps=16, source="derived"),
    Entry("*", 8, 4096, 1024, "two_shot", source="derived"),
    Entry("*", 8, 8192, 8, "one_shot", split=8, warps=4, source="derived"),
    Entry("*", 8, 8192, 13, "one_shot", warps=32, source="derived"),
    Entry("*", 8, 8192, 512, "two_shot", source="derived"),
]


def _between(entries: list[Entry]) -> list[Entry]:
    """The entries of one kind of device for the numbers of ranks that it has none for."""
    there = sorted({entry.world for entry in entries})
    nearest = {world: min(there, key=lambda other: abs(math.log(other / world))) for world in worlds()}
    return [
        dataclasses.replace(entry, world=world, source="derived")
        for world, other in nearest.items() if other != world
        for entry in entries if entry.world == other and (
            entry.kernel not in KERNELS or world in KERNELS[entry.kernel].worlds
        )
    ]  # fmt: skip


_GIVEN = [*_LINKED, *_VIRTUAL, *_H100, *_ELSEWHERE]
_DEVICES = dict.fromkeys(entry.device for entry in _GIVEN)

SHIPPED = Table(
    [*_GIVEN, *(more for device in _DEVICES for more in _between([e for e in _GIVEN if e.device == device]))],
    note="H200, H100: 2 linked GPUs, virtual ranks, and crossovers derived from bytes",
)
