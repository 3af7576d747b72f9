"""Run ranks that are expected to fail, and see how each of them ended.

`outcomes(2, fn, arg)` calls `fn(rank, arg)` in fresh gloo processes, as `tests.ranks` does, but an error, a kill or an
exit is a result: its class, its words, when it came, and whether the process could exit afterwards.
"""

from __future__ import annotations

import datetime
import os
import queue
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .ranks import rank_context


@dataclass
class Outcome:
    """How a rank ended. error: the class of what it raised, or ''. exitcode: None if it had to be killed."""

    rank: int
    value: Any = None
    error: str = ""
    message: str = ""
    seconds: float = 0.0
    exitcode: int | None = None
    stderr: str = ""


def _entry(rank, world, folder, cache, group_timeout, environment, fn, args, results) -> None:
    redirected = os.open(os.path.join(folder, f"stderr{rank}"), os.O_WRONLY | os.O_CREAT)
    os.dup2(redirected, 2)
    os.environ.update(environment)
    dist.set_debug_level_from_env()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(cache or folder, f"rank{rank}")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=group_timeout),
    )
    try:
        results.put(Outcome(rank, value=fn(rank, *args)))
    except BaseException as error:
        results.put(Outcome(rank, error=type(error).__name__, message=str(error)))
    results.close()
    results.join_thread()


def outcomes(
    world: int,
    fn: Callable[..., Any],
    *args: Any,
    group_timeout: float = 60,
    timeout: float = 120,
    cache: str | None = None,
    environment: dict[str, str] | None = None,
    unending: tuple[int, ...] = (),
) -> list[Outcome]:
    """How each rank ended, in rank order. Ranks still there after `timeout` are killed (exitcode None), and so are the
    `unending` ones when all others have ended.

    `seconds` is time.monotonic() when a rank ended: a clock that all processes of a machine share.
    """
    context = rank_context()
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        common = (world, folder, cache, group_timeout, environment or {}, fn, args, results)
        processes = [context.Process(target=_entry, args=(rank, *common), daemon=True) for rank in range(world)]
        for process in processes:
            process.start()
        ended: dict[int, Outcome] = {}
        deadline = time.monotonic() + timeout
        while not set(range(world)) - set(unending) <= set(ended) and time.monotonic() < deadline:
            try:
                outcome = results.get(timeout=0.05)
                outcome.seconds = time.monotonic()
                ended[outcome.rank] = outcome
            except queue.Empty:
                for rank, process in enumerate(processes):
                    if rank not in ended and process.exitcode is not None and results.empty():
                        ended[rank] = Outcome(rank, seconds=time.monotonic())
        for rank, process in enumerate(processes):
            process.join(timeout=10 if rank in ended else 0)
            outcome = ended.setdefault(rank, Outcome(rank, error="Hang", seconds=time.monotonic()))
            outcome.exitcode = process.exitcode
            process.kill()
            with open(os.path.join(folder, f"stderr{rank}"), errors="replace") as file:
                outcome.stderr = file.read()
    return [ended[rank] for rank in range(world)]


def mark(folder: str) -> None:
    """Note the moment of a fault, on the clock of `Outcome.seconds`."""
    with open(os.path.join(folder, "fault"), "w") as file:
        file.write(repr(time.monotonic()))
