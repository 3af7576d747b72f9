"""Which kernel runs: the choice from a table, and the kernel bound to a call.

A choice decides which protocol a rank takes part in, so it may depend only on facts that are equal on all ranks of the
group: the table, the device name, the number of ranks, the shape and the dtype. Nothing is tuned at run time.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from ...errors import OptionError
from ..call import Call
from .entries import Entry, Table
from .operands import Launch, default_warps
from .registry import KERNELS
from .tables import SHIPPED
from .workspace import Workspace

__all__ = ["TABLE_VARIABLE", "Entry", "Table", "bind", "choose", "default_table", "runs_exactly"]
TABLE_VARIABLE = "TPFUSE_DISPATCH_TABLE"


def bind(entry: Entry, call: Call, ws: Workspace) -> Launch | None:
    """The entry's kernel on these operands; None for the functional path, or where the workspace is too small. A split
    or a register limit that does not suit the shape is dropped, and a one-shot too large becomes a two-shot.

    A `batch_invariant` call: whole rows in one shot whatever the number of rows (None when a slot does not hold
    them), because both a split and a second trip round differently.
    """
    if call.batch_invariant:
        whole = KERNELS["one_shot"]
        return whole.bind(call, ws, 1, 0, 0) if whole.fits(call, ws, 1) else None
    name = entry.kernel
    while name in KERNELS:
        kernel = KERNELS[name]
        for split in (entry.split, 1) if kernel.splits else (1,):
            if kernel.fits(call, ws, split):
                warps = 0 if kernel.splits and split != entry.split else entry.warps
                return kernel.bind(call, ws, split, _no_more(warps, call, split), entry.registers)
        name = kernel.otherwise
    return None


def runs_exactly(entry: Entry, call: Call, ws: Workspace) -> bool:
    """Whether `bind` would run just what `entry` says on these operands; for measuring, where a substitute misleads."""
    kernel = KERNELS.get(entry.kernel)
    if kernel is None:
        return False
    split = entry.split if kernel.splits else 1
    return kernel.fits(call, ws, split) and entry.warps <= default_warps(call, split)


def _no_more(warps: int, call: Call, split: int) -> int:
    """An entry may come from a wider row; more threads than 16-byte pieces would read some twice."""
    return min(warps, default_warps(call, split))


@lru_cache(maxsize=4096)
def choose(device: str, world: int, hidden: int, itemsize: int, rows: int) -> Entry:
    """`default_table().choose(...)`, looked up once for each size."""
    return default_table().choose(device, world, hidden, itemsize, rows)


@lru_cache
def default_table() -> Table:
    """The table of this process: the file that TPFUSE_DISPATCH_TABLE names, else the shipped one."""
    path = os.environ.get(TABLE_VARIABLE, "")
    if not path:
        return SHIPPED
    try:
        return Table.from_json(Path(path).read_bytes())
    except (OSError, OptionError) as error:
        raise OptionError(f"{TABLE_VARIABLE}={path} is no dispatch table: {error}") from error
