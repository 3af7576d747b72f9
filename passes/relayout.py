"""Rewrite the residual stream to the chosen layouts: scatter_dense, share_attention_group, gather_full_tp.

A stage that changes its layout is built anew beside the old one; readers are moved over one by one, each to the layout
it wants, and a gather or a cut is added only where somebody wants the other layout. What is left of the old stage is
erased, its collectives explicitly. Layouts change only in graphs without a backward pass, whose saved values would
need a second layout too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from . import aten_ops as ops
from .collectives import Collective, ResolveGroup, is_collective
from .factor import Factored, factor_sums
from .graph import argument, fake_result, insert_call, is_call, same_shape, same_size, value
from .layouts import FULL, NOMINAL_ROWS, SCATTERED, Sizes, Stage, choose
from .rewrite import region_between, sizes_of
from .stream import StreamStage, divides, find_streams, moves_rows

aten, c10d = ops.aten, ops.c10d


@dataclass
class Moved:
    """What happened to the original collectives, by node name: (rewrite, fused, reason).

    `stands_for` maps the name of a new collective to the original one whose sum it pays.
    """

    verdicts: dict[str, tuple[str, bool, str]] = field(default_factory=dict)
    stands_for: dict[str, str] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)


def relayout(
    graph: fx.Graph, resolve: ResolveGroup, rank: int, names: dict[tuple[int, ...], str], residual: str, rows: int | None,
    rewrites: tuple[str, ...],
    inference: bool,
) -> Moved:
    """Re-lay the residual streams of `graph`. `names`: members -> name of the groups this rank may use.

    In a joint graph of training only sums are factored: no gradient reads a sum or its rows.
    """
    moved = Moved()
    if not moves_rows(graph):
        return moved
    if "gather_full_tp" in rewrites:
        for factored in factor_sums(graph, resolve, rank, names):
            _note_factored(moved, factored)
    streams = find_streams(graph, resolve, rank) if inference else {}
    for ranks, stages in streams.items():
        layouts = _layouts(graph, stages, ranks, residual, rows)
        layouts = [_allowed(stage, layout, rewrites) for stage, layout in zip(stages, layouts, strict=True)]
        fuse_scattered = "reduce_scatter_norm" in rewrites
        _Builder(graph, stages, layouts, names, ranks, rank, moved, fuse_scattered).build()
    return moved


def _note_factored(moved: Moved, factored: Factored) -> None:
    moved.stands_for[factored.last.name] = factored.name
    reason = "its sum is paid in factors: a reduce-scatter over the dp replicas, then over the attention group"
    moved.verdicts[factored.name] = ("gather_full_tp", False, reason)


def _allowed(stage: StreamStage, layout: str, rewrites: tuple[str, ...]) -> str:
    """The layout, or the one the stage is written in where the rewrite to change it is switched off."""
    own = SCATTERED if stage.scattered_form else FULL
    if layout == own or (stage.scattered_form and not stage.clonable):
        return own
    rewrite = "share_attention_group" if stage.scattered_form else "scatter_dense"
    return layout if rewrite in rewrites else own


def _layouts(
    graph: fx.Graph, stages: list[StreamStage], ranks: tuple[int, ...], residual: str, rows: int | None
) -> list[str]:
    val = value(stages[0].hidden)
    hidden = val.shape[-1] if isinstance(val.shape[-1], int) else 4096
    dp_gathers = [len(g.ranks) for stage in stages if not stage.scattered_form for g in stage.gathers]
    payload = (rows or NOMINAL_ROWS) * hidden * val.element_size()
    sizes = Sizes(len(ranks), max(dp_gathers, default=1), payload)
    inside = {node for stage in stages for node in stage.total.interior}
    return choose([_stage(stage, inside) for stage in stages], sizes, residual)


def _stage(stage: StreamStage, inside: set[fx.Node]) -> Stage:
    wants = set()
    if stage.cuts:
        wants.add("own_rows")
    if stage.gathers:
        wants.add("all_rows" if stage.scattered_form else "dp_rows")
    elif not stage.cuts:
        wants.add("own_rows" if stage.scattered_form else "all_rows")
    kind = {"owed": "owed_attn", "scattered": "owed_attn", "gathered": "own_rows"}[stage.addend.kind]
    chain = region_between(stage.norm.output, {stage.hidden})
    outside = any(user not in inside and user not in chain for user in stage.hidden.users)
    return Stage(kind, frozenset(wants), stage.previous is not None, outside and not stage.scattered_form)


class _Builder:
    """Builds the stages of one chain in their layouts. `full` and `own` hold the hidden states built so far."""

    def __init__(
        self,
        graph: fx.Graph,
        stages: list[StreamStage],
        layouts: list[str],
        names: dict[tuple[int, ...], str],
        ranks: tuple[int, ...],
        rank: int,
        moved: Moved,
        fuse_scattered: bool,
    ):
        self.fuse_scattered = fuse_scattered
        self.graph, self.stages, self.layouts, self.moved = graph, stages, layouts, moved
        self.names, self.ranks, self.group = names, ranks, names[ranks]
        self.parts, self.index = len(ranks), ranks.index(rank)
        self.full: dict[fx.Node, fx.Node] = {}
        self.own: dict[fx.Node, fx.Node] = {}
        self.shape: fx.Node | None = None
        self.replaced: set[fx.Node] = set()

    def build(self) -> None:
        for stage, layout in zip(self.stages, self.layouts, strict=True):
            if not stage.scattered_form and stage.addend.kind == "owed":
                self.shape = self._shaped_partial(stage)
            changes = layout != (SCATTERED if stage.scattered_form else FULL)
            if changes and layout == SCATTERED:
                self._scatter(stage)
            elif changes:
                self._replicate(stage)
            elif stage.scattered_form and self.fuse_scattered:
                self._fuse_scattered(stage)
        self._hand_out_hidden()
        self._erase()

    # -- full form → scattered ----------------------------------------------------------------------------------------

    def _scatter(self, stage: StreamStage) -> None:
        norm, addend, graph = stage.norm, stage.addend, self.graph
        with graph.inserting_after(norm.output):
            place = graph.call_function(_here)
        with graph.inserting_before(place):
            vector = residual = None
            for term in stage.total.replicated:
                if value(term.leaf).dim() == 1:
                    vector = self._added(vector, self._scaled(term.leaf, term.scale))
                else:
                    residual = self._added(residual, self._own_of(term.leaf))
            if addend.kind == "gathered":
                y, h = self._norm_op(stage, torch.ops.tpfuse.rows_norm.default, addend.source, residual, vector, "")
            else:
                source, group = self._owed_over(stage)
                op = torch.ops.tpfuse.reduce_scatter_norm.default
                y, h = self._norm_op(stage, op, source, residual, vector, group)
            self.own[stage.hidden] = h
            self._readers_of_scattered(stage, y)
        graph.erase_node(place)
        self.replaced |= {addend.collective.node, addend.collective.wait}
        name = self.moved.stands_for.get(addend.collective.node.name, addend.collective.node.name)
        if addend.kind == "owed":
            rewrite = "gather_full_tp" if name != addend.collective.node.name else "scatter_dense"
            self.moved.verdicts[name] = (rewrite, True, "")
        else:
            reason = "moved behind the next norm: the residual stream stays scattered, so only the normed rows are gathered"
            self.moved.verdicts[name] = ("scatter_dense", False, reason)
        self.moved.layouts[name] = SCATTERED

    def _owed_over(self, stage: StreamStage) -> tuple[fx.Node, str]:
        """(partial, group): where a reduce-scatter over dp comes first, both are one over the whole group."""
        source = stage.addend.source
        first = source.args[0] if source.target is ops.WAIT else None
        if first is None or first.target is not c10d.reduce_scatter_tensor.default or len(source.users) != 1:
            return source, self.group
        whole = self._whole_group(argument(first, "group_name"))
        if whole is None or not divides(self.parts, value(source).shape[0]):
            return source, self.group
        self.replaced |= {first, source}
        return first.args[0], whole

    def _whole_group(self, dp_name: str) -> str | None:
        """The group that is the product of this chain's group and the dp group called `dp_name`."""
        dp = next((members for members, name in self.names.items() if name == dp_name), ())
        wanted = len(dp) * self.parts
        candidates = [m for m in self.names if len(m) == wanted and {*dp, *self.ranks} <= set(m)]
        return self.names[candidates[0]] if len(candidates) == 1 else None

    def _readers_of_scattered(self, stage: StreamStage, y: fx.Node) -> None:
        for gather in stage.gathers:
            self._gather_whole(gather, y)
        for cut in stage.cuts:
            cut.replace_all_uses_with(self._shaped(y, cut), propagate_meta=False)
            self.replaced.add(cut)
        out = stage.norm.output
        if self._alive(out):
            full = self._gathered(y, out, like=stage.addend.collective.node)
            out.replace_all_uses_with(full, propagate_meta=False)

    def _gather_whole(self, gather: Collective, y: fx.Node) -> None:
        """Gather the rows of every replica straight from the scattered rows, where the shares are even."""
        whole = self._whole_group(gather.group_name)
        if whole is None or not divides(self.parts, value(gather.input).shape[0]):
            return
        count = self.parts * len(gather.ranks)
        node = insert_call(self.graph, c10d.all_gather_into_tensor.default, (y, count, whole), like=gather.node)
        node = insert_call(self.graph, ops.WAIT, (node,), like=gather.node)
        gather.wait.replace_all_uses_with(self._shaped(node, gather.wait), propagate_meta=False)
        self.replaced |= {gather.node, gather.wait}
        reason = "gathers over the whole group straight from the scattered rows; nothing follows it that could be fused"
        self.moved.verdicts[gather.node.name] = ("gather_full_tp", False, reason)

    # -- scattered form → full ----------------------------------------------------------------------------------------

    def _replicate(self, stage: StreamStage) -> None:
        """The same sums, unscattered: the all-reduce this writes is fused with its norm like any other afterwards."""
        norm, addend, graph = stage.norm, stage.addend, self.graph
        with graph.inserting_after(norm.output):
            place = graph.call_function(_here)
        with graph.inserting_before(place):
            node = insert_call(graph, c10d.all_reduce.default, (addend.source, "sum", self.group), like=addend.leaf)
            self.moved.stands_for[node.name] = addend.collective.node.name
            self.moved.verdicts[addend.collective.node.name] = ("share_attention_group", False, "")
            self.moved.layouts[addend.collective.node.name] = FULL
            replacements = {addend.leaf: insert_call(graph, ops.WAIT, (node,), like=addend.leaf)}
            for term in stage.total.replicated:
                if value(term.leaf).dim() > 1:
                    replacements[term.leaf] = self._full_of(term.leaf)
            hidden = self._cloned(stage.hidden, replacements, set(stage.total.interior))
            self.full[stage.hidden] = hidden
            y = self._cloned(
                norm.output, {stage.hidden: hidden}, region_between(norm.output, {stage.hidden}) - {stage.hidden}
            )
            for gather in stage.gathers:
                gather.wait.replace_all_uses_with(self._shaped(y, gather.wait), propagate_meta=False)
                self.replaced |= {gather.wait, gather.node}
                reason = "the residual stream is kept replicated over the group, so nothing is left to gather"
                self.moved.verdicts[gather.node.name] = ("share_attention_group", False, reason)
            if self._alive(norm.output):
                norm.output.replace_all_uses_with(self._cut(y, norm.output), propagate_meta=False)
        graph.erase_node(place)
        self.replaced |= {addend.collective.node, addend.collective.wait}

    def _cloned(self, out: fx.Node, replacements: dict[fx.Node, fx.Node], inside: set[fx.Node]) -> fx.Node:
        """Copy the nodes `inside` that lead to `out`, reading `replacements`; views with sizes are not among them."""
        known = dict(replacements)
        for node in sorted(inside | {out}):
            if any(parent in known for parent in node.all_input_nodes):
                copied = self.graph.node_copy(node, lambda n: known.get(n, n))
                copied.meta["val"] = fake_result(copied)
                known[node] = copied
        return known[out]

    # -- scattered form, kept -----------------------------------------------------------------------------------------

    def _fuse_scattered(self, stage: StreamStage) -> None:
        """Reduce-scatter, addition and norm in one operation; the layout stays."""
        norm, addend, graph = stage.norm, stage.addend, self.graph
        hidden = stage.hidden
        residuals = [t for t in stage.total.replicated if value(t.leaf).dim() > 1]
        if not divides(self.parts, value(addend.source).shape[0]) or value(addend.source).dim() != 2:
            return
        if any(not same_shape(t.leaf, hidden) or t.views for t in residuals) or not same_shape(norm.output, hidden):
            return
        if not residuals and value(hidden).dim() != 2:
            return
        with graph.inserting_after(norm.output):
            place = graph.call_function(_here)
        with graph.inserting_before(place):
            vector = residual = None
            for term in stage.total.replicated:
                if value(term.leaf).dim() == 1:
                    vector = self._added(vector, self._scaled(term.leaf, term.scale))
                else:
                    residual = self._added(residual, term.leaf)
            sizes = None
            if residual is not None and value(hidden).dim() != 2:
                sizes = sizes_of(graph, residual)
                residual = insert_call(graph, aten.reshape.default, (residual, [-1, sizes[-1]]), like=residual)
            op = torch.ops.tpfuse.reduce_scatter_norm.default
            results = self._norm_op(stage, op, addend.source, residual, vector, self.group)
            if sizes is not None:
                results = tuple(insert_call(graph, aten.reshape.default, (r, sizes), like=r) for r in results)
            y, h = results
            chain = region_between(norm.output, {hidden})
            norm.output.replace_all_uses_with(y, propagate_meta=False)
            for reader in [user for user in hidden.users if user not in chain]:
                reader.replace_input_with(hidden, h)
        graph.erase_node(place)
        self.replaced |= {addend.collective.node, addend.collective.wait}
        name = addend.collective.node.name
        original = self.moved.stands_for.get(name, name)
        rewrite = "reduce_scatter_norm" if original == name else "gather_full_tp"
        self.moved.verdicts[original] = (rewrite, True, "")

    # -- one layout from the other ------------------------------------------------------------------------------------

    def _own_of(self, node: fx.Node) -> fx.Node:
        if node not in self.own:
            self.own[node] = insert_call(
                self.graph, torch.ops.tpfuse.cut_rows.default, (node, self.parts, self.index), like=node
            )
        return self.own[node]

    def _full_of(self, node: fx.Node) -> fx.Node:
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
                self.graph, c10d.all_gather_into_tensor.default, (node, self.parts, self.group), like=node
            )
            self.full[node] = insert_call(self.graph, ops.WAIT, (gathered,), like=node)
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

    def _gathered(self, own: fx.Node, old: fx.Node, like: fx.Node) -> fx.Node:
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

    def _cut(self, full: fx.Node, old: fx.Node) -> fx.Node:
        cut = insert_call(self.graph, torch.ops.tpfuse.cut_rows.default, (full, self.parts, self.index), like=old)
        return self._shaped(cut, old)

    # -- small steps --------------------------------------------------------------------------------------------------

    def _norm_op(
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

    def _shaped_partial(self, stage: StreamStage) -> fx.Node | None:
        """A tensor that has the stream's full shape and stays in the graph: sizes are read off it."""
        source = stage.addend.source
        return source if same_shape(source, stage.hidden) else self.shape

    def _size(self, dim: int) -> Any:
        size = value(self.shape).shape[dim]
        return size if isinstance(size, int) else insert_call(self.graph, aten.sym_size.int, (self.shape, dim), like=self.shape)

    def _product(self, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            return left * right
        return insert_call(self.graph, ops.operator.mul, (left, right), like=self.shape)

    def _shaped(self, node: fx.Node, old: fx.Node) -> fx.Node:
        if same_shape(node, old):
            return node
        return insert_call(self.graph, aten.reshape.default, (node, list(value(old).shape)), like=old)

    def _scaled(self, node: fx.Node, scale: float) -> fx.Node:
        return node if scale == 1.0 else insert_call(self.graph, aten.mul.Tensor, (node, scale), like=node)

    def _added(self, left: fx.Node | None, right: fx.Node) -> fx.Node:
        return right if left is None else insert_call(self.graph, aten.add.Tensor, (left, right), like=right)

    def _alive(self, node: fx.Node) -> bool:
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

    def _hand_out_hidden(self) -> None:
        """Readers of the old hidden states that are no stage of the chain get them in the layout they had."""
        for table, convert in ((self.own, self._gathered), (self.full, None)):
            for stage in self.stages:
                hidden = stage.hidden
                if hidden not in table or (convert is None) != stage.scattered_form:
                    continue
                old = self._old_nodes(stage)
                readers = [user for user in hidden.users if user not in old]
                if not readers:
                    continue
                with self.graph.inserting_after(table[hidden]):
                    place = self.graph.call_function(_here)
                with self.graph.inserting_before(place):
                    node = (
                        self._gathered(table[hidden], hidden, like=stage.addend.collective.node)
                        if convert is not None
                        else self._cut(table[hidden], hidden)
                    )
                self.graph.erase_node(place)
                for reader in readers:
                    reader.replace_input_with(hidden, node)

    def _old_nodes(self, stage: StreamStage) -> set[fx.Node]:
        """The nodes that go with the old form: the stage's norm, and the additions of stages that were rebuilt."""
        old = region_between(stage.norm.output, {stage.hidden})
        for other in self.stages:
            if other.hidden in self.own or other.hidden in self.full:
                old |= other.total.interior
        return old

    def _erase(self) -> None:
        """Sweep what nobody reads any more; collectives only where they were replaced."""
        for node in reversed(list(self.graph.nodes)):
            if node.op != "call_function" or node.users:
                continue
            collective = is_collective(node) or node.target is ops.WAIT
            if node in self.replaced or (not collective and not node.is_impure()):
                self.graph.erase_node(node)


def _here() -> None:
    """Marks a place in a graph while nodes are inserted there."""


__all__ = ["Moved", "relayout"]
