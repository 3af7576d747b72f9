"""The kernels' protocol as an explicit-state model: every order in which ranks, programs and stores can take turns.

`explore(world, calls)` walks through all states that `world` ranks can reach which make these calls one after the
other, and returns how many there are, or raises `Violation` with the way to a state that must not be. A state is a dict
of what is not at rest. One word stands for all the words that one program stores into one row of one peer: no word says
anything about another (docs/kernels.md). Words lie where the kernels put them, so calls of different shapes overlap.

What is free: when each program of each rank moves; when each store to a peer is performed, up to the end of its kernel;
whether a rank among `give_ups` gives up a wait that finds a word empty. What must hold: without give-ups every result
is right, nobody waits for ever, and in the end all memory is at rest. With give-ups every result is right or NaN, on
every rank, and a rank that began a call dead has NaN in all of its results.

Each of RULES is a rule of docs/kernels.md that can be taken away. Left out are the sizes of things: that 2^30 calls
wrap, that a watch has a clock, that a word has 32 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

RULES = {
    "sentinel": "a writer replaces the bit pattern of EMPTY",
    "rotating slots": "call e uses slot e mod 3 (without: one slot)",
    "stored once": "a call stores each word once (without: twice, as lanes that are no rank's might)",
    "clear after read": "each call empties every word that it reads",
    "barrier before clear": "every warp has read before one clears",
    "push before wait": "a program stores its row before it waits",
    "kernel boundary": "stores and clears of a call are performed before the rank's next call begins",
    "own epoch": "each program reads a copy of the epoch that only it writes (without: one copy for all)",
    "all epochs": "a call writes all copies, whatever its grid",
    "no rows, no call": "a call without rows leaves slots and epoch alone",
    "residency": "all programs of a call run at once (without: one after another)",
    "inbox emptied": "a program empties its inbox",
    "two stages": "stages take turns (barrier)",
    "release": "rows come before the flag that tells of them (barrier)",
    "flag of the next call": "a reader also takes the flag of a peer that is one call ahead (barrier)",
    "dead mark": "a rank that gave up a wait is dead",
    "mark before push": "the mark is read with the epoch, before the first push (without: pushes do not look at it)",
    "own words": "NaN also in what a dead rank adds itself",
    "mark of the rank": "one mark for all programs of a rank (without: one for each)",
    "mark stays": "no later call takes the mark away",
    "sums of the dead": "the sums that a dead rank sends are NaN, whatever it finds in its slot (two-shot)",
    "whole row": "a dead rank's row of sums is NaN in every column (two-shot)",
}
Ranks = Sequence[int]
EMPTY, NAN, WRONG = None, "nan", "wrong"


@dataclass(frozen=True)
class Call:
    """kernel: one_shot, two_shot or barrier; split: programs a row (one_shot)."""

    kernel: str = "one_shot"
    rows: int = 1
    grid: int = 1  # most programs
    split: int = 1

    @property
    def programs(self) -> int:
        return min(self.rows * self.split, self.grid * self.split)


class Violation(Exception):
    """What went wrong, and the way there."""

    def __init__(self, what: str, way: list[str]):
        super().__init__(f"{what}\n" + "\n".join(way))
        self.what = what


def combine(words: list[Any], expected: list[Any], result: Any) -> Any:
    """A sum (or a row, or statistics): NaN if anything is; `result` if all is what it must be; else a wrong number."""
    return NAN if NAN in words else result if words == expected else WRONG


class Model:
    def __init__(self, world: int, calls: list[Call], give_ups: Ranks = (), without: tuple[str, ...] = (),
                 slots: int = 3, most_states: int = 2_000_000):  # fmt: skip
        assert set(without) <= set(RULES)
        self.world, self.calls, self.give_ups, self.most_states = world, calls, give_ups, most_states
        self.on = {rule: rule not in without for rule in RULES}
        self.slots = slots if self.on["rotating slots"] else 1
        self.coarse = bool(give_ups) and not without  # states that differ in nothing that matters are one (`coarser`)
        self.channels = max(call.programs for call in calls)
        self.steps = [[self.program(call, pid) for pid in range(call.programs)] for call in calls]

    # -- what a program does: a list of steps, each performed at once -------------------------------------------------

    def program(self, call: Call, pid: int) -> list[tuple]:
        part, rows = pid % call.split, range(pid // call.split, call.rows, max(call.programs // call.split, 1))
        steps: list[tuple] = [("begin",)]
        if call.kernel == "barrier":
            steps += [("publish", row) for row in rows] + [("raise",), ("meet",)]
            if not self.on["release"]:
                steps = [("begin",), ("raise",), *[("publish", row) for row in rows], ("meet",)]
            steps += [step for row in rows for step in (("read", row), ("out", row))]
        elif call.kernel == "two_shot":
            # Each row is scattered two rows, and added up one row, before it is finished.
            steps += [("scatter", row) for row in rows[:2]] + [("reduce", row) for row in rows[:1]]
            for i, row in enumerate(rows):
                steps += [("scatter", later) for later in rows[i + 2 : i + 3]]
                steps += [("reduce", later) for later in rows[i + 1 : i + 2]]
                steps += [("finish", row), ("out", row), ("clear", row, part)]
        else:
            ahead = self.on["push before wait"]
            steps += [("push", row, part) for row in rows[:1] if ahead]
            for i, row in enumerate(rows):
                steps += [("push", later, part) for later in rows[i + 1 : i + 2] if ahead]
                steps += [("take", row, part)] + [("push", row, part)] * (not ahead)
                if call.split > 1:
                    steps += [("tell", row, part), ("join", row, part)]
                steps += [("out", row), ("clear", row, part)]
        if not self.on["clear after read"]:
            steps = [step for step in steps if step[0] != "clear"]
        if not self.on["barrier before clear"]:  # two warps: one reads and empties before the other one reads
            first = [[step, ("clear", *step[1:])] if step[0] == "take" else [] for step in steps]
            steps = [step for before, after in zip(first, steps, strict=True) for step in (*before, after)]
        return [*steps, ("end",)]

    # -- one step -----------------------------------------------------------------------------------------------------

    def move(self, state: dict, rank: int, pid: int, give_up: bool = False) -> dict | None:
        """The state after the next step of a program; None where it must wait (or, with `give_up`, need not)."""
        number = state.get(("call", rank), 0)
        call = self.calls[number]
        at, epoch, dead, value = state.get(("program", rank, pid), (0, 0, False, EMPTY))
        name, *where = self.steps[number][pid][at]
        new = dict(state)
        me, everyone, peers = rank, range(self.world), [q for q in range(self.world) if q != rank]
        slot = ("slot", epoch % self.slots)
        row, part = (*where, 0, 0)[:2]
        mark = ("dead", rank) if self.on["mark of the rank"] else ("dead", rank, pid)
        missing = False

        def put(key: tuple, word: Any, late: bool = True) -> None:
            """A store: performed at some time (`late`) or now."""
            if late:
                new[("store", rank, number, key)] = word
                if not self.on["stored once"]:
                    new[("store", rank, number, key, "again")] = word
            elif word is EMPTY:
                new.pop(key, None)
            else:
                new[key] = word

        def got(keys: list[tuple]) -> list[Any] | None:
            """The words at `keys`, NaN for those given up; None where a word is empty."""
            nonlocal missing
            if dead and self.coarse:
                return None if give_up else [WRONG] * len(keys)
            words = [state.get(key) for key in keys]
            empty = EMPTY in words
            if empty != give_up:
                return None
            missing = missing or empty
            return [NAN if word is EMPTY else word for word in words]

        def x(word: tuple, pushed: bool) -> Any:
            """A word of the own input: as it travels, or as the rank adds it itself."""
            poisoned = dead and (self.on["mark before push"] if pushed else self.on["own words"])
            if not self.on["sentinel"] and number == 0:
                return EMPTY
            return NAN if poisoned else word

        def one(source: int, owner: int) -> tuple:  # one-shot: rows of each source lie densely
            return (*slot, owner, (source * call.rows + row) * call.split + part)

        def piece(source: int, owner: int) -> tuple:
            return (*slot, owner, source * call.rows + row)

        def total(chunk: int, owner: int) -> tuple:
            return (*slot, owner, self.world * call.rows + row * self.world + chunk)

        if name == "begin":
            epoch, dead = state.get(("epoch", rank, pid if self.on["own epoch"] else 0), 0), mark in state
        elif name == "push":
            for q in peers:
                put(one(me, q), x(("x", number, row, me, part), True))
        elif name == "take":
            words = got([one(q, me) for q in peers])
            if words is None:
                return None
            words.append(x(("x", number, row, me, part), False))
            wanted = [("x", number, row, q, part) for q in (*peers, me)]
            value = combine(words, wanted, ("t", number, row, part))
        elif name == "tell":
            for other in range(call.split):
                put(("inbox", rank, pid - part + other, part), value, False)
        elif name == "join":
            keys = [("inbox", rank, pid, other) for other in range(call.split)]
            missing = any(key not in state for key in keys)
            if missing != give_up:
                return None
            told = [state.get(key, NAN) for key in keys]
            value = combine([*told, value], [("t", number, row, p) for p in (*range(call.split), part)], value)
            for key in keys if self.on["inbox emptied"] else ():
                new.pop(key, None)
        elif name == "scatter":
            for q in everyone:
                put(piece(me, q), x(("p", number, row, me, q), True), q != me)
        elif name == "reduce":
            words = got([piece(q, me) for q in everyone])
            if words is None:
                return None
            sent = combine(words, [("p", number, row, q, me) for q in everyone], ("s", number, row, me))
            sent = NAN if dead and self.on["sums of the dead"] else sent
            for q in everyone:
                put(total(me, q), sent, q != me)
        elif name == "finish":
            words = got([total(q, me) for q in everyone])
            if words is None:
                return None
            value = combine(words, [("s", number, row, q) for q in everyone], ("t", number, row, 0))
            # Columns are finite or NaN one by one: a row that is not NaN as a whole may hold a wrong number.
            if value == NAN and any(w not in (NAN, ("s", number, row, q)) for q, w in enumerate(words)):
                value = WRONG
            value = NAN if dead and self.on["whole row"] else value
        elif name == "publish":
            put(("stage", rank, epoch % (2 if self.on["two stages"] else 1), row), x(("x", number, row, me, 0), True))
        elif name == "raise":
            rows = [key for key in state if key[0] == "store" and key[1] == rank and key[3][0] == "stage"]
            if rows and self.on["release"]:
                return None
            for q in everyone:
                put(("flag", q, pid, me), epoch + 1)
        elif name == "meet":
            raised = (epoch + 1, epoch + 2) if self.on["flag of the next call"] else (epoch + 1,)
            empty = any(state.get(("flag", me, pid, q)) not in raised for q in everyone)
            if empty != give_up:
                return None
            missing, value = empty, NAN if empty else EMPTY
        elif name == "read":
            stage = epoch % (2 if self.on["two stages"] else 1)
            words = [state.get(("stage", q, stage, row), WRONG) for q in everyone]
            read = combine(words, [("x", number, row, q, 0) for q in everyone], ("t", number, row, 0))
            value = (NAN if value == NAN else EMPTY, read)
        elif name == "out":
            if call.kernel == "barrier":
                absent, read = value
                self.check(NAN if absent else read, dead)
                value = absent
            else:
                self.check(value, dead)
                value = EMPTY
        elif name == "clear":
            later = not self.on["kernel boundary"]
            keys = [one(q, me) for q in peers]
            if call.kernel == "two_shot":
                keys = [at(q, me) for q in everyone for at in (piece, total)]
            for key in keys:
                put(key, EMPTY, later)
        elif name == "end":
            for channel in range(pid, self.channels, call.programs) if self.on["all epochs"] else (pid,):
                new[("epoch", rank, channel if self.on["own epoch"] else 0)] = epoch + 1
            if not self.on["mark stays"] and ("gave up", rank, number) not in state:
                new.pop(mark, None)
        if missing:
            if self.on["dead mark"]:
                new[mark] = True
            if not self.on["mark stays"]:
                new[("gave up", rank, number)] = True
        new[("program", rank, pid)] = (at + 1, epoch, dead, value)
        return new

    def check(self, value: Any, dead: bool) -> None:
        if value == WRONG:
            raise Violation("a wrong number", [])
        if value == NAN and not self.give_ups:
            raise Violation("NaN, though nobody gave up", [])
        if value != NAN and dead:
            raise Violation("a number on a dead rank", [])

    # -- all steps ----------------------------------------------------------------------------------------------------

    def turns(self, state: dict) -> list[tuple[str, dict]]:
        """Every state that may follow. Where a step concerns nobody else, it alone: the others commute with it."""
        out: list[tuple[str, dict]] = []
        posted: dict[int, list] = {rank: [] for rank in range(self.world)}
        for key in state:
            if key[0] == "store":
                posted[key[1]].append(key)
        for rank in range(self.world):
            number = state.get(("call", rank), 0)
            for key in sorted(posted[rank], key=repr):  # the same order in every process
                new = dict(state)
                word = new.pop(key)
                if word is EMPTY:
                    new.pop(key[3], None)
                else:
                    new[key[3]] = word
                out.append((f"rank {rank}: store {key[3]} = {word} of call {key[2]} performed", new))
            if number == len(self.calls):
                continue
            done = 0
            for pid, steps in enumerate(self.steps[number]):
                at = state.get(("program", rank, pid), (0,))[0]
                if at == len(steps):
                    done += 1
                    continue
                if not self.on["residency"] and pid > done:
                    continue
                for give_up in (False, True) if rank in self.give_ups else (False,):
                    if give_up and steps[at][0] not in ("take", "join", "reduce", "finish", "meet"):
                        continue
                    try:
                        new = self.move(state, rank, pid, give_up)
                    except Violation as found:
                        last = f"rank {rank} program {pid}: call {number}, {steps[at]}"
                        raise Violation(found.what, [last]) from None
                    if new is not None:
                        how = "gives up " if give_up else ""
                        turn = (f"rank {rank} program {pid}: call {number}, {how}{steps[at]}", new)
                        if self.alone(steps[at][0], len(self.steps[number])):
                            return [turn]
                        out.append(turn)
            if done == len(self.steps[number]) and not (posted[rank] and self.on["kernel boundary"]):
                new = {key: word for key, word in state.items() if key[:2] != ("program", rank)}
                following = number + 1
                while following < len(self.calls) and not self.calls[following].rows:
                    following += 1
                    for channel in () if self.on["no rows, no call"] else range(self.channels):
                        new[("epoch", rank, channel)] = new.get(("epoch", rank, channel), 0) + 1
                new[("call", rank)] = following
                return [(f"rank {rank}: call {number} has ended", new)]
        return out

    def alone(self, step: str, programs: int) -> bool:
        """Whether a step commutes with whatever others may do meanwhile."""
        if step == "end":
            return self.on["own epoch"]
        return step in ("push", "scatter", "publish", "out", "tell") or (step == "begin" and programs == 1)

    def over(self, state: dict) -> bool:
        """Whether all that may follow is NaN: every rank is dead, and began its call so."""
        began = {(key[1], word[2]) for key, word in state.items() if key[0] == "program" and word[0] > 0}
        return began == {(rank, True) for rank in range(self.world)} and self.coarse

    def coarser(self, state: dict) -> frozenset:
        """The state with WRONG, the worst a word can be, in place of words of calls that their reader has left, and
        without what lies in slots of ranks that began their call dead: these take it that they find WRONG."""
        if self.coarse:
            began_dead = {key[1] for key, word in state.items() if key[0] == "program" and word[2]}
            for key, word in list(state.items()):
                place = key[3] if key[0] == "store" else key
                if place[0] == "slot":
                    if place[2] in began_dead:
                        del state[key]
                    elif word not in (EMPTY, NAN, WRONG) and word[1] < state.get(("call", place[2]), 0):
                        state[key] = WRONG
        return frozenset(state.items())

    def explore(self) -> int:
        """The number of states. Raises Violation."""
        way: dict[frozenset, tuple[frozenset | None, str]] = {frozenset(): (None, "")}
        stack = [frozenset()]
        while stack:
            frozen = stack.pop()
            state = dict(frozen)
            if self.over(state):
                continue
            try:
                turns = self.turns(state)
                if not turns:
                    self.at_rest(state)
            except Violation as found:
                raise Violation(found.what, self.path(way, frozen) + str(found).splitlines()[1:]) from None
            for words, new in turns:
                key = self.coarser(new)
                if key not in way:
                    way[key] = (frozen, words)
                    stack.append(key)
            assert len(way) < self.most_states, "more states than expected"
        return len(way)

    def at_rest(self, state: dict) -> None:
        """Nobody can move: all must have made all calls, and without give-ups all memory must be at rest."""
        patient = [rank for rank in range(self.world) if state.get(("call", rank), 0) < len(self.calls)]
        if patient and not (self.give_ups and all(rank not in self.give_ups for rank in patient)):
            raise Violation("a wait for ever", [])
        epochs = {state.get(("epoch", rank, c), 0) for rank in range(self.world) for c in range(self.channels)}
        left = [key for key in state if key[0] in ("slot", "inbox")]
        if not self.give_ups and (left or (len(epochs) > 1 and self.on["own epoch"])):
            raise Violation(f"not at rest: {left}, epochs {epochs}", [])

    @staticmethod
    def path(way: dict, frozen: frozenset) -> list[str]:
        steps = []
        while way[frozen][0] is not None:
            steps.append(way[frozen][1])
            frozen = way[frozen][0]
        return steps[::-1]


def explore(world: int, calls: list[Call], give_ups: Ranks = (), without: tuple[str, ...] = (), **more: Any) -> int:
    return Model(world, calls, give_ups, without, **more).explore()
