"""The processes of a soak: start them, hear each at the end of every stretch, and end them in whatever state."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp
from soak_schedule import GONE, Answer, Setting, Stretch

#: Loaded once, in the process that the others are forked from: faults take many new ones.
PRELOADED = ["torch", "torch._dynamo", "torch.distributed._functional_collectives"]


class Workers:
    """`setting.processes` processes that run `stretches` one after the other. A context: on leaving they are gone."""

    def __init__(self, setting: Setting, stretches: list[Stretch], scratch: str):
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.scratch = Path(scratch)
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        for index in range(setting.processes):
            here, there = context.Pipe(duplex=False)
            arguments = (index, setting, stretches, scratch, there)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            there.close()  # so that the pipe ends when the process does
            self.processes.append(process)
            self.pipes.append(here)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self.processes:
            process.join(timeout=2)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self.pipes:
            pipe.close()

    def answers(self, patience: float) -> list[Answer | None]:
        """One answer a process to the current stretch; None from one that says nothing for `patience` seconds."""
        deadline = time.monotonic() + patience
        return [self._answer(index, deadline) for index in range(len(self.pipes))]

    def _answer(self, index: int, deadline: float) -> Answer | None:
        if not self.pipes[index].poll(max(0.0, deadline - time.monotonic())):
            return None
        try:
            return self.pipes[index].recv()
        except EOFError:
            self.processes[index].join(timeout=5)
            return Answer(0, 0, f"{GONE} (exit code {self.processes[index].exitcode}): {self.last_words(index)}")

    def last_words(self, index: int) -> str:
        """The last line that a process printed on stderr."""
        return next(reversed(self._lines(index)), "").strip()

    def where(self, index: int, lines: int = 100) -> str:
        """The stacks of a process that says nothing, from the innermost call, behind what it last printed."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[index].pid, signal.SIGUSR1)
            time.sleep(1)
        return "\n".join(self._lines(index)[-lines:])

    def _lines(self, index: int) -> list[str]:
        log = _log(self.scratch, index)
        lines = log.read_text(errors="replace").split("\n") if log.exists() else []
        return [line for line in lines if line.strip()]


def _work(index: int, setting: Setting, stretches: list[Stretch], scratch: str, pipe: Connection) -> None:
    """A process's life. What libraries print when they abort goes to a file, since faults provoke it."""
    log = os.open(_log(Path(scratch), index), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(scratch) / f"cache{index}")
    if setting.mode == "virtual":
        from soak_virtual import run_stretches
    else:
        from soak_ranks import run_stretches
    try:
        for answer in run_stretches(index, setting, stretches, scratch):
            pipe.send(answer)
    except BaseException:
        pipe.send(Answer(0, 0, f"{GONE}: {traceback.format_exc()}"))


def _log(scratch: Path, index: int) -> Path:
    return scratch / f"process{index}.log"


def host_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 2)


def thread_count() -> int:
    """Threads of this process, those of C++ libraries included."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else threading.active_count()


def device_mb() -> float:
    """Device memory in use by everyone, as the driver sees it; 0 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return round((total - free) / 2**20, 2)
