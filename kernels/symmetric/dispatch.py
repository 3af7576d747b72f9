"""Which kernel runs at which size: an explicit table, and the choice from it.

A choice decides which protocol a rank takes part in, so it may depend only on facts that are equal on all ranks of the
group: the table, the device name, the number of ranks, the shape and the dtype. Nothing is tuned at run time.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from ...errors import OptionError
from ...strict_json import StrictJson, check_integer, show
from . import barrier as _barrier
from . import one_shot as _one_shot
from . import two_shot as _two_shot
from .operands import Launch, Operands
from .workspace import Workspace

KERNELS = ("one_shot", "two_shot", "barrier", "functional")
SOURCES = ("measured", "derived", "published")
TABLE_VARIABLE = "TPFUSE_DISPATCH_TABLE"
#: The least and the most that the numbers of an entry may be.
_LEAST = {"world": 1, "hidden": 1, "rows": 0, "split": 1, "warps": 0, "registers": 0}
MAX_SIZE = 1 << 40
_ALLOWED = {"kernel": KERNELS, "source": SOURCES, "split": (1, 2, 4, 8), "warps": (0, 1, 2, 4, 8, 16, 32)}


@dataclass(frozen=True)
class Entry(StrictJson):
    """Up to `rows` rows of `hidden` 16-bit elements (a float32 row counts as one twice as wide) run `kernel`.

    `split`, `warps`, `registers`: how, as the kernel's function takes them. `source`: "measured" (on virtual ranks or
    links, as the table's note says), "derived" from bytes and latency, or "published" by others. `device` is the name
    torch.cuda gives, or "*".
    """

    device: str
    world: int
    hidden: int
    rows: int
    kernel: str
    split: int = 1
    warps: int = 0
    registers: int = 0
    source: str = "measured"

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            check_integer(f"Entry.{name}", getattr(self, name), least, MAX_SIZE, OptionError)
        for name, allowed in _ALLOWED.items():
            given = getattr(self, name)
            if given not in allowed:
                raise OptionError(f"Entry.{name}={show(given)}; allowed: {', '.join(map(str, allowed))}")


@dataclass(frozen=True)
class Table(StrictJson):
    """Entries in any order, no two for one size. `digest` is what ranks compare."""

    entries: list[Entry] = field(default_factory=list)
    note: str = ""

    def __post_init__(self) -> None:
        sizes = Counter((e.device, e.world, e.hidden, e.rows) for e in self.entries)
        for (device, world, hidden, rows), count in sizes.items():
            if count > 1:
                raise OptionError(
                    f"Table.entries: {count} entries for device {show(device)}, world {world}, hidden {hidden}, rows "
                    f"{rows}; allowed: one for each size"
                )

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json(sort_keys=True).encode()).hexdigest()[:16]

    def choose(self, device: str, world: int, hidden: int, itemsize: int, rows: int) -> Entry:
        """The entry for a call. Of the device's own entries, or else those for "*", the ones with the hidden size
        nearest on a logarithmic scale; of those the smallest `rows` that holds the call. Past the last: functional."""
        width = hidden * itemsize / 2
        here = [e for e in self.entries if e.world == world and e.device == device]
        here = here or [e for e in self.entries if e.world == world and e.device == "*"]
        if here:
            nearest = min(here, key=lambda e: (abs(math.log(e.hidden / width)), e.hidden)).hidden
            # between two measured widths, compare bytes rather than rows
            scaled = rows * max(width / nearest, 1.0)
            enough = [e for e in here if e.hidden == nearest and e.rows >= scaled]
            if enough:
                return min(enough, key=lambda e: e.rows)
        return Entry(device, world, hidden, rows, "functional", source="derived")


def bind(entry: Entry, op: Operands, ws: Workspace, batch_invariant: bool = False) -> Launch | None:
    """The entry's kernel on these operands; None for the functional path, or where the workspace is too small. A split
    or a register limit that does not suit the shape is dropped, and a one-shot too large becomes a two-shot.

    `batch_invariant`: whole rows in one shot whatever the number of rows (None when a slot does not hold them), because
    both a split and a second trip round differently.
    """
    if batch_invariant:
        return _one_shot.one_shot(op, ws) if _one_shot.fits(op, ws, 1) else None
    kernel = entry.kernel
    if kernel == "one_shot":
        split = entry.split if _one_shot.fits(op, ws, entry.split) else 1
        if _one_shot.fits(op, ws, split):
            warps = entry.warps if split == entry.split else 0
            return _one_shot.one_shot(op, ws, split, _no_more(warps, op, split), entry.registers)
        kernel = "two_shot"
    if kernel == "two_shot" and _two_shot.fits(op, ws):
        return _two_shot.two_shot(op, ws, _no_more(entry.warps, op, 1), entry.registers)
    if kernel == "barrier" and _barrier.fits(op, ws):
        return _barrier.barrier(op, ws, _no_more(entry.warps, op, 1), entry.registers)
    return None


def runs_exactly(entry: Entry, op: Operands, ws: Workspace) -> bool:
    """Whether `bind` would run just what `entry` says on these operands; for measuring, where a substitute misleads."""
    if entry.kernel == "one_shot":
        return _one_shot.fits(op, ws, entry.split) and entry.warps <= _one_shot.default_warps(op, entry.split)
    fits = {"two_shot": _two_shot.fits, "barrier": _barrier.fits}.get(entry.kernel)
    return fits is not None and fits(op, ws) and entry.warps <= _one_shot.default_warps(op, 1)


def _no_more(warps: int, op: Operands, split: int) -> int:
    """An entry may come from a wider row; more threads than 16-byte pieces would read some twice."""
    return min(warps, _one_shot.default_warps(op, split))


@lru_cache(maxsize=4096)
def choose(device: str, world: int, hidden: int, itemsize: int, rows: int) -> Entry:
    """`default_table().choose(...)`, looked up once for each size."""
    return default_table().choose(device, world, hidden, itemsize, rows)


@lru_cache
def default_table() -> Table:
    """The table of this process: the file that TPFUSE_DISPATCH_TABLE names, else the shipped one."""
    from .tables import SHIPPED

    path = os.environ.get(TABLE_VARIABLE, "")
    if not path:
        return SHIPPED
    try:
        return Table.from_json(Path(path).read_bytes())
    except (OSError, OptionError) as error:
        raise OptionError(f"{TABLE_VARIABLE}={path} is no dispatch table: {error}") from error
