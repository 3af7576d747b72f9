"""From a process group to its workspace: the one place of this package that knows torch.distributed.

A group's first call is collective: the ranks tell each other who they are, and every rank draws the same conclusion
from the same facts: a workspace for all, or the same refusal for all. Nothing is allocated inside graph capture.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from .._torch_private import process_group
from ..errors import PeerTimeoutError
from .call import KERNEL_DTYPES, MAX_HIDDEN
from .compat import HAVE_TRITON
from .facts import OVERLAP_VARIABLE, Exchange, facts_of, judge, tried
from .records import Records
from .symmetric.registry import worlds
from .symmetric.timeout import gave_up, raise_if_late, set_timeout
from .symmetric.workspace import DEFAULT_SLOT_BYTES, Workspace, buffer_words, copy_words_of, from_buffers, initialise
from .words import STATE_WORDS

log = logging.getLogger(__name__)


@dataclass
class Member:
    """What the registry holds of one group: its workspace or why there is none, workspaces that were outgrown but may
    still be addressed by captured graphs, the limit that `init_workspace` was given for its waits, and the records of
    its launches, which hold for the workspace in use. `no_copies`: there was no memory for a copy slot."""

    group: Any
    workspace: Workspace | None
    refusal: str
    outgrown: list[Workspace] = field(default_factory=list)
    timeout: float | None = None
    records: Records = field(default_factory=Records)
    no_copies: bool = False

    @property
    def workspaces(self) -> tuple[Workspace, ...]:
        """All of them, the one in use first."""
        return (self.workspace, *self.outgrown) if self.workspace is not None else ()

    def serves(self, slot_bytes: int, copies: bool) -> bool:
        """Whether there is nothing to set up for calls of this size; `copies`: that copy engines may make."""
        ws = self.workspace
        copies = copies and not self.no_copies and ws is not None and ws.world == 2
        return ws is None or (ws.slot_words * 4 >= slot_bytes and (not copies or ws.copy_words > 0))

    def set_timeout(self, seconds: float | None) -> None:
        if seconds is not None:
            self.timeout = seconds
            for ws in self.workspaces:
                set_timeout(ws.watch, seconds)


# The mutable state of this package. Group name -> Member; an entry goes when its process group does.
WORKSPACE_REGISTRY: dict[str, Member] = {}
# Workspaces whose addresses are in CUDA graphs. Nobody tells when such a graph goes, so they are kept for good.
CAPTURED: list[Workspace] = []
# One at a time sets up a group. Not one lock for all groups: ranks may meet two groups in different orders.
_LOCKS: weakref.WeakKeyDictionary[Any, threading.Lock] = weakref.WeakKeyDictionary()


def why_not(
    group_name: str,
    device: torch.device | str,
    hidden: int | None = None,
    dtype: torch.dtype | None = None,
    *,
    found_out: bool = True,
) -> str:
    """One sentence saying why calls of this group cannot use the symmetric-memory kernels; empty when, for all that can
    be known without communicating, they can. Callable on one rank alone; once the group has made a call, the answer is
    what its ranks found out. Without `found_out` a call changes nothing: what is kept on disk, or must be the same on
    all ranks at all times, asks so."""
    device = torch.device(device)
    if not HAVE_TRITON:
        return "Triton is not installed, so all-reduce and norm run as separate operations."
    if device.type != "cuda":
        return f"Tensors are on {device.type}; the symmetric-memory kernels need NVIDIA GPUs with peer access."
    if hidden is not None and (hidden % 8 or not 0 < hidden <= MAX_HIDDEN):
        return f"Hidden size {hidden} is not a multiple of 8 up to {MAX_HIDDEN}, as the symmetric-memory kernels need."
    if dtype is not None and dtype not in KERNEL_DTYPES:
        return f"The dtype is {dtype}; the symmetric-memory kernels take bfloat16, float16 and float32."
    group = process_group(group_name)
    if group is None:
        return f"No process group is named {group_name!r} in this process."
    known = WORKSPACE_REGISTRY.get(group_name)
    if found_out and known is not None and known.group() is group:
        return known.refusal
    return _static_refusal(group)


def _static_refusal(group: Any) -> str:
    """What speaks against a group before anyone is asked; the same on all of its ranks."""
    world = dist.get_world_size(group)
    if world not in (taken := worlds()):
        return f"The group has {world} ranks; the symmetric-memory kernels take {taken[0]} to {taken[-1]}."
    backend = str(dist.get_backend(group))
    if "nccl" in backend:
        return ""
    if "gloo" in backend and os.environ.get(OVERLAP_VARIABLE) == "1":
        return ""
    return f"The group communicates through {backend}; the symmetric-memory kernels need nccl."


def workspace_of(group_name: str, device: torch.device, slot_bytes: int = 0, copies: bool = False) -> Workspace | None:
    """The group's workspace, made at the first call (collective); None where `why_not` has a reason. With `slot_bytes`
    the workspace has at least such slots, and with `copies` that of 2 ranks has a copy slot: one that has not is
    replaced, by all ranks together.

    Raises PeerTimeoutError where it would have to grow and any rank of the group gave up waiting for a peer, and where
    the ranks cannot meet. Two threads at a group's first call meet once.
    """
    group = process_group(group_name)
    if group is None:
        return None
    known = _known(group_name, group)
    if known is None or not known.serves(slot_bytes, copies):
        if _static_refusal(group):
            return None
        if torch.cuda.is_current_stream_capturing():
            if known is None:
                log.warning("first use of group %s inside CUDA-graph capture: taking the functional path", group_name)
                return None
            log.warning("group %s: its memory does not grow inside CUDA-graph capture: going without", group_name)
            return known.workspace
        with _LOCKS.setdefault(group, threading.Lock()):
            known = _known(group_name, group)
            if known is None or not known.serves(slot_bytes, copies):
                known = _set_up(known, group, group_name, device, slot_bytes, copies)
    return known.workspace


def _known(group_name: str, group: Any) -> Member | None:
    """What is held of this very group: another one may have had the name before."""
    known = WORKSPACE_REGISTRY.get(group_name)
    return known if known is not None and known.group() is group else None


def _set_up(
    known: Member | None, group: Any, group_name: str, device: torch.device, slot_bytes: int, copies: bool
) -> Member:
    had = known.workspace if known is not None else None
    slots = max(slot_bytes, DEFAULT_SLOT_BYTES, had.slot_words * 4 if had is not None else 0)
    copies = copies or (had is not None and had.copy_words > 0)
    # On a thread of its own: where CUDA graphs warm up, what this thread allocates comes from the graph's private pool,
    # and the two small tensors of addresses that a rendezvous keeps would be taken for results that nobody returns.
    with ThreadPoolExecutor(1) as aside:
        workspace, refusal = aside.submit(_meet, group, group_name, device, slots, copies).result()
    if refusal:
        log.info("group %s: %s", group_name, refusal)
    if known is None:
        if (former := WORKSPACE_REGISTRY.pop(group_name, None)) is not None:
            _retire(former)
        weakref.finalize(group, _forget, group_name, weakref.ref(group)).atexit = False
        known = WORKSPACE_REGISTRY[group_name] = Member(weakref.ref(group), workspace, refusal)
    elif workspace is not None:
        # Captured graphs may address the old one. (Where there is no memory for a larger one, it stays in use.)
        if known.workspace is not None:
            known.outgrown.append(known.workspace)
        known.workspace = workspace
        known.records.clear()  # they hold for the old one, and are not used any more
        known.set_timeout(known.timeout)
    known.no_copies = copies and (known.workspace is None or not known.workspace.copy_words)
    return known


def note_capture(ws: Workspace) -> None:
    """A CUDA graph now holds addresses of this workspace's memory."""
    if not any(kept is ws for kept in CAPTURED):
        CAPTURED.append(ws)


