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
    named = [(node, group) for node, group in named if not any(d.means(_operator(node)) for d in declared)]
    if not named:
        return []
    gradients = backward_nodes(graph)
    norms_at = {norm.source: norm for norm in find_norms(graph)}
    found: dict[str, list[tuple[fx.Node, str]]] = {}
    for node, group in named:
        if node not in gradients and reach(node, norms_at, gradients).feeds_norm:
            found.setdefault(operator_full_name(_operator(node)), []).append((node, group))
    return [_note(name, places, resolve) for name, places in found.items()]


def _names_a_group(node: fx.Node) -> Iterable[str]:
    """The argument by which an operator of another tool names a group; at most one."""
    target = _operator(node)
    schema = operator_schema(target)
    if node.op != "call_function" or schema is None or is_collective(node):
        return
    if getattr(target, "namespace", "") in _TORCHS or not (is_float(node) or target is not node.target):
        return
    for parameter in schema.arguments:
        if "group" in parameter.name and isinstance(_given(node, parameter.name), str):
            yield parameter.name
            return


def _operator(node: fx.Node) -> object:
    """What `node` calls; of the functional form of an operator that writes to its arguments, that operator."""
    first = node.args[0] if node.args else None
    return first if "auto_functionalized" in str(node.target) and operator_schema(first) is not None else node.target


def _given(node: fx.Node, name: str) -> object:
    return argument(node, name) if _operator(node) is node.target else node.kwargs.get(name)


def _note(name: str, places: list[tuple[fx.Node, str]], resolve: ResolveGroup) -> str:
    node, group = places[0]
    operator = _operator(node)
    problem = Declaration(name, group).problem(operator)
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    where = place(node).removeprefix(str(node.target)) + more
    said = f"{name}{where} names a group, {group}={_given(node, group)!r}, and a norm reads its result"
    if problem:
        return f"{said}; only an operator that returns one new tensor could be declared as an all-reduce, and {problem}"
    line = f'tpfuse.register_all_reduce("{name}", group="{group}")'
    given = _given(node, group)
    if not isinstance(given, str) or resolve(given) is None:
        line = line.removesuffix(")") + ", resolve=...)"
        return f"{said}; if it sums over that group, declare it: {line}; resolve maps that name to a ProcessGroup"
    return f"{said}; if it sums over that group, declare it, and it is treated like torch's own: {line}"


__all__ = ["undeclared"]
