"""What the ranks of a group tell each other before they share memory, and the conclusion that all of them draw.

Facts travel as JSON in blocks of one size over the group itself: nothing is unpickled, and the memory for it is taken
before anything large is allocated, so that a rank that runs out of memory can still say so.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ..errors import PeerTimeoutError
from .symmetric.dispatch import default_table

OVERLAP_VARIABLE = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
BLOCK = 4096  # bytes of one rank's word: two for its length, then JSON
WORDS = 600  # most characters of an error's text; JSON may take six bytes for one


def facts_of(device: torch.device, slot_bytes: int, late: bool) -> dict[str, Any]:
    """This rank's. `late`: whether a kernel of this rank gave up waiting for a peer of the group."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "device": properties.name,
        "uuid": str(getattr(properties, "uuid", device.index)),
        "multiprocessors": properties.multi_processor_count,
        "capability": list(torch.cuda.get_device_capability(device)),
        "torch": torch.__version__,
        "table": default_table().digest,
        "slot_bytes": slot_bytes,
        "overlap": os.environ.get(OVERLAP_VARIABLE) == "1",
        "late": late,
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
        return sorted({str(fact.get(key)) for fact in facts})

    for rank, fact in enumerate(facts):
        if "error" in fact:
            return f"Rank {rank} of the group could not say what it has ({fact['error']})."
    if len(differing("host")) > 1 or len(differing("boot")) > 1:
        return f"The group spans several hosts ({', '.join(differing('host'))}); the kernels need peer access."
    for key in ("device", "torch", "table", "slot_bytes", "overlap_all_reduce_norm"):
        if len(differing(key)) > 1:
            return f"The group's ranks differ in {key} ({', '.join(differing(key))})."
    if tuple(facts[0]["capability"]) < (8, 0):
        return f"{facts[0]['device']} is older than what the kernels are written for (compute capability 8.0)."
    if len(differing("uuid")) < len(facts) and not all(fact["overlap"] for fact in facts):
        return f"Several ranks of the group share one GPU (allowed for tests with {OVERLAP_VARIABLE}=1)."
    return ""


def tried(fn: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What `fn` says, or its error's text under "error": a rank that fails goes on to the next exchange, where its
    peers hear of it."""
    try:
        return fn(*args)
    except Exception as error:  # no peer access, no memory, an old driver
        return {"error": " ".join(f"{type(error).__name__}: {error}".splitlines()[:1])[:WORDS]}


class Exchange:
    """A few words from every rank of `group` to every rank, in rank order. Collective.

    Raises PeerTimeoutError where the group itself fails, as it does when a peer is gone or comes too late.
    """

    def __init__(self, group: Any, group_name: str, device: torch.device):
        on = device if "nccl" in str(dist.get_backend(group)) else torch.device("cpu")
        self.group, self.name = group, group_name
        self.own = torch.zeros(BLOCK, dtype=torch.uint8, device=on)
        self.all = [torch.zeros_like(self.own) for _ in range(dist.get_world_size(group))]

    def __call__(self, word: dict[str, Any]) -> list[dict[str, Any]]:
        text = json.dumps(word).encode()
        if len(text) > BLOCK - 2:
            raise ValueError(f"{len(text)} bytes of facts; allowed: {BLOCK - 2}")
        framed = len(text).to_bytes(2, "little") + text
        self.own[: len(framed)] = torch.frombuffer(bytearray(framed), dtype=torch.uint8)
        try:
            dist.all_gather(self.all, self.own, group=self.group)
            blocks = [bytes(block.tolist()) for block in self.all]
        except RuntimeError as error:
            ranks = dist.get_process_group_ranks(self.group)
            raise PeerTimeoutError(
                f"group {self.name!r} of ranks {ranks}, rank {dist.get_rank()}: its ranks could not meet to set up "
                f"symmetric memory: {str(error).splitlines()[0]}",
                rank=dist.get_rank(), group=ranks,
            ) from error  # fmt: skip
        return [json.loads(block[2 : 2 + int.from_bytes(block[:2], "little")]) for block in blocks]
