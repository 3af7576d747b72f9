"""Equal rows on all dp replicas: assumed where nobody announced counts, and checked until they were seen equal once.

The check is a collective, so every rank must enter it at the same call. That is the model's first one, and, when that
raised, the next: ranks compile at different times, but all of them make the same calls and see the same counts. Eager
code checks there and then. Compiled code cannot leave the graph, so the operator `same_rows` marks the place; the
tpfuse backend takes the marks out again and checks before it runs the graph. Under another backend the operator itself
checks when it runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor, fx

from tpfuse._torch_private import process_group, under_dispatch_mode
from tpfuse.errors import PolicyError
from tpfuse.parallel.collectives import all_gather
from tpfuse.parallel.mesh import Group
from tpfuse.parallel.rows import announced_rows


class _Checks:
    """The checks of all models by the number that graphs know them by.

    An entry goes with its check, and no number comes twice: a graph that outlived its model finds nothing.
    """

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.by_key: WeakValueDictionary[int, RowsCheck] = WeakValueDictionary()

    def add(self, check: RowsCheck) -> int:
        key = next(self.numbers)
        self.by_key[key] = check
        return key


#: REGISTRY: see `_Checks`.
_CHECKS = _Checks()

_lib = torch.library.Library("tpfuse", "FRAGMENT")
_lib.define("same_rows(Tensor x, str group_name, int key) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


class RowsCheck:
    """Whether the dp replicas of one model were seen to hold equal rows."""

    def __init__(self) -> None:
        self.done = False
        self.key = _CHECKS.add(self)

    def __deepcopy__(self, memo: dict) -> RowsCheck:
        memo[id(self)] = copied = RowsCheck()
        return copied

    def __call__(self, x: Tensor, group: Group) -> Tensor:
        """x [R, H], whose rows are compared over the dp `group` until they agree once.

        Raises:
            PolicyError: on every rank of the group, when their R differ.
        """
        if torch.compiler.is_compiling():
            return torch.ops.tpfuse.same_rows.default(x, group.name, self.key)
        # Under a dispatch mode (fake tensors, tracing) there is nobody to meet.
        if not under_dispatch_mode():
            self.meet(x.shape[0], group.name, x.device)
        return x

    def meet(self, rows: int, group_name: str, device: torch.device) -> None:
        """Compare `rows` over the group, unless equal rows were seen before; a collective. Raises as `__call__`."""
        if self.done:
            return
        size = dist.get_world_size(process_group(group_name))
        counts = all_gather(torch.tensor([rows], device=device), size, group_name).tolist()
        if len(set(counts)) > 1:
            raise PolicyError(
                f"the dp replicas hold {counts} rows; equal rows are assumed unless announced: use "
                f"`with tpfuse.rows({tuple(counts)}):` around the call, or SharingPolicy(max_rows=...)"
            )
        self.done = True


def _same_rows(x: Tensor, group_name: str, key: int) -> Tensor:
    if (check := _CHECKS.by_key.get(key)) is not None:
        check.meet(x.shape[0], group_name, x.device)
    return x.clone()


_lib.impl("same_rows", _same_rows, "CompositeExplicitAutograd")
torch.library.register_fake("tpfuse::same_rows", lambda x, group_name, key: torch.empty_like(x), lib=_lib)
torch.library.register_autograd("tpfuse::same_rows", lambda ctx, grad: (grad, None, None), lib=_lib)


# -- in the backend ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """One `same_rows` taken out of a graph: `rows` is a number, or an expression over the graph's symbolic inputs."""

    check: RowsCheck
    group_name: str
    rows: Any
    device: torch.device


def take_marks(gm: fx.GraphModule) -> list[Mark]:
    """Take every `same_rows` out of a Dynamo graph; one mark for each model is kept."""
    marks: dict[int, Mark] = {}
    for node in list(gm.graph.nodes):
        if node.target is not torch.ops.tpfuse.same_rows.default:
            continue
        x, group_name, key = node.args
        example = x.meta["example_value"]
        check = _CHECKS.by_key.get(key)
        if check is not None and key not in marks:
            marks[key] = Mark(check, group_name, example.shape[0], example.device)
        node.replace_all_uses_with(x)
        gm.graph.erase_node(node)
    if marks:
        gm.recompile()
    return list(marks.values())


def checking(compiled: Callable[..., Any], gm: fx.GraphModule, marks: Sequence[Mark]) -> Callable[..., Any]:
    """`compiled`, checked before its first run. Costs one comparison afterwards, and no synchronisation."""
    symbols = {
        node.meta["example_value"].node.expr: position
        for position, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")
        if isinstance(node.meta.get("example_value"), torch.SymInt)
    }
    pending = [mark for mark in marks if not mark.check.done]
    if not pending:
        return compiled

    def run(*args: Any) -> Any:
        for mark in pending:
            if not mark.check.done and announced_rows() is None:
                mark.check.meet(_evaluated(mark.rows, symbols, args), mark.group_name, mark.device)
        return compiled(*args)

    return run


def _evaluated(rows: Any, symbols: dict[Any, int], args: Sequence[Any]) -> int:
    if isinstance(rows, int):
        return rows
    expression = rows.node.expr
    return int(expression.subs({symbol: args[symbols[symbol]] for symbol in expression.free_symbols}))
