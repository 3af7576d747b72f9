"""The ranks of a group agree on a graph before its first run: all of them run what tpfuse made of it, or none does.

A plan that changes what a rank sends is right only if every peer changes it alike, and nothing in one rank's graph says
that they do: a peer may read a sum that the others never look at. So each graph's plan is published in the process
group's store at the graph's first run, and where it changes what is sent, the rank waits for its peers' plans for the
same graph. Equal plans run. Otherwise every rank runs its graph with everything sent as the program wrote it, which is
right next to any peer. The outcome is one word in the store, set once, so no two ranks read it differently.

*Which graph is the same* on two ranks is told by what it communicates as written, and by the how manieth such graph of
a new piece of code it is: ranks meet new code in the same order. They do not recompile in step (row counts 5, 7, 1, 0
on one rank are one graph on another), so what was made anew of old code, with a plan that the group agreed on before,
runs at once and asks nobody.

*Next to a changed plan that the ranks agreed on* a rank must not be alone with another graph of that code: its peers
may be running the plan, whatever this rank's new graph sends. So such a graph waits for the peers even where it is as
written (`_round`): it runs only if all of them are at a new graph of such code, too.

Nothing collective is run, nothing happens while compiling, and after a graph's first run nothing is left.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch.distributed as dist

from .. import _state as state
from .._torch_private import default_group, default_store
from ..errors import OptionError, PlanMismatchError
from .plan_check import Ranks, Record, describe, versions_differ

log = logging.getLogger(__name__)
FULL, WRITTEN = "as planned", "as written"
#: How the ballots of rounds are called, before their number.
ROUND = "round "
#: The outcome of a round that not all ranks came to.
ALONE = "alone"
#: How many times `plan_timeout` a rank waits for peers that say that they compile.
PATIENCE = 20


@dataclass(frozen=True)
class Place:
    """Which compilation a graph comes from: the number of the piece of code, and of its compilations so far. codes:
    what that code is a part of, and the compiled code that called it."""

    code: int | None = None
    compilation: int = 0
    codes: tuple[tuple, ...] = ()


@dataclass
class _Known:
    """What came out for the graphs of one piece of code that communicate alike.

    names: by group, what their first ballot was called. plans: how what is sent over the groups is made -> whether the
    ranks agreed on it.
    """

    names: dict[Ranks, str] = field(default_factory=dict)
    plans: dict[tuple, bool] = field(default_factory=dict)


class Ledger:
    """What this rank and its peers have published in one world (one life of the default process group)."""

    def __init__(self, store: dist.Store, rank: int):
        self.store, self.rank = dist.PrefixStore("tpfuse/plans", store), rank
        self.published: dict[Ranks, dict[int, list[Record]]] = {}
        self.known: dict[tuple, _Known] = {}
        #: By group and graph as written: changed plans that the ranks agreed on, which a peer may be running.
        self.running: dict[tuple[Ranks, str], set[str]] = {}
        #: Code that graphs came from -> the groups over which the ranks agreed on a changed plan of it.
        self.changed: dict[tuple, set[Ranks]] = {}
        #: Code with such plans of which the ranks came to different graphs later -> the groups of those.
        self.apart_in: dict[tuple, set[Ranks]] = {}
        #: How many rounds are over, by group.
        self.rounds: dict[Ranks, int] = {}
        self.lock = threading.Lock()

    def agree(self, plans: Mapping[Ranks, Record], timeout: float, place: Place | None = None) -> bool:
        """Whether a graph may run as planned; otherwise everything must be sent as it was written. Called before its
        first run; waits for peers, `timeout` seconds at most, only where the graph changes what is sent.

        Raises:
            PlanMismatchError: the ranks run different versions, or the peers already run what this graph cannot.
        """
        place = place or Place()
        plans = {group: record for group, record in plans.items() if self.rank in group}
        with self.lock:
            self._heard(plans)
            code = (place.code, tuple((group, record.graph) for group, record in sorted(plans.items())))
            if place.compilation == 0 or place.code is None:
                self.known.pop(code, None)
            known = self.known.setdefault(code, _Known())
            # Without the values of inputs: those were equal once, and of what is compiled anew no peer need know.
            how = tuple(record.how for _, record in sorted(plans.items()))
            if how not in known.plans:
                known.plans[how] = self._ballot(plans, known, timeout, place)
            # What was once not agreed on is not tried again: a peer may run the graph as it was written.
            return all(known.plans.values())

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Tell the peers that this rank compiles: who waits for it goes on waiting."""
        self.store.set(f"compiling/{self.rank}", "yes")
        try:
            yield
        finally:
            self.store.set(f"compiling/{self.rank}", "no")

    def _ballot(self, plans: Mapping[Ranks, Record], known: _Known, timeout: float, place: Place) -> bool:
        if not all(known.plans.values()):
            return False
        beside = {group for group in plans if self._beside(group, place)}
        # All groups first: a peer may be waiting for any of them.
        waits = {
            group
            for group, record in plans.items()
            if group in beside or not record.as_written or self.running.get((group, record.graph))
        }
        ballots = {
            group: self._publish(group, replace(record, waits=group in waits), known, group in beside)
            for group, record in plans.items()
        }
        waiting = {group: record for group, record in ballots.items() if record.waits}
        agreed = all([
            self._round(group, record, timeout, place) if group in beside else self._count(group, record, timeout)
            for group, record in waiting.items()
        ])  # fmt: skip
        changed = {group: record for group, record in waiting.items() if not record.as_written}
        if len(changed) > 1:
            # A disagreement in one group is news for the peers in the others, and for theirs.
            for turn in range(1, len(changed) + 1):
                agreed = self._pass_on(changed, turn, agreed, timeout)
        if agreed:
            for group, record in changed.items():
                self.running.setdefault((group, record.graph), set()).add(record.sent)
                for code in place.codes:
                    self.changed.setdefault(code, set()).add(group)
        for group, record in plans.items():
            self._compare_versions(group, record)
        return agreed

    def _beside(self, group: Ranks, place: Place) -> bool:
        """Whether peers may be running a changed plan of the code that this new graph comes from. Where the ranks came
        to different graphs of it before, all of them as written, code that was not met yet goes on like that."""
        ever = any(group in self.changed.get(code, ()) for code in place.codes)
        return ever and (place.compilation > 0 or all(group not in self.apart_in.get(c, ()) for c in place.codes))

    # -- one group's ballot -------------------------------------------------------------------------------------------

    def _publish(self, group: Ranks, record: Record, known: _Known, beside: bool = False) -> Record:
        own = self._own(group)
        if beside:
            name = f"{ROUND}{self.rounds.get(group, 0)}"
        elif group in known.names:
            name = f"{known.names[group]}+{len(known.plans)}"
        else:
            name = known.names[group] = f"{record.graph}/{sum(r.graph == record.graph and _new(r) for r in own)}"
        record = replace(record, ballot=name)
        self.store.set(f"{_name(group)}/{self.rank}/{len(own)}", record.to_json())
        own.append(record)
        return record

    def _round(self, group: Ranks, record: Record, timeout: float, place: Place) -> bool:
        """Whether all ranks of the group have come to a new graph beside a running plan, and have the same plan for it.

        Rounds are counted, so ranks whose graphs differ meet as well. One that not all ranks came to in time is over
        for all of them, and its ranks run what was agreed on before, or nothing.
        """
        known = _Known()
        began, pause = time.monotonic(), 0.001
        while True:
            cast = {rank: r for rank in group for r in self._read(group, rank) if r.ballot == record.ballot}
            missing = [rank for rank in group if rank not in cast]
            same = len({r.sent for r in cast.values()}) == 1
            word = self._word(group, record)
            if not missing and word is None:
                word = self._set_word(group, record, FULL if same else WRITTEN)
            late = not self._may_come(missing, time.monotonic() - began, timeout)
            if word is None and late:
                word = self._set_word(group, record, ALONE)
            if word is None:
                # Polled, since a store that waits answers no other thread.
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
                continue
            self.rounds[group] = self.rounds.get(group, 0) + 1
            if word == ALONE and not late:
                record = self._publish(group, record, known, beside=True)
                continue
            if word == ALONE:
                return self._alone(group, record, missing, timeout)
            if word == WRITTEN:
                for code in place.codes:
                    self.apart_in.setdefault(code, set()).add(group)
                self._warn(group, cast)
            return word == FULL

    def _may_come(self, missing: Sequence[int], waited: float, timeout: float) -> bool:
        """Whether to go on waiting for these ranks: those that compile are given more time."""
        if waited <= timeout:
            return True
        keys = [f"compiling/{rank}" for rank in missing]
        compiling = [key for key in keys if self.store.check([key]) and self.store.get(key) == b"yes"]
        return len(compiling) == len(keys) and waited <= PATIENCE * timeout

    def _alone(self, group: Ranks, record: Record, missing: Sequence[int], timeout: float) -> bool:
        """The outcome where some ranks have not come to a round: they run on with what was agreed on."""
        if record.sent in self.running.get((group, record.graph), ()):
            return True
        words = (
            f"rank {self.rank} has compiled a graph anew, ranks {list(missing)} of group {list(group)} have not "
            f"within {timeout:g} s (plan_timeout) and may still run the one that was agreed on before, which sends "
            "something else. Call the model once on all ranks with what this rank wants of it now before any rank "
            "goes on; for a number that only some ranks change, compile with dynamic=True; or compile with "
            "options={'check_plans': False}: then what is sent stays as it was written"
        )
        self.store.set(f"{_name(group)}/differ", words)
        raise PlanMismatchError(words)

    def _count(self, group: Ranks, record: Record, timeout: float) -> bool:
        """Whether all ranks of the group have the same plan for this graph."""
        cast: dict[int, Record] = {}
        began, pause = time.monotonic(), 0.001
        while True:
            for rank in group:
                cast.update((rank, r) for r in self._read(group, rank) if r.ballot == record.ballot)
            missing = [rank for rank in group if rank not in cast]
            if len({r.sent for r in cast.values()}) > 1 or not missing or self._elsewhere(group, missing):
                break
            decided = self._decided(group, record, 0)
            if decided is not None:
                return decided
            waited = time.monotonic() - began
            if self.running.get((group, record.graph)):
                if not self._may_come(missing, waited, timeout):
                    return self._decide(group, record, 0, self._alone(group, record, missing, timeout))
            elif waited > timeout:
                log.warning(
                    "ranks %s of group %s ran no such graph within %g s (plan_timeout); rank %d runs it with what it "
                    "sends as it was written", missing, list(group), timeout, self.rank,
                )  # fmt: skip
                return self._decide(group, record, 0, False)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        same = not missing and len({r.sent for r in cast.values()}) == 1
        agreed = self._decide(group, record, 0, same)
        if not agreed:
            self._warn(group, {**{rank: own[-1] for rank in missing if (own := self._own(group, rank))}, **cast})
        return agreed

    def _warn(self, group: Ranks, plans: Mapping[int, Record]) -> None:
        log.warning("%s. All of them run this graph with what they send as it was written.", describe(group, plans))

    def _elsewhere(self, group: Ranks, missing: Sequence[int]) -> bool:
        """Whether a rank has come to a graph that this one has not, without passing by this one's: it cannot come."""
        own = {record.ballot for record in self._own(group)}
        others = [r for rank in missing for r in self._own(group, rank) if r.ballot not in own]
        stuck = (r for r in others if r.waits and self._decided(group, r, 0) is None)
        return any(_new(r) for r in others) or any(stuck)

    def _pass_on(self, changed: Mapping[Ranks, Record], turn: int, agreed: bool, timeout: float) -> bool:
        """Tell the peers of all groups how it stands, and hear from them."""
        for group, record in changed.items():
            self.store.set(f"{_name(group)}/{record.ballot}/{turn}/{self.rank}", FULL if agreed else WRITTEN)
        deadline = time.monotonic() + timeout
        for group, record in changed.items():
            keys = [f"{_name(group)}/{record.ballot}/{turn}/{rank}" for rank in group]
            # Ranks with another plan take no part; their peers know it from the ballot itself.
            heard = agreed and self._all_there(keys, deadline, group, record, turn)
            same = heard and all(self.store.get(key).decode() == FULL for key in keys)
            agreed = self._decide(group, record, turn, same) and agreed
        return agreed

    def _all_there(self, keys: list[str], deadline: float, group: Ranks, record: Record, turn: int) -> bool:
        while not self.store.check(keys):
            if time.monotonic() > deadline or self._decided(group, record, turn) is False:
                return False
            time.sleep(0.005)
        return True

    def _decide(self, group: Ranks, record: Record, turn: int, agreed: bool) -> bool:
        """The group's word on a ballot: that of the first rank to have one."""
        return self._set_word(group, record, FULL if agreed else WRITTEN, turn) == FULL

    def _decided(self, group: Ranks, record: Record, turn: int) -> bool | None:
        word = self._word(group, record, turn)
        return None if word is None else word == FULL

    def _set_word(self, group: Ranks, record: Record, word: str, turn: int = 0) -> str:
        return self.store.compare_set(f"{_name(group)}/{record.ballot}/{turn}/outcome", "", word).decode()

    def _word(self, group: Ranks, record: Record, turn: int = 0) -> str | None:
        key = f"{_name(group)}/{record.ballot}/{turn}/outcome"
        return self.store.get(key).decode() if self.store.check([key]) else None

    # -- what was published -------------------------------------------------------------------------------------------

    def _own(self, group: Ranks, rank: int | None = None) -> list[Record]:
        lists = self.published.setdefault(group, {rank: [] for rank in group})
        return lists[self.rank if rank is None else rank]

    def _read(self, group: Ranks, rank: int) -> list[Record]:
        known = self._own(group, rank)
        if rank != self.rank:
            while self.store.check([key := f"{_name(group)}/{rank}/{len(known)}"]):
                known.append(_parsed(self.store.get(key)))
        return known

    def _compare_versions(self, group: Ranks, record: Record) -> None:
        last = {rank: found[-1] for rank in group if (found := self._read(group, rank))}
        words = versions_differ(group, last)
        if words:
            words = self.store.compare_set(f"{_name(group)}/differ", "", words).decode()
            raise PlanMismatchError(words)

    def _heard(self, plans: Mapping[Ranks, Record]) -> None:
        if words := self.heard(plans):
            raise PlanMismatchError(words)

    def heard(self, plans: Mapping[Ranks, Record]) -> str:
        """What a rank that cannot go on has left in the store for the groups of these plans, or ''."""
        for group in plans:
            if self.store.check([key := f"{_name(group)}/differ"]):
                return self.store.get(key).decode()
        return ""

    def apart(self, plans: Mapping[Ranks, Record]) -> str:
        """For a wait that ended in an error: a sentence on a group whose ranks have published different graphs last,
        or ''."""
        for group in plans:
            last = {rank: found[-1] for rank in group if (found := self._read(group, rank))}
            if len({record.graph for record in last.values()}) > 1:
                return describe(group, last)
        return ""


def _new(record: Record) -> bool:
    """Whether a record is of code that its rank had not met before."""
    return "+" not in record.ballot and not record.ballot.startswith(ROUND)


def _parsed(text: bytes) -> Record:
    try:
        return Record.from_json(text)
    except OptionError:  # of a version with other records
        return Record("unreadable", "another version", "another version")


def _name(group: Ranks) -> str:
    return "-".join(map(str, group))


def ledger() -> Ledger | None:
    """The ledger of the current world; None without a process group whose ranks can meet."""
    world = default_group()
    if world is None or dist.get_backend(world) == "fake":
        return None
    found = state.LEDGERS.get(world)
    if found is None:
        made = Ledger(default_store(), dist.get_rank())
        with state.LOCK:
            found = state.LEDGERS.setdefault(world, made)
    return found
