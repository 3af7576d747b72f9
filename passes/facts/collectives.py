"""Find the collectives of a graph. Reads only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from tpfuse._torch_private import compiles_on_one_rank, operator_name

from . import aten_ops as ops
from .declared import operator_of
from .graph import argument, why_unusual

#: Answers which global ranks a group name stands for on this rank; None when it cannot be resolved.
ResolveGroup = Callable[[str], "tuple[int, ...] | None"]


@dataclass(frozen=True)
class Collective:
    """One collective and the wait on its result.

    `ranks` are the members of its group: groups are compared by members, never by name, since one logical group has
    different names on different ranks and different groups may share one. `ranks`, `group_name` and `reduce_op` are
    empty where they are not known. `problem` is empty, or one sentence on why no pass may touch this collective.
    `declared`: the name of another tool's operator that it stands for, or ''.
    """

    kind: str
    node: fx.Node
    wait: fx.Node | None
    group_name: str
    ranks: tuple[int, ...]
    reduce_op: str
    problem: str = ""
    declared: str = ""

    @property
    def input(self) -> fx.Node:
        return argument(self.node, "input")

    @property
    def result(self) -> fx.Node:
        """The node whose value is the finished result."""
        return self.wait if self.wait is not None else self.node


def is_collective(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is ops.WAIT:
        return False
    return getattr(node.target, "namespace", None) in ops.COLLECTIVE_NAMESPACES


def communicates_between(first: fx.Node, last: fx.Node) -> bool:
    """Whether a collective stands between two nodes of a graph. Every operation of ours counts as one: most have one in
    them, and it is not told which."""
    node = first.next
    while node.op != "root" and node < last:
        if is_collective(node) or getattr(node.target, "namespace", "") == "tpfuse":
            return True
        node = node.next
    return False


def find_collectives(graph: fx.Graph, resolve: ResolveGroup) -> list[Collective]:
    """Every collective of the graph, in graph order."""
    return [_describe(node, resolve) for node in graph.nodes if is_collective(node)]


def _describe(node: fx.Node, resolve: ResolveGroup) -> Collective:
    name = operator_name(node.target)
    kind = next((k for k in ops.COLLECTIVE_KINDS if name.startswith(k)), name)
    waits = [user for user in node.users if user.target is ops.WAIT]
    wait = waits[0] if len(waits) == 1 else None
    group = argument(node, "group_name")
    ranks = resolve(group) if isinstance(group, str) else None
    reduce_op = argument(node, "reduce_op")
    declared = operator_of(node)

    problem = ""
    if not isinstance(group, str):
        problem = _no_group_name(group)
    elif ranks is None:
        problem = f"the group {group!r} cannot be resolved on this rank: no process group of that name exists here"
        if declared:
            problem += f"; register_all_reduce({declared!r}, ..., resolve=...) tells which one {declared} means by it"
    elif kind == "all_reduce":
        problem = _all_reduce_problem(node, name, wait, waits, reduce_op)
    group_name, reduction = (word if isinstance(word, str) else "" for word in (group, reduce_op))
    return Collective(kind, node, wait, group_name, ranks or (), reduction, problem, declared)


def _no_group_name(group: object) -> str:
    if not isinstance(group, fx.Node):
        return f"its group is a {type(group).__name__}, not a group name; only named groups can be fused"
    whose = "is an input of the graph" if group.op == "placeholder" else f"is made in the graph by {group.target}"
    unknown = "which ranks it has is not known while compiling"
    if not compiles_on_one_rank():
        return f"its group {whose}, and {unknown}; only named groups can be fused"
    setting = "torch.distributed.config.compile_on_one_rank"
    return f"its group {whose}, because {setting} is on, and {unknown}; with it off it can be fused"


def _all_reduce_problem(node: fx.Node, name: str, wait: fx.Node | None, waits: list[fx.Node], reduce_op: object) -> str:
    if name != "all_reduce":
        more = "; each of its tensors by an all_reduce of its own can be" if "coalesced" in name else ""
        return f"it is written as {name}; only the functional all_reduce can be fused{more}"
    if not isinstance(reduce_op, str) or reduce_op.lower() not in ("sum", "avg"):
        return f"its reduce op is {reduce_op!r}; only 'sum' and 'avg' can be fused"
    if not waits:
        return "its result is never waited for in this graph"
    if wait is None:
        return "its result is waited for more than once"
    if any(user is not wait for user in node.users):
        return "its unfinished result is used before it is waited for"
    if not isinstance(argument(node, "input"), fx.Node):
        return "its input is no value of the graph"
    return why_unusual(wait, "its result") or why_unusual(argument(node, "input"), "its input")
