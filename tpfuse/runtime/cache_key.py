"""What a compiled graph depends on besides the graph: the key under which Inductor's caches keep it."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .._torch_private import all_group_members
from ..kernels.entry import why_not
from ..options import Options
from ..passes.facts.groups import own_rank

_PACKAGE = Path(__file__).resolve().parents[1]


def cache_key(options: Options) -> bytes:
    """A digest that changes whenever the rewritten graph could: sources of tpfuse, options, policy, versions, own rank,
    world size, members of the process groups, device architecture."""
    facts: dict[str, Any] = {
        "sources": _SOURCES,
        "options": _canonical(options),
        "torch": torch.__version__,
        "python": sys.version,
        "triton": _triton_version(),
        # Ranks may share a cache folder and trace the same graph; which rows are a rank's own is in the rewritten one.
        "rank": own_rank(),
        "world": dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1,
        "groups": sorted(all_group_members().items()),
        "runs": _how_groups_communicate(),
        "device": _device(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode()).digest()


def _canonical(options: Options) -> dict[str, Any]:
    return {
        "policy": options.policy.to_json() if options.policy is not None else None,
        "ranks": options.ranks,
        "strict": options.strict,
        "inner": options.inner,
        "rewrites": list(options.rewrites),
        "batch_invariant": options.batch_invariant,
        "as_written": options.as_written,
    }


def _sources() -> list[Path]:
    """Every file of the package. `passes` and `kernels` may be links, which a recursive search does not follow."""
    return sorted({path for folder in (".", "passes", "kernels") for path in (_PACKAGE / folder).rglob("*.py")})


def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(str(path.relative_to(_PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


#: Taken once, on import: a file edited later is not what this process runs, and what it compiles must not be taken for
#: the work of the new source.
_SOURCES = _source_digest()


def _how_groups_communicate() -> list[tuple[str, str]]:
    """What the report's word on symmetric memory depends on, for it is kept with the compiled graph. Not what a group
    found out when it first met: the key of a graph would be another one after its first call."""
    return [(name, why_not(name, "cuda", found_out=False)) for name in sorted(all_group_members())]


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    return f"{torch.cuda.get_device_name()} {torch.cuda.get_device_capability()}"


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__
