"""What a soak does when: stretches of calls and their faults, from one seed, equal on all ranks; and their answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

#: skip: a rank leaves out its last call. raise: a rank raises between two calls. rows: a rank's last call has one row
#: more. exit: a rank's process ends without a word. The numbers are how often each is drawn; the last two take new
#: processes.
FAULTS = {"skip": 4, "raise": 4, "rows": 1, "exit": 1}
ENDS_PROCESSES = ("rows", "exit")
#: How the error of a rank begins whose process is gone.
GONE = "process gone"
#: Numbers of rows: none, one, a decode batch, a prefill.
ROWS = (0, 1, 1, 2, 3, 5, 8, 13, 20, 33, 64)
DELAYED, LONGEST_DELAY_S = 0.1, 0.005


@dataclass(frozen=True)
class Setting:
    """Where a soak runs. `processes`: how many it takes, `ranks`: the (largest) number of ranks."""

    mode: str
    device: str
    ranks: int
    processes: int
    hidden: int
    timeout_s: float

    @property
    def description(self) -> str:
        return f"soak {self.mode}: {self.ranks} ranks in {self.processes} process(es) on {self.device}"


@dataclass(frozen=True)
class Fault:
    """A fault at the end of a stretch, on one rank."""

    kind: str
    rank: int


@dataclass(frozen=True)
class Call:
    """One call. `delays`: seconds each rank waits before it."""

    rows: int
    seed: int
    delays: tuple[float, ...]


@dataclass(frozen=True)
class Stretch:
    """`calls` calls over one process group, then the fault, if any."""

    number: int
    seed: int
    calls: int
    ranks: int
    fault: Fault | None = None

    def each(self) -> Iterator[Call]:
        pick = random.Random(f"{self.seed} {self.number}")
        for index in range(self.calls):
            rows = pick.choice(ROWS)
            if self.fault is not None and index == self.calls - 1:
                rows = max(rows, 1)  # a call without rows sends nothing that a peer could miss
            late = [pick.random() < DELAYED for _ in range(self.ranks)]
            delays = tuple(pick.uniform(0, LONGEST_DELAY_S) if is_late else 0.0 for is_late in late)
            yield Call(rows, pick.randrange(1 << 30), delays)


def schedule(seed: int, iterations: int, every: int, faults: tuple[str, ...], ranks: int) -> list[Stretch]:
    """`iterations` calls in stretches of `every`; where `faults` names kinds, each stretch ends in one of them, on a
    random rank. Each kind occurs where there are enough stretches, and those that end processes come last, so that
    the first processes live long enough to show whether memory grows."""
    pick = random.Random(seed)
    lengths = [min(every, iterations - first) for first in range(0, iterations, every)]
    injected: list[Fault | None] = [None] * len(lengths)
    if faults:
        drawn = [*faults, *pick.choices(faults, [FAULTS[kind] for kind in faults], k=len(lengths))][: len(lengths)]
        drawn.sort(key=ENDS_PROCESSES.__contains__)
        injected = [Fault(kind, pick.randrange(ranks)) for kind in drawn]
    return [
        Stretch(number, seed, calls, ranks, fault)
        for number, (calls, fault) in enumerate(zip(lengths, injected, strict=True))
    ]


@dataclass(frozen=True)
class Answer:
    """What a process says at the end of a stretch: calls done, wrong results among them, the error that ended it (empty
    without one) and how many seconds after the fault it came; its memory, and its threads."""

    calls: int
    wrong: int
    error: str = ""
    seconds: float = 0.0
    host_mb: float = 0.0
    device_mb: float = 0.0
    threads: int = 0
