"""Whether the graph shows that a value differs between the ranks of a group. Reads only.

A factor may move in front of an all-reduce only if every rank multiplies by the same: g * sum(x) = sum(g * x). A
graph cannot prove that an input is the same everywhere; tensor parallelism itself rests on it (hidden states, and so
whatever scales them, are replicated). What a graph does show is where ranks part: random numbers, a rank's own rows,
sums not yet paid. Those are looked for here.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from itertools import combinations
from math import prod

import torch
from torch import fx

from tpfuse._torch_private import operator_schema

from ..facts.collectives import Collective
from ..facts.graph import symbols, symbols_told, value
from .sums import linear_inputs

#: Take something of each rank's own.
_SUMMING = ("all_reduce", "reduce_scatter")
#: Give every rank something of its own; all other collectives end with the same value on all ranks of their group.
_SCATTERING = ("reduce_scatter", "all_to_all", "tpfuse::cut_rows")
#: Sums its first argument, and adds and normalises with the others.
_SUMS = "tpfuse::all_reduce_norm"


@dataclass(frozen=True)
class Parting:
    """Where ranks part in one graph, and where they come together.

    `partial`: what is to be summed over ranks, scattered or not, and what that is a sum, a view or a multiple of: no
    two ranks need hold the same of it. Of two addends the graph does not say which is a rank's own, so both count.
    `finished`: results of all-reduces and all-gathers, and the ranks that hold the same of each. `groups`: the ranks of
    each group, by its name. `sizes`: symbols that the sizes of what is sent tell: equal on all ranks, or nothing runs.
    `same`: what was found to be the same, by what was asked; a residual stream is looked at once for all of its norms.
    """

    partial: frozenset[fx.Node]
    finished: dict[fx.Node, tuple[int, ...]]
    groups: dict[str, tuple[int, ...]]
    sizes: frozenset[str] = frozenset()
    same: dict[tuple[int, ...], set[fx.Node]] = field(default_factory=dict)


def find_partings(collectives: Iterable[Collective]) -> Parting:
    found = list(collectives)
    finished = {c.result: c.ranks for c in found if not any(word in _name(c.node) for word in _SCATTERING)}
    pending = [c.input for c in found if c.kind in _SUMMING and isinstance(c.input, fx.Node)]
    partial: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in partial and node not in finished:
            partial.add(node)
            pending += [child for child, _, _ in linear_inputs(node)]
    sent = [tensor for c in found if isinstance(c.input, fx.Node) and (tensor := value(c.input)) is not None]
    sizes = symbols_told(size for tensor in sent for size in tensor.shape)
    return Parting(frozenset(partial), finished, {c.group_name: c.ranks for c in found}, sizes)


def given_number(node: fx.Node, parting: Parting) -> bool:
    """Whether `node` is a number that every call brings anew: a Python number that Dynamo made symbolic (a float among
    them is a float64 tensor without dimensions), what `.item()` gives, a size of something that is not sent.

    One rank alone may bring another at any call, without compiling anew; so no agreement at the first run covers it.
    """
    number = node.meta.get("val")
    if isinstance(number, (torch.SymInt, torch.SymFloat)):
        return not symbols(number) <= parting.sizes
    if node.op != "placeholder" or not isinstance(number, torch.Tensor):
        return False
    return number.dim() == 0 and number.dtype is torch.float64 and number.device.type == "cpu"


def moved_by_number(nodes: Iterable[fx.Node], parting: Parting) -> str:
    """A sentence where a step reads such a number, or ''."""
    number = next((node for node in nodes if given_number(node, parting)), None)
    said = "what is read of the all-reduced sum depends on a number that each call brings anew"
    return f"{said} ({number}); as a constant it may move" if number is not None else ""


def differs_between_ranks(node: fx.Node, ranks: tuple[int, ...], parting: Parting) -> str:
    """A noun phrase that names why `node` may differ between `ranks`, or ''.

    Follows `node` towards the inputs, up to finished all-reduces and all-gathers. Those over other groups make it the
    same on all of `ranks` only together: a gather over the replicas, of what is summed over each replica's ranks.
    """
    pending: list[tuple[fx.Node, frozenset[tuple[int, ...]]]] = [(node, frozenset())]
    seen = set()
    same = parting.same.setdefault(ranks, set())
    while pending:
        current, groups = pending.pop()
        if not groups and current in same:
            continue
        if current in parting.finished:
            group = parting.finished[current]
            groups = groups | {group} if group else groups
            if not group or _cover(groups, ranks):
                continue
        elif current in parting.partial:
            held = f"is equal on ranks {sorted(map(list, groups))} only" if groups else "is what they have to sum up"
            return f"a value that differs between ranks ({current.target} {held})"
        if (current, groups) in seen:
            continue
        if given_number(current, parting):
            return "a number that each call brings anew, on each rank its own; as a constant it may move"
        if current.op != "call_function":
            continue
        seen.add((current, groups))
        if is_random(current):
            return (
                f"a random mask ({current.target}), which every rank draws for itself: the mask of a sum is the sum of"
                " masked parts only if all ranks drew the same; with dropout at 0, or in eval mode, this boundary fuses"
            )
        if _name(current) == _SUMS:
            summed = parting.groups.get(str(current.kwargs.get("group_name")), ())
            if not _cover({summed}, ranks):
                return f"a value that differs between ranks ({current.target} is equal on ranks {list(summed)} only)"
            pending += [(arg, groups) for arg in current.args[1:] if isinstance(arg, fx.Node)]
            continue
        if any(word in _name(current) for word in _SCATTERING):
            return f"a value that differs between ranks ({current.target} gives each rank its own rows)"
        pending.extend((parent, groups) for parent in current.all_input_nodes)
    same |= {current for current, groups in seen if not groups}
    return ""


def _cover(groups: Set[tuple[int, ...]], ranks: tuple[int, ...]) -> bool:
    """Whether what is the same on each of `groups` is the same on all of `ranks`: one holds them all, or they are the
    axes of a mesh of them."""
    if any(set(ranks) <= set(group) for group in groups):
        return True
    inside = [set(group) for group in groups if set(group) <= set(ranks)]
    axes = all(len(a & b) == 1 for a, b in combinations(inside, 2))
    return axes and prod(map(len, inside)) == len(ranks)


def is_random(node: fx.Node) -> bool:
    """Whether `node` draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _name(node: fx.Node) -> str:
    schema = operator_schema(node.target)
    return schema.name if schema is not None else ""


__all__ = ["Parting", "differs_between_ranks", "find_partings", "given_number", "is_random", "moved_by_number"]
