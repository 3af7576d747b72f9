"""What stands around a compiled graph at run time: the agreement on its first run, and words for a wait in vain."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch.distributed as dist

from .._state import FAILED, LIMITS
from .._torch_private import default_group
from ..errors import PlanMismatchError
from ..kernels.rendezvous import check_peers
from ..options import Options
from ..report import Report
from . import heartbeat as stuck
from .ballots import Ledger, Place, ledger
from .failures import note_failure, raise_again, watched_groups
from .limits import Group, apply_limit, groups_with_ranks
from .plan_check import records
from .same_values import with_values


@dataclass(frozen=True)
class Compiled:
    """A compiled graph, with the report on it."""

    call: Callable[..., Any]
    report: Report

    @cached_property
    def steps(self) -> tuple:
        return tuple(self.report.steps)


def guard(
    compiled: Callable[..., Any],
    report: Report,
    options: Options,
    written: Callable[[], tuple[Callable[..., Any], Report]] | None = None,
    place: Place | None = None,
) -> Callable[..., Any]:
    """`compiled`, guarded as the options say; unchanged where it communicates with nobody.

    `written` compiles the same graph with everything sent as the program wrote it, and is called where the ranks of a
    group do not agree on more. `place`: which compilation this is.

    After the first run in a world a call costs a few comparisons more than before, one more where any graph has a
    `peer_timeout`, and with a `peer_timeout` of its own two notes of the time besides. Where kernels run in symmetric
    memory, a call ends with a look at a word of host memory for each of its groups: at what kernels, those of
    replayed CUDA graphs too, have reported until then. It waits neither for the device nor for other ranks.

    The result raises:
        PlanMismatchError: at the first run, when the ranks run different versions, or when peers already run what this
            graph cannot take part in; and where a collective fails because the ranks' programs differ.
        PeerTimeoutError: when a collective of this graph fails because a peer is late, elsewhere or gone; when a kernel
            of its groups has reported that; and again at every later call, until the groups are set up anew.
    """
    plans = records(report)
    if not plans:
        return compiled
    limit = options.peer_timeout
    variants = [Compiled(compiled, report)]  # as planned, and as written once that was asked for
    chosen = variants[0]
    checked: Callable[[], dist.ProcessGroup | None] = lambda: None  # noqa: E731
    pulse: stuck.Pulse | None = None
    groups: tuple[Group, ...] = ()
    watched: tuple[tuple[str, str], ...] = ()  # names of the groups that kernels of this graph use, and where

    def meet(world: dist.ProcessGroup, args: Sequence[Any]) -> None:
        """Before the first run in a world."""
        nonlocal checked, chosen, pulse, groups, watched
        pulse = stuck.pulse(limit) if limit is not None else None
        groups = groups_with_ranks(plans)
        book = ledger() if options.check_plans else None
        try:
            agreed = book is None or book.agree(with_values(plans, args), options.plan_timeout, place)
            if not agreed and written is not None and not all(record.as_written for record in plans.values()):
                if len(variants) == 1:
                    variants.append(Compiled(*written()))
                chosen = variants[1]
            else:
                chosen = variants[0]
        except PlanMismatchError as error:
            # What peers wait for does not come, so nothing that this rank sends from here on would meet what it should.
            note_failure(groups, error, plans)
            raise
        watched = watched_groups(chosen.steps)
        checked = weakref.ref(world)

    def run(*args: Any, **kwargs: Any) -> Any:
        world = default_group()
        if world is not None and checked() is not world:
            meet(world, args)
        if FAILED:
            raise_again(groups)
        if pulse is not None and limit is not None:
            apply_limit(groups, limit)
            pulse.began(chosen.steps, limit)
        elif LIMITS:
            apply_limit(groups, None)
        began = time.monotonic() if pulse is not None else None
        try:
            result = chosen.call(*args, **kwargs)
        except RuntimeError as error:
            if not stuck.from_the_group(error):
                raise
            raise _explained(error, began) from error
        finally:
            if pulse is not None:
                pulse.ended()
        for name, boundary in watched:
            check_peers(name, boundary)
        return result

    def _explained(error: RuntimeError, began: float | None) -> Exception:
        book: Ledger | None = ledger() if options.check_plans else None
        try:
            words = (book.heard(plans) or book.apart(plans)) if book is not None else ""
        except RuntimeError:  # the store went with the rank that held it
            words = ""
        seconds = time.monotonic() - began if began is not None else None
        said = f"after {seconds:.1f} s, " if seconds is not None else ""
        cause = f"{said}{str(error).splitlines()[0]}"
        if words:
            apart = PlanMismatchError(f"{words} ({cause})")
            note_failure(groups, apart, plans)
            return apart
        steps = chosen.steps
        if "mismatch between collectives" in cause:  # TORCH_DISTRIBUTED_DEBUG=DETAIL compares every call
            where = stuck.name_step(stuck.step_of_error(error, steps), steps)
            rank = dist.get_rank()
            return PlanMismatchError(f"rank {rank} and its peers enter different collectives at {where}: {cause}")
        step = stuck.step_of_error(error, steps)
        found = stuck.waited(dist.get_rank(), step, steps, cause, pulse, seconds)
        note_failure(groups, found, {s.group for s in (steps if step is None else (step,))})
        return found

    return run
