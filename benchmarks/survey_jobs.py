"""The survey of parallelize in several processes at once, and the file of its records."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Seconds beyond a configuration's own that a worker may take: it imports transformers, and forks ranks anew.
STARTING = 120.0

Configuration = tuple[str, str]


class Records:
    """JSON lines, one for each (family, policy); written as they come, sorted when the last of a run is there.

    A run that was stopped leaves what it found beside the file that it was to replace, and the next one goes on there.
    """

    def __init__(self, path: Path | None, again: bool) -> None:
        self.path, self.found = path, dict[Configuration, dict[str, Any]]()
        self.partial = path and path.with_name(path.name + ".partial")
        if self.partial and not again and self.partial.exists():
            for line in self.partial.read_text().splitlines():
                self._keep(json.loads(line))
        elif self.partial:
            self.partial.write_text("")

    def add(self, record: dict[str, Any]) -> None:
        self._keep(record)
        if self.partial:
            with self.partial.open("a") as file:
                file.write(json.dumps(record, sort_keys=True) + "\n")

    def finish(self) -> None:
        """The file that was asked for: the records, in the order of family and policy."""
        if self.path and self.partial:
            lines = [json.dumps(self.found[one], sort_keys=True) + "\n" for one in sorted(self.found)]
            self.partial.write_text("".join(lines))
            self.partial.replace(self.path)

    def _keep(self, record: dict[str, Any]) -> None:
        self.found[record["family"], record["policy"]] = record


def serve(surveyed: Any, timeout: float) -> None:
    """A worker: a configuration a line comes in, a record a line goes out.

    Args:
        surveyed: gives a record for each configuration that it is given, with a limit in seconds for each.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    for record in surveyed((tuple(json.loads(line)) for line in sys.stdin), timeout):
        answers.write(json.dumps(record) + "\n")
        answers.flush()


def surveyed_apart(todo: Sequence[Configuration], timeout: float, jobs: int, script: Path) -> Iterator[dict[str, Any]]:
    """The records as they come, of `jobs` workers with ranks of their own; one that does not answer is started anew."""
    work: queue.SimpleQueue[Configuration | None] = queue.SimpleQueue()
    records: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    for one in (*todo, *[None] * jobs):
        work.put(one)

    def run() -> None:
        worker = None
        while (one := work.get()) is not None:
            worker = worker or _Worker(script, timeout)
            if (record := worker.ask(one)) is None:
                worker.stop()
                worker = None
                reason = f"the process that surveyed it gave no answer in {timeout + STARTING:g} s"
                record = dict(family=one[0], policy=one[1], outcome="dies", share=None, cut="", reason=reason)
            records.put(record)
        if worker is not None:
            worker.stop()

    threads = [threading.Thread(target=run, daemon=True) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for _ in todo:
        yield records.get()
    for thread in threads:
        thread.join()


class _Worker:
    """A process that surveys, and the ranks that it forks: one process group."""

    def __init__(self, script: Path, timeout: float) -> None:
        self.limit = timeout + STARTING
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(
            [sys.executable, str(script), "--worker", "--timeout", str(timeout)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment,
        )  # fmt: skip

    def ask(self, one: Configuration) -> dict[str, Any] | None:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(one) + "\n")
            self.process.stdin.flush()
        except OSError:
            return None
        ends = time.monotonic() + self.limit
        while time.monotonic() < ends:
            if select.select([self.process.stdout], [], [], 1.0)[0]:
                line = self.process.stdout.readline()
                return json.loads(line) if line else None
        return None

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
