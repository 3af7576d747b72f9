"""Whether the inputs that a plan takes for equal on all ranks are: a digest of their values at the first run.

A gate in front of a sum must be the same on all ranks. The graph shows what it is made of; what the inputs hold it does
not show. So the ranks compare digests of those inputs together with their plans: where they differ, all of them
run the graph with what they send as it was written.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from .._torch_private import local_of
from .plan_check import Ranks, Record

#: Larger tensors are weighed on their device, this many bytes at a time; smaller ones are hashed.
_CHUNK = 1 << 24


def with_values(plans: Mapping[Ranks, Record], args: Sequence[Any]) -> dict[Ranks, Record]:
    """`plans`, each with a digest of those of `args` that it relies on."""
    known: dict[int, str] = {}
    found = {}
    for group, record in plans.items():
        for index in {index for step in record.steps for index in step.relies}:
            if index not in known:
                known[index] = _digest(args[index]) if 0 <= index < len(args) else str(uuid.uuid4())
        # Step by step: two ranks may take the same values for each other's steps.
        words = [known[index] for step in record.steps for index in step.relies]
        counts = [f"{len(step.relies)} {step.shapes}" for step in record.steps]
        told = words or any(step.shapes for step in record.steps)
        values = hashlib.sha256("\0".join(counts + words).encode()).hexdigest()[:16] if told else ""
        found[group] = replace(record, values=values)
    return found


def _digest(value: Any) -> str:
    if isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, DTensor):
        value = local_of(value)  # where it is sharded, this rank's part, which no other has
    if not isinstance(value, torch.Tensor) or type(value) not in (torch.Tensor, torch.nn.Parameter):
        return str(uuid.uuid4())
    with torch.no_grad():
        plain = value.detach().resolve_conj().resolve_neg().contiguous()
        data = plain.reshape(-1).view(torch.uint8)
        if data.numel() <= _CHUNK or data.device.type == "cpu":
            words = hashlib.blake2b(data.cpu().numpy().data).hexdigest()
        else:
            words = str(_weighed(data))
    return f"{plain.dtype} {words}"


def _weighed(data: torch.Tensor) -> int:
    """A sum of bytes, each multiplied by a number that depends on where it stands."""
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, data.numel(), _CHUNK):
        part = data[start : start + _CHUNK].to(torch.int64)
        place = torch.arange(start + 1, start + 1 + part.numel(), device=data.device)
        total = total * 1_000_003 + (part * (place * 2_654_435_761 % 2_147_483_647)).sum()
    return int(total)
