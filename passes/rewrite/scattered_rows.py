"""The rows that a reduce-scatter gives a rank: flat for an operation on them, and back where the graph has them.

The operation works on [rows, H] in the order in which rows are scattered. The graph may permute them before it adds the
residual (scattered along another dimension than the first): then the residual is permuted to them, and results back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..facts import aten_ops as ops
from ..facts.graph import insert_call, is_call, val
from ..plan.sites import Plan
from ..recognise.scattered import row_order
from ..recognise.sums import Step, Sum
from .replay import computed, replay, reshaped, sizes_of

aten = ops.aten


@dataclass(frozen=True)
class ScatteredRows:
    """`source` is what is summed, and scattered in so many `parts` of this `shape`; `steps` lead from the rows that
    arrive to where they are added to and normalised; `order` is the permutation among them, or ()."""

    source: fx.Node
    parts: int
    shape: Sequence[Any]
    steps: tuple[Step, ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, plan: Plan, total: Sum) -> ScatteredRows | None:
        """None where the boundary's sum is no reduce-scatter's."""
        collective = plan.paid[0].collective
        if collective.kind != "reduce_scatter":
            return None
        (term,) = total.owed
        shape = val(collective.result).shape
        return cls(collective.input, len(collective.ranks), shape, term.steps, row_order(term.steps) or ())

    def flat(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """`node`, a value of the graph's order, [rows, H] or [rows, 1], as the operation takes it."""
        if self.order:
            back = sorted(range(len(self.order)), key=self.order.__getitem__)
            node = insert_call(graph, aten.permute.default, (node, back), like=node)
        if val(node).dim() == 2:
            return node
        return insert_call(graph, aten.reshape.default, (node, [-1, sizes_of(graph, node)[-1]]), like=node)

    def arrived(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """[rows, H], or [rows, 1], in the shape in which the reduce-scatter gives it."""
        if val(self.source).dim() == 2:
            return node
        rows, *rest, _ = sizes_of(graph, self.source)
        own = computed(graph, ops.operator.floordiv, rows, self.parts, node)  # no -1: without rows that could be any
        sizes = [own, *rest, sizes_of(graph, node)[-1]]
        return reshaped(graph, node, sizes, (*self.shape[:-1], val(node).shape[-1]))

    def placed(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """[rows, H] where the graph has it."""
        return replay(graph, self.steps, self.arrived(graph, node))

    def statistic(self, graph: fx.Graph, node: fx.Node, rows: fx.Node) -> fx.Node:
        """[rows, 1] where the graph has it; `rows`: a placed value of as many."""
        if self.order:  # all other steps keep the shape (`row_order`), and name it with H
            moves = [step for step in self.steps if is_call(step.node, ops.REORDERINGS)]
            return replay(graph, moves, self.arrived(graph, node))
        sizes = [*sizes_of(graph, rows)[:-1], 1]
        return node if len(sizes) == 2 else insert_call(graph, aten.reshape.default, (node, sizes), like=node)
