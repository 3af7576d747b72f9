"""Operators of other tools that name a process group, or are called all-reduces, and feed a norm: all-reduces that
nobody declared? Reads only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import fx

from tpfuse._torch_private import operator_full_name, operator_schema
from tpfuse.declared import Declaration

from ..facts import aten_ops as ops
from ..facts.backward import backward_nodes
from ..facts.collectives import ResolveGroup, is_collective
from ..facts.graph import argument, value
from ..facts.others import TORCHS, operator_of
from ..recognise.norms import find_norms
from .names import place
from .reach import reach


def undeclared(graph: fx.Graph, declared: Sequence[Declaration], resolve: ResolveGroup) -> list[str]:
    """A note for each operator of `graph` that has a group's name among its arguments, or is called an all-reduce, and
    whose result a norm reads."""
    named = [(node, group) for node in graph.nodes for group in _names_a_group(node)]
    named = [(node, group) for node, group in named if not any(d.means(operator_of(node)) for d in declared)]
    if not named:
        return []
    gradients = backward_nodes(graph)
    norms_at = {norm.source: norm for norm in find_norms(graph)}
    found: dict[str, list[tuple[fx.Node, str]]] = {}
    for node, group in named:
        if node not in gradients and any(reach(n, norms_at, gradients).feeds_norm for n in _results(node)):
            found.setdefault(operator_full_name(operator_of(node)), []).append((node, group))
    return [_note(name, places, resolve) for name, places in found.items()]


def _results(node: fx.Node) -> list[fx.Node]:
    """`node`, or what is taken from its several results."""
    taken = [user for user in node.users if user.target is ops.operator.getitem]
    return taken if value(node) is None and taken else [node]


def _names_a_group(node: fx.Node) -> Iterable[str]:
    """The argument by which an operator of another tool names a group; '' where it names none and is called an
    all-reduce; at most one."""
    if node.op != "call_function" or getattr(node.target, "namespace", "") in TORCHS:
        return
    target = operator_of(node)
    schema = operator_schema(target)
    if schema is None or is_collective(node):
        return
    if getattr(target, "namespace", "") in TORCHS:
        return
    for parameter in schema.arguments:
        if "group" in parameter.name and isinstance(_given(node, parameter.name), str):
            yield parameter.name
            return
    if re.search("all_?reduce", schema.name):
        yield ""


def _given(node: fx.Node, name: str) -> object:
    return argument(node, name) if operator_of(node) is node.target else node.kwargs.get(name)


def _note(name: str, places: list[tuple[fx.Node, str]], resolve: ResolveGroup) -> str:
    node, group = places[0]
    operator = operator_of(node)
    problem = Declaration(name, group).problem(operator)
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    where = place(node).removeprefix(str(operator)) + more
    if not group:
        only = "only an operator that is given its group's name could be declared as an all-reduce"
        return f"{name}{where} is called an all-reduce, names no group, and a norm reads its result; {only}"
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
