"""Ranks of one group must run the same plan: each graph's plan is published at its first run and compared.

    record = (shape of the original graph; what the rewritten graph communicates over one group; versions)

A rank appends its records to the process group's store, one list for each group, and reads the lists of its peers.

- Rows are no part of a record, so graphs specialised on different row counts agree.
- Ranks recompile at different times (rows 5, 7, 1, 0 on one rank are one graph on another), so records are matched by
  the shape of the graph before tpfuse changed it and, within one shape, by the order in which *different* plans
  appeared. A plan that a peer has not published yet is not waited for, except the group's very first one.
- The first plans of all ranks must be alike even where the graphs are not: they hold the group's first collectives. One
  may be the beginning of another (a graph break on one rank only).
- Nothing collective is run, nothing happens while compiling, and nothing after a graph's first run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist

from .._torch_private import default_group, default_store
from ..errors import PlanMismatchError
from ..report import Boundary, Report, Step
from ..strict_json import StrictJson

log = logging.getLogger(__name__)
Ranks = tuple[int, ...]
FIRST = "first"


@dataclass(frozen=True)
class Record(StrictJson):
    """One graph's plan for one group: the group's verdicts and steps in graph order, and who made them.

    graph: a digest of the collectives before the rewrite, equal on ranks that compile the same program.
    """

    graph: str
    tpfuse: str
    torch: str
    boundaries: list[Boundary] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @cached_property
    def digest(self) -> str:
        """Of all that must be equal on a group's ranks: op, dtype, hidden, rewrite, fell back or not, versions."""
        verdicts = [(b.collective, b.dtype, b.hidden, b.rewrite, b.fused) for b in self.boundaries]
        return _digest([self.tpfuse, self.torch, verdicts, self.performed])

    @cached_property
    def performed(self) -> list[tuple]:
        return [(step.op, step.dtype, step.hidden) for step in self.steps]


def records(report: Report) -> dict[Ranks, Record]:
    """The plan of one compiled graph, group by group."""
    from .. import __version__

    # Groups enter by size: their members differ between the ranks of, say, two data-parallel replicas.
    shape = _digest([(b.collective, len(b.group), b.module, b.dtype, b.hidden) for b in report.boundaries])
    groups = {boundary.group for boundary in report.boundaries} | {step.group for step in report.steps}
    return {
        group: Record(
            shape,
            __version__,
            torch.__version__,
            [_what_counts(boundary) for boundary in report.boundaries if boundary.group == group],
            [step for step in report.steps if step.group == group],
        )
        for group in sorted(groups)
        if len(group) > 1
    }


def _what_counts(b: Boundary) -> Boundary:
    """Without what depends on rows or on the rank, and what no message needs."""
    return Boundary(
        "", b.module, b.collective, b.group, rewrite=b.rewrite, fused=b.fused, reason=b.reason, dtype=b.dtype,
        hidden=b.hidden,
    )  # fmt: skip


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


# -- comparing: pure functions of what was published ------------------------------------------------------------------


def distinct(published: Sequence[Record]) -> dict[tuple[str, int], Record]:
    """The records by (shape of the graph, which of the different plans for it)."""
    found: dict[tuple[str, int], Record] = {}
    digests: dict[str, list[str]] = {}
    for record in published:
        known = digests.setdefault(record.graph, [])
        if record.digest not in known:
            found[record.graph, len(known)] = record
            known.append(record.digest)
    return found


def disagreement(group: Ranks, published: Mapping[int, Sequence[Record]], own: int) -> tuple[str, str] | None:
    """Whether the latest record of rank `own` disagrees with its peers' records.

    published: rank -> its records, in order. Returns (a name for what is disagreed on, a sentence about it), or None.
    """
    firsts = {rank: records[0] for rank, records in published.items() if records}
    if len(published[own]) == 1 and _clash(list(firsts.values())):
        return FIRST, describe(group, firsts)
    plans = {rank: distinct(records) for rank, records in published.items()}
    place = list(plans[own])[-1]
    there = {rank: found[place] for rank, found in plans.items() if place in found}
    if len({record.digest for record in there.values()}) > 1:
        return f"{place[0]}/{place[1]}", describe(group, there)
    return None


def _clash(firsts: list[Record]) -> bool:
    """Whether first plans differ before the end of the shorter one."""
    for record in firsts[1:]:
        if record.graph == firsts[0].graph:
            if record.digest != firsts[0].digest:
                return True
        elif any(a != b for a, b in zip(firsts[0].performed, record.performed, strict=False)):
            return True
    return False


def describe(group: Ranks, plans: Mapping[int, Record]) -> str:
    """Which boundary, and which ranks decided what about it."""
    ranks = sorted(plans)
    versions = {rank: f"tpfuse {plans[rank].tpfuse} and torch {plans[rank].torch}" for rank in ranks}
    if len(set(versions.values())) > 1:
        return f"the ranks of group {list(group)} run different versions: {_who(versions)}"
    for index in range(max(len(plans[rank].boundaries) for rank in ranks)):
        verdicts = {rank: _verdict(plans[rank].boundaries, index) for rank in ranks}
        if len({verdict[:3] for verdict in verdicts.values()}) > 1:
            names = sorted({verdict[0] for verdict in verdicts.values() if verdict[0]})
            where = f"boundary {index} ({' or '.join(names) or 'in no named module'})"
            return _sentence(group, where, {rank: verdict[1] + verdict[3] for rank, verdict in verdicts.items()})
    for index in range(max(len(plans[rank].steps) for rank in ranks)):
        steps = {rank: _step(plans[rank].steps, index) for rank in ranks}
        if len(set(steps.values())) > 1:
            return _sentence(group, f"step {index}", steps)
    return f"the ranks of group {list(group)} compiled different plans"


