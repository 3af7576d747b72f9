"""A call by copies, made again on other tensors: its steps, with numbers in the place of all that stays the same.

A first call asks for some thirty steps, and what costs the host is not to make them but to find them out: outputs,
views, what a kernel is compiled for, where a chunk goes. For calls that are alike (`records.py`) all of that is the
same as long as the workspace is. `noted` goes through a call that was just made, step by step as the call's own code
asks for them, so there is one description of the protocol (`copies.py`). What comes out makes the same steps in the
same order, on the addresses it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from ...errors import OpError
from ..driver import Driver, driver
from ..words import COPIES
from .copies import Copies, Finish, InCalls, Lane, Step, X, lane_of
from .operands import COMPILED_REGISTRY, TENSORS, Places, addressed
from .workspace import Workspace

#: As `Call.product`.
Product = Callable[[int, int], None]
#: One step, on the addresses of the call's tensors, behind work on the caller's stream.
_Again = Callable[[tuple, Product | None, int], None]
_LAST = {"q_ptr": TENSORS, "scale_ptr": TENSORS + 1}  # which follow the tensors


@dataclass(frozen=True)
class Steps:
    """All steps of a call. addresses: those of its tensors in the order of NAMES, and of q and scale where it
    quantises; product: as `Call.product`, where x is one; stream: the caller's."""

    each: tuple[_Again, ...]
    lane: Lane
    driver: Driver

    def __call__(self, *addresses: int | None, stream: int, product: Product | None = None) -> None:
        try:
            for step in self.each:
                step(addresses, product, stream)
        except BaseException:  # copies are under way, as where a first call raises
            asked, beside, _ = self.lane.handles(0)
            with suppress(OpError):  # nothing is under way in a stream of copies that is not captured yet
                self.driver.record(asked, beside)
                self.driver.wait(stream, asked, 0)
            raise

    def __len__(self) -> int:
        return len(self.each)


def noted(
    calls: InCalls, places: Places, finishing: Callable[[int, int], Callable[[int], Step]]
) -> tuple[Steps, tuple] | None:  # fmt: skip
    """The steps of a call that was made with tensors at `places`, as `Launch.again` gives them; None where its kernels
    were not compiled, or the driver is not found. finishing(start, stop) is for one call of the protocol, on these
    rows: it gives, by a row's number, the step that finishes rows from that one on."""
    if (found := driver()) is None:
        return None
    copies = Noted(calls.ws, calls.words, places, found)

    def finisher(start: int, stop: int) -> Finish:
        step = finishing(start, stop)
        return lambda first, last: copies.launch(step(first), last - first)

    try:
        replace(calls, product=copies.multiply).run(finisher, copies)
    except _NotCompiledError:
        return None
    return Steps(tuple(copies.each), copies.lane, found), ()


class _NotCompiledError(Exception):
    """By Triton's interpreter, or not yet."""


class Noted(Copies):
    """As `Copies`, but does nothing: `each` are the steps asked for. places: where the tensors of the call lie."""

    def __init__(self, ws: Workspace, words: Tensor, places: Places, found: Driver) -> None:
        super().__init__(ws, words)
        self.places, self.driver = places, found
        self.each: list[_Again] = []

    def __enter__(self) -> Noted:
        return self

    def __exit__(self, *failed: Any) -> None:
        return None

    @cached_property
    def lane(self) -> Lane:
        return lane_of(self.ws, self.words.device)

    def multiply(self, first: int, stop: int) -> None:
        """In the place of the call's product."""

        def again(at: tuple, product: Product | None, stream: int) -> None:
            if product is not None:
                product(first, stop)

        self.each.append(again)

    def launch(self, step: Step, programs: int) -> None:
        known = COMPILED_REGISTRY.get(step.key) if step.key is not None else None
        if known is None:
            raise _NotCompiledError
        compiled, names = known
        options = [step.options.get(name) for name in names]
        args = addressed((*step.args, *options), self.ws.watch)
        of_call = [(i, which, args[i] - (self.places[which] or 0)) for i, which in step.of_call if args[i] is not None]
        of_call += [(len(step.args) + names.index(name), which, 0) for name, which in _LAST.items()
                    if isinstance(step.options.get(name), Tensor)]  # fmt: skip
        run = compiled[(programs, 1, 1)]

        def again(at: tuple, product: Product | None, stream: int) -> None:
            own = args.copy()
            for i, which, behind in of_call:
                own[i] = at[which] + behind
            run(*own, stream=stream)

        self.each.append(again)

    def send(self, chunk: int, words: Tensor, at: int, of_call: int = X) -> None:
        there, place = self.ws.remote, self.places[of_call]
        assert there is not None and place is not None, "it was sent before"
        to, flag = (there.data_ptr() + 4 * word for word in (self.ws.copies_offset + at, self._flags + chunk))
        behind, size = words.data_ptr() - place, 4 * words.numel()
        count = self.ws.state[COPIES:].data_ptr()
        copy, record, wait = self.driver
        asked, beside, sent = self.lane.handles(chunk)

        def again(at: tuple, product: Product | None, stream: int) -> None:
            record(asked, stream)
            wait(beside, asked, 0)
            copy(to, at[of_call] + behind, size, beside)
            copy(flag, count, 4, beside)
            record(sent, beside)

        self.each.append(again)

    def receive(self, chunk: int) -> None:
        wait, sent = self.driver.wait, self.lane.handles(chunk)[2]
        self.each.append(lambda at, product, stream: wait(stream, sent, 0))
        self.launch(self.waiting(chunk, 0, 0), 1)
