"""Run a function on several ranks: real gloo processes, or threads that stand in for them.

`run_processes(2, fn, arg)` calls `fn(rank, arg)` in two fresh processes whose default process group is gloo, and
returns what each returned, in rank order. `fn` must be importable (a module-level function). A rank that raises
makes the call raise with that rank's traceback; ranks that do not come back within `timeout` are killed.
"""

from __future__ import annotations

import datetime
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
import torch.distributed as dist
import torch.multiprocessing as mp

#: What ranks import; none of it starts a thread or touches a GPU.
PRELOADED = [
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
    "tpfuse.backend",
    "tests.warm",
]


def rank_context() -> Any:
    """How ranks are started. One process imports torch, and the ranks are its copies: a quarter of the time that fresh
    interpreters take. CUDA does not survive a copy, and imports may have asked for it: there ranks start afresh."""
    context = mp.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _entry(
    rank: int,
    world: int,
    backend: str,
    folder: str,
    cache: str | None,
    fn: Callable[..., Any],
    args: tuple,
    results: Any,
) -> None:
    if cache is None:
        # Ranks share what the C++ compiler makes of a kernel, but no graph: each of them traces and rewrites.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(folder, "cache")
        torch._inductor.config.fx_graph_cache = torch._functorch.config.enable_autograd_cache = False
    else:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(cache, f"rank{rank}")
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            backend,
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=120),
        )
        out = fn(rank, *args)
        results.put((rank, True, out))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))


def run_processes(
    world: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout: float = 240,
    cache_dir: str | None = None,
    backend: str = "gloo",
) -> list[Any]:
    """Call `fn(rank, *args)` on `world` processes (gloo ones unless `backend` says otherwise); results in rank order.

    `cache_dir`: where compile caches go (one folder a rank); None for no graph caches.
    Results must be picklable; tensors are best returned as numpy arrays or CPU tensors.
    """
    context = rank_context()
    results = context.Queue()
    with tempfile.TemporaryDirectory() as scratch:
        processes = [
            context.Process(
                target=_entry, args=(rank, world, backend, scratch, cache_dir, fn, args, results), daemon=True
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            answers: dict[int, Any] = {}
            deadline = time.monotonic() + timeout
            while len(answers) < world:
                try:
                    rank, ok, value = results.get(timeout=1)
                except queue.Empty:
                    if time.monotonic() > deadline:
                        missing = sorted(set(range(world)) - set(answers))
                        raise TimeoutError(f"ranks {missing} did not answer within {timeout:.0f} s") from None
                    dead = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0) and r not in answers]
                    if dead:
                        raise RuntimeError(f"ranks {dead} died without a word") from None
                    continue
                if not ok:
                    raise RuntimeError(f"rank {rank} raised:\n{value}")
                answers[rank] = value
            return [answers[rank] for rank in range(world)]
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
