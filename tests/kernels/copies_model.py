"""The protocol of copies as a model: every order in which two ranks' streams and copies can take turns.

A rank's steps and what each stands behind are those of kernels/symmetric/copies.py, in the order of copied.py and
exchanged.py. A rank has two streams, the caller's and that of copies; the steps of each are made in turn. In one model
the streams run beside each other; in the other a rank does one step at a time, in any order that its streams allow, and
a wait that was begun must end before anything else runs: so a device might run a captured graph.

A chunk is named by its flag. It lies in the place of that number in the peer's slot, in all calls: so y of a small
exchange lies where x of a larger one will.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

RULES = {
    "slot": "a copy stands behind the peer's beginning of this call",
    "flag behind rows": "a flag is copied behind its rows",
    "count": "a chunk waits for a flag that is not behind this call",
    "own send first": "the wait for a chunk stands behind the own send of it",
    "y behind finish": "y of rows is sent behind the finish of them",
    "dead x": "x that a dead rank sends is NaN",
    "dead y": "the rows that a dead rank finishes are NaN",
    "dead take": "the rows that a dead rank takes are NaN",
}
Step = tuple[str, int, int]  # name, number of the call from 1, chunk


@dataclass(frozen=True)
class Call:
    """`chunks`: of x; an exchange has as many of y."""

    kind: str
    chunks: int

    @property
    def flags(self) -> int:
        return self.chunks * (2 if self.kind == "exchanged" else 1)


@dataclass(frozen=True)
class Streams:
    """The steps of each stream in their order, and how many of the other stream's each stands behind."""

    main: list[Step]
    copies: list[Step]
    behind: dict[Step, int]


def streams_of(calls: list[Call], rules: set[str]) -> Streams:
    main: list[Step] = []
    copies: list[Step] = []
    behind: dict[Step, int] = {}

    def send(call: int, chunk: int, after: Step) -> None:
        """A copy of rows is two steps: who looks may see some of the new ones."""
        names = ["half", "rows", "flag"] if "flag behind rows" in rules else ["flag", "half", "rows"]
        for name in names:
            copies.append((name, call, chunk))
            behind[name, call, chunk] = main.index(after) + 1

    def receive(call: int, chunk: int) -> None:
        main.append(("await", call, chunk))
        if "own send first" in rules:
            behind[main[-1]] = 1 + max(copies.index((name, call, chunk)) for name in ("rows", "flag"))

    for number, call in enumerate(calls, 1):
        main.append(("begin", number, 0))
        for chunk in range(call.chunks):
            main += [("multiply", number, chunk), ("slot", number, chunk)]
            send(number, chunk, main[-1])
        for chunk in range(call.chunks):
            if call.kind == "exchanged":
                main.append(("multiply own", number, chunk))
            receive(number, chunk)
            main.append(("finish", number, chunk))
            if call.kind == "exchanged":
                send(number, call.chunks + chunk, main[-1] if "y behind finish" in rules else main[-2])
        for chunk in range(call.chunks, call.flags):
            receive(number, chunk)
            main.append(("take", number, chunk))
    return Streams(main, copies, behind)


class Violation(Exception):
    pass


NAN, BEFORE = -1, 0  # what rows may hold besides those of a call: NaN, and what was there before all calls
Rows = frozenset[int]  # of which calls some rows are: while they are copied, those of two


class Rank(NamedTuple):
    """How many steps of each stream are done; whether a wait holds everything up; whether a wait was given up; the
    count, which the peer is told; the slot and its flags; the rows that are sent."""

    main: int
    copies: int
    held: bool
    dead: bool
    count: int
    slot: tuple[Rows, ...]
    flags: tuple[int, ...]
    sent: tuple[Rows, ...]


State = tuple[Rank, Rank]


