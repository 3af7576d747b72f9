"""What every boundary costs before and after: collectives, bytes a rank sends, layouts of the rows. Reads only.

Before the graph is rewritten each collective is marked with its own name (`ORIGIN`); whatever is put in its place
carries the mark on, so that the collectives of the rewritten graph can be counted by the boundary they belong to.
Bytes come from the planner's own model (`layouts.sent_bytes`) and the sizes that the graph was traced with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tpfuse._torch_private import operator_schema
from tpfuse.policy import SharingPolicy
from tpfuse.report import Boundary, Transfer

from ..facts import aten_ops as ops
from ..facts.collectives import Collective, ResolveGroup, is_collective
from ..facts.graph import GATHERS, ORIGIN, argument, value
from ..facts.groups import MeshGroups, mesh_groups, names_of_groups, own_rank
from ..plan.layouts import STEP_LAYOUTS, sent_bytes

#: Our own operators that communicate, and what each performs, before it gathers where its name says so.
OURS = {
    "tpfuse::all_reduce_norm": "all_reduce",
    "tpfuse::reduce_scatter_norm": "reduce_scatter",
    "tpfuse::all_reduce_norm_backward": "all_reduce",
    "tpfuse::reduce_scatter_norm_backward": "reduce_scatter",
    "tpfuse::reduce_scatter_norm_gather": "reduce_scatter",
    "tpfuse::reduce_scatter_norm_backward_gather": "reduce_scatter",
}


def mark(collectives: Iterable[Collective]) -> None:
    """Mark every collective with its own name."""
    for collective in collectives:
        collective.node.meta[ORIGIN] = collective.node.name


def origin(node: fx.Node) -> str:
    """The name of the collective that `node` stands for: the original one, or itself."""
    return node.meta.get(ORIGIN, node.name)


def transfers(graph: fx.Graph, resolve: ResolveGroup) -> dict[str, tuple[Transfer, ...]]:
    """The collectives that `graph` performs, in graph order, by the name of the one they stand for."""
    found: dict[str, list[Transfer]] = defaultdict(list)
    for node in graph.nodes:
        transfer = _transfer(node, resolve)
        if transfer is not None:
            found[origin(node)].append(transfer)
        if GATHERS in node.meta:
            found[node.meta[GATHERS]].append(_gathered(node, resolve))
    return {name: tuple(items) for name, items in found.items()}


def mesh_of(policy: SharingPolicy | None, ranks: tuple[int, ...] | None) -> MeshGroups | None:
    """The groups of `policy` on this rank, where both are known. `ranks`: of the whole group."""
    rank = own_rank()
    if policy is None or rank is None:
        return None
    return mesh_groups(policy.tp_size, policy.dp_size, rank, names_of_groups(), ranks)


def account(
    boundaries: list[Boundary],
    names: list[str],
    before: Mapping[str, tuple[Transfer, ...]],
    after: Mapping[str, tuple[Transfer, ...]],
    mesh: MeshGroups | None,
    kept_in: Mapping[str, str],
) -> list[Boundary]:
    """The boundaries with their transfers and layouts. `names`: their collectives.

    kept_in: for collectives that vanished, the layout in which the rows stay.
    """
    return [
        _accounted(boundary, before.get(name, ()), after.get(name, ()), mesh, kept_in.get(name))
        for boundary, name in zip(boundaries, names, strict=True)
    ]


def _accounted(
    boundary: Boundary,
    before: tuple[Transfer, ...],
    after: tuple[Transfer, ...],
    mesh: MeshGroups | None,
    kept_in: str | None,
) -> Boundary:
    if kept_in is not None and not after:
        layouts = (kept_in, kept_in)
    else:
        performed = after or before
        first, last = _layouts(performed[0], mesh), _layouts(performed[-1], mesh)
        layouts = (first[0], last[1])
    return replace(boundary, layout_in=layouts[0], layout_out=layouts[1], before=before, after=after)


def _layouts(transfer: Transfer, mesh: MeshGroups | None) -> tuple[str, str]:
    # Without a policy nothing is known of replicas: every group is one whose ranks hold the same rows.
    over = "attention" if mesh is None else mesh.called(transfer.group)
    return STEP_LAYOUTS.get((transfer.collective, over), ("", ""))


def _transfer(node: fx.Node, resolve: ResolveGroup) -> Transfer | None:
    """What `node` sends, if it is a collective or one of our operators that perform one."""
    kind = performs(node)
    if kind is None:
        return None
    ranks = _ranks(node, resolve)
    return Transfer(kind, ranks, _sent(node, kind, len(ranks)))


def _ranks(node: fx.Node, resolve: ResolveGroup) -> tuple[int, ...]:
    name = argument(node, "group_name")
    return (resolve(name) if isinstance(name, str) else None) or ()


def performs(node: fx.Node) -> str | None:
    """The kind of collective that `node` performs, or None. (A gather at the end of an operation is not its kind.)"""
    collective = is_collective(node)
    if not collective and getattr(node.target, "namespace", "") != "tpfuse":
        return None
    schema = operator_schema(node.target)
    if node.op != "call_function" or schema is None:
        return None
    if not collective:
        return OURS.get(schema.name)
    name = schema.name.split("::")[-1]
    return next((kind for kind in ops.COLLECTIVE_KINDS if name.startswith(kind)), name)


def _gathered(node: fx.Node, resolve: ResolveGroup) -> Transfer:
    """What an operation sends to gather its last result."""
    ranks = _ranks(node, resolve)
    return Transfer("all_gather", ranks, _bytes("all_gather", node.meta["val"][-1], len(ranks)))


def _sent(node: fx.Node, kind: str, ranks: int) -> int | None:
    return _bytes(kind, value(node if kind == "all_gather" else node.args[0] if node.args else None), ranks)


def _bytes(kind: str, sent: torch.Tensor | None, ranks: int) -> int | None:
    """Bytes each rank sends; None where a size is unknown."""
    count = _hinted(sent.numel()) if sent is not None else None
    if sent is None or count is None or ranks == 0:
        return None
    return round(sent_bytes(kind, ranks, count * sent.element_size()))


def _hinted(size: Any) -> int | None:
    """A number for `size`: itself, or, for a symbolic one, what it was when the graph was traced. Adds no guard."""
    if isinstance(size, int):
        return size
    node = getattr(size, "node", None)
    return node.hint if node is not None and node.has_hint() else None
