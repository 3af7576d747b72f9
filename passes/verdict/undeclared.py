"""Operators of other tools that name a process group and feed a norm: all-reduces that nobody declared? Reads only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from tpfuse._torch_private import operator_full_name, operator_schema
from tpfuse.declared import Declaration

from ..facts import aten_ops as ops
from ..facts.collectives import ResolveGroup, is_collective
from ..facts.graph import argument, is_float
from ..recognise.norms import find_norms
from ..recognise.sites import backward_nodes
from .names import place
from .reach import reach

_TORCHS = (*ops.COLLECTIVE_NAMESPACES, "aten", "prims", "c10d", "tpfuse")


def undeclared(graph: fx.Graph, declared: Sequence[Declaration], resolve: ResolveGroup) -> list[str]:
    """A note for each operator of `graph` that has a group's name among its arguments and whose result a norm reads."""
    named = [(node, group) for node in graph.nodes for group in _names_a_group(node)]
    named = [(node, group) for node, group in named if not any(d.means(node.target) for d in declared)]
    if not named:
        return []
    gradients = backward_nodes(graph)
    norms_at = {norm.source: norm for norm in find_norms(graph)}
    found: dict[str, list[tuple[fx.Node, str]]] = {}
    for node, group in named:
        if node not in gradients and reach(node, norms_at, gradients).feeds_norm:
            found.setdefault(operator_full_name(node.target), []).append((node, group))
    return [_note(name, places, resolve) for name, places in found.items()]


def _names_a_group(node: fx.Node) -> Iterable[str]:
    """The argument by which an operator of another tool names a group; at most one."""
    schema = operator_schema(node.target)
    if node.op != "call_function" or schema is None or is_collective(node) or not is_float(node):
        return
    if getattr(node.target, "namespace", "") in _TORCHS:
        return
    for parameter in schema.arguments:
        if "group" in parameter.name and isinstance(argument(node, parameter.name), str):
            yield parameter.name
            return


def _note(name: str, places: list[tuple[fx.Node, str]], resolve: ResolveGroup) -> str:
    node, group = places[0]
    problem = Declaration(name, group).problem(node.target)
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    where = place(node).removeprefix(str(node.target)) + more
    said = f"{name}{where} names a group, {group}={argument(node, group)!r}, and a norm reads its result"
    if problem:
        return f"{said}; only an operator that returns one new tensor could be declared as an all-reduce, and {problem}"
    line = f'tpfuse.register_all_reduce("{name}", group="{group}")'
    if resolve(argument(node, group)) is None:
        line = line.removesuffix(")") + ", resolve=...)"
        return f"{said}; if it sums over that group, declare it: {line}; resolve maps that name to a ProcessGroup"
    return f"{said}; if it sums over that group, declare it and it can be fused: {line}"


__all__ = ["undeclared"]
