"""How long a kernel waits for its peers, and what it leaves behind when it gives up.

Every workspace has a watch: 32-bit words that the device and the host both read without waiting for each other (pinned
host memory; shared memory under the interpreter).

    word 0       how long one wait may last, in units of 2^20 ns (about a millisecond)    written by the host
    word 1       not 0: a wait was given up, so all others end at their next look here    written by either
    words 2, 3   the address of the rank's first dead mark (see `workspace`)              written by the host
    word 8 + q   not 0: data of rank q did not come; 1 + the number of the call           written by the device

A kernel that gives up puts NaN in place of what did not come, says so here, sets the rank's dead marks, and ends. From
its next call on the rank sends NaN only. What peers sent too late stays in the slots, and a later call may take it for
fresh; the rank's own NaN keeps that from being a number, on every rank. The workspace is of no more use, and
`raise_if_late` says so.

A kernel looks at clock and watch once in POLLS polls (of about 0.7 us). It must be so seldom because looks go to the
host, where those of all waiting warps queue up, about a microsecond each: a look makes this rank late in its turn. With
1024 polls and a thousand waiting warps, two ranks of which one had once been late by a millisecond kept each other at a
millisecond a call for ever.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import OptionError, PeerTimeoutError
from ..patience import GONE, LATE, MARK, POLLS
from ..words import MOST_RANKS, POISON

__all__ = [
    "DEFAULT_TIMEOUT", "GONE", "LATE", "MARK", "POISON", "POLLS", "TIMEOUT_VARIABLE", "WATCH_WORDS", "gave_up",
    "late_ranks", "new_watch", "peer_timeout", "raise_if_late", "set_timeout",
]  # fmt: skip
WATCH_WORDS = LATE + MOST_RANKS
TIMEOUT_VARIABLE = "TPFUSE_PEER_TIMEOUT"
DEFAULT_TIMEOUT = 600.0  # seconds, as torch.distributed's own: a peer may be compiling a new shape


def new_watch(device: torch.device | str, timeout: float | None = None) -> Tensor:
    """A watch that kernels on `device` can read and write; `timeout` as for `set_timeout`."""
    pinned = torch.device(device).type == "cuda"
    watch = torch.zeros(WATCH_WORDS, dtype=torch.int32, pin_memory=pinned)
    set_timeout(watch, timeout)
    return watch


def set_timeout(watch: Tensor, seconds: float | None) -> None:
    """How long one wait may last, from now on and in captured graphs too. None: what TPFUSE_PEER_TIMEOUT says, or else
    600. Infinite: for ever. Kernels look at it every ten milliseconds or so. Raises OptionError for what is not a
    positive number."""
    source = f"timeout={seconds!r}"
    if seconds is None:
        given = os.environ.get(TIMEOUT_VARIABLE, "")
        source = f"{TIMEOUT_VARIABLE}={given}"
        try:
            seconds = float(given) if given else DEFAULT_TIMEOUT
        except ValueError:
            seconds = math.nan
    if not seconds > 0:
        raise OptionError(f"{source}; allowed: a positive number of seconds, or inf")
    watch[0] = math.ceil(min(seconds * 1e9 / (1 << 20), 0x7FFFFFFF))


def gave_up(watch: Tensor) -> bool:
    """Whether a kernel ended a wait. Costs less than a microsecond and waits for nothing."""
    return ctypes.c_int32.from_address(watch.data_ptr() + 4 * GONE).value != 0


def late_ranks(watch: Tensor) -> dict[int, int]:
    """Of each rank whose data did not come: the number of the last call that missed it (modulo 2^30)."""
    return {rank: stamp - 1 for rank, stamp in enumerate(watch[LATE:].tolist()) if stamp}


def raise_if_late(ws: Any, group: str, boundary: str = "", ranks: Sequence[int] = ()) -> None:
    """Raise PeerTimeoutError if a kernel on workspace `ws` gave up waiting for a peer. Never waits for the device.

    `group`: what to call the group; `boundary`: where in the model the caller is, if it knows; `ranks`: the global
    ranks of the group, in its order.
    """
    if gave_up(ws.watch):
        raise peer_timeout(ws, group, boundary, ranks)


def peer_timeout(ws: Any, group: str, boundary: str = "", ranks: Sequence[int] = ()) -> PeerTimeoutError:
    """What `raise_if_late` raises: who waited, for whom, and how long."""
    ranks = ranks or range(ws.world)
    missing = {ranks[rank]: call for rank, call in late_ranks(ws.watch).items()}
    seconds = int(ws.watch[0]) * (1 << 20) / 1e9
    whom = ", ".join(f"rank {rank} (call {call})" for rank, call in missing.items()) or "its peers (called off)"
    message = (
        f"group {group!r}, rank {ranks[ws.rank]}{', at ' + boundary if boundary else ''}: waited longer than "
        f"{seconds:.3g} s for {whom}. Results since then hold NaN, and this group's "
        "symmetric memory cannot be used any more: find out what stopped that rank (it may have raised, skipped a "
        f"call, or used another shape), and create the group anew. {TIMEOUT_VARIABLE} sets the limit."
    )
    return PeerTimeoutError(
        message, rank=ranks[ws.rank], group=ranks, boundary=boundary, missing=missing, seconds=seconds
    )
