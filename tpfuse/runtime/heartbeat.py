"""A call that waits for a peer in vain ends in an error that says where, for whom, and what the peer was doing.

What ends the wait is the process group's own timeout, which `peer_timeout` sets, or the connection that a dying peer
closes. The group's error names neither boundary nor peer; `explained` makes one that does:

- *where*: the generated code is on the error's traceback. The n-th communicating line above it is the plan's n-th step.
- *who*: with `peer_timeout` every rank has one thread, its pulse, that tells the store a few times a second what the
  rank is doing. A peer whose pulse stands still is gone.

If the group does not end the wait, the pulse does: it prints the error and ends the process.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import re
import sys
import threading
import time
import types
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from .. import _state as state
from .._torch_private import compiling, default_group, default_store, group_exists
from ..errors import PeerTimeoutError
from ..report import Step
from ..strict_json import StrictJson

#: The exit status of a process that its pulse had to end (EX_TEMPFAIL).
EXIT_STUCK = 75
_COMMUNICATES = re.compile(
    r"_c10d_functional\.(?:all_reduce|reduce_scatter|all_gather|all_to_all|broadcast)"
    r"|tpfuse\.(?:rows_norm_gather|(?:all_reduce_norm|reduce_scatter_norm)(?:_backward)?(?:_gather)?)"
)
#: What process groups say in a plain RuntimeError: gloo, the checks of TORCH_DISTRIBUTED_DEBUG=DETAIL, NCCL.
_GROUP_ERRORS = re.compile(
    r"gloo/|Timed out waiting \d+\s?ms|Connection (?:closed|reset|refused)|mismatch between collectives"
    r"|Application timeout caused pair closure"
    r"|NCCL (?:error|communicator|operation)|nccl(?:System|Unhandled|Internal|Remote)\w*"
)


@dataclass(frozen=True)
class Beat(StrictJson):
    """What a rank says of itself: a number that grows with each beat, what it does, how many calls it has finished."""

    number: int
    doing: str
    calls: int


def from_the_group(error: BaseException) -> bool:
    """Whether an error out of a compiled graph is its process group's, not the model's.

    By its type; or by words that groups use, where the line of generated code that raised it communicates. (The code
    may be no Python: then the words have to do.)
    """
    if isinstance(error, dist.DistError):
        return True
    if _GROUP_ERRORS.search(str(error)) is None:
        return False
    line, trace = None, error.__traceback__
    while trace is not None:
        if not _own(trace.tb_frame) and _communicates(trace.tb_frame):
            line = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno, trace.tb_frame.f_globals)
        trace = trace.tb_next
    return line is None or _is_communicating(line)


# -- where ------------------------------------------------------------------------------------------------------------


def step_at(frame: types.FrameType, line: int, steps: Sequence[Step]) -> Step | None:
    """The step that generated code is in at `line`, if this frame is generated code that communicates."""
    if not _communicates(frame):
        return None
    lines = _source(frame)[: line - frame.f_code.co_firstlineno + 1]
    found = [match for text in lines if (match := _COMMUNICATES.search(text)) is not None]
    two_steps = [match for match in found[:-1] if match[0].endswith("_gather") and "rows_norm" not in match[0]]
    index = len(found) - 1 + len(two_steps)
    return steps[index] if 0 <= index < len(steps) else None


def _source(frame: types.FrameType) -> list[str]:
    return linecache.getlines(frame.f_code.co_filename, frame.f_globals)[frame.f_code.co_firstlineno - 1 :]


def _communicates(frame: types.FrameType) -> bool:
    return any(_COMMUNICATES.search(text) for text in _source(frame))


def _is_communicating(text: str) -> bool:
    return _COMMUNICATES.search(text) is not None or "_c10d_functional.wait_tensor" in text


def step_of_error(error: BaseException, steps: Sequence[Step]) -> Step | None:
    """The step in whose code `error` was raised; the innermost frame of generated code counts."""
    found, trace = None, error.__traceback__
    while trace is not None:
        if not _own(trace.tb_frame):
            found = step_at(trace.tb_frame, trace.tb_lineno, steps) or found
        trace = trace.tb_next
    return found


def step_of_thread(thread: int, steps: Sequence[Step]) -> Step | None:
    """The step in whose code a thread stands now."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if not _own(frame) and (found := step_at(frame, frame.f_lineno, steps)) is not None:
            return found
        frame = frame.f_back
    return None


