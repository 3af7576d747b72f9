"""What stands around a compiled graph at run time: the agreement on its first run, and words for a wait in vain."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from .._torch_private import default_group, groups_of, set_group_timeout
from ..errors import PlanMismatchError
from ..options import Options
from ..report import Report
from . import heartbeat as stuck
from .plan_check import Ledger, ledger, records


def guard(compiled: Callable[..., Any], report: Report, options: Options) -> Callable[..., Any]:
    """`compiled`, guarded as the options say; unchanged where it communicates with nobody.

    After the first run in a world a call costs one comparison more than before, and with `peer_timeout` two notes of
    the time besides.

    The result raises:
        PlanMismatchError: at the first run, when the ranks of a group have different plans for this graph.
        PeerTimeoutError: when a collective of this graph fails because a peer is late, elsewhere or gone.
    """
    plans = records(report)
    if not plans:
        return compiled
    steps, limit = tuple(report.steps), options.peer_timeout
    checked: Callable[[], dist.ProcessGroup | None] = lambda: None  # noqa: E731
    pulse: stuck.Pulse | None = None

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked, pulse
        world = default_group()
        if world is not None and checked() is not world:
            if limit is not None and (pulse := stuck.pulse(limit)) is not None:
                # Plans name groups by their ranks, and graphs by one of the groups with those ranks.
                for group in (group for ranks in plans for group in groups_of(ranks)):
                    set_group_timeout(group, limit)
            book = ledger() if options.check_plans else None
            if book is not None:
                book.agree(plans, options.plan_timeout)
            checked = weakref.ref(world)
        if pulse is not None:
            pulse.began(steps, limit)
        began = time.monotonic() if pulse is not None else None
        try:
            return compiled(*args, **kwargs)
        except RuntimeError as error:
            if not stuck.from_the_group(error):
                raise
            raise _explained(error, began) from error
        finally:
            if pulse is not None:
                pulse.ended()

    def _explained(error: RuntimeError, began: float | None) -> Exception:
        book: Ledger | None = ledger() if options.check_plans else None
        try:
            words = book.heard(plans) if book is not None else ""
        except RuntimeError:  # the store went with the rank that held it
            words = ""
        if words:
            return PlanMismatchError(words)
        seconds = f"after {time.monotonic() - began:.1f} s, " if began is not None else ""
        cause = f"{seconds}{str(error).splitlines()[0]}"
        if "mismatch between collectives" in cause:  # TORCH_DISTRIBUTED_DEBUG=DETAIL compares every call
            step = stuck.name_step(stuck.step_of_error(error, steps), steps)
            rank = dist.get_rank()
            return PlanMismatchError(f"rank {rank} and its peers enter different collectives at {step}: {cause}")
        return stuck.waited(dist.get_rank(), stuck.step_of_error(error, steps), steps, cause, pulse)

    return run
