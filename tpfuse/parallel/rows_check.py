"""How many rows the dp replicas hold: the replicas meet in every forward pass, so that an error is one on all of them.

A boundary that gathers rows over dp needs equal rows, announced ones, or no more than the policy's `max_rows`. What one
replica sees of that is an error which the others wait for in vain. So before the first such boundary of a model runs,
the replicas exchange a few numbers: their rows, to how many they pad, and what is wrong with them. The first time by a
collective; from then on through a `Mailbox`, so that a step has no more collectives and waits for no device.

The place is the boundary that the model's first call came to first, and stays that one: ranks compile at different
times, or not at all, but all of them call it as often. Eager code meets there and then. Compiled code cannot leave the
graph, so the operator `same_rows` marks the place; the tpfuse backend takes the marks out again and meets before it
runs the graph. Under another backend the operator itself meets when it runs.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from tpfuse import _state as state
from tpfuse._torch_private import process_group, under_dispatch_mode
from tpfuse.errors import PolicyError
from tpfuse.parallel.adapters import chosen, named
from tpfuse.parallel.collectives import all_gather
from tpfuse.parallel.mailbox import Mailbox
from tpfuse.parallel.mesh import Group

_lib = torch.library.Library("tpfuse", "FRAGMENT")
_lib.define(
    "same_rows(Tensor x, str group_name, int key, int site, int padded, int fault, int limit) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


NONE, TOO_MANY, OTHER_THAN_ANNOUNCED, OTHER_REPLICAS = range(4)


@dataclass(frozen=True)
class Says:
    """What one replica says of its rows at one boundary.

    Args:
        padded: to how many rows it pads, -1 where it does not.
        fault: what is wrong on this replica.
        limit: with a fault, the rows that are allowed or announced, or how many counts were announced.
    """

    padded: int = -1
    fault: int = NONE
    limit: int = 0


class RowsCheck:
    """What the dp replicas of one model know of each other's rows. `names`: the boundaries, by their number."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.site: int | None = None
        #: Adapters in modules that work on all replicas' rows: none of them may be another's.
        self.adapters: list[nn.Module] = []
        #: From the second meeting on; None as long as nobody was met.
        self.mailbox: Mailbox | None = None
        self.key = state.ROWS_CHECKS.add(self)

    def __deepcopy__(self, memo: dict) -> RowsCheck:
        memo[id(self)] = copied = RowsCheck()
        copied.names = list(self.names)  # it meets anew: a mailbox has one owner on each rank
        return copied

    def number_of(self, name: str) -> int:
        """A new boundary's number."""
        self.names.append(name)
        return len(self.names) - 1

    def __call__(self, x: Tensor, group: Group, site: int, says: Says) -> Tensor:
        """x [R, H] of this replica, which meets the others over the dp `group` if this is the place to.

        Raises:
            PolicyError: on every rank of the group, when their R do not go together.
        """
        if torch.compiler.is_compiling():
            return torch.ops.tpfuse.same_rows.default(
                x, group.name, self.key, site, says.padded, says.fault, says.limit
            )
        # Under a dispatch mode (fake tensors, tracing) there is nobody to meet.
        if under_dispatch_mode() or not self.meet(x.shape[0], group.name, x.device, site, says):
            self.alone(x.shape[0], site, says)
        return x

    def alone(self, rows: int, site: int, says: Says) -> None:
        """Raises for a fault of this replica's where nobody is met."""
        if says.fault:
            raise PolicyError(self._wrong([[rows, says.padded, says.fault, says.limit, site, 0, 0]]))

    def meet(self, rows: int, group_name: str, device: torch.device, site: int, says: Says) -> bool:
        """Exchange it, if `site` is the place to; all replicas do. Raises as `__call__`. Returns whether it was."""
        if self.site not in (None, site) or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return False
        group = process_group(group_name)
        assert group is not None
        fake = dist.get_backend(group) == "fake"
        own = [rows, says.padded, says.fault, says.limit, site, *chosen(self.adapters)]
        if self.site is not None and fake:
            return False  # nobody answers
        if self.mailbox is not None:
            said = self.mailbox.exchange(own)
        else:
            said = self._first_meeting(own, group, group_name, device)
        if words := self._wrong(said):
            raise PolicyError(words)
        self.site = site
        return True

    def _first_meeting(
        self, own: list[int], group: dist.ProcessGroup, group_name: str, device: torch.device
    ) -> list[list[int]]:
        """By a collective, which also agrees on the mailbox's name: that of the first replica."""
        size = dist.get_world_size(group)
        message = torch.tensor([[*own, secrets.randbits(62)]], device=device)
        said = all_gather(message, size, group_name).tolist()
        if dist.get_backend(group) != "fake":
            self.mailbox = Mailbox(f"rows/{said[0][-1]}", dist.get_rank(group), size)
        return [numbers[:-1] for numbers in said]

    def _wrong(self, said: list[list[int]]) -> str:
        """What is wrong with the replicas' rows, the same sentence on all of them; or ''."""
        rows, padded = [one[0] for one in said], [one[1] for one in said]
        for replica, (own, _, fault, limit, site, *_) in enumerate(said):
            name = self.names[site]
            which = f"of dp replica {replica} " if len(said) > 1 else ""
            if fault == TOO_MANY:
                return (
                    f"{name} {which}has {own} rows; SharingPolicy.max_rows allows {limit}; raise it, or announce the "
                    "rows of each replica with tpfuse.rows"
                )
            if fault == OTHER_THAN_ANNOUNCED:
                whose = f"for dp replica {replica}" if len(said) > 1 else "for this replica"
                return f"{name} {which}has {own} rows, but tpfuse.rows announced {limit} {whose}"
            if fault == OTHER_REPLICAS:
                return f"tpfuse.rows announced {limit} counts; allowed: one for each dp replica"
        if len({one[4] for one in said}) > 1:
            places = [self.names[one[4]] for one in said]
            return (
                f"the dp replicas came to {places} at once; modules that work on all replicas' rows must be called by "
                "all of them, in one order"
            )
        if len({one[5] for one in said}) > 1:
            use = ", ".join(f"{named(self.adapters, one[6])} on {at}" for at, one in enumerate(said))
            return (
                f"the dp replicas use different adapters ({use}), but {self.names[said[0][4]]} and others work on all "
                "replicas' rows, each rank with its own slices; use the same adapters on all replicas, or cut MLPs "
                "over the attention group (moe_dense_tp_size=attn_tp_size)"
            )
        if len(set(padded)) > 1:
            return (
                f"the dp replicas pad to {padded} rows (-1: not at all); announce the same rows on all of them: use "
                f"`with tpfuse.rows({tuple(rows)}):` around the call"
            )
        if len(set(rows)) > 1 and padded[0] < 0:
            return (
                f"the dp replicas hold {rows} rows; equal rows are assumed unless announced: use "
                f"`with tpfuse.rows({tuple(rows)}):` around the call, or SharingPolicy(max_rows=...)"
            )
        return ""


