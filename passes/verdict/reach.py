"""Where the result of a collective goes: to a norm, to what looks like one, out of the graph. Reads only."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import fx

from ..facts.collectives import is_collective
from ..facts.graph import depends_on
from ..recognise.alike import Alike, find_alike, is_end
from ..recognise.norms import Norm
from ..recognise.sums import gated_inputs, linear_inputs

_LIMIT = 400


@dataclass
class Reached:
    """The first norm that reads the result over row-wise operators, or what else becomes of it.

    obstacle: the first operator on the way to the norm that is not linear. path: the way, from the result to what the
    norm reads. product: an operator that mixes units or rows, reads the result, and has a say in what that norm reads:
    the sum has to be finished before, so the norm is not fed by it (an embedding whose residual ends in a later norm).
    alike: what looks like a norm and reads it before. ends: where the walk stopped. returned: what the graph returns of
    it. limited: the walk was given up.
    """

    norm: Norm | None = None
    obstacle: fx.Node | None = None
    path: tuple[fx.Node, ...] = ()
    product: fx.Node | None = None
    alike: Alike | None = None
    ends: list[fx.Node] = field(default_factory=list)
    returned: list[fx.Node] = field(default_factory=list)
    limited: bool = False

    @property
    def feeds_norm(self) -> bool:
        return self.alike is not None or (self.norm is not None and self.product is None)


def reach(start: fx.Node, norms_at: Mapping[fx.Node, Norm], ignored: Collection[fx.Node] = ()) -> Reached:
    """Follow `start` forwards over row-wise operators. `norms_at`: by what they read. `ignored`: the backward pass."""
    reached = _walk(start, norms_at)
    alike = find_alike(start, norms_at, ignored)
    if alike is not None and (reached.norm is None or alike.node < reached.path[-1]):
        reached.alike, reached.norm, reached.product = alike, None, None
    return reached


def _walk(start: fx.Node, norms_at: Mapping[fx.Node, Norm]) -> Reached:
    reached = Reached()
    came: dict[fx.Node, fx.Node | None] = {start: None}
    pending: deque[tuple[fx.Node, fx.Node | None]] = deque([(start, None)])
    while pending and len(came) < _LIMIT:
        node, obstacle = pending.popleft()
        if node in norms_at:
            reached.norm, reached.obstacle, reached.path = norms_at[node], obstacle, _path(node, came)
            reached.product = next((end for end in reached.ends if depends_on(node, {end})), None)
            return reached
        for user in node.users:
            if user.op == "output":
                reached.returned.append(node)
            elif user not in came:
                if is_collective(user) or is_end(user):
                    reached.ends.append(user)
                    continue
                came[user] = node
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
