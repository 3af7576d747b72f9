"""How what is sent is computed, in words that are equal on ranks that compute it alike. Reads only.

A rewritten graph may send something that the program did not: the program's tensors, carried through steps that stood
behind their sums. What is carried is a rank's own, for it is summed. What the steps read besides (gates, masks, sizes,
addends) has to be the same on all ranks, and so have the operands of an operation that finishes rows for other ranks.
Words say how those are computed, back to results of collectives and inputs of the graph; of the inputs the values are
compared at the first run (`relied`), and so are the sizes that tensors are viewed in (`shapes`).
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tpfuse._torch_private import is_higher_order, is_operator, without_modes

from ..facts import aten_ops as ops
from ..facts.collectives import ResolveGroup, is_collective
from ..facts.graph import FINISHES, GATHERS, argument, input_node, is_call, symbols, value
from ..recognise.streams import calls

#: The fused operators that communicate: one collective each, and a gather behind it where their name says so; but of
#: `rows_norm_gather` the gather is the only one.
FUSED = (
    "all_reduce_norm", "reduce_scatter_norm", "all_reduce_norm_backward", "reduce_scatter_norm_backward",
    "reduce_scatter_norm_gather", "reduce_scatter_norm_backward_gather", "rows_norm_gather",
)  # fmt: skip
#: Their lists are sizes, which differ with the rows: compared at the first run, and no part of the words.
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
_SIZES = {ops.aten.sym_size.int, ops.aten.sym_numel.default, ops.aten.sym_stride.int}
#: What operators of these namespaces, and plain functions, give depends on their arguments alone. Others may ask which
#: rank they are on.
_KNOWN = ("aten", "prims", "tpfuse", "inductor", "inductor_prims", *ops.COLLECTIVE_NAMESPACES)
_LARGEST_CONSTANT = 65_536


def communicates(node: fx.Node) -> bool:
    ours = getattr(node.target, "namespace", "") == "tpfuse"  # every node is asked, and few are
    return is_collective(node) or (ours and any(calls(node, f"tpfuse::{name}") for name in FUSED))


@dataclass(frozen=True)
class Written:
    """What the program sends. inputs: which of its collectives send the value of a node, by the node's name; summed:
    those whose value is summed; sizes: symbols in their sizes."""

    inputs: Mapping[str, Sequence[int]]
    summed: frozenset[str]
    sizes: frozenset[str]


@dataclass
class Expression:
    """`node` is what communicates, `source` what it sends.

    order: all that `source` is computed from, in an order that depends on the expression alone. beside: those of it
    that have to be the same on all ranks. resolve: the ranks of a group, by its name.
    """

    node: fx.Node
    source: fx.Node
    written: Written
    carrying: frozenset[fx.Node]
    owner: torch.nn.Module | None
    resolve: ResolveGroup
    order: dict[fx.Node, None] = field(default_factory=dict)
    beside: set[fx.Node] = field(default_factory=set)
    _symbols: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pending = [(operand, True) for operand in reversed(self._operands())] + [(self.source, False)]
        while pending:
            node, beside = pending.pop()
            if node in self.order and (not beside or node in self.beside):
                continue
            self.order[node] = None
            if beside:
                self.beside.add(node)
            pending += reversed(self._parents(node, beside))

    def _operands(self) -> list[fx.Node]:
        """What the operation itself takes for equal on all ranks, besides what it sends."""
        if not self.node.meta.get(FINISHES):
            return []
        return _others(self.node)

    def _parents(self, node: fx.Node, beside: bool) -> list[tuple[fx.Node, bool]]:
        if node.op != "call_function" or (beside and self._is_known_size(node)):
            return []
        if calls(node, "tpfuse::rows_norm"):  # rows of a rank's own, and what they are finished with
            return [(node.args[0], False), *((other, True) for other in _others(node))]  # type: ignore[list-item]
        if _is_gathered(node):
            operation = input_node(node)
            return [] if not beside or self._reaches_all(operation) else [(operation, True)]
        if _receives(node):
            if beside and not self._reaches_all(node):
                return [(parent, True) for parent in node.all_input_nodes]
            return [(other, True) for other in _others(node)] if beside and _is_whole(node) else []
        if not beside and node.name in self.written.inputs:
            return []
        alone = not beside and self.source in self.carrying
        return [(parent, beside or (alone and parent not in self.carrying)) for parent in node.all_input_nodes]

    def _reaches_all(self, node: fx.Node) -> bool:
        """Whether what `node` received is the same on all ranks that compare words. A sum or a gather over some of them
        is as different as what went into it."""
        alike = _is_whole(node) or GATHERS in node.meta
        if not alike and not any(kind in str(node.target) for kind in ("all_reduce", "all_gather")):
            return True
        theirs, ours = argument(node, "group_name"), argument(self.node, "group_name")
        if theirs == ours:
            return True
        ranks = [self.resolve(group) if isinstance(group, str) else None for group in (theirs, ours)]
        return ranks[0] is not None and ranks[1] is not None and {*ranks[1]} <= {*ranks[0]}

    def _is_known_size(self, node: fx.Node) -> bool:
        return node.target in _SIZES and symbols(node.meta.get("val")) <= self.written.sizes

    # -- words --------------------------------------------------------------------------------------------------------

    @property
    def read(self) -> list[fx.Node]:
        """The inputs of the graph whose values have to be equal. Sizes of the tensors that the program sums are not
        among them: they are equal or nothing runs, and change with the rows."""
        inputs = [node for node in self.order if node.op == "placeholder"]
        inputs = [node for node in inputs if node in self.beside or node.name not in self.written.inputs]
        return [node for node in inputs if not self._is_a_size(node)]

    def _is_a_size(self, node: fx.Node) -> bool:
        found = symbols(node.meta.get("val"))
        return bool(found) and found <= self.written.sizes

    def words(self) -> list[str]:
        """How what is sent is computed, and what the operation finishes rows with."""
        # The values of inputs are compared in this order, so which one is read where is part of the expression.
        known = {node: f"input {i}" for i, node in enumerate(self.read)}
        for node in self.source.graph.nodes:
            if node in self.order:
                known[node] = self._word(node, known)
        finishes = _options(self.node) if self.node.meta.get(FINISHES) else []
        return [known[self.source], *(known[operand] for operand in self._operands()), *finishes]

    def shapes(self) -> str:
        """A digest of the sizes that values are viewed in; '' where none are."""
        found = [
            self._sizes(arg)
            for node in self.order
            if is_call(node, _SIZED)
            for arg in (*node.args, *node.kwargs.values())
            if isinstance(arg, (list, tuple))
        ]
        return digest(found) if found else ""

    def _sizes(self, sizes: Sequence[object]) -> str:
        return ",".join(self._size(s.meta.get("val")) if isinstance(s, fx.Node) else repr(s) for s in sizes)

    def _size(self, number: object) -> str:
        """A symbolic number, with its symbols named in the order in which they are met."""
        if not isinstance(number, (torch.SymInt, torch.SymFloat)):
            return repr(number)
        expression = number.node.expr
        found = sorted(expression.free_symbols, key=lambda s: (self._symbols.get(str(s), "~"), str(s)))
        names = {s: self._symbols.setdefault(str(s), f"n{len(self._symbols)}") for s in found}
        return str(expression.subs({symbol: type(symbol)(name) for symbol, name in names.items()}))

    def _word(self, node: fx.Node, known: Mapping[fx.Node, str]) -> str:
        beside = node in self.beside
        if not beside and node.name in self.written.inputs:
            return f"sent {list(self.written.inputs[node.name])}"
        val = value(node)
        if node.op == "get_attr":
            return constant_digest(self.owner, str(node.target))
        if node.op != "call_function":
            return f"{known.get(node, node.op)} {val.dtype if val is not None else ''}"
        if beside and _gives_each_its_own(node):
            return f"unknown {uuid.uuid4()}"
        if _is_gathered(node) and (not beside or self._reaches_all(input_node(node))):
            return "received"
        reaches = not _receives(node) or not beside or self._reaches_all(node)
        if _receives(node) and reaches and not (beside and _is_whole(node)):
            return "received"
        if beside and self._is_known_size(node):
            return f"size {self._size(node.meta.get('val'))}"
        if not _is_known(node):
            return f"unknown {uuid.uuid4()}"
        if calls(node, "tpfuse::cut_rows"):  # rows of a rank's own
            return digest([str(node.target), known.get(node.args[0], "?"), repr(node.args[1])])  # type: ignore[arg-type]
        sized = is_call(node, _SIZED)

        def word(arg: object) -> str:
            if isinstance(arg, fx.Node):
                return known.get(arg, "?")
            if isinstance(arg, (list, tuple)):
                return f"[{','.join(word(a) for a in arg if not (sized and isinstance(a, (int, fx.Node))))}]"
            if isinstance(arg, (bool, int, float, complex, str, torch.dtype, torch.memory_format)) or arg is None:
                return repr(arg)
            return type(arg).__name__

        if not reaches:  # groups have other names on other ranks
            group = argument(node, "group_name")
            return digest([str(node.target), *(word(arg) for arg in node.args if arg is not group), *_options(node)])
        if _receives(node) or calls(node, "tpfuse::rows_norm"):
            return digest(["received", *map(word, node.args[1:]), *_options(node)])
        if calls(node, "tpfuse::rows_norm_gather"):
            return digest([str(node.target), *map(word, node.args), *_options(node)])
        if node.target is ops.operator.getitem and _gives_several(node.args[0]):
            return digest([known.get(node.args[0], "?"), _called(node)])  # type: ignore[arg-type]
        arguments = [*map(word, node.args), *(f"{name}={word(arg)}" for name, arg in sorted(node.kwargs.items()))]
        return digest([str(node.target), *arguments])


def find_carrying(graph: fx.Graph, written: Written, index: Mapping[str, int]) -> frozenset[fx.Node]:
    """The nodes that are computed from what the program sums, before it is summed. `index`: the program's collectives,
    by name; what others that scatter a sum give is still to be summed."""
    carrying: set[fx.Node] = set()
    for node in graph.nodes:
        if node.name in written.summed:
            carrying.add(node)
        elif is_collective(node):
            if node.name not in index and "reduce_scatter" in str(node.target):
                carrying.add(node)
        elif node.op == "call_function" and not communicates(node) and not carrying.isdisjoint(node.all_input_nodes):
            carrying.add(node)
    return frozenset(carrying)


def _others(node: fx.Node) -> list[fx.Node]:
    """The operands of one of our norms besides what is summed: residual, bias in front, weight, bias, eps."""
    return [arg for arg in node.args[1:] if isinstance(arg, fx.Node)]


def _options(node: fx.Node) -> list[str]:
    """How one of our norms adds and normalises, but for its tensors; none for a plain collective."""
    names = ("norm", "eps", "weight_offset", "alpha", "post", "out_dtype")
    return [repr(node.kwargs[name]) for name in names if name in node.kwargs]


def _gives_each_its_own(node: fx.Node) -> bool:
    """Whether `node` is a collective of the program that gives every rank something else."""
    alike = ("all_reduce", "all_gather", "broadcast")
    return is_collective(node) and not any(kind in str(node.target) for kind in alike)


def _receives(node: fx.Node) -> bool:
    """Whether `node` communicates and what it gives is what it received, or is made of that."""
    return communicates(node) and not calls(node, "tpfuse::rows_norm_gather")


def _is_gathered(node: fx.Node) -> bool:
    """Whether `node` is what one of our operations gathered behind what it gives besides."""
    made = node.args[0] if node.target is ops.operator.getitem else None
    if not isinstance(made, fx.Node) or GATHERS not in made.meta:
        return False
    return bool(node.args[1] == len(made.meta["val"]) - 1)


def _is_whole(node: fx.Node) -> bool:
    return calls(node, "tpfuse::all_reduce_norm") or calls(node, "tpfuse::all_reduce_norm_backward")


def _gives_several(node: object) -> bool:
    return any(calls(node, f"tpfuse::{name}") for name in (*FUSED, "rows_norm"))


def _called(node: fx.Node) -> str:
    """Which result of one of our norms `node` takes; where it stands depends on which others are handed out."""
    norm, position = node.args
    assert isinstance(norm, fx.Node) and isinstance(position, int)
    options = norm.kwargs
    if GATHERS in norm.meta and position == len(norm.meta["val"]) - 1:
        return "gathered"
    if "want_weight" in options:
        wanted = {"dx": True, "sum": options["want_sum"], "dweight": options["want_weight"]}
        return [*(name for name, is_wanted in wanted.items() if is_wanted), "dbias"][position]
    names = ["y"]
    names += ["hidden"] if options.get("hidden_dtype") is not None else []
    names += ["sum"] if options.get("want_sum") else []
    if options.get("stats"):
        names += (["mean"] if options.get("norm") == "layer_norm" else []) + ["rstd"]
    if quant := options.get("quant"):  # peers that quantise otherwise would take the bytes for other numbers
        names += [f"q of {quant}", f"scale of {quant}"]
    return names[position]


def _is_known(node: fx.Node) -> bool:
    namespace = getattr(node.target, "namespace", None)
    if is_operator(node.target):
        return namespace in _KNOWN
    module = str(getattr(node.target, "__module__", ""))
    return module in ("_operator", "math", "builtins") or (
        module.split(".")[0] == "torch" and not is_higher_order(node.target)
    )


def input_index(node: fx.Node) -> int:
    """Which of the compiled graph's inputs the placeholder `node` is, or is a part of; -1 where that is not known."""
    desc: Any = node.meta.get("desc")
    if type(desc).__name__ == "SubclassGetAttrAOTInput":
        desc = desc.base
    index = getattr(desc, "idx", None)
    return index if isinstance(index, int) and type(desc).__name__ == "PlainAOTInput" else -1


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


def digest(words: Sequence[str]) -> str:
    """A short word for a list of words, equal in every process."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]
