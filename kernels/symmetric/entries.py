"""A dispatch table: which kernel runs at which size, and how. Data only."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass, field

from ...errors import OptionError
from ...strict_json import StrictJson, check_integer, show
from .registry import KERNELS

SOURCES = ("measured", "derived", "published")
#: The least and the most that the numbers of an entry may be.
_LEAST = {"world": 1, "hidden": 1, "rows": 0, "split": 1, "warps": 0, "registers": 0}
MAX_SIZE = 1 << 40
_ALLOWED = {
    "kernel": (*KERNELS, "functional"), "source": SOURCES, "split": (1, 2, 4, 8), "warps": (0, 1, 2, 4, 8, 16, 32),
}  # fmt: skip


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
