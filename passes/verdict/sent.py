"""What a rewritten graph's operations send: an original collective's input as it was, or something made of several.

Ranks compare these words (`tpfuse.runtime.ballots`), so they must be equal on ranks whose graphs do the same before
they communicate, whatever else the graphs hold: no names of nodes, no sizes. Reads only.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import fx

from tpfuse._torch_private import without_modes

from ..facts import aten_ops as ops
from ..facts.collectives import is_collective
from ..facts.declared import operator_of
from ..facts.graph import OWN_ROWS, argument, is_call, value
from ..recognise.streams import calls
from .accounting import origin

#: The fused operators that communicate: one collective each.
FUSED = ("all_reduce_norm", "reduce_scatter_norm")
#: Their lists are sizes, which say nothing of what is computed and differ with the rows.
_SIZED = {
    ops.aten.view.default,
    ops.aten.reshape.default,
    ops.aten._unsafe_view.default,
    ops.aten.expand.default,
    ops.aten.full.default,
    ops.aten.empty.memory_format,
    ops.aten.zeros.default,
    ops.aten.ones.default,
}
_INDEX = re.compile(r"#(\d+)")
_LARGEST_CONSTANT = 65_536


def communicates(node: fx.Node) -> bool:
    ours = getattr(node.target, "namespace", "") == "tpfuse"  # every node is asked, and few are
    return is_collective(node) or (ours and any(calls(node, f"tpfuse::{name}") for name in FUSED))


def communicating(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that communicate, in graph order: "#0", "#1" and so on."""
    return [node for node in graph.nodes if communicates(node)]


def shifted(sends: str, by: int) -> str:
    """The same words for a graph whose collectives come behind `by` others."""
    return _INDEX.sub(lambda found: f"#{int(found[1]) + by}", sends)


class Sent:
    """Words for what is sent, once the collectives `originals` were rewritten."""

    def __init__(self, originals: Sequence[fx.Node], owner: torch.nn.Module | None = None):
        self.owner = owner
        self.index = {node.name: i for i, node in enumerate(originals)}
        self.targets = {node.name: node.target for node in originals}
        self.declared = {node.name for node in originals if operator_of(node)}
        self.inputs: dict[str, list[int]] = {}
        self.input_of: dict[int, str] = {}
        for i, node in enumerate(originals):
            source = _input(node)
            if isinstance(source, fx.Node):
                self.inputs.setdefault(source.name, []).append(i)
                self.input_of[i] = source.name
        values = [value(node) for node in map(_input, originals) if isinstance(node, fx.Node)]
        #: Symbols in the sizes of what the program sends.
        self.sizes = frozenset().union(*(symbols(size) for val in values if val is not None for size in val.shape))

    def by(self, node: fx.Node) -> str:
        """What `node`, a collective or a fused operation, sends."""
        if node.name in self.index and self.targets[node.name] is node.target:
            return f"#{self.index[node.name]}"
        if node.meta.get(OWN_ROWS):  # of two that the same boundary adds, either may come first
            return f"own rows, #{self.index.get(origin(node), 0)}"
        source = _input(node)
        if not isinstance(source, fx.Node):
            return "?"
        plain = source
        while is_call(plain, ops.VIEWS - ops.REORDERINGS) and isinstance(plain.args[0], fx.Node):
            if plain.name in self.inputs:
                break
            plain = plain.args[0]
        index = self.index.get(origin(node))
        if index is not None and self.input_of.get(index) == plain.name and _same_collective(self.targets, node):
            # In the place of another tool's operator it is performed in another way than peers may perform theirs.
            return f"#{index}" if origin(node) not in self.declared else f"{digest(['functional'])}:#{index}"
        return self._expression(node, source)

    def relied_on(self, node: fx.Node) -> tuple[int, ...]:
        """Which of the compiled graph's inputs `node` takes for equal on all ranks, because something made of them
        stands before its sum: those whose values the ranks compare before the first run, in the order in which what is
        sent reads them. Sizes of the tensors that the program sums are not among them: they are equal or nothing runs,
        and change with the rows."""
        if self.by(node).startswith(("#", "own rows")):
            return ()
        return tuple(input_index(current) for current in self._read(self._needed(_input(node))))

    def _read(self, needed: Iterable[fx.Node]) -> list[fx.Node]:
        inputs = [current for current in needed if current.op == "placeholder" and current.name not in self.inputs]
        return [current for current in inputs if not self._is_a_size(current)]

    def _is_a_size(self, node: fx.Node) -> bool:
        found = symbols(node.meta.get("val"))
        return bool(found) and found <= self.sizes

    def _needed(self, source: object) -> list[fx.Node]:
        """What `source` is computed from, back to finished collectives and the graph's inputs; in an order that depends
        on the expression alone."""
        needed: dict[fx.Node, None] = {}
        pending = [source] if isinstance(source, fx.Node) else []
        while pending:
            current = pending.pop()
            if current not in needed:
                needed[current] = None
                if not self._ends(current):
                    pending += reversed(current.all_input_nodes)
        return list(needed)

    def _expression(self, node: fx.Node, source: fx.Node) -> str:
        """A digest of how `source` is computed, back to finished collectives and the graph's inputs."""
        order = self._needed(source)
        # The values of inputs are compared in this order, so which one is read where is part of the expression.
        known = {current: f"input {i}" for i, current in enumerate(self._read(order))}
        needed = set(order)
        for current in source.graph.nodes:
            if current in needed:
                known[current] = self._word(current, known)
        found = sorted({i for current in needed for i in self.inputs.get(current.name, [])})
        how = digest([str(argument(node, "reduce_op")), known[source]])
        return f"{how}:{','.join(f'#{i}' for i in found)}"

    def _ends(self, node: fx.Node) -> bool:
        return node.name in self.inputs or communicates(node) or node.op != "call_function"

    def _word(self, node: fx.Node, known: dict[fx.Node, str]) -> str:
        if node.name in self.inputs:
            return f"sent {self.inputs[node.name]}"
        if communicates(node):
            return "received"
        val = value(node)
        if node.op == "get_attr":
            return constant_digest(self.owner, str(node.target))
        if node.op != "call_function":
            return f"{known.get(node, node.op)} {val.dtype if val is not None else ''}"
        sized = is_call(node, _SIZED)

        def word(arg: object) -> str:
            if isinstance(arg, fx.Node):
                return known.get(arg, "?")
            if isinstance(arg, (list, tuple)):
                return f"[{','.join(word(a) for a in arg if not (sized and isinstance(a, (int, fx.Node))))}]"
            if isinstance(arg, (bool, int, float, str)) or arg is None:
                return repr(arg)
            return type(arg).__name__

        arguments = [*map(word, node.args), *(f"{name}={word(arg)}" for name, arg in sorted(node.kwargs.items()))]
        return digest([str(node.target), *arguments])


