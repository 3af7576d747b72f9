"""What reads may not be moved past: writes, changes of mode, random numbers. Reads only.

Fusing a boundary moves reads. The partial sums and the residual are read where the fused operation stands, which is
later than the all-reduce stood; whatever is computed from the sum moves behind it; and values that shared memory before
come out of the fused operation apart. In a functional graph all of this is harmless. Graphs of `make_fx` and
`torch.export` may write in place, and there it is harmless only if nobody writes to what is read or handed out.

Two nodes may share memory if an operator's schema says that its result aliases an argument, or if their fake values
share a storage. Neither is enough alone: composite operators alias without saying so, and graphs traced with real
tensors have a fake value of its own for every node.

Functionalising a graph once, on its way in, would not make this unnecessary. Writes to inputs stay in any graph, since
callers see them; modes and random numbers are no writes; and a graph is functionalised by tracing it anew, which takes
fake values for all of it and gives new nodes, without the tags, stacks and names by which the partitioner, the reports
and the owner of the graph know them, whether a boundary is fused or not.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import fx

from tpfuse._torch_private import operator_schema, storage_identity

from ..facts import aten_ops as ops
from ..facts.graph import tensor_inputs, value, writes_to_temporary
from .divergence import is_random


@dataclass(frozen=True)
class _Write:
    """An operator that writes in place, and the nodes it writes to; `surely` is False where only suspicion says so."""

    node: fx.Node
    written: tuple[fx.Node, ...]
    surely: bool


@dataclass(frozen=True)
class Moving:
    """A part of the graph, from `first` to `last`, that is to be built anew behind it.

    read: what it reads; kept: those of them of which a copy in another layout may still be read up to `until`. made:
    its values, whose readers are handed new ones.
    """

    first: fx.Node
    read: tuple[fx.Node, ...]
    kept: tuple[fx.Node, ...]
    made: set[fx.Node]
    last: fx.Node
    until: fx.Node


class Hazards:
    """The writes, changes of mode and random operators of one graph."""

    def __init__(self, graph: fx.Graph):
        self.writes: list[_Write] = []
        self.modes: list[fx.Node] = []
        self.random: list[fx.Node] = []
        for node in graph.nodes:
            if node.op in ("placeholder", "get_attr", "output"):
                continue
            written, surely = _written(node)
            if written:
                self.writes.append(_Write(node, written, surely))
            elif _changes_mode(node):
                self.modes.append(node)
            if is_random(node):
                self.random.append(node)
        self.memory = _Memory(graph) if self.writes else None

    @property
    def effects(self) -> set[fx.Node]:
        """The nodes that are there for what they do: those that change modes, or write to what others may read."""
        return {write.node for write in self.writes if not writes_to_temporary(write.node)} | set(self.modes)

    def problem(
        self, read: Iterable[fx.Node], paid: set[fx.Node], inside: Iterable[fx.Node], out: fx.Node, last: fx.Node
    ) -> str:
        """Why a boundary cannot be fused here, or ''.

        read: what the fused operation reads. paid: the finished sums it takes over. inside: the nodes between those
        and the hidden states. out: the node whose value it computes; last: `out`, or the addition behind it.
        """
        first = min([*paid, *(parent for node in paid for parent in node.all_input_nodes)])
        mode = next((node for node in self.modes if first < node < last), None)
        if mode is not None:
            return f"{_name(mode)} changes how operators work between the all-reduce and the norm"
        moved = None
        if any(first < node < last for node in (*self.random, *(write.node for write in self.writes))):
            moved = _computed_from(paid, last)
        if moved is not None and self._reorders_random(moved, last):
            return "operators that draw random numbers would change places"
        if self.memory is None:
            return ""
        return self._write_problem(set(read), paid, inside, out, first, last, moved or set())

    def write_to(self, nodes: Iterable[fx.Node], first: fx.Node, last: fx.Node) -> str:
        """The name of an operator between `first` and `last` that may write to one of `nodes`, or ''."""
        if self.memory is None:
            return ""
        cells = self.memory.cells(nodes)
        found = (w for w in self.writes if first < w.node < last and self.memory.cells(w.written) & cells)
        return next((_name(write.node) for write in found), "")

    def stays(self, moving: Moving) -> str:
        """Why a part of the graph cannot be built anew behind itself, its values laid out in another way, or ''."""
        first, last = moving.first, moving.last
        mode = next((node for node in self.modes if first < node < last), None)
        if mode is not None:
            return f"{_name(mode)} changes how operators work between the collective and the norm"
        if self.memory is None:
            return ""
        cells = self.memory.cells
        read, kept, made = cells(moving.read), cells(moving.kept), cells(moving.made)
        moved: set[fx.Node] | None = None
        for write in self.writes:
            if not first < write.node:
                continue
            target = cells(write.written)
            if (target & read and write.node < last) or (target & kept and write.node < moving.until):
                return f"{_name(write.node)} writes in place to what its boundary reads ({_names(write.written)})"
            if not write.surely or writes_to_temporary(write.node):
                continue
            if target & made:
                return f"{_name(write.node)} writes in place to what its boundary computes ({_names(write.written)})"
            if write.node < last:
                moved = _computed_from({first}, last) if moved is None else moved
                overtaken = cells(parent for node in moved for parent in tensor_inputs(node))
                if write.node in moved or target & overtaken:
                    return f"{_name(write.node)} writes in place between its collective and the norm"
        return ""

    def _reorders_random(self, moved: set[fx.Node], last: fx.Node) -> bool:
        here = [node for node in self.random if node < last]
        return any(a in moved and b not in moved for a, b in pairwise(here))

    def _write_problem(
        self,
        read: set[fx.Node],
        paid: set[fx.Node],
        inside: Iterable[fx.Node],
        out: fx.Node,
        first: fx.Node,
        last: fx.Node,
        moved: set[fx.Node],
    ) -> str:
        if self.memory is None:
            return ""
        cells = self.memory.cells
        operands = cells(read)
        overtaken = cells(parent for node in moved for parent in tensor_inputs(node))
        handed_out = cells({*paid, *inside, *(node for node in moved if node is not out and _leads_to(node, out))})
        for write in self.writes:
            target = cells(write.written)
            hits = target & operands or (write.node not in moved and target & overtaken)
            if first < write.node < last and hits:
                where = "between the all-reduce and the norm, to a tensor that is read"
                return f"{_name(write.node)} writes in place, {where}"
            if write.surely and first < write.node and target & handed_out and not writes_to_temporary(write.node):
                return f"{_name(write.node)} writes in place to a value between the all-reduce and the norm"
        return ""


# -- what a node does -------------------------------------------------------------------------------------------------


def _written(node: fx.Node) -> tuple[tuple[fx.Node, ...], bool]:
    """(the nodes that `node` writes to, whether it surely does)."""
    schema = operator_schema(node.target)
    if getattr(node.target, "namespace", "") == "c10d":
        return tuple(tensor_inputs(node)), True  # their schemas do not say so
    if node.op == "call_function" and schema is not None:
        return (tuple(_arguments(node, schema, writes=True)), True) if schema.is_mutable else ((), True)
    if node.op == "call_function" and _is_pure(node.target):
        return (), True
    name = str(node.target if node.op != "call_function" else getattr(node.target, "__name__", node.target))
    surely = (node.op == "call_method" and name.endswith("_")) or node.target in _IN_PLACE or "mutation" in name
    written = tensor_inputs(node)
    return tuple(written[:1] if surely and "mutation" not in name else written), surely


_IN_PLACE = {
    getattr(operator, name) for name in dir(operator) if name.startswith("i") and f"__{name}__" in dir(operator)
}
_IN_PLACE -= {operator.index, operator.inv, operator.invert}


def _is_pure(target: Any) -> bool:
    module, name = getattr(target, "__module__", None), getattr(target, "__name__", "")
    if target in _IN_PLACE:
        return False
    return module in ("_operator", "math", "builtins") or (module == "torch" and name.startswith("sym_"))


def _changes_mode(node: fx.Node) -> bool:
    """Whether `node` is there for its effect on what follows: autocast, grad mode and the like take no tensors."""
    known = operator_schema(node.target) is not None or _is_pure(node.target)
    return node.op == "call_function" and not known and not node.all_input_nodes


def _arguments(node: fx.Node, schema: Any, writes: bool = False) -> Iterator[fx.Node]:
    """The nodes given for the arguments that `schema` says are aliased (or written to)."""
    for position, parameter in enumerate(schema.arguments):
        info = parameter.alias_info
        if info is None or (writes and not info.is_write):
            continue
        given = node.args[position] if position < len(node.args) else node.kwargs.get(parameter.name)
        found: list[fx.Node] = []
        fx.map_arg(given, found.append)
        yield from found


def _name(node: fx.Node) -> str:
    return str(node.target) if not callable(node.target) else getattr(node.target, "__name__", str(node.target))


def _names(written: tuple[fx.Node, ...]) -> str:
    return ", ".join(str(node) for node in written)


# -- who shares memory ------------------------------------------------------------------------------------------------


class _Memory:
    """Nodes in classes that may share memory (union-find)."""

    def __init__(self, graph: fx.Graph):
        self._above: dict[fx.Node, fx.Node] = {}
        storages: dict[int, fx.Node] = {}
        for node in graph.nodes:
            for other in _aliased(node):
                self._join(node, other)
            val = value(node)
            storage = storage_identity(val) if val is not None else None
            if storage is not None:
                self._join(node, storages.setdefault(storage, node))

    def _root(self, node: fx.Node) -> fx.Node:
        while (above := self._above.get(node, node)) is not node:
            self._above[node] = self._above.get(above, above)
            node = above
        return node

    def _join(self, a: fx.Node, b: fx.Node) -> None:
        a, b = self._root(a), self._root(b)
        if a is not b:
            self._above[a] = b

    def cells(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """The classes of `nodes`, each by a representative."""
        return {self._root(node) for node in nodes}


#: Their results are their argument's memory, although their schemas do not say so.
_SILENT_ALIASES = {ops.WAIT, ops.aten._unsafe_view.default, operator.getitem}


def _aliased(node: fx.Node) -> list[fx.Node]:
    schema = operator_schema(node.target)
    if node.target in _SILENT_ALIASES or node.op in ("call_module", "call_method"):
        return tensor_inputs(node)
    if schema is not None and any(result.alias_info is not None for result in schema.returns):
        return list(_arguments(node, schema))
    return tensor_inputs(node)[:1] if node.target in _IN_PLACE else []


# -- the graph around -------------------------------------------------------------------------------------------------


def _computed_from(sources: set[fx.Node], last: fx.Node) -> set[fx.Node]:
    """The nodes up to `last` that are computed from `sources`."""
    found: set[fx.Node] = set(sources)
    node = min(sources).next
    while node.op != "output" and not last < node:
        if any(parent in found for parent in node.all_input_nodes):
            found.add(node)
        node = node.next
    return found - sources


def _leads_to(node: fx.Node, out: fx.Node) -> bool:
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if user is out:
                return True
            if user not in seen and user < out:
                seen.add(user)
                pending.append(user)
    return False


__all__ = ["Hazards", "Moving"]
