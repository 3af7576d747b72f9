"""What a GPU draws and how fast it is clocked while something runs, by NVML (the package nvidia-ml-py). Reads only."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch


@dataclass(frozen=True)
class Drawn:
    """us: a call. watts: the mean over all calls. mhz: the median of the multiprocessors' clock."""

    us: float
    watts: float
    mhz: float


class Meter:
    """Of one device, for as long as the process lives."""

    def __init__(self, device: torch.device) -> None:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)

    @property
    def limit(self) -> float:
        """Watts."""
        return float(self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1000)

    def over(self, calls: Callable[[], Any], count: int) -> Drawn:
        """Make `calls` so many times, one behind the other: half a second of them at least, since the counter of energy
        steps some ten times a second, and the watts are those between its first and its last step."""
        seen: list[tuple[float, float, int]] = []
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(seen, done))
        torch.cuda.synchronize()
        watcher.start()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            calls()
        end.record()
        end.synchronize()
        done.set()
        watcher.join()
        steps = [now for before, now in pairwise(seen) if now[1] != before[1]]
        watts = (steps[-1][1] - steps[0][1]) / (steps[-1][0] - steps[0][0]) if len(steps) > 1 else float("nan")
        mhz = statistics.median(clock for _, _, clock in seen)
        return Drawn(start.elapsed_time(end) * 1000 / count, watts, mhz)

    def _watch(self, seen: list[tuple[float, float, int]], done: threading.Event) -> None:
        """(seconds, joules, MHz), until it is done."""
        nvml, handle = self._nvml, self._handle
        while not done.wait(0.004):
            joules = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
            seen.append((time.monotonic(), joules, nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)))