@dataclass(frozen=True)
class Model:
    calls: list[Call]
    rules: set[str]
    in_turn: bool
    give_ups: tuple[int, ...]  # the ranks that may end a wait in vain
    streams: Streams

    def explore(self) -> int:
        flags = max(call.flags for call in self.calls)
        nothing = (frozenset({BEFORE}),) * flags
        rank = Rank(0, 0, False, False, 0, nothing, (0,) * flags, nothing)
        begin = rank, rank
        seen, todo = {begin}, [begin]
        while todo:
            state = todo.pop()
            following = [after for who in (0, 1) for after in self.moves(state, who)]
            if not following and any(self.left(rank) for rank in state):
                raise Violation(f"both ranks wait: {state}")
            for after in following:
                if after not in seen:
                    seen.add(after)
                    todo.append(after)
        return len(seen)

    def left(self, rank: Rank) -> bool:
        return rank.main < len(self.streams.main) or rank.copies < len(self.streams.copies)

    def moves(self, state: State, who: int) -> list[State]:
        rank, steps = state[who], self.streams
        out = []
        if rank.copies < len(steps.copies) and not rank.held:
            step = steps.copies[rank.copies]
            if rank.main >= steps.behind[step]:
                mine, peers = self.copied(step, rank, state[1 - who])
                out.append((mine, peers))
        if rank.main < len(steps.main):
            step = steps.main[rank.main]
            if rank.copies >= steps.behind.get(step, 0):
                out += [(mine, state[1 - who]) for mine in self.done(step, rank, state[1 - who], who)]
        return [pair if who == 0 else (pair[1], pair[0]) for pair in out]

    def copied(self, step: Step, rank: Rank, peer: Rank) -> State:
        name, _, chunk = step
        if name == "flag":  # what the count is by now
            peer = peer._replace(flags=put(peer.flags, chunk, rank.count))
        else:
            rows = rank.sent[chunk] | (peer.slot[chunk] if name == "half" else frozenset())
            peer = peer._replace(slot=put(peer.slot, chunk, rows))
        return rank._replace(copies=rank.copies + 1), peer

    def done(self, step: Step, rank: Rank, peer: Rank, who: int) -> list[Rank]:
        name, call, chunk = step
        waits = False
        if name == "slot" and "slot" in self.rules:
            waits = peer.count < call
        if name == "await":
            waits = rank.flags[chunk] < (call if "count" in self.rules else 1)
        if not waits or rank.dead:
            return [self.after(step, rank)]
        out = [rank._replace(held=True)] if self.in_turn and not rank.held else []
        return [*out, self.after(step, rank._replace(dead=True))] if who in self.give_ups else out

    def after(self, step: Step, rank: Rank) -> Rank:
        name, call, chunk = step
        rank = rank._replace(main=rank.main + 1, held=False)
        if name == "begin":
            return rank._replace(count=call)
        if name == "multiply":
            return rank._replace(sent=put(rank.sent, chunk, frozenset({call})))
        if name == "slot" and rank.dead and "dead x" in self.rules:
            return rank._replace(sent=put(rank.sent, chunk, frozenset({NAN})))
        if name not in ("finish", "take"):
            return rank
        nan = rank.dead and ("dead y" if name == "finish" else "dead take") in self.rules
        rows = frozenset({NAN}) if nan else rank.slot[chunk]
        if not rows <= {call, NAN}:
            raise Violation(f"{name} reads rows of calls {sorted(rows)} in call {call}")
        if name == "finish" and self.calls[call - 1].kind == "exchanged":
            return rank._replace(sent=put(rank.sent, self.calls[call - 1].chunks + chunk, rows))
        return rank


def put(whole: tuple, at: int, value: object) -> tuple:
    return (*whole[:at], value, *whole[at + 1 :])


def explore(
    calls: list[Call], without: tuple[str, ...] = (), in_turn: bool = False, give_ups: tuple[int, ...] = ()
) -> int:
    """How many states there are; raises Violation for wrong rows or for ranks that wait for ever."""
    rules = set(RULES) - set(without)
    return Model(calls, rules, in_turn, give_ups, streams_of(calls, rules)).explore()
