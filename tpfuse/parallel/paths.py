"""What the autograd graph says of tensors at a cut module's edges, where eager code runs.

Inside a cut module a rank's gradients are partial, and are summed where its inputs enter (`copy_to`). Two things would
go wrong there without a word: a tensor that comes in by another way (an attribute, a closure, an object nobody looks
into) keeps a partial gradient; and one that is this rank's own (keys and values of an earlier layer) would be summed
with those of other ranks' heads.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.fsdp import FlatParameter
from torch.distributed.tensor import DTensor

from tpfuse.errors import PlanError
from tpfuse.parallel.containers import tensors_in

#: Backward of what brings an input into a cut module, and of what makes its output whole again.
ENTRY, OWN_ROWS = "_CopyToBackward", "_ScatterRowsBackward"
EXITS = ("_ReduceFromBackward", "_ScaleGradientBackward", "_GatherColumnsBackward", "_GatherRowsBackward")


#: On parameters inside of cut modules: whether they are cut themselves.
_INSIDE = "_tpfuse_inside"


def mark(parameter: Tensor, cut: bool) -> None:
    """Lets the graph tell a parameter inside of a cut module from others."""
    setattr(parameter, _INSIDE, cut)


def is_own(given: Tensor) -> bool:
    """Whether an argument is what this rank alone has: it comes from inside a cut module, in front of its sum."""
    return any(node.name() == ENTRY for node in _nodes([given], (ENTRY, *EXITS)))


def gives_own(output: Tensor) -> bool:
    """Whether a tensor that a cut module is about to give back is what this rank alone has: it was made by a cut
    weight, and no sum follows."""
    nodes = _nodes([output], (ENTRY, *EXITS))
    return any(getattr(getattr(node, "variable", None), _INSIDE, False) for node in nodes)


def _nodes(tensors: Collection[Tensor], last: Collection[str]) -> list[Any]:
    """The graph that made the tensors, up to nodes called like one of `last`."""
    found: dict[Any, None] = {}
    waiting = [t.grad_fn for t in tensors if t.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found[node] = None
        if node.name() not in last:
            waiting.extend(one for one, _ in node.next_functions if one is not None)
    return list(found)


def leaves_of(tensor: Tensor) -> list[Tensor]:
    """The leaves that a tensor was computed from, in eager code."""
    return [node.variable for node in _nodes([tensor], ()) if hasattr(node, "variable")]


def _wants_gradient(output: Any) -> bool:
    return any(tensor.requires_grad for tensor in tensors_in(output))


@dataclass(frozen=True)
class OnlyByArguments:
    """After a cut module's first forward pass with gradients: whatever it read came as an argument, or is its own.

    `entry`: the node that its inputs come in by. `module`: the one that was cut, and no copy of it.
    """

    name: str
    entry: str
    module: weakref.ref[nn.Module] = field(compare=False)

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if self.module() is not module and _wants_gradient(output):
            raise PlanError(
                f"this {type(module).__name__} is a copy (copy.deepcopy) of a parallelized one, {self.name}: nothing "
                "sums its gradients, and clipping would not know it. Copy the whole model first, and parallelize each; "
                "a copy can be used under torch.no_grad()"
            )
        if "_tpfuse_looked_at" in vars(module):
            return
        parameters = list(module.parameters())
        if any(isinstance(p, DTensor) for p in parameters):
            return  # FSDP2 has put other tensors in their place by now
        module._tpfuse_looked_at = True  # type: ignore[assignment]
        own = {id(p) for p in parameters}
        for node in _nodes(list(tensors_in(output)), (self.entry,)):
            leaf = getattr(node, "variable", None)
            if leaf is None or id(leaf) in own or hasattr(leaf, _INSIDE):
                continue  # the latter: keys and values of another cut module, which are this rank's own
            if isinstance(leaf, FlatParameter):
                raise PlanError(
                    f"{self.name} ({type(module).__name__}) was cut, and FullyShardedDataParallel (FSDP1) holds its "
                    "parameters in one flat one, whose gradient nothing can sum by parts; use fully_shard (FSDP2)"
                )
            if leaf.requires_grad:
                raise PlanError(
                    f"{self.name} ({type(module).__name__}) reads a tensor that requires a gradient (made of a leaf of "
                    f"shape {list(leaf.shape)} outside of it) by another way than its arguments, so that its gradient "
                    "would lack the other ranks' part; hand it to forward as a tensor, or in a tuple, list, dict or "
                    "dataclass"
                )
