"""Ranks as processes that share CPU memory and run the kernels in Triton's interpreter.

A process is one rank, or one program of a split row (`programs_per_rank` > 1): the interpreter runs the programs of a
grid one after another, so programs that wait for each other need processes of their own.
"""

from __future__ import annotations

import multiprocessing
import pickle
import queue
import random
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tpfuse.kernels.symmetric.timeout import new_watch
from tpfuse.kernels.symmetric.workspace import SLOTS, Workspace, buffer_words, copy_words_of, from_buffers, initialise
from tpfuse.kernels.words import COPIES, EPOCHS, INBOXES, MARKS, SENTINEL, STATE_WORDS


@dataclass(frozen=True)
class Seat:
    """Where one process sits: its workspace, which program of its rank it is, and how it waits for the others of its
    rank between two calls (what a stream does on a GPU)."""

    ws: Workspace
    program: int
    programs: int
    fence: Any
    delay: random.Random

    def dawdle(self) -> None:
        """Fall behind now and then, so that ranks meet in every order."""
        if self.delay.random() < 0.4:
            time.sleep(self.delay.random() * 0.02)


def _entry(fn: Callable, seat: Seat, results: Any, args: tuple) -> None:
    torch.set_num_threads(1)
    try:
        results.put((seat.ws.rank, seat.program, True, pickle.dumps(fn(seat, *args))))  # by value: no file handles
    except BaseException:
        results.put((seat.ws.rank, seat.program, False, traceback.format_exc()))


def run(world: int, fn: Callable[..., Any], *args: Any, programs_per_rank: int = 1, slot_bytes: int = 1 << 16,
        max_blocks: int = 4, seed: int = 0, timeout: float = 100, patience: float = float("inf"), rest: bool = True,
        ) -> list[list[Any]]:  # fmt: skip
    """`fn(seat, *args)` on every seat; returns [rank][program] of what came back. Raises what a seat raised, and
    TimeoutError when ranks hang. `patience`: how long kernels wait for peers, in units of 32 polls rather than
    milliseconds. `rest`: whether all memory must be at rest in the end."""
    slot_words = slot_bytes // 16 * 4
    copies = copy_words_of(slot_words, world)
    size = buffer_words(slot_words, world, copies)
    buffers = [torch.empty(size, dtype=torch.int32).share_memory_() for _ in range(world)]
    states = [torch.empty(STATE_WORDS, dtype=torch.int32).share_memory_() for _ in range(world)]
    for buffer, state in zip(buffers, states, strict=True):
        initialise(buffer, state, slot_words, copies)
    context = multiprocessing.get_context("fork")  # the mappings keep their addresses
    results: Any = context.Queue()
    watches = [new_watch("cpu", patience).share_memory_() for _ in range(world)]
    addresses = [buffer.data_ptr() for buffer in buffers]
    seats = []
    for rank in range(world):
        fence = context.Barrier(programs_per_rank)
        ws = from_buffers(rank, addresses, buffers[rank], states[rank], slot_words, max_blocks, None,
                          watch=watches[rank], remote=buffers[1 - rank] if copies else None, copies=copies)  # fmt: skip
        for program in range(programs_per_rank):
            delay = random.Random(f"{seed}/{rank}/{program}")
            seats.append(Seat(ws, program, programs_per_rank, fence, delay))
    processes = [context.Process(target=_entry, args=(fn, seat, results, args), daemon=True) for seat in seats]
    for process in processes:
        process.start()
    try:
        answers: dict[tuple[int, int], Any] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < len(seats):
            try:
                rank, program, ok, value = results.get(timeout=max(deadline - time.monotonic(), 0.01))
            except queue.Empty:
                missing = sorted({(s.ws.rank, s.program) for s in seats} - set(answers))
                raise TimeoutError(f"(rank, program) {missing} hang") from None
            if not ok:
                raise RuntimeError(f"rank {rank} program {program}:\n{value}")
            answers[rank, program] = pickle.loads(value)
        for rank, (buffer, state) in enumerate(zip(buffers, states, strict=True)) if rest else ():
            check_rest(rank, buffer, state, slot_words)
        return [[answers[rank, program] for program in range(programs_per_rank)] for rank in range(world)]
    finally:
        for process in processes:
            process.join(timeout=1)
            if process.is_alive():
                process.kill()


def check_rest(rank: int, buffer: torch.Tensor, state: torch.Tensor, slot_words: int) -> None:
    """At rest every slot and inbox is empty, and all channels agree on the epoch."""
    assert (buffer[: SLOTS * slot_words] == SENTINEL).all(), f"rank {rank} left words in a slot"
    assert (state[INBOXES:COPIES] == SENTINEL).all(), f"rank {rank} left words in an inbox"
    assert (state[MARKS] == 0).all(), f"rank {rank} is dead"
    assert (state[EPOCHS] == state[0]).all(), f"rank {rank}'s channels disagree on the epoch"