def limit_waits(group_name: str, timeout: float | None) -> None:
    """Let kernels of this group wait for `timeout` seconds from now on, those of captured graphs and of workspaces that
    were outgrown too; None leaves all as it is."""
    known = WORKSPACE_REGISTRY.get(group_name)
    if known is not None and timeout is not None:
        known.set_timeout(timeout)


@contextmanager
def injected(group_name: str, workspace: Workspace | None) -> Iterator[None]:
    """Within the context, calls of the group use `workspace`, or with None the functional path; nothing is communicated
    or set up. So one process can play every rank of a group in turn, each on its own virtual rank's workspace."""
    before = WORKSPACE_REGISTRY.get(group_name)
    WORKSPACE_REGISTRY[group_name] = Member(weakref.ref(process_group(group_name)), workspace, "")
    try:
        yield
    finally:
        if before is None:
            del WORKSPACE_REGISTRY[group_name]
        else:
            WORKSPACE_REGISTRY[group_name] = before


def check_peers(group_name: str | None = None, boundary: str = "") -> None:
    """Raise PeerTimeoutError if a kernel of this group (of any group: None) gave up waiting for a peer.

    For the host's side of a replayed CUDA graph, which no Python watches: call it after a step, or from a thread. It
    reads pinned memory, costs about a microsecond, and waits neither for the device nor for other ranks. Groups that
    were destroyed are not asked. `boundary`: where in the model the caller is, for the message.
    """
    for name in WORKSPACE_REGISTRY.copy() if group_name is None else (group_name,):
        known = WORKSPACE_REGISTRY.get(name)
        if known is None:
            continue
        for ws in known.workspaces:
            if gave_up(ws.watch) and (group := process_group(name)) is not None and known.group() is group:
                raise_if_late(ws, name, boundary, _ranks(group, ws))


