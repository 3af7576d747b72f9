"""What a results file says about the machine it was measured on."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch


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
