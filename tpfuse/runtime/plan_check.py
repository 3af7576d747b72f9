"""What a compiled graph sends over each of its groups, and how the plans of two ranks are told apart. Pure functions.

What must be equal on all ranks of a group is what is *sent*: which partial tensors, added up or changed in which way,
in which order. What a rank hands out besides (the sum itself, hidden states, statistics) is its own affair. A plan is
`as_written` over a group where every operation sends just what the program said, in its order, also among those of
other groups: it fits every peer that does the same, whatever else their graphs do. Any other plan changes what is
sent, and needs peers with the same plan (`ballots`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import TypeVar

import torch

from ..report import Boundary, Report, Step
from ..strict_json import StrictJson

Ranks = tuple[int, ...]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Record(StrictJson):
    """One graph's plan for one group: the group's verdicts and steps in graph order, and who made them.

    graph: a digest of the group's collectives as the program wrote them. ballot: which graph this is, by a name that
    all ranks of the group give it (`ballots`). as_written: whether what is sent is unchanged; changed: over how many of
    the graph's groups it is not. values: a digest of the inputs that the plan takes for equal on all ranks. order: in
    which order the graph sends what the program sent, over all groups. waits: whether the rank waits for its peers.
    """

    graph: str
    tpfuse: str
    torch: str
    boundaries: list[Boundary] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    as_written: bool = True
    changed: int = 0
    order: str = ""
    ballot: str = ""
    values: str = ""
    waits: bool = False

    @cached_property
    def sent(self) -> str:
        """A digest of what is sent: equal where two ranks' plans go together."""
        return self.how if self.as_written else _digest([self.how, self.values])

    @cached_property
    def how(self) -> str:
        """The same without the values: equal for two compilations of one rank that send alike."""
        if self.as_written:
            return f"{self.graph} as written"
        steps = [(_on_the_wire(step), step.sends, step.kernel, step.told) for step in self.steps]
        return _digest([self.graph, self.changed, self.order, steps])


def _on_the_wire(step: Step) -> str:
    """What the ranks perform together; without a kernel of its own, a fused operation is its collective."""
    return step.op if step.kernel else step.op.removesuffix("_backward").removesuffix("_norm").removesuffix("_tensor")


def records(report: Report) -> dict[Ranks, Record]:
    """The plan of one compiled graph, group by group."""
    from .. import __version__

    found = {}
    overtaken = _overtaken(report.steps)
    groups = {boundary.group for boundary in report.boundaries} | {step.group for step in report.steps}
    for group in sorted(groups):
        if len(group) < 2:
            continue
        written = [(f"#{i}", b) for i, b in enumerate(report.boundaries) if b.group == group]
        steps = [step for step in report.steps if step.group == group]
        # Steps without a word on what they send stand in reports that nothing was rewritten in.
        unchanged = [step.sends for step in steps] == [name for name, _ in written] or not any(
            step.sends for step in steps
        )
        found[group] = Record(
            _digest([(b.collective, b.dtype, b.hidden) for _, b in written]),
            __version__,
            torch.__version__,
            [_what_counts(b) for _, b in written],
            steps,
            unchanged and group not in overtaken and not any(step.kernel for step in steps),
        )
    changed = sum(not record.as_written for record in found.values())
    order = ";".join(",".join(map(str, _written_as(step))) for step in report.steps)
    return {group: replace(record, changed=changed, order=order) for group, record in found.items()}


def _written_as(step: Step) -> list[int]:
    """Which collectives of the program, by number, an operation performs."""
    return [int(number) for number in re.findall(r"#(\d+)", step.sends)]


