"""From a process group to its workspace: the one place of this package that knows torch.distributed.

A group's first call is collective: the ranks tell each other who they are, and every rank draws the same conclusion
from the same facts: a workspace for all, or the same refusal for all. Nothing is allocated inside graph capture.
"""

from __future__ import annotations

import logging
import os
import socket
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from .._torch_private import process_group
from .add_norm import KERNEL_DTYPES, MAX_HIDDEN
from .compat import HAVE_TRITON
from .symmetric.dispatch import default_table
from .symmetric.timeout import raise_if_late
from .symmetric.workspace import DEFAULT_SLOT_BYTES, STATE_WORDS, Workspace, buffer_words, from_buffers, initialise

log = logging.getLogger(__name__)
OVERLAP_VARIABLE = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
WORLDS = (2, 4, 8)


@dataclass
class Member:
    """What the registry holds of one group: its workspace or why there is none, and workspaces that were outgrown but
    may still be addressed by captured graphs."""

    group: Any
    workspace: Workspace | None
    refusal: str
    outgrown: list[Workspace] = field(default_factory=list)


# The only mutable state of this package: group name -> Member. An entry goes when its process group does.
WORKSPACE_REGISTRY: dict[str, Member] = {}


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
    if world not in WORLDS:
        return f"The group has {world} ranks; the symmetric-memory kernels take 2, 4 or 8."
    backend = str(dist.get_backend(group))
    if "nccl" in backend:
        return ""
    if "gloo" in backend and os.environ.get(OVERLAP_VARIABLE) == "1":
        return ""
    return f"The group communicates through {backend}; the symmetric-memory kernels need nccl."


def _facts(device: torch.device, slot_bytes: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "device": properties.name,
        "uuid": str(getattr(properties, "uuid", device.index)),
        "multiprocessors": properties.multi_processor_count,
        "capability": torch.cuda.get_device_capability(device),
        "torch": torch.__version__,
        "table": default_table().digest,
        "slot_bytes": slot_bytes,
        "overlap": os.environ.get(OVERLAP_VARIABLE) == "1",
    }


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def judge(facts: list[dict[str, Any]]) -> str:
    """The refusal that follows from all ranks' facts, or nothing. Pure, so every rank comes to the same end."""

    def differing(key: str) -> list[Any]:
        return sorted({str(fact[key]) for fact in facts})

    if len(differing("host")) > 1 or len(differing("boot")) > 1:
        return f"The group spans several hosts ({', '.join(differing('host'))}); the kernels need peer access."
    for key in ("device", "torch", "table", "slot_bytes"):
        if len(differing(key)) > 1:
            return f"The group's ranks differ in {key} ({', '.join(differing(key))})."
    if tuple(facts[0]["capability"]) < (8, 0):
        return f"{facts[0]['device']} is older than what the kernels are written for (compute capability 8.0)."
    if len(differing("uuid")) < len(facts) and not all(fact["overlap"] for fact in facts):
        return f"Several ranks of the group share one GPU (allowed for tests with {OVERLAP_VARIABLE}=1)."
    return ""


def workspace_of(group_name: str, device: torch.device, slot_bytes: int = 0) -> Workspace | None:
    """The group's workspace, made at the first call (collective); None where `why_not` has a reason. With `slot_bytes`
    the workspace has at least such slots: a smaller one is replaced, by all ranks together."""
    group = process_group(group_name)
    if group is None:
        return None
    known = WORKSPACE_REGISTRY.get(group_name)
    if known is not None and known.group() is not group:
        known = None
    if known is not None and (known.workspace is None or known.workspace.slot_words * 4 >= slot_bytes):
        return known.workspace
    if _static_refusal(group):
        return None
    if torch.cuda.is_current_stream_capturing():
        log.warning("first use of group %s inside CUDA-graph capture: taking the functional path", group_name)
        return known.workspace if known is not None else None
    # On a thread of its own: where CUDA graphs warm up, what this thread allocates comes from the graph's private pool,
    # and the two small tensors of addresses that a rendezvous keeps would be taken for results that nobody returns.
    with ThreadPoolExecutor(1) as aside:
        slots = max(slot_bytes, DEFAULT_SLOT_BYTES)
        workspace, refusal = aside.submit(_meet, group, group_name, device, slots).result()
    if refusal:
        log.info("group %s: %s", group_name, refusal)
    if known is None:
        weakref.finalize(group, _forget, group_name, weakref.ref(group)).atexit = False
        WORKSPACE_REGISTRY[group_name] = Member(weakref.ref(group), workspace, refusal)
    elif workspace is not None:
        # Captured graphs may address the old one. (Where there is no memory for a larger one, it stays in use.)
        known.outgrown.append(known.workspace)
        known.workspace = workspace
    return WORKSPACE_REGISTRY[group_name].workspace


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
    reads pinned memory, costs about a microsecond, and waits neither for the device nor for other ranks. `boundary`:
    where in the model the caller is, for the message.
    """
    for name, member in list(WORKSPACE_REGISTRY.items()):
        if group_name in (None, name):
            for ws in (member.workspace, *member.outgrown):
                if ws is not None:
                    raise_if_late(ws, name, boundary)


def _forget(group_name: str, group: Any) -> None:
    """The group is gone; a younger one may have taken its name."""
    known = WORKSPACE_REGISTRY.get(group_name)
    if known is not None and known.group == group:
        del WORKSPACE_REGISTRY[group_name]


def _gather(group: Any, value: Any) -> list[Any]:
    out: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(out, value, group=group)
    return out


def _meet(group: Any, group_name: str, device: torch.device, slot_bytes: int) -> tuple[Workspace | None, str]:
    """Collective: exchange facts, allocate, rendezvous, bring to rest, and only then return, on all ranks alike."""
    torch.cuda.set_device(device)  # each thread has its own
    facts = _gather(group, _facts(device, slot_bytes))
    refusal = judge(facts)
    if refusal:
        return None, refusal
    import torch.distributed._symmetric_memory as symmetric

    workspace, problem = None, ""
    try:
        world = len(facts)
        slot_words = slot_bytes // 16 * 4
        shared = -(-buffer_words(slot_words, world) // 4) * 4
        # One allocation for everything: memory from here never belongs to a CUDA graph's private pool.
        whole = symmetric.empty(shared + STATE_WORDS + 2 * world, dtype=torch.int32, device=device)
        buffer, state = whole[:shared], whole[shared : shared + STATE_WORDS]
        peers = whole[shared + STATE_WORDS :].view(torch.int64)
        initialise(buffer, state, slot_words)
        handle = symmetric.rendezvous(whole, group_name)
        blocks = min(fact["multiprocessors"] for fact in facts)
        devices = {fact["uuid"] for fact in facts}
        blocks = blocks * len(devices) // world  # ranks that share a device share its multiprocessors
        workspace = from_buffers(
            handle.rank, handle.buffer_ptrs, buffer, state, slot_words, blocks, (whole, handle), peers
        )
        workspace = replace(workspace, device_name=facts[0]["device"])  # to ask the driver takes long
        torch.cuda.synchronize(device)
    except Exception as error:  # no peer access, no memory, an old driver: all ranks must hear of it
        problem = f"{type(error).__name__}: {error}"
    problems = [p for p in _gather(group, problem) if p]  # also the barrier after which every rank is at rest
    if problems:
        return None, f"Symmetric memory could not be set up ({problems[0].splitlines()[0]})."
    return workspace, ""
