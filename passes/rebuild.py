"""Build the stages of a chain anew beside the old ones: what both directions of changing a layout share.

New nodes are put behind the old norm; readers are moved over one by one, each to the layout it wants, and a gather or a
cut is added only where somebody wants the other layout. What is left of the old stages is swept at the end, their
collectives explicitly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from . import aten_ops as ops
from .collectives import is_collective
from .graph import (
    added,
    argument,
    insert_call,
    inserting_behind,
    is_call,
    region_between,
    same_shape,
    same_size,
    scaled,
    value,
)
from .stream import StreamStage

aten, c10d = ops.aten, ops.c10d


@dataclass
class Moved:
    """What happened to the original collectives, by node name: (rewrite, fused, reason).

    layouts: for those that moved, in which layout the rows stay. kept: why others stay as they were written.
    """

    verdicts: dict[str, tuple[str, bool, str]] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)


class Chain:
    """The stages of one group's residual stream while they are rebuilt. `full` and `own` hold the new hidden states.

    names: members -> name of the groups this rank may use; ranks: the chain's group.
    """

    def __init__(
        self,
        graph: fx.Graph,
        stages: list[StreamStage],
        names: dict[tuple[int, ...], str],
        ranks: tuple[int, ...],
        rank: int,
        moved: Moved,
    ):
        self.graph, self.stages, self.moved = graph, stages, moved
        self.names, self.ranks, self.group = names, ranks, names[ranks]
        self.parts, self.index = len(ranks), ranks.index(rank)
        self.full: dict[fx.Node, fx.Node] = {}
        self.own: dict[fx.Node, fx.Node] = {}
        self.shape: fx.Node | None = None
        self.replaced: set[fx.Node] = set()

    def arrive(self, stage: StreamStage) -> None:
        """Remember a tensor that has the stream's full shape and stays in the graph: sizes are read off it."""
        source = stage.addend.source
        if stage.addend.kind == "owed" and same_shape(source, stage.hidden):
            self.shape = source

    def operands(self, stage: StreamStage, own: bool) -> tuple[fx.Node | None, fx.Node | None]:
        """(a bias per hidden unit, the residual): what is added to the stage's addend; of the residual the own rows
        where `own`."""
        vector = residual = None
        for term in stage.total.replicated:
            if value(term.leaf).dim() == 1:
                vector = added(self.graph, vector, scaled(self.graph, term.leaf, term.scale))
            else:
                residual = added(self.graph, residual, self.own_of(term.leaf) if own else term.leaf)
        return vector, residual

    def norm_op(
        self, stage: StreamStage, op: Any, source: fx.Node, residual: fx.Node | None, vector: fx.Node | None, group: str
    ) -> tuple[fx.Node, fx.Node]:
        norm = stage.norm
        eps_tensor = norm.eps if isinstance(norm.eps, fx.Node) else None
        options = {
            "norm": norm.kind,
            "eps": 0.0 if eps_tensor is not None else float(norm.eps),
            "weight_offset": norm.weight_offset,
            "alpha": stage.term.scale,
            "post": False,
            "out_dtype": value(norm.output).dtype,
            "hidden_dtype": value(stage.hidden).dtype,
            "want_sum": False,
            "stats": False,
            "group_name": group,
        }
        args = (source, residual, vector, norm.weight, norm.bias, eps_tensor)
        fused = insert_call(self.graph, op, args, options, like=stage.addend.collective.node)
        return tuple(insert_call(self.graph, ops.operator.getitem, (fused, i), like=fused) for i in range(2))

    # -- one layout from the other ------------------------------------------------------------------------------------

    def own_of(self, node: fx.Node) -> fx.Node:
        if node not in self.own:
            self.own[node] = insert_call(
                self.graph, torch.ops.tpfuse.cut_rows.default, (node, self.parts, self.index), like=node
            )
        return self.own[node]

    def full_of(self, node: fx.Node, like: fx.Node) -> fx.Node:
        """The unscattered form of own rows: known, the tensor they were cut from, or gathered."""
        if node not in self.full:
            source = node
            while source.target in (aten.slice.Tensor, ops.operator.getitem, aten.clone.default, aten.alias.default):
                whole = self._cut_from(source)
                if whole is not None:
                    self.full[node] = whole
                    return whole
                source = source.args[0]
            gathered = insert_call(
                self.graph, c10d.all_gather_into_tensor.default, (node, self.parts, self.group), like=like
            )
            self.full[node] = insert_call(self.graph, ops.WAIT, (gathered,), like=like)
        return self.full[node]

    def _cut_from(self, node: fx.Node) -> fx.Node | None:
        """The tensor of which `node` is this rank's even share of the rows: `x.chunk(n)[index]` or a slice of it."""
        if node.target is ops.operator.getitem:
            split, position = node.args
            if not is_call(split, aten.split.Tensor) or argument(split, "dim", 0) != 0:
                return None
            source, start = split.args[0], None
        else:
            source, start, position = node.args[0], argument(node, "start", 0), None
            if argument(node, "dim", 0) != 0 or argument(node, "step", 1) != 1:
                return None
        all_rows, own = value(source).shape[0], value(node).shape[0]
        if not same_size(all_rows, own * self.parts):
            return None
        starts_here = position == self.index if start is None else same_size(start, own * self.index)
        return source if starts_here else None

    def gathered(self, own: fx.Node, old: fx.Node, like: fx.Node) -> fx.Node:
        """All rows, in the shape of `old`, from every rank's own."""
        graph = self.graph
        node = insert_call(graph, c10d.all_gather_into_tensor.default, (own, self.parts, self.group), like=like)
        node = insert_call(graph, ops.WAIT, (node,), like=like)
        sizes = [self._size(dim) for dim in range(value(old).dim())]
        rows: Any = 1
        for size in sizes[:-1]:
            rows = size if rows == 1 else self._product(rows, size)
        if not same_shape(node, old) and not (isinstance(rows, int) and rows == value(node).shape[0]):
            node = insert_call(graph, torch.ops.tpfuse.trim_rows.default, (node, rows), like=like)
        return node if same_shape(node, old) else insert_call(graph, aten.reshape.default, (node, sizes), like=like)

    def cut(self, full: fx.Node, old: fx.Node) -> fx.Node:
        cut = insert_call(self.graph, torch.ops.tpfuse.cut_rows.default, (full, self.parts, self.index), like=old)
        return self.shaped(cut, old)

    def _size(self, dim: int) -> Any:
        size = value(self.shape).shape[dim]
        if isinstance(size, int):
            return size
        return insert_call(self.graph, aten.sym_size.int, (self.shape, dim), like=self.shape)

    def _product(self, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            return left * right
        return insert_call(self.graph, ops.operator.mul, (left, right), like=self.shape)

    def shaped(self, node: fx.Node, old: fx.Node) -> fx.Node:
        if same_shape(node, old):
            return node
        return insert_call(self.graph, aten.reshape.default, (node, list(value(old).shape)), like=old)

    def alive(self, node: fx.Node) -> bool:
        """Whether something that stays reads `node`."""
        pending, seen = list(node.users), set()
        while pending:
            user = pending.pop()
            if user in seen or user in self.replaced:
                continue
            seen.add(user)
            if user.op == "output" or is_collective(user) or user.target not in ops.VIEWS:
                return True
            pending.extend(user.users)
        return False

    def hand_out_hidden(self) -> None:
        """Readers of the old hidden states that are no stage of the chain get them in the layout they had."""
        for table, scattered in ((self.own, True), (self.full, False)):
            for stage in self.stages:
                hidden = stage.hidden
                if hidden not in table or scattered == stage.scattered_form:
                    continue
                old = self._old_nodes(stage)
                readers = [user for user in hidden.users if user not in old]
                if not readers:
                    continue
                with inserting_behind(self.graph, table[hidden]):
                    node = (
                        self.gathered(table[hidden], hidden, like=stage.addend.collective.node)
                        if scattered
                        else self.cut(table[hidden], hidden)
                    )
                for reader in readers:
                    reader.replace_input_with(hidden, node)

    def _old_nodes(self, stage: StreamStage) -> set[fx.Node]:
        """The nodes that go with the old form: the stage's norm, and the additions of stages that were rebuilt."""
        old = region_between(stage.norm.output, {stage.hidden})
        for other in self.stages:
            if other.hidden in self.own or other.hidden in self.full:
                old |= other.total.interior
        return old

    def sweep(self) -> None:
        """Sweep what nobody reads any more; collectives only where they were replaced."""
        for node in reversed(list(self.graph.nodes)):
            if node.op != "call_function" or node.users:
                continue
            collective = is_collective(node) or node.target is ops.WAIT
            if node in self.replaced or (not collective and not node.is_impure()):
                self.graph.erase_node(node)
