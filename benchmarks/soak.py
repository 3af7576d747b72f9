"""Run boundaries for a long time, with random shapes, random delays and faults, and count everything that went wrong.

    python benchmarks/soak.py cpu         a two-layer model on 2 CPU ranks (gloo processes), through the backend; faults
    python benchmarks/soak.py virtual     kernels on virtual ranks of one GPU (one process); no faults
    python benchmarks/soak.py overlap     the model of `cpu` on 2 processes that share one GPU (symmetric memory)

Every result is compared with one that needs no other rank. The run is cut into stretches; a stretch has a process group
of its own (or workspaces of its own) and may end in a fault, which must become an error on every rank. After it the run
goes on: with a new group in the same processes where they live, with new processes where they do not. No answer within
`--patience` seconds is a hang. Writes benchmarks/results/soak_<mode>.json and exits with 1 where a result was wrong, a
rank hung, or an error was missing or out of place.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import cpu_machine, machine
from records import write
from soak_schedule import FAULTS, GONE, Answer, Setting, Stretch, schedule
from soak_workers import Workers

RESULTS = Path(__file__).resolve().parent / "results"
ALL_FAULTS = ",".join(FAULTS)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__.splitlines()[0])


@dataclass
class Tally:
    """What a soak has seen. `errors`: on how many ranks each fault was reported, and by what; `unreported`: ranks on
    which a fault passed without an error; `unexpected`: errors without a fault."""

    iterations: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    errors: dict[str, Counter[str]] = field(default_factory=dict)
    slowest_error_s: dict[str, float] = field(default_factory=dict)
    wrong: int = 0
    hangs: int = 0
    unreported: int = 0
    unexpected: list[str] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)

    def add(self, stretch: Stretch, answers: list[Answer | None]) -> None:
        """Count one stretch; an answer is None where a rank gave none in time."""
        given = [answer for answer in answers if answer is not None]
        self.hangs += len(answers) - len(given)
        self.iterations += max((answer.calls for answer in given), default=0)
        self.wrong += sum(answer.wrong for answer in given)
        errors = [answer.error for answer in given if answer.error]
        if stretch.fault is None:
            self.unexpected += errors
            return
        kind = stretch.fault.kind
        self.faults[kind] += 1
        self.unreported += len(given) - len(errors)
        self.errors.setdefault(kind, Counter()).update(error.partition(":")[0] for error in errors)
        slowest = max((answer.seconds for answer in given), default=0.0)
        self.slowest_error_s[kind] = round(max(self.slowest_error_s.get(kind, 0.0), slowest), 2)

    @property
    def errors_reported(self) -> int:
        return sum(sum(counter.values()) for counter in self.errors.values())

    def summary(self) -> dict[str, Any]:
        """All of it, for a JSON file."""
        counts = {name: getattr(self, name) for name in ("iterations", "wrong", "hangs", "unreported", "unexpected")}
        errors = {kind: dict(counter) for kind, counter in self.errors.items()}
        faults = {"faults": dict(self.faults), "errors": errors, "slowest_error_s": self.slowest_error_s}
        return counts | faults | {"errors_reported": self.errors_reported, "memory": self.memory()}

    @property
    def clean(self) -> bool:
        return not (self.wrong or self.hangs or self.unreported or self.unexpected)

    def memory(self) -> dict[str, float]:
        """Growth of the processes that lived longest, from their second stretch on (the first one compiles)."""
        longest = max(self.lives, key=lambda life: life.calls, default=Life())
        return {
            "calls_of_longest_life": longest.calls,
            "host_mb_at_start": longest.host_mb[0],
            "host_mb_growth": round(longest.host_mb[1] - longest.host_mb[0], 2),
            "device_mb_growth": round(longest.device_mb[1] - longest.device_mb[0], 2),
            "threads_growth": longest.threads[1] - longest.threads[0],
        }


@dataclass
class Life:
    """Memory of one process, at the end of its second and of its last stretch, and its calls in between."""

    calls: int = 0
    host_mb: tuple[float, float] = (0.0, 0.0)
    device_mb: tuple[float, float] = (0.0, 0.0)
    threads: tuple[int, int] = (0, 0)
    seen: int = 0

    def add(self, answer: Answer) -> None:
        if self.seen >= 1:
            first = self.seen == 1
            self.calls += 0 if first else answer.calls
            self.host_mb = (answer.host_mb if first else self.host_mb[0], answer.host_mb)
            self.device_mb = (answer.device_mb if first else self.device_mb[0], answer.device_mb)
            self.threads = (answer.threads if first else self.threads[0], answer.threads)
        self.seen += 1


def soak(setting: Setting, stretches: list[Stretch], patience: float, progress: Progress | None = None) -> Tally:
    """Run all stretches, in as few processes as the faults allow."""
    tally = Tally()
    task = progress.add_task(setting.mode, total=sum(s.calls for s in stretches)) if progress is not None else None
    left = list(stretches)
    with tempfile.TemporaryDirectory() as scratch:
        while left:
            with Workers(setting, left, scratch) as workers:
                lives = [Life() for _ in range(setting.processes)]
                alive = True
                while left and alive:
                    stretch = left.pop(0)
                    answers = workers.answers(patience)
                    for index, answer in enumerate(answers):
                        if answer is None:
                            print(f"hang in {stretch}, process {index}:\n{workers.where(index)}", file=sys.stderr)
                    tally.add(stretch, answers)
                    alive = all(answer is not None and not answer.error.startswith(GONE) for answer in answers)
                    for life, answer in zip(lives, answers, strict=True):
                        if alive:
                            life.add(answer)
                    if progress is not None:
                        progress.update(task, advance=stretch.calls)
                tally.lives += lives
    return tally


def closing_line(mode: str, tally: Tally) -> str:
    memory = tally.memory()
    faults = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.faults.items())) or "none"
    return (
        f"soak {mode}: {tally.iterations} iterations, {sum(tally.faults.values())} faults injected ({faults}), "
        f"{tally.errors_reported} errors reported, {tally.unreported} missing, {len(tally.unexpected)} out of place, "
        f"{tally.wrong} wrong results, {tally.hangs} hangs, memory {memory['host_mb_growth']:+.1f} MB host and "
        f"{memory['device_mb_growth']:+.1f} MB device over {memory['calls_of_longest_life']} calls of one process"
    )


def run(setting: Setting, iterations: int, every: int, faults: str, seed: int, patience: float, out: Path) -> None:
    kinds = tuple(kind for kind in faults.split(",") if kind)
    unknown = sorted(set(kinds) - set(FAULTS))
    if unknown:
        raise typer.BadParameter(f"--faults names {', '.join(unknown)}; allowed: {', '.join(FAULTS)}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    began = time.monotonic()
    console = Console(stderr=True)
    with Progress(*columns, console=console) as progress:
        tally = soak(setting, schedule(seed, iterations, every, kinds, setting.ranks), patience, progress)
    line = closing_line(setting.mode, tally)
    where = cpu_machine() if setting.device == "cpu" else machine(setting.description)
    result = tally.summary() | {"line": line}
    settings = {"seed": seed, "calls_a_stretch": every, "faults": kinds, "patience_s": patience, **asdict(setting)}
    seconds = round(time.monotonic() - began, 1)
    out.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": where, "settings": settings, "seconds": seconds, "result": result}
    write(out, document)
    for error in tally.unexpected:
        console.print(error)
    print(line)
    raise typer.Exit(0 if tally.clean else 1)


Iterations = Annotated[int, typer.Option(min=1, help="calls of the model, or of a kernel, in all")]
Every = Annotated[int, typer.Option(min=1, help="calls a stretch, each with a process group of its own")]
Faults = Annotated[str, typer.Option(help=f"kinds, separated by commas: {', '.join(FAULTS)}; empty for none")]
Seed = Annotated[int, typer.Option(help="everything random follows from it")]
Patience = Annotated[float, typer.Option(min=1, help="seconds without an answer that count as a hang")]
Timeout = Annotated[float, typer.Option(min=1, help="the process group's timeout in seconds")]
Out = Annotated[Path, typer.Option(help="the JSON file to write")]


@app.command()
def cpu(
    iterations: Iterations = 5200, every: Every = 200, faults: Faults = ALL_FAULTS, seed: Seed = 0,
    patience: Patience = 150, timeout: Timeout = 10, out: Out = RESULTS / "soak_cpu.json",
) -> None:  # fmt: skip
    """A two-layer model on two CPU ranks, through the backend; every stretch ends in a fault."""
    setting = Setting("cpu", "cpu", ranks=2, processes=2, hidden=64, timeout_s=timeout)
    run(setting, iterations, every, faults, seed, patience, out)


@app.command()
def overlap(
    iterations: Iterations = 1000, every: Every = 250, faults: Faults = "", seed: Seed = 0,
    patience: Patience = 60, timeout: Timeout = 30, out: Out = RESULTS / "soak_overlap.json",
) -> None:  # fmt: skip
    """The model on two processes that share one GPU: the kernels over real symmetric memory."""
    setting = Setting("overlap", "cuda", ranks=2, processes=2, hidden=1024, timeout_s=timeout)
    run(setting, iterations, every, faults, seed, patience, out)


@app.command()
def virtual(
    iterations: Iterations = 20000, every: Every = 2500, seed: Seed = 0,
    patience: Patience = 480, out: Out = RESULTS / "soak_virtual.json",
) -> None:  # fmt: skip
    """Kernels on 2 to 8 virtual ranks of one GPU: random kernels, shapes and delays. The patience is for the first
    stretch, before which 70 kernels are compiled."""
    setting = Setting("virtual", "cuda", ranks=8, processes=1, hidden=1024, timeout_s=0)
    run(setting, iterations, every, "", seed, patience, out)


if __name__ == "__main__":
    app()
