"""`python -m tpfuse doctor`: what will run on this machine, what is missing, and how to get it.

Everything here is looked up in this one process; no group is made and nothing is sent.
"""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import subprocess
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .._torch_private import NEWEST, OLDEST
from ..errors import OptionError

GOOD, WARNING, MISSING = "ok", "note", "missing"


@dataclass(frozen=True)
class Finding:
    """what: the subject. state: "ok", "note" or "missing". remedy: how to get it. fatal: without it no kernel runs."""

    what: str
    state: str
    found: str
    remedy: str = ""
    fatal: bool = False


def examine() -> list[Finding]:
    """Every finding, in the order in which they are shown."""
    found = [_torch(), _triton()]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found.append(_gpus(count))
    if count:
        found += [_links(), _peers(count), _nccl(), _dispatch(torch.cuda.get_device_name(0), count)]
    found.append(_compiler())
    return found


def shown(findings: list[Finding]) -> str:
    """One screen."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="tpfuse doctor", title_justify="left", title_style="bold")
    for column in ("", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(finding.what, finding.state, finding.found, finding.remedy)
    out = io.StringIO()
    console = Console(file=out, width=120, color_system=None)
    console.print(table)
    missing = [finding.what for finding in findings if finding.fatal]
    if missing:
        console.print(f"The kernels cannot run here: {', '.join(missing)}. Fused operations run as the process group's")
        console.print("all-reduce and plain PyTorch, with the same results.")
    else:
        console.print("The kernels can run here, between processes that each have a GPU of their own.")
    return out.getvalue().rstrip()


def _torch() -> Finding:
    allowed = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]} are tested"
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return Finding("torch", GOOD, f"{torch.__version__}, {cuda}; {allowed}")


def _triton() -> Finding:
    if importlib.util.find_spec("triton") is None:
        return Finding("Triton", MISSING, "not installed", "pip install triton (torch's CUDA builds bring it)", True)
    import triton

    return Finding("Triton", GOOD, triton.__version__)


def _gpus(count: int) -> Finding:
    if count == 0:
        why = "torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        remedy = "install torch's CUDA build on a machine with NVIDIA GPUs; check nvidia-smi, CUDA_VISIBLE_DEVICES"
        return Finding("GPUs", MISSING, why, remedy, True)
    names = [torch.cuda.get_device_properties(i) for i in range(count)]
    listed = ", ".join(f"{i}: {p.name}, {p.total_memory / 2**30:.0f} GiB" for i, p in enumerate(names))
    if count == 1:
        return Finding("GPUs", WARNING, listed, "nothing to share with one GPU; more ranks need more GPUs on this host")
    return Finding("GPUs", GOOD, listed)


def _links() -> Finding:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Finding("links", WARNING, "nvidia-smi is not on the path", "it tells whether GPUs have NVLink")
    try:
        asked = subprocess.run([tool, "nvlink", "--status"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("links", WARNING, f"nvidia-smi did not answer ({type(error).__name__})")
    speeds = [line.split(":", 1)[1].strip() for line in asked.stdout.splitlines() if "GB/s" in line]
    if not speeds:
        return Finding("links", WARNING, "no NVLink", "over PCIe the kernels need peer access, and are slower")
    return Finding("links", GOOD, f"NVLink: {len(speeds)} links in all, {speeds[0]} each")


def _peers(count: int) -> Finding:
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    cut = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if not pairs:
        return Finding("peer access", WARNING, "one GPU has no peer")
    if not cut:
        return Finding("peer access", GOOD, f"all {len(pairs)} directed pairs of GPUs")
    remedy = "check that the GPUs share a PCIe root or NVLink, and that no IOMMU or ACS keeps them apart"
    return Finding("peer access", MISSING, f"not between {cut[:4]}", remedy, len(cut) == len(pairs))


def _nccl() -> Finding:
    if not dist.is_nccl_available():
        return Finding("NCCL", MISSING, "not in this build of torch", "use torch's CUDA build for Linux; gloo is slow")
    return Finding("NCCL", GOOD, ".".join(map(str, torch.cuda.nccl.version())))


def _dispatch(device: str, count: int) -> Finding:
    from ..kernels.symmetric.dispatch import TABLE_VARIABLE, default_table

    where = os.environ.get(TABLE_VARIABLE) or "the shipped table"
    try:
        entries = default_table().entries
    except OptionError as error:
        return Finding("dispatch", MISSING, str(error), "write a new table: python -m tpfuse tune")
    own = [entry for entry in entries if entry.device == device]
    used = own or [entry for entry in entries if entry.device == "*"]
    words = []
    for world in sorted({entry.world for entry in used if entry.world <= max(count, 2)}):
        sources = [entry.source for entry in used if entry.world == world]
        words.append(f"{world} ranks: " + ", ".join(f"{sources.count(s)} {s}" for s in dict.fromkeys(sources)))
    whose = f"entries for {device}" if own else f"entries for any device (none for {device})"
    remedy = "" if own else "measure this machine: torchrun --nproc-per-node N -m tpfuse tune"
    return Finding("dispatch", GOOD if own else WARNING, f"{where}, {whose}; {'; '.join(words)}", remedy)


def _compiler() -> Finding:
    if any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return Finding("C++ compiler", GOOD, "found, for Inductor's code on the CPU")
    return Finding("C++ compiler", WARNING, "none on the path", "Inductor on the CPU needs one: install g++")
