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

from tpfuse.boundary_spec import Options
from tpfuse.errors import TPFuseError

from ..facts import aten_ops as ops
from ..facts.backward import is_incoming_gradient
from ..facts.collectives import is_collective
from ..facts.graph import (
    OWN_ROWS,
    added,
    argument,
    input_node,
    insert_call,
    inserting_behind,
    is_call,
    region_between,
    same_shape,
    same_size,
    scaled,
    val,
    value,
    writes_to_temporary,
)
from ..facts.refusals import Refusal
from ..recognise.hazards import Hazards
from ..recognise.streams import StreamStage

aten, c10d = ops.aten, ops.c10d


@dataclass
class Moved:
    """What happened to the original collectives, by node name: (rewrite, fused, why it is not).

    layouts: for those that moved, in which layout the rows stay. kept: why others stay as they were written; demanded:
    those among them that stay because the policy, as it is declared, asks for it. notes: sentences about the whole.
    """

    verdicts: dict[str, tuple[str, bool, Refusal | None]] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)
    kept: dict[str, Refusal] = field(default_factory=dict)
    demanded: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


class Chain:
    """The stages of one group's residual stream while they are rebuilt. `full` and `own` hold the new hidden states of
    the stages that were, in the layout they were given.

    names: members -> name of the groups this rank may use; ranks: the chain's group, which each stage calls by the name
    that its own collective does.
    """

    def __init__(
        self,
        graph: fx.Graph,
        stages: list[StreamStage],
        names: dict[tuple[int, ...], str],
        ranks: tuple[int, ...],
        rank: int,
        moved: Moved,
        hazards: Hazards,
    ):
        self.graph, self.stages, self.moved = graph, stages, moved
        self.names, self.ranks, self.rank = names, ranks, rank
        self.parts, self.index = len(ranks), ranks.index(rank)
        self.full: dict[fx.Node, fx.Node] = {}
        self.own: dict[fx.Node, fx.Node] = {}
        #: Collectives that were replaced, and those that were put in for a reader: both may go once nobody reads them.
        self.replaced: set[fx.Node] = set()
        self.inserted: set[fx.Node] = set()
        #: What a rebuilt stage reads of values that keep their layout: their own rows, and the rows they are part of.
        self.cuts: dict[fx.Node, fx.Node] = {}
        self.gathers: dict[fx.Node, fx.Node] = {}
        self.hazards = hazards
        #: Nodes that stay, off which sizes may be read; later ones may be computed from what earlier stages hand out.
        self.staying = [
            node for node in graph.nodes if node.op == "placeholder" and not is_incoming_gradient(node)
        ]

    def arrive(self, stage: StreamStage) -> None:
        """From here on sizes may be read off what the stage's collective is given, too."""
        self.staying.append(stage.addend.source)

    def knows_sizes(self, stage: StreamStage) -> bool:
        """Whether every size that the stage's values have can be read off a node that stays."""
        nodes = [stage.hidden, stage.norm.output, *(t.joins for t in stage.residuals if t.joins is not None)]
        sizes = [size for node in nodes for size in val(node).shape]
        return all(isinstance(size, int) or self._where(size) is not None for size in sizes)

    def operands(self, stage: StreamStage, own: bool) -> tuple[fx.Node | None, fx.Node | None]:
        """(a bias per hidden unit, the residual): what is added to the stage's addend; of the residual the own rows
        where `own`, else what there is in the layout it was written in."""
        vector = residual = None
        for term in stage.vectors:
            vector = added(self.graph, vector, scaled(self.graph, term.leaf, term.scale))
        for term in stage.residuals:
            if not own:
                node = self.own.get(term.leaf, term.leaf)
            elif term.joins is None or same_shape(term.leaf, term.joins):
                node = self.own_of(term.leaf)
            else:
                wide = (term.leaf, self.sizes(term.joins))
                node = self.own_of(insert_call(self.graph, aten.expand.default, wide, like=term.leaf))
            residual = added(self.graph, residual, node)
        return vector, residual

    def norm_op(
        self, stage: StreamStage, op: Any, source: fx.Node, residual: fx.Node | None, vector: fx.Node | None, group: str
    ) -> tuple[fx.Node, fx.Node]:
        norm = stage.norm
        eps_tensor, eps = (norm.eps, 0.0) if isinstance(norm.eps, fx.Node) else (None, float(norm.eps))
        options = Options(
            norm=norm.kind, eps=eps, weight_offset=norm.weight_offset, alpha=stage.term.scale, group_name=group,
            out_dtype=val(norm.output).dtype, hidden_dtype=val(stage.hidden).dtype,
        )  # fmt: skip
        args = (source, residual, vector, norm.weight, norm.bias, eps_tensor)
        fused = insert_call(self.graph, op, args, options.arguments, like=stage.addend.collective.node)
        normed, hidden = (insert_call(self.graph, ops.operator.getitem, (fused, i), like=fused) for i in range(2))
        return normed, hidden

    # -- one layout from the other ------------------------------------------------------------------------------------

    def own_of(self, node: fx.Node) -> fx.Node:
        """The own rows of a value that was written with all rows: a rebuilt stage's, or cut."""
        if node in self.own:
            return self.own[node]
        if node not in self.cuts:
            cut = (node, self.parts, self.index)
            self.cuts[node] = insert_call(self.graph, torch.ops.tpfuse.cut_rows.default, cut, like=node)
        return self.cuts[node]

    def full_of(self, node: fx.Node, stage: StreamStage) -> fx.Node:
        """All rows of a value that was written as own rows: a rebuilt stage's, the tensor they were cut from, or
        gathered."""
        if node in self.full:
            return self.full[node]
        if node not in self.gathers:
            whole = self.whole_of(node)
            if whole is None:
                whole = self._gathered(self.own.get(node, node), stage)
                input_node(whole).meta[OWN_ROWS] = True
            self.gathers[node] = whole
        return self.gathers[node]

    def whole_of(self, node: fx.Node) -> fx.Node | None:
        """The tensor of which `node` is this rank's even share of the rows, if the graph has it."""
        while node.target in (aten.slice.Tensor, ops.operator.getitem, aten.clone.default, aten.alias.default):
            whole = self._cut_from(node)
            if whole is not None or not same_shape(node, input_node(node)):
                return whole
            node = input_node(node)
        return None

    def _cut_from(self, node: fx.Node) -> fx.Node | None:
        """The tensor x that `node` is this rank's even share of, as x.chunk(n)[index] or as a slice."""
        if node.target in (aten.clone.default, aten.alias.default):
            return None
        if node.target is ops.operator.getitem:
            split, position = input_node(node), node.args[1]
            if not is_call(split, aten.split.Tensor) or argument(split, "dim", 0) != 0:
                return None
            source, start = input_node(split), None
        else:
            source, start, position = input_node(node), argument(node, "start", 0), None
            if argument(node, "dim", 0) != 0 or argument(node, "step", 1) != 1:
                return None
        all_rows, own = val(source).shape[0], val(node).shape[0]
        if not same_size(all_rows, own * self.parts):
            return None
        starts_here = position == self.index if start is None else same_size(start, own * self.index)
        return source if starts_here else None

    def gathered(self, own: fx.Node, old: fx.Node, stage: StreamStage) -> fx.Node:
        """All rows, in the shape of `old`, from every rank's own, over the group that pays the stage."""
        graph, like = self.graph, stage.addend.collective.node
        node = self._gathered(own, stage)
        sizes = self.sizes(old)
        rows = self._rows(sizes)
        if not same_shape(node, old) and not (isinstance(rows, int) and rows == val(node).shape[0]):
            node = insert_call(graph, torch.ops.tpfuse.trim_rows.default, (node, rows), like=like)
        return node if same_shape(node, old) else insert_call(graph, aten.reshape.default, (node, sizes), like=like)

    def _gathered(self, own: fx.Node, stage: StreamStage) -> fx.Node:
        collective = stage.addend.collective
        gather = (own, self.parts, collective.group_name)
        node = insert_call(self.graph, c10d.all_gather_into_tensor.default, gather, like=collective.node)
        wait = insert_call(self.graph, ops.WAIT, (node,), like=collective.node)
        self.inserted |= {node, wait}
        return wait

    def cut(self, full: fx.Node, old: fx.Node) -> fx.Node:
        cut = insert_call(self.graph, torch.ops.tpfuse.cut_rows.default, (full, self.parts, self.index), like=old)
        return self.shaped(cut, old)

    def sizes(self, old: fx.Node) -> list[Any]:
        """The sizes of `old`, which may be about to go: numbers, or nodes that read them off something that stays."""
        return [size if isinstance(size, int) else self._read(size) for size in val(old).shape]

    def _read(self, size: Any) -> fx.Node:
        found = self._where(size)
        if found is None:
            raise TPFuseError(f"internal error: no value that stays in the graph has the size {size}")
        node, dim = found
        return node if dim is None else insert_call(self.graph, aten.sym_size.int, (node, dim), like=node)

    def _where(self, size: Any) -> tuple[fx.Node, int | None] | None:
        """The first node that stays and has a dimension of this symbolic size, or is it."""
        for node in self.staying:
            tensor = value(node)
            if tensor is None:
                if same_size(node.meta.get("val"), size):
                    return node, None
                continue
            for dim, other in enumerate(tensor.shape):
                if same_size(other, size):
                    return node, dim
        return None

    def without_padding(self, own: fx.Node, old: fx.Node) -> fx.Node:
        """Own rows of `old` with zeros for padding, as a cut has them."""
        graph, like = self.graph, own
        ones = insert_call(graph, aten.new_ones.default, (own, [self._rows(self.sizes(old)), 1]), like=like)
        cut_rows = torch.ops.tpfuse.cut_rows.default
        cut = insert_call(graph, cut_rows, (ones, self.parts, self.index), like=like)
        mask = insert_call(graph, aten.ne.Scalar, (cut, 0), like=like)
        return insert_call(graph, aten.where.ScalarOther, (mask, own, 0.0), like=like)

    def _rows(self, sizes: list[Any]) -> Any:
        rows: Any = 1
        for size in sizes[:-1]:
            rows = size if rows == 1 else self._product(rows, size)
        return rows

    def _product(self, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            return left * right
        node = next(side for side in (left, right) if isinstance(side, fx.Node))
        return insert_call(self.graph, ops.operator.mul, (left, right), like=node)

    def shaped(self, node: fx.Node, old: fx.Node) -> fx.Node:
        if same_shape(node, old):
            return node
        sizes = [size if isinstance(size, int) else -1 for size in val(old).shape]
        if sizes.count(-1) > 1:
            sizes = self.sizes(old)
        return insert_call(self.graph, aten.reshape.default, (node, sizes), like=old)

    def alive(self, node: fx.Node) -> bool:
        """Whether something that stays reads `node`."""
        pending, seen = list(node.users), set()
        while pending:
            user = pending.pop()
            if user in seen or user in self.replaced or (user.op == "call_function" and _is_dead(user)):
                continue
            seen.add(user)
            if user.op == "output" or is_collective(user) or user.target not in ops.VIEWS:
                return True
            pending.extend(user.users)
        return False

    def hand_out_hidden(self) -> None:
        """Readers of a rebuilt stage's old hidden states that are no stage of the chain get the new ones in the layout
        they had."""
        for stage in self.stages:
            hidden = stage.hidden
            if hidden not in self.own and hidden not in self.full:
                continue
            old = self._old_nodes(stage)
            readers = [user for user in hidden.users if user not in old]
            if not readers:
                continue
            new = self.own.get(hidden) or self.full[hidden]
            with inserting_behind(self.graph, new):
                if not stage.scattered_form:
                    new = self.gathered(new, hidden, stage)
                elif hidden in self.full:
                    new = self.cut(new, hidden)
            for reader in readers:
                reader.replace_input_with(hidden, new)

    def _old_nodes(self, stage: StreamStage) -> set[fx.Node]:
        """The nodes that go with the old form: the stage's norm, and the additions of stages that were rebuilt."""
        old = region_between(stage.norm.output, {stage.hidden})
        for other in self.stages:
            if other.hidden in self.own or other.hidden in self.full:
                old |= other.total.interior
        return old

    def sweep(self) -> None:
        """Sweep what nobody reads any more; collectives only where they were replaced."""
        effects = self.hazards.effects
        for node in reversed(list(self.graph.nodes)):
            ours = not node.users and (node in self.replaced or node in self.inserted)
            if node.op == "call_function" and node not in effects and (ours or _is_dead(node)):
                self.graph.erase_node(node)


def _is_dead(node: fx.Node) -> bool:
    """Whether nobody reads what `node` computes, and computing it does nothing else."""
    if node.users or is_collective(node) or node.target is ops.WAIT:
        return False
    return not node.is_impure() or writes_to_temporary(node)
