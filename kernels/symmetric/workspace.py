"""The memory that the ranks of one group share, and the state that says which part of it is in use.

One `Workspace` a rank. `buffer` is symmetric: every rank can address every other rank's. Its 32-bit words are

    3 slots of slot_words          written by peers, read and emptied by the owner (one-shot and two-shot, `lamport`)
    2 stages of stage_words        written by the owner, read by peers              (barrier kernel)
    CHANNELS x world               flags: word [block][source], written by peers    (barrier kernel); 1 before that
    copy_words, COPY_FLAGS         the peer's rows and their flags, of 2 ranks, written by the peer (`copies`); 0 before

`state` is the owner's alone: CHANNELS pairs of an epoch (always equal to each other; the slot in the low two bits, the
count of calls above) and a dead mark (not 0 once a kernel of this rank gave up a wait; the rank sends only NaN from
its next call on), then two sets of inboxes through which the programs of one row talk to each other, then the count of
calls by `copies`. At rest every word of slots and inboxes holds SENTINEL. `watch` says how long to wait for peers, and
tells the host of those that did not come (see `timeout`).

The kernels take a Workspace as an argument and know nothing of process groups: `virtual_ranks` makes one for each of
several ranks that live on a single device, or on CPU tensors in shared memory. docs/kernels.md has the protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import OpError
from ..words import CHANNELS, COPIES, COPY_FLAGS, INBOXES, MARKS, MOST_RANKS, SENTINEL, STATE_WORDS
from .timeout import MARK, new_watch

SLOTS = 3
DEFAULT_SLOT_BYTES = 16 << 20
COPY_BYTES = 64 << 20  # of a copy slot, where slots are of the default size


@dataclass(frozen=True, eq=False)
class Workspace:
    """One rank's view. Made by `from_buffers` alone, which tells the watch where the dead marks are.

    `peers`: int64 [world], addresses of all ranks' buffers; `max_blocks`: most programs that may be resident at once,
    lowered by a harness whose ranks share one device; `owner` keeps the mapping alive; `device_name`: under which name
    dispatch tables are searched, where that is not torch.cuda's; `remote`: of two ranks, the other's buffer as a tensor
    of this process, where it may copy to it; `copy_words`: of the copy slot, or 0 where there is none."""

    rank: int
    world: int
    slot_words: int
    stage_words: int
    max_blocks: int
    buffer: Tensor
    peers: Tensor
    state: Tensor
    watch: Tensor
    owner: Any = None
    device_name: str = ""
    remote: Tensor | None = None
    copy_words: int = 0

    @property
    def slots_end(self) -> int:
        """Where the stages begin."""
        return SLOTS * self.slot_words

    @property
    def flags_offset(self) -> int:
        return SLOTS * self.slot_words + 2 * self.stage_words

    @property
    def copies_offset(self) -> int:
        return self.flags_offset + CHANNELS * self.world


def stage_words_of(slot_words: int, world: int) -> int:
    """A stage holds one rank's rows, a slot those of all ranks. Rounded up to 16 bytes."""
    return -(-slot_words // world // 4) * 4


def copy_words_of(slot_words: int, world: int) -> int:
    """A copy slot holds one rank's rows: as many as the slots do, or COPY_BYTES, less where slots are small."""
    return 0 if world != 2 else max(slot_words // 2, min(4 * slot_words, COPY_BYTES // 4)) // 4 * 4


def buffer_words(slot_words: int, world: int, copies: int = 0) -> int:
    """`copies`: the words of a copy slot, or 0 for none."""
    shared = SLOTS * slot_words + 2 * stage_words_of(slot_words, world) + CHANNELS * world
    return shared + (copies + COPY_FLAGS if copies else 0)


def initialise(buffer: Tensor, state: Tensor, slot_words: int, copies: int = 0) -> None:
    """Bring buffer and state to rest. Every rank must have done so before any rank launches a kernel."""
    buffer[: SLOTS * slot_words].fill_(SENTINEL)
    buffer[SLOTS * slot_words :].fill_(1)
    if copies:
        buffer[-COPY_FLAGS:].zero_()
    state.zero_()
    state[INBOXES:COPIES].fill_(SENTINEL)


def from_buffers(
    rank: int, addresses: Sequence[int], buffer: Tensor, state: Tensor, slot_words: int, max_blocks: int, owner: Any,
    peers: Tensor | None = None, watch: Tensor | None = None, remote: Tensor | None = None, copies: int = 0,
) -> Workspace:  # fmt: skip
    """A workspace over memory that exists; `addresses[q]` is where this process sees rank q's buffer. `peers`: int64
    [world] memory to keep them in, else allocated; likewise `watch`. `remote`, `copies`: as `remote`, `copy_words`
    in `Workspace`."""
    world = len(addresses)
    if world > MOST_RANKS:
        raise OpError(f"a workspace of {world} ranks; allowed: {MOST_RANKS}, since a watch has a word for each")
    if (words := buffer_words(slot_words, world, copies)) >= 1 << 31:
        raise OpError(f"a workspace of {4 * words:,} bytes is more than kernels address")
    listed = torch.tensor(list(addresses), dtype=torch.int64)
    peers = listed.to(buffer.device) if peers is None else peers.copy_(listed)
    stage = stage_words_of(slot_words, world)
    watch = new_watch(buffer.device) if watch is None else watch
    watch[MARK : MARK + 2] = torch.tensor([state[MARKS].data_ptr()]).view(torch.int32)
    return Workspace(
        rank, world, slot_words, stage, min(max_blocks, CHANNELS), buffer, peers, state, watch, owner, remote=remote,
        copy_words=copies,
    )  # fmt: skip


def virtual_ranks(
    world: int, device: torch.device | str, max_blocks: int, slot_bytes: int = DEFAULT_SLOT_BYTES
) -> list[Workspace]:
    """The workspaces of `world` ranks that share one device, each with all buffers. `max_blocks` must keep the programs
    of all ranks together resident at once, or they wait for each other forever."""
    slot_words = slot_bytes // 16 * 4
    copies = copy_words_of(slot_words, world)
    size = buffer_words(slot_words, world, copies)
    buffers = [torch.empty(size, dtype=torch.int32, device=device) for _ in range(world)]
    states = [torch.empty(STATE_WORDS, dtype=torch.int32, device=device) for _ in range(world)]
    for buffer, state in zip(buffers, states, strict=True):
        initialise(buffer, state, slot_words, copies)
    addresses = [buffer.data_ptr() for buffer in buffers]
    return [
        from_buffers(
            rank, addresses, buffers[rank], states[rank], slot_words, max_blocks, owner=tuple(buffers),
            remote=buffers[1 - rank] if copies else None, copies=copies,
        )
        for rank in range(world)
    ]  # fmt: skip