def _ranks(group: Any, ws: Workspace) -> list[int]:
    ranks = dist.get_process_group_ranks(group)
    return ranks if len(ranks) == ws.world else list(range(ws.world))  # injected: virtual ranks


def _forget(group_name: str, group: Any) -> None:
    """The group is gone; a younger one may have taken its name."""
    known = WORKSPACE_REGISTRY.get(group_name)
    if known is not None and known.group == group:
        _retire(WORKSPACE_REGISTRY.pop(group_name))


def _retire(member: Member) -> None:
    """Of a group that is gone: memory that captured graphs address stays, for as long as the process lives."""
    kept = sum(any(ws is used for used in CAPTURED) for ws in member.workspaces)
    if kept:
        log.info("%d workspaces of a destroyed group are kept, because CUDA graphs hold their addresses", kept)


def _meet(
    group: Any, group_name: str, device: torch.device, slot_bytes: int, copies: bool = False
) -> tuple[Workspace | None, str]:
    """Collective: exchange facts, allocate, rendezvous, bring to rest, and only then return, on all ranks alike. A rank
    that fails on the way says so at the next exchange, in which all its peers take part."""
    torch.cuda.set_device(device)  # each thread has its own
    exchange = Exchange(group, group_name, device)
    known = _known(group_name, group)
    late = known is not None and any(gave_up(ws.watch) for ws in known.workspaces)
    copies = copies and dist.get_world_size(group) == 2
    facts = exchange({**tried(facts_of, device, slot_bytes, late), "overlap_all_reduce_norm": copies})
    refusal = judge(facts)
    if gone := [rank for rank, fact in enumerate(facts) if fact.get("late")]:
        check_peers(group_name)
        ranks = dist.get_process_group_ranks(group)
        raise PeerTimeoutError(
            f"group {group_name!r}, rank {dist.get_rank()}: kernels of ranks {[ranks[rank] for rank in gone]} gave up "
            "waiting for a peer, so the group's symmetric memory does not grow; create the group anew.",
            rank=dist.get_rank(), group=ranks,
        )  # fmt: skip
    if refusal:
        return None, refusal
    copied = copy_words_of(slot_bytes // 16 * 4, len(facts)) if copies else 0
    # Of a group that has nothing yet all but the copy slot may find room.
    for words_of_it in (copied, 0) if copied and known is None else (copied,):
        made: dict[str, Any] = {}
        for step in (_allocate, _map):
            words = exchange(tried(step, made, facts, group_name, device, slot_bytes, words_of_it))
            problems = [f"rank {rank}: {word['error']}" for rank, word in enumerate(words) if "error" in word]
            if problems:
                break
        else:
            return made["workspace"], ""
    return None, f"Symmetric memory could not be set up ({problems[0]})."


def _allocate(
    made: dict[str, Any], facts: list[dict], group_name: str, device: torch.device, slot_bytes: int, copies: int
) -> dict:
    """The memory, by each rank for itself. Whoever has none says so before its peers wait for it in `_map`."""
    import torch.distributed._symmetric_memory as symmetric

    slot_words = slot_bytes // 16 * 4
    shared = -(-buffer_words(slot_words, len(facts), copies) // 4) * 4
    # One allocation for everything: memory from here never belongs to a CUDA graph's private pool.
    made["whole"] = symmetric.empty(shared + STATE_WORDS + 2 * len(facts), dtype=torch.int32, device=device)
    made["buffer"], made["state"] = made["whole"][:shared], made["whole"][shared : shared + STATE_WORDS]
    initialise(made["buffer"], made["state"], slot_words, copies)
    torch.cuda.synchronize(device)
    return {}


def _map(
    made: dict[str, Any], facts: list[dict], group_name: str, device: torch.device, slot_bytes: int, copies: int
) -> dict:
    """Each other's memory, together."""
    import torch.distributed._symmetric_memory as symmetric

    whole, buffer, state = made["whole"], made["buffer"], made["state"]
    handle = symmetric.rendezvous(whole, group_name)  # type: ignore[arg-type]  # a str with another name
    peers = whole[len(buffer) + STATE_WORDS :].view(torch.int64)
    blocks = min(fact["multiprocessors"] for fact in facts)
    devices = {fact["uuid"] for fact in facts}
    blocks = blocks * len(devices) // len(facts)  # ranks that share a device share its multiprocessors
    slot_words = slot_bytes // 16 * 4
    other = handle.get_buffer(1 - handle.rank, (len(buffer),), torch.int32) if copies else None
    workspace = from_buffers(
        handle.rank, handle.buffer_ptrs, buffer, state, slot_words, blocks, (whole, handle), peers, remote=other,
        copies=copies,
    )  # fmt: skip
    made["workspace"] = replace(workspace, device_name=facts[0]["device"])  # to ask the driver takes long
    torch.cuda.synchronize(device)
    return {}