def _same_rows(
    x: Tensor, group_name: str, key: int, site: int, padded: int, fault: int, limit: int
) -> Tensor:  # fmt: skip
    check, says = state.ROWS_CHECKS.by_key.get(key), Says(padded, fault, limit)
    if check is not None and not check.meet(x.shape[0], group_name, x.device, site, says):
        check.alone(x.shape[0], site, says)
    return x.clone()


_lib.impl("same_rows", _same_rows, "CompositeExplicitAutograd")
torch.library.register_fake("tpfuse::same_rows", lambda x, *_: torch.empty_like(x), lib=_lib)
torch.library.register_autograd("tpfuse::same_rows", lambda ctx, grad: (grad, *[None] * 6), lib=_lib)


# -- in the backend ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """One `same_rows` taken out of a graph: `rows` is a number, or an expression over the graph's symbolic inputs."""

    check: RowsCheck
    group_name: str
    site: int
    says: Says
    rows: Any
    device: torch.device


def take_marks(gm: fx.GraphModule) -> list[Mark]:
    """Take every `same_rows` out of a Dynamo graph; one mark for each boundary is kept, in the graph's order."""
    marks: dict[tuple[int, int], Mark] = {}
    for node in list(gm.graph.nodes):
        if node.target is not torch.ops.tpfuse.same_rows.default:
            continue
        x, group_name, key, site, *says = node.args
        example = x.meta["example_value"]
        check = state.ROWS_CHECKS.by_key.get(key)
        if check is not None and (key, site) not in marks:
            marks[key, site] = Mark(check, group_name, site, Says(*says), example.shape[0], example.device)
        node.replace_all_uses_with(x)
        gm.graph.erase_node(node)
    if marks:
        gm.recompile()
    return list(marks.values())


def checking(compiled: Callable[..., Any], gm: fx.GraphModule, marks: Sequence[Mark]) -> Callable[..., Any]:
    """`compiled`, before every run of which the replicas meet. Where another graph is the place, it costs nothing."""
    symbols = {
        node.meta["example_value"].node.expr: position
        for position, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")
        if isinstance(node.meta.get("example_value"), torch.SymInt)
    }
    if not marks:
        return compiled

    def run(*args: Any) -> Any:
        for mark in marks:
            if mark.check.site in (None, mark.site):
                rows = _evaluated(mark.rows, symbols, args)
                mark.check.meet(rows, mark.group_name, mark.device, mark.site, mark.says)
            elif mark.says.fault:
                mark.check.alone(_evaluated(mark.rows, symbols, args), mark.site, mark.says)
        return compiled(*args)

    return run


def _evaluated(rows: Any, symbols: dict[Any, int], args: Sequence[Any]) -> int:
    if isinstance(rows, int):
        return rows
    expression = rows.node.expr
    return int(expression.subs({symbol: args[symbols[symbol]] for symbol in expression.free_symbols}))
