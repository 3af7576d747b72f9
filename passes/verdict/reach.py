"""Where the result of a collective goes: to a norm, to what looks like one, out of the graph. Reads only."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from torch import fx

from ..facts import aten_ops as ops
from ..facts.collectives import is_collective
from ..facts.graph import depends_on
from ..facts.others import is_opaque
from ..recognise.alike import Alike, find_alike, is_end, regions
from ..recognise.norms import Norm, find_norms
from ..recognise.sums import gated_inputs, linear_inputs
from .names import norm_around

_LIMIT = 400


@dataclass
class Reached:
    """The first norm that reads the result over row-wise operators, or what else becomes of it.

    obstacle: the first operator on the way to the norm that is not linear. path: the way, from the result to what the
    norm reads. product: an operator that mixes units or rows, reads the result, and has a say in what that norm reads:
    the sum has to be finished before, so the norm is not fed by it (an embedding whose residual ends in a later norm).
    alike: what looks like a norm and reads it before. opaque: the first operator of another tool that reads it. ends:
    where the walk stopped. returned: what the graph returns of it. limited: the walk was given up.
    """

    norm: Norm | None = None
    obstacle: fx.Node | None = None
    path: tuple[fx.Node, ...] = ()
    product: fx.Node | None = None
    alike: Alike | None = None
    opaque: fx.Node | None = None
    ends: list[fx.Node] = field(default_factory=list)
    returned: list[fx.Node] = field(default_factory=list)
    limited: bool = False

    @property
    def feeds_norm(self) -> bool:
        return self.alike is not None or (self.norm is not None and self.product is None)


def reach(start: fx.Node, norms_at: Mapping[fx.Node, Norm], ignored: Collection[fx.Node] = ()) -> Reached:
    """Follow `start` forwards over row-wise operators. `norms_at`: by what they read. `ignored`: the backward pass."""
    came: dict[fx.Node, fx.Node | None] = {start: None}
    reached = _walk(start, norms_at, came, ignored)
    alike = find_alike(start, norms_at, ignored)
    if alike is None and reached.norm is None:
        alike = _by_name([*came, *reached.ends], {start, *ignored})
    if alike is not None and (reached.norm is None or alike.node < reached.path[-1]):
        reached.alike, reached.norm, reached.product = alike, None, None
    return reached


def _by_name(nodes: Iterable[fx.Node], ignored: Collection[fx.Node]) -> Alike | None:
    """What only the program's names tell: a module's class or a function (batch norm, whose statistics are fixed), or a
    region of its own that holds a norm."""
    for node in sorted(set(nodes) - set(ignored)):
        called = norm_around(node)
        if called:
            return Alike(node, None, False, called)
        inner = [graph for graph in regions(node) if isinstance(graph, fx.GraphModule)]
        if any(find_norms(graph.graph) for graph in inner):
            return Alike(node, None, False)
    return None


def _walk(
    start: fx.Node, norms_at: Mapping[fx.Node, Norm], came: dict[fx.Node, fx.Node | None], ignored: Collection[fx.Node]
) -> Reached:
    """`came`: filled with what was seen, and from where."""
    reached = Reached()
    pending: deque[tuple[fx.Node, fx.Node | None]] = deque([(start, None)])
    while pending and len(came) < _LIMIT:
        node, obstacle = pending.popleft()
        if node in norms_at:
            reached.norm, reached.obstacle, reached.path = norms_at[node], obstacle, _path(node, came)
            reached.product = next((end for end in reached.ends if depends_on(node, {end})), None)
            return reached
        for user in node.users:
            if user.op == "output" or (user.target is ops.aten.copy_.default and user.args[1] is node):
                reached.returned.append(node)  # or written to what others read: an input of the graph
            elif user not in came and user not in ignored:
                if is_collective(user) or is_end(user):
                    reached.ends.append(user)
                    continue
                came[user] = node
                if reached.opaque is None and is_opaque(user):
                    reached.opaque = user
                linear = any(child is node for child, *_ in [*linear_inputs(user), *gated_inputs(user)])
                pending.append((user, obstacle or (None if linear else user)))
    reached.limited = bool(pending)
    return reached


def _path(node: fx.Node | None, came: Mapping[fx.Node, fx.Node | None]) -> tuple[fx.Node, ...]:
    path = []
    while node is not None:
        path.append(node)
        node = came[node]
    return tuple(reversed(path))