def _communicating_line(thread: int) -> tuple[int, int] | None:
    """Which communicating line of generated code a thread stands in: (frame, line), or None."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno, frame.f_globals)
        if not _own(frame) and _is_communicating(text):
            return id(frame), frame.f_lineno
        frame = frame.f_back
    return None


def _own(frame: types.FrameType) -> bool:
    # Tracebacks also hold tpfuse.ops, which is no generated code though it calls the same operators.
    return frame.f_globals.get("__name__", "").startswith("tpfuse.")


def name_step(step: Step | None, steps: Sequence[Step]) -> str:
    """For messages: the boundary, or, where the generated code does not tell, those it must be one of."""
    if step is not None:
        tensor = f"{step.dtype or '?'} x {step.hidden or '?'}"
        return f"{step.module or 'a boundary without a module'} ({step.op} of {tensor} over ranks {list(step.group)})"
    modules = list(dict.fromkeys(step.module for step in steps if step.module))
    return f"one of the boundaries {', '.join(modules)}" if modules else "a boundary without a module"


# -- who --------------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """A call of a compiled graph that has begun in some thread, and since when it stands in one communicating line."""

    steps: tuple[Step, ...]
    limit: float
    line: tuple[int, int] | None = None
    since: float = 0.0


class Pulse(threading.Thread):
    """Tells the peers of one world what this rank is doing, and ends the process if a wait does not come back."""

    def __init__(self, world: dist.ProcessGroup):
        super().__init__(name="tpfuse-pulse", daemon=True)
        self.world, self.rank, self.every = weakref.ref(world), dist.get_rank(), 2.0
        # A connection of its own where stores have one: the caller's may be busy waiting.
        self.store = dist.PrefixStore("tpfuse/pulse", _own_connection(default_store()))
        self.calls: dict[int, Call] = {}
        self.finished = 0

    def keep_up_with(self, limit: float) -> None:
        """Beat often enough for calls that may wait for `limit` seconds, and for those of before."""
        self.every = min(self.every, max(limit / 8, 0.05))

    def began(self, steps: tuple[Step, ...], limit: float) -> None:
        self.calls[threading.get_ident()] = Call(steps, limit)

    def ended(self) -> None:
        self.calls.pop(threading.get_ident(), None)
        self.finished += 1

    def run(self) -> None:
        number = 0
        while self.alive():
            # Without the store, whose rank may be gone, the calls are still watched.
            with contextlib.suppress(RuntimeError):
                self.store.set(str(self.rank), Beat(number, self.doing(), self.finished).to_json())
            number += 1
            for thread, call in list(self.calls.items()):
                self.watch(thread, call)
            time.sleep(self.every)

    def watch(self, thread: int, call: Call) -> None:
        """End the process if the thread stands for too long in one line that communicates, and nowhere else."""
        now, line = time.monotonic(), _communicating_line(thread)
        if line is None or line != call.line:
            call.line, call.since = line, now
        elif now - call.since > call.limit + max(call.limit, 1.0):
            self.end_process(thread, call, now - call.since)

    def alive(self) -> bool:
        """Whether the world this pulse was made for still exists."""
        world = self.world()
        return world is not None and group_exists(world)

    def doing(self) -> str:
        for thread, call in list(self.calls.items()):
            return f"in {name_step(step_of_thread(thread, call.steps), call.steps)}"
        if any(compiling(frame) for frame in sys._current_frames().values()):
            return "compiling"
        return "outside compiled graphs"

    def peers(self, ranks: Sequence[int]) -> dict[int, str]:
        """A clause on each of the other ranks; takes up to eight beats, to see whose pulse stands still."""
        first = {rank: self._beat(rank) for rank in ranks if rank != self.rank}
        now = first
        for _ in range(8):
            time.sleep(self.every)
            now = {rank: self._beat(rank) for rank in first}
            if all(now[rank] is not None and now[rank] != first[rank] for rank in first):
                break
        return {rank: self._clause(rank, first[rank], now[rank]) for rank in first}

    def _beat(self, rank: int) -> Beat | None:
        try:
            return Beat.from_json(self.store.get(str(rank))) if self.store.check([str(rank)]) else None
        except RuntimeError:
            return None

    def _clause(self, rank: int, before: Beat | None, now: Beat | None) -> str:
        if now is None:
            return f"rank {rank} has not been heard of"
        at = f"{now.doing} after {now.calls} calls (this rank: after {self.finished})"
        if before is None or before.number == now.number:
            return f"rank {rank} is gone: its process answers no more; it was {at}"
        return f"rank {rank} is alive, {at}"

    def end_process(self, thread: int, call: Call, seconds: float) -> None:
        """The last resort, for waits that no timeout of the group ends."""
        cause = f"after {seconds:.1f} s the process group had not ended the wait, so the process is ended"
        error = waited(self.rank, step_of_thread(thread, call.steps), call.steps, cause, self)
        print(f"tpfuse.PeerTimeoutError: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_STUCK)


def _own_connection(store: dist.Store) -> dist.Store:
    cloned: Any = store  # a store of Python's own, or of an older torch, may not be one that can be cloned
    try:
        return cloned.clone()
    except (AttributeError, RuntimeError, NotImplementedError):
        return store


def waited(
    rank: int, step: Step | None, steps: Sequence[Step], cause: str, pulse: Pulse | None, seconds: float | None = None
) -> PeerTimeoutError:
    """The error for a wait in vain; `cause` says how it ended, `seconds` how long the call had taken."""
    group = step.group if step is not None else steps[0].group
    known = pulse.peers(group) if pulse is not None else {}
    clauses = "; ".join(known.values()) or "options={'peer_timeout': seconds} tells what the peers do"
    where = name_step(step, steps)
    # A peer whose process answers no more is missing; where all answer, any of them may be the one that is elsewhere.
    gone = [peer for peer, clause in known.items() if "is alive" not in clause]
    missing = gone or [peer for peer in group if peer != rank]
    return PeerTimeoutError(
        f"rank {rank} of group {list(group)} waited in vain at {where}: {cause}; {clauses}",
        rank=rank, group=group, boundary=step.module if step is not None else where, missing=missing, seconds=seconds,
    )  # fmt: skip


def pulse(timeout: float) -> Pulse | None:
    """The current world's pulse, started if there is none yet, fast enough for `timeout`; None where ranks cannot
    meet."""
    world = default_group()
    if world is None or dist.get_backend(world) == "fake":
        return None
    found = state.PULSES.get(world)
    if found is None:
        made = Pulse(world)
        with state.LOCK:
            found = state.PULSES.setdefault(world, made)
        if found is made:
            found.keep_up_with(timeout)
            found.start()
    found.keep_up_with(timeout)
    return found
