"""What a rewritten graph's operations send: an original collective's input as it was, or something made of several.

Ranks compare these words (`tpfuse.runtime.ballots`), so they must be equal on ranks whose graphs do the same before
they communicate, whatever else the graphs hold: no names of nodes, no sizes. Reads only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import fx

from ..facts import aten_ops as ops
from ..facts.collectives import ResolveGroup, is_collective
from ..facts.declared import operator_of
from ..facts.graph import FINISHES, GATHERS, OWN_ROWS, QUANTISED_ROWS, argument, is_call, symbols_told, value
from ..facts.groups import resolve_group
from ..recognise.streams import calls
from .accounting import origin
from .expression import FUSED, Expression, Written, communicates, digest, find_carrying, input_index

_INDEX = re.compile(r"#(\d+)")


def communicating(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that communicate, in graph order: "#0", "#1" and so on."""
    return [node for node in graph.nodes if communicates(node)]


def shifted(sends: str, by: int) -> str:
    """The same words for a graph whose collectives come behind `by` others."""
    return _INDEX.sub(lambda found: f"#{int(found[1]) + by}", sends)


class Sent:
    """Words for what is sent, once the collectives `originals` were rewritten."""

    def __init__(
        self, originals: Sequence[fx.Node], owner: torch.nn.Module | None = None, resolve: ResolveGroup = resolve_group
    ):
        self.owner, self.resolve = owner, resolve
        self.index = {node.name: i for i, node in enumerate(originals)}
        self.targets = {node.name: node.target for node in originals}
        self.declared = {node.name for node in originals if operator_of(node)}
        self.inputs: dict[str, list[int]] = {}
        self.input_of: dict[int, str] = {}
        summed = set()
        for i, node in enumerate(originals):
            source = _input(node)
            if isinstance(source, fx.Node):
                self.inputs.setdefault(source.name, []).append(i)
                self.input_of[i] = source.name
                if _sums(node):
                    summed.add(source.name)
        values = [value(node) for node in map(_input, originals) if isinstance(node, fx.Node)]
        #: Symbols that the sizes of what the program sends tell.
        sizes = symbols_told(size for val in values if val is not None for size in val.shape)
        self.written = Written(self.inputs, frozenset(summed), sizes)
        self._carrying = cache(lambda graph: find_carrying(graph, self.written, self.index))
        self._expressions = cache(self._expression)
        #: What a node, a collective or a fused operation, sends; asked for several times, and found once.
        self.by = cache(self._by)

    def _by(self, node: fx.Node) -> str:
        if node.name in self.index and self.targets[node.name] is node.target:
            return f"#{self.index[node.name]}"
        if node.meta.get(OWN_ROWS):  # of two that the same boundary adds, either may come first
            return f"own rows, #{self.index.get(origin(node), 0)}"
        quantised, in_place = node.meta.get(QUANTISED_ROWS, ("", False))
        if in_place:  # of the rows that the program sends there; to other numbers if a peer quantises otherwise
            return f"{digest(['quantised', quantised])}:#{self.index[origin(node)]}"
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
        expression = self._expressions(node, source)
        found = sorted({i for current in expression.order for i in self.inputs.get(current.name, [])})
        how = digest([str(argument(node, "reduce_op")), *filter(None, [quantised]), *expression.words()])
        return f"{how}:{','.join(f'#{i}' for i in found)}"

    def gathered_by(self, node: fx.Node) -> str:
        """What an operation that gathers as well sends behind its sum: its rank's own rows, as the program does."""
        return f"#{self.index[name]}" if (name := node.meta[GATHERS]) in self.index else "?"

    def relied_on(self, node: fx.Node) -> tuple[int, ...]:
        """Which of the compiled graph's inputs `node` takes for equal on all ranks, in the order in which what is sent
        reads them; their values are compared before the first run. -1 is one that cannot be told."""
        source = _input(node)
        in_place = self.by(node).startswith(("#", "own rows")) or node.meta.get(QUANTISED_ROWS, ("", False))[1]
        if in_place or not isinstance(source, fx.Node):
            return ()
        relied = tuple(map(input_index, self._expressions(node, source).read))
        # The norm of a sum that was laid out anew is elsewhere: what finishes its rows cannot be told.
        return (*relied, -1) if node.meta.get(FINISHES) and is_collective(node) else relied

    def shapes(self, node: fx.Node) -> str:
        """A digest of the sizes that what `node` sends was viewed in; '' where it is as written."""
        source = _input(node)
        if self.by(node).startswith(("#", "own rows")) or not isinstance(source, fx.Node) or not _sums(node):
            return ""
        return self._expressions(node, source).shapes()

    def _expression(self, node: fx.Node, source: fx.Node) -> Expression:
        carrying = self._carrying(node.graph) if _sums(node) else frozenset()
        return Expression(node, source, self.written, carrying, self.owner, self.resolve)


def _sums(node: fx.Node) -> bool:
    return any(kind in str(node.target) for kind in ("all_reduce", "reduce_scatter"))


def _input(node: fx.Node) -> object:
    source = argument(node, "input") if is_collective(node) else node.args[0] if node.args else None
    return source if source is not None else next(iter(node.all_input_nodes), None)


def _same_collective(targets: Mapping[str, object], node: fx.Node) -> bool:
    """Whether a fused operation performs its original's collective: a fused sum instead of an average does not."""
    kind = next((name for name in FUSED if calls(node, f"tpfuse::{name}")), None)
    return kind is not None and kind.partition("_norm")[0] in str(targets[origin(node)])