def symbols(number: object) -> frozenset[str]:
    """Names of the symbols in a symbolic number; none in any other value."""
    if not isinstance(number, (torch.SymInt, torch.SymFloat)):
        return frozenset()
    return frozenset(str(symbol) for symbol in number.node.expr.free_symbols)


def input_index(node: fx.Node) -> int:
    """Which of the compiled graph's inputs the placeholder `node` is; -1 where that is not known."""
    index = getattr(node.meta.get("desc"), "idx", None)
    return index if isinstance(index, int) and type(node.meta["desc"]).__name__ == "PlainAOTInput" else -1


def constant_digest(owner: torch.nn.Module | None, name: str) -> str:
    """A word for the values of a constant tensor; one that no other rank has, where they cannot be read."""
    found: object = owner
    for part in name.split("."):
        found = getattr(found, part, None)
    plain = type(found) in (torch.Tensor, torch.nn.Parameter)
    if not isinstance(found, torch.Tensor) or not plain or found.numel() > _LARGEST_CONSTANT:
        return f"constant {uuid.uuid4()}"
    with without_modes():
        return f"constant {found.dtype} {digest([repr(found.detach().cpu().tolist())])}"


def _input(node: fx.Node) -> object:
    source = argument(node, "input") if is_collective(node) else node.args[0] if node.args else None
    return source if source is not None else next(iter(node.all_input_nodes), None)


def _same_collective(targets: Mapping[str, object], node: fx.Node) -> bool:
    """Whether a fused operation performs its original's collective: a fused sum instead of an average does not."""
    kind = next((name for name in FUSED if calls(node, f"tpfuse::{name}")), None)
    return kind is not None and kind.removesuffix("_norm") in str(targets[origin(node)])


def digest(words: Sequence[str]) -> str:
    """A short word for a list of words, equal in every process."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]
