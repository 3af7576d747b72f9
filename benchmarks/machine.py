"""What a results file says about the machine it was measured on."""

from __future__ import annotations

import datetime
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def join_ranks(seconds: float) -> tuple[int, torch.device]:
    """Join the process group that torchrun tells of, NCCL's with GPUs and gloo's without: (this rank's number on its
    host, its device). seconds: how long a collective may wait."""
    cuda, rank = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    limit = datetime.timedelta(seconds=seconds)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None, timeout=limit)
    return rank, device


def machine(setting: str) -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "setting": setting,
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_machine() -> dict[str, Any]:
    """The same for what was measured without a GPU, and how busy the machine was."""
    model = ""
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