def _overtaken(steps: Sequence[Step]) -> set[Ranks]:
    """The groups of operations that another one overtook, or that overtook one: a peer that keeps the program's order
    waits for the one while the other waits for it."""
    numbers = [_written_as(step) for step in steps]
    before = list(accumulate((max(each, default=-1) for each in numbers), max, initial=-1))
    last = len(steps) + max(before)
    behind = list(accumulate((min(each, default=last) for each in reversed(numbers)), min, initial=last))[::-1]
    return {
        step.group
        for at, (step, each) in enumerate(zip(steps, numbers, strict=True))
        if each and (before[at] > min(each) or behind[at + 1] < max(each))
    }


def _what_counts(b: Boundary) -> Boundary:
    """Without what depends on rows or on the rank, and what no message needs."""
    return Boundary(
        "", b.module, b.collective, b.group, rewrite=b.rewrite, fused=b.fused, reason=b.reason, dtype=b.dtype,
        hidden=b.hidden,
    )  # fmt: skip


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


# -- words ------------------------------------------------------------------------------------------------------------


def versions_differ(group: Ranks, plans: Mapping[int, Record]) -> str:
    """A sentence on ranks that run different versions, or ''."""
    versions = {rank: f"tpfuse {plan.tpfuse} and torch {plan.torch}" for rank, plan in plans.items()}
    if len(set(versions.values())) < 2:
        return ""
    return f"the ranks of group {list(group)} run different versions: {_who(versions)}. Install the same on all ranks"


def describe(group: Ranks, plans: Mapping[int, Record]) -> str:
    """Which boundary the plans first differ at, and which ranks decided what about it."""
    ranks = sorted(plans)
    for index in range(max(len(plans[rank].boundaries) for rank in ranks)):
        verdicts = {rank: _at(plans[rank].boundaries, index) for rank in ranks}
        if len({_decided(b) for b in verdicts.values()}) > 1:
            names = sorted({b.module for b in verdicts.values() if b is not None and b.module})
            where = f"boundary {index} ({' or '.join(names) or 'in no named module'})"
            return _sentence(group, where, {rank: _verdict(b) for rank, b in verdicts.items()})
    for index in range(max(len(plans[rank].steps) for rank in ranks)):
        steps = {rank: _at(plans[rank].steps, index) for rank in ranks}
        if len({_performed(step) for step in steps.values()}) > 1:
            return _sentence(group, f"step {index}", {rank: _step(step) for rank, step in steps.items()})
    return f"the ranks of group {list(group)} have different plans"


def _sentence(group: Ranks, where: str, decided: Mapping[int, str]) -> str:
    return f"the ranks of group {list(group)} have different plans, first of all for {where}: {_who(decided)}"


def _at(found: Sequence[Item], index: int) -> Item | None:
    return found[index] if index < len(found) else None


def _decided(b: Boundary | None) -> tuple | None:
    """What ranks must agree on about a boundary; the reasons of each rank are its own."""
    return None if b is None else (b.module, b.collective, b.dtype, b.hidden, b.fused, b.rewrite)


def _verdict(b: Boundary | None) -> str:
    if b is None:
        return "no such boundary"
    done = f"fused by {b.rewrite}" if b.fused else f"changed by {b.rewrite}" if b.rewrite else "left as it is"
    why = f" ({b.reason})" if b.reason else ""
    return f"{b.collective} of {b.dtype or '?'} x {b.hidden or '?'} {done}{why}"


def _performed(step: Step | None) -> tuple | None:
    return None if step is None else (step.op, step.dtype, step.hidden, step.module, step.sends, step.told)


def _step(step: Step | None) -> str:
    if step is None:
        return "no such step"
    op = f"{step.op} ({step.told})" if step.told else step.op
    what = f"{op} of {step.dtype or '?'} x {step.hidden or '?'}" + (f" at {step.module}" if step.module else "")
    return f"{what}, which sends {step.sends}" if step.sends else what


def _who(said: Mapping[int, str]) -> str:
    by_saying: dict[str, list[int]] = {}
    for rank in sorted(said):
        by_saying.setdefault(said[rank], []).append(rank)
    return "; ".join(
        f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}: {saying}"
        for saying, ranks in by_saying.items()
    )