def _sentence(group: Ranks, where: str, decided: Mapping[int, str]) -> str:
    return (
        f"the ranks of group {list(group)} compiled different plans, first of all for {where}: {_who(decided)}. Give "
        "all ranks the same model, options and versions; options={'check_plans': False} turns this check off"
    )


def _verdict(boundaries: Sequence[Boundary], index: int) -> tuple[str, str, str, str]:
    """(module, what was decided, which tensor, why)"""
    if index >= len(boundaries):
        return "", "no such boundary", "", ""
    b = boundaries[index]
    tensor = f"{b.dtype or '?'} x {b.hidden or '?'}"
    done = f"fused by {b.rewrite}" if b.fused else f"changed by {b.rewrite}" if b.rewrite else "left as it is"
    return b.module, f"{b.collective} of {tensor} {done}", tensor, f" ({b.reason})" if b.reason else ""


def _step(steps: Sequence[Step], index: int) -> str:
    if index >= len(steps):
        return "no such step"
    step = steps[index]
    return f"{step.op} of {step.dtype or '?'} x {step.hidden or '?'}" + (f" at {step.module}" if step.module else "")


def _who(said: Mapping[int, str]) -> str:
    by_saying: dict[str, list[int]] = {}
    for rank in sorted(said):
        by_saying.setdefault(said[rank], []).append(rank)
    return "; ".join(
        f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}: {saying}"
        for saying, ranks in by_saying.items()
    )


# -- publishing -------------------------------------------------------------------------------------------------------


class Ledger:
    """What this rank and its peers have published in one world (one life of the default process group)."""

    def __init__(self, store: dist.Store, rank: int):
        self.store, self.rank = dist.PrefixStore("tpfuse/plans", store), rank
        self.published: dict[Ranks, dict[int, list[Record]]] = {}
        self.lock = threading.Lock()

    def agree(self, plans: Mapping[Ranks, Record], timeout: float) -> None:
        """Publish a graph's plans, and compare them with those of the peers.

        Raises:
            PlanMismatchError: the same on every rank that finds the disagreement, or hears of it.
        """
        with self.lock:
            # All groups first: a peer may be waiting for any of them.
            fresh = [group for group, record in plans.items() if self.rank in group and self._publish(group, record)]
            for group in fresh:
                if len(self.published[group][self.rank]) == 1:
                    self._wait(group, timeout)
            for group in fresh:
                self._compare(group)
        if words := self.heard(plans):
            raise PlanMismatchError(words)

    def heard(self, plans: Mapping[Ranks, Record]) -> str:
        """What a rank that found a disagreement about these plans has left in the store, or ''."""
        for group, record in plans.items():
            places = [FIRST] + [f"{record.graph}/{index}" for index in range(4)]
            for place in places:
                if self.store.check([key := f"{_name(group)}/differ/{place}"]):
                    return self.store.get(key).decode()
        return ""

    def _publish(self, group: Ranks, record: Record) -> bool:
        own = self.published.setdefault(group, {rank: [] for rank in group})[self.rank]
        if any(record.graph == r.graph and record.digest == r.digest for r in own):
            return False
        self.store.set(f"{_name(group)}/{self.rank}/{len(own)}", record.to_json())
        own.append(record)
        return True

    def _wait(self, group: Ranks, timeout: float) -> None:
        deadline, pause = time.monotonic() + timeout, 0.001
        while missing := [rank for rank in group if not self._read(group, rank)]:
            if time.monotonic() > deadline:
                log.warning(
                    "ranks %s of group %s ran no compiled graph within %g s (plan_timeout); rank %d goes on without "
                    "having compared plans", missing, list(group), timeout, self.rank,
                )  # fmt: skip
                return
            # Polled, since a store that waits answers no other thread.
            time.sleep(pause)
            pause = min(2 * pause, 0.05)

    def _read(self, group: Ranks, rank: int) -> list[Record]:
        known = self.published[group][rank]
        if rank != self.rank:
            while self.store.check([key := f"{_name(group)}/{rank}/{len(known)}"]):
                known.append(Record.from_json(self.store.get(key)))
        return known

    def _compare(self, group: Ranks) -> None:
        for rank in group:
            self._read(group, rank)
        found = disagreement(group, self.published[group], self.rank)
        if found is not None:
            place, sentence = found
            # The first rank to find it chooses the words, so that all ranks raise the same.
            words = self.store.compare_set(f"{_name(group)}/differ/{place}", "", sentence)
            raise PlanMismatchError(words.decode())


def _name(group: Ranks) -> str:
    return "-".join(map(str, group))


#: REGISTRY: the ledger of each world this process is part of. An entry goes when its default process group does.
LEDGERS: weakref.WeakKeyDictionary[dist.ProcessGroup, Ledger] = weakref.WeakKeyDictionary()


def ledger() -> Ledger | None:
    """The ledger of the current world; None without a process group whose ranks can meet."""
    world = default_group()
    if world is None or dist.get_backend(world) == "fake":
        return None
    found = LEDGERS.get(world)
    if found is None:
        found = LEDGERS.setdefault(world, Ledger(default_store(), dist.get_rank()))
    return found
