"""How a fused operation will run, for all that can be known without asking the group's other ranks. Reads only."""

from __future__ import annotations

from dataclasses import dataclass

from tpfuse.kernels.entry import why_not

from ..facts.graph import val, value
from ..plan.sites import Plan


@dataclass(frozen=True)
class Runs:
    """kernel: whether it is one kernel in symmetric memory, where its size has one; sentence: `Boundary.runs`."""

    kernel: bool
    sentence: str


#: Of boundaries that stay as the program laid them out.
LOCAL_KERNEL = Runs(False, "functional: Only an all-reduce before a norm has a symmetric-memory kernel.")


NOT_FUSED = Runs(False, "")
IN_ONE_KERNEL = Runs(True, "symmetric memory")
NO_KERNEL = Runs(
    False, "functional: Its layout was changed, and only an all-reduce before a norm has a symmetric-memory kernel."
)


def how_it_runs(plan: Plan) -> Runs:
    """To be called before the graph is rewritten. What a group found
    out in this process does not count, since the answer is kept with the compiled graph."""
    collective = plan.paid[-1].collective
    if collective.kind != "all_reduce":
        return LOCAL_KERNEL
    total = val(collective.result)
    hidden = total.shape[-1] if isinstance(total.shape[-1], int) else None
    refusal = why_not(collective.group_name, total.device, hidden, total.dtype, found_out=False)
    return Runs(False, f"functional: {refusal}") if refusal else IN_ONE_KERNEL


def runs_in_a_kernel(group_name: object, partial: object) -> bool:
    """Whether a fused operation on `partial` may run as one kernel, for all that can be known without communicating."""
    given = value(partial)
    if given is None or not isinstance(group_name, str):
        return False
    hidden = given.shape[-1] if given.dim() and isinstance(given.shape[-1], int) else None
    return not why_not(group_name, given.device, hidden, given.dtype, found_out=False)
