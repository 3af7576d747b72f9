"""How a fused operation will run, for all that can be known without asking the group's other ranks. Reads only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from tpfuse._torch_private import group_size
from tpfuse.kernels.entry import why_not
from tpfuse.product_ops import FROM_BYTES, RANKS

from ..facts.collectives import Collective
from ..facts.graph import GATHERS, argument, val, value
from ..plan.sites import Plan
from ..recognise.streams import calls
from .accounting import origin


@dataclass(frozen=True)
class Runs:
    """kernel: whether it is one kernel in symmetric memory, where its size has one; sentence: `Boundary.runs`."""

    kernel: bool
    sentence: str


#: Of boundaries that stay as the program laid them out.
LOCAL_KERNEL = Runs(False, "functional: Only an all-reduce before a norm has a symmetric-memory kernel here.")


NOT_FUSED = Runs(False, "")
IN_ONE_KERNEL = Runs(True, "symmetric memory")
EXCHANGED = Runs(True, f"symmetric memory, by copy engines, from {FROM_BYTES >> 20} MB of a rank's rows on")
NO_KERNEL = Runs(
    False, "functional: Its layout was changed, and only all-reduces before norms have symmetric-memory kernels here."
)


def how_it_runs(plan: Plan, overlap: bool = False) -> Runs:
    """To be called before the graph is rewritten. What a group found out in this process does not count, since the
    answer is kept with the compiled graph. `overlap`: whether overlap_all_reduce_norm is named."""
    collective = plan.paid[-1].collective
    if collective.kind != "all_reduce":
        return LOCAL_KERNEL
    total = val(collective.result)
    hidden = total.shape[-1] if isinstance(total.shape[-1], int) else None
    refusal = why_not(collective.group_name, total.device, hidden, total.dtype, found_out=False)
    if refusal:
        return Runs(False, f"functional: {refusal}")
    return Runs(True, f"{IN_ONE_KERNEL.sentence}{_overlapped(collective, total)}") if overlap else IN_ONE_KERNEL


def _overlapped(collective: Collective, total: torch.Tensor) -> str:
    """What the name of the rewrite does for this boundary."""
    if len(collective.ranks or ()) != RANKS:
        return f"; overlap_all_reduce_norm takes groups of {RANKS} ranks"
    size, least = total.numel() * total.element_size(), f"{FROM_BYTES >> 20} MB of a rank's rows"
    if not isinstance(size, int):
        return f"; from {least} on by copy engines, while later rows are multiplied"
    if size < FROM_BYTES:
        return f"; overlap_all_reduce_norm begins at {least}, and here are {size / (1 << 20):.3g}"
    return ", by copy engines: rows travel while later ones are multiplied"


_WHOLE = "tpfuse::all_reduce_norm_backward"
_EXCHANGES = ("tpfuse::reduce_scatter_norm_gather", "tpfuse::reduce_scatter_norm_backward_gather", _WHOLE)


def exchanges(node: fx.Node) -> bool:
    """Whether `node`, a reduce-scatter, a norm or its backward, and a gather in one operation, or an all-reduce and
    the norm's backward, may run as one, by copies between two ranks."""
    return any(calls(node, name) for name in _EXCHANGES) and may_exchange(node)


def may_exchange(node: fx.Node) -> bool:
    """The same of an operation of ours, were its gather a part of it. Of facts that are equal on all ranks: how many
    rows a call has is looked at again when it is made."""
    x, group, out_dtype = value(node.args[0]), argument(node, "group_name"), argument(node, "out_dtype")
    otherwise = any(node.kwargs.get(name) for name in ("batch_invariant", "quant")) or not node.kwargs.get("overlap")
    if otherwise or node.kwargs.get("swap") is not None or x is None or group_size(group) != RANKS:
        return False
    size, rows = x.numel() * x.element_size(), x.shape[0]
    if isinstance(size, int) and size < FROM_BYTES:
        return False
    odd = isinstance(rows, int) and rows % 2
    if not calls(node, _WHOLE) and (odd or out_dtype.itemsize != x.element_size()):
        return False
    return runs_in_a_kernel(group, node.args[0])


def exchanged(graph: fx.Graph) -> list[str]:
    """The names of the collectives that are one exchange with another."""
    found = [node for node in graph.nodes if exchanges(node)]
    return [name for node in found for name in (origin(node), node.meta.get(GATHERS, origin(node)))]


def runs_in_a_kernel(group_name: object, partial: object) -> bool:
    """Whether a fused operation on `partial` may run as one kernel, for all that can be known without communicating."""
    given = value(partial)
    if given is None or not isinstance(group_name, str):
        return False
    hidden = given.shape[-1] if given.dim() and isinstance(given.shape[-1], int) else None
    return not why_not(group_name, given.device, hidden, given.dtype, found_out=False)
