"""What a loss reads of a cut model beside its output: penalties on parameters, and values kept from inside a module.

A hook sums the gradient of a parameter over the ranks that hold parts of it. What a loss reads outside of the module is
no part: each rank that holds the parameter whole gives all of its gradient. Before a backward pass its graph is walked
from the loss, down to where modules paid their sums and no further, which is a few steps a layer:

    reads                                                   its gradient
    a parameter that every rank holds whole                 counted once for each replica's loss, as everywhere
    a cut one, element by element and then summed           likewise; each rank has that of its slice
    a cut one otherwise (a norm, a mean, a product)         refused: a slice does not tell what the whole would give
    a value from inside a module, of its slices, summed     right: the ranks' parts add up
    any other value from inside a module                    refused: it would be counted once for each rank
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch.nn as nn
from torch import Tensor

from tpfuse._torch_private import backward_task, before_backward
from tpfuse.errors import PlanError
from tpfuse.parallel.mesh import Groups
from tpfuse.parallel.paths import ENTRY, EXITS, OWN_ROWS
from tpfuse.parallel.places import Place

log = logging.getLogger(__name__)

#: On parameters of cut modules.
_READ = "_tpfuse_read"
#: A graph larger than this is no cut model's that ends where sums are paid; the rest of it is not looked at.
_MOST = 20_000
#: What hides the graph of a model in one node.
_OPAQUE = ("CompiledFunctionBackward", "CheckpointFunctionBackward")
_LINEAR = {"Sum", "Add", "Sub", "Rsub", "Neg", "ToCopy", "View", "UnsafeView", "Reshape", "ReshapeAlias", "Cat",
           "Stack", "Squeeze", "Unsqueeze", "Expand", "Clone", "Alias", "T", "Transpose", "Permute"}  # fmt: skip
_BY_ELEMENT = {"Pow", "Abs", "Mul", "Div", "Exp", "Log", "Log1P", "Sqrt", "Tanh", "Sigmoid", "Relu", "Square", "Clamp",
               "ClampMin", "ClampMax", "Where", "Gelu", "Silu", "Softplus", "Huber"}  # fmt: skip
#: How the path from the loss has come: linear so far; linear, over a sum; then element by element; otherwise.
_PLAIN, _SUMMED, _ELEMENTS, _OTHER = range(4)


@dataclass(frozen=True)
class Read:
    """A parameter of a cut module, and by how much what a loss reads of it counts beside what the hook sums; None where
    its parts differ."""

    place: Place
    factor: float | None


def watch_losses(model: nn.Module, places: Iterable[Place], owed: Any, groups: Groups) -> None:
    """Marks the parameters of cut modules, and lets backward passes look for them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for place in places:
        if place.ranks > 1 and place.name in parameters and place.name in owed:  # the first of its names
            setattr(parameters[place.name], _READ, Read(place, _factor(place, owed[place.name], groups)))
    before_backward(_look)


def _factor(place: Place, owed: str, groups: Groups) -> float | None:
    cut = place.cut
    if cut is not None and not cut.disjoint:
        return cut.counts[0] / cut.size if len(set(cut.counts)) == 1 else None
    return groups.dp.size / (groups.of(owed).size if owed else 1)


def _look(roots: Iterable[Any]) -> None:
    """Before a backward pass from these tensors. Nothing is communicated: every rank's loss has the same graph.

    Raises:
        PlanError: for what this rank's slices cannot give a gradient of.
    """
    if backward_task() >= 0:
        return  # a pass inside of another one (a checkpoint that is computed again) has its own ends
    start = [t.grad_fn for t in roots if isinstance(t, Tensor) and t.grad_fn is not None]
    if _finds(start):
        _judge(start)


def _next(node: Any) -> Iterator[tuple[int, Any]]:
    if node.name() in EXITS or node.name().startswith(_OPAQUE) or _enters(node):
        return
    for at, (one, _) in enumerate(node.next_functions):
        if one is not None:
            yield at, one


def _enters(node: Any) -> bool:
    """Whether a node brings something into a cut module; own rows that a module gives back are cut evenly."""
    return node.name() == ENTRY or (node.name() == OWN_ROWS and getattr(node, "rows", None) is not None)


def _read_of(node: Any) -> Read | None:
    return getattr(getattr(node, "variable", None), _READ, None)


def _finds(start: list[Any]) -> bool:
    seen: set[Any] = set()
    waiting = list(start)
    while waiting and len(seen) < _MOST:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if _enters(node) or _read_of(node) is not None:
            return True
        waiting.extend(one for _, one in _next(node))
    if waiting:
        _say_how_far()
    return False


@cache
def _say_how_far() -> None:
    log.warning(
        "a backward pass has more than %d steps outside of cut modules: what its loss reads of their weights beyond "
        "these (penalties, values kept from inside) is not looked for", _MOST,
    )  # fmt: skip


def _judge(start: list[Any]) -> None:
    seen: set[tuple[Any, int]] = set()
    waiting = [(node, _PLAIN) for node in start]
    scaled: dict[Any, dict[int, float]] = {}
    while waiting and len(seen) < _MOST:
        node, came = waiting.pop()
        if (node, came) in seen:
            continue
        seen.add((node, came))
        way = _after(node, came)
        if way == _OTHER and came != _OTHER and (inner := _inner(node)) is not None:
            _judge_inner(inner, came in (_SUMMED, _ELEMENTS))
            continue
        for at, one in _next(node):
            if _enters(one):
                raise PlanError(_left(None))
            read = _read_of(one)
            if read is not None and any(other.name() in EXITS for _, other in _next(node)):
                continue  # the bias of a row-wise projection, which is added to the whole sum
            if read is None:
                waiting.append((one, way))
                continue
            if (inner := _inner(node)) is not None:
                _judge_inner(inner, way in (_SUMMED, _ELEMENTS))
                continue
            if read.factor is None or (read.place.cut is not None and way not in (_SUMMED, _ELEMENTS)):
                raise PlanError(_no_part(read.place))
            scaled.setdefault(node, {})[at] = read.factor
    for node, factors in scaled.items():
        if any(factor != 1 for factor in factors.values()) and not node.metadata.get(_READ):
            node.metadata[_READ] = True  # a graph that is kept is walked again
            node.register_hook(_scaling(factors))


def _after(node: Any, way: int) -> int:
    """The way of what a node takes, from that of what it gives."""
    kind = node.name().rstrip("0123456789").removesuffix("Backward")
    taken = sum(1 for one, _ in node.next_functions if one is not None)
    if kind == "MseLoss" and getattr(node, "_saved_reduction", None) == 2:
        return _ELEMENTS if way in (_PLAIN, _SUMMED) else _OTHER
    if kind in ("Mul", "Div") and taken == 1 and way in (_PLAIN, _SUMMED):
        return way  # by what has no gradient
    if kind in _LINEAR and way in (_PLAIN, _SUMMED):
        return _SUMMED if kind == "Sum" else way
    if way in (_SUMMED, _ELEMENTS) and (kind in _BY_ELEMENT or (kind in _LINEAR and kind != "Sum")):
        return _ELEMENTS
    return _OTHER


@dataclass(frozen=True)
class _Inner:
    """A value that was made inside a cut module: a parameter it was made of, and whether one of them is cut."""

    place: Place | None
    own: bool


def _inner(node: Any) -> _Inner | None:
    seen: set[Any] = set()
    waiting, entered, found, own = [node], False, None, False
    while waiting and len(seen) < _MOST:
        at = waiting.pop()
        if at in seen:
            continue
        seen.add(at)
        entered |= _enters(at)
        if (read := _read_of(at)) is not None:
            found, own = read.place, own or read.place.cut is not None
        waiting.extend(one for _, one in _next(at))
    return _Inner(found, own) if entered else None


def _judge_inner(inner: _Inner, summed: bool) -> None:
    if not (inner.own and summed):
        raise PlanError(_left(inner))


def _scaling(factors: dict[int, float]) -> Any:
    def hook(inputs: tuple, outputs: tuple) -> tuple:
        return tuple(g if g is None or at not in factors else g * factors[at] for at, g in enumerate(inputs))

    return hook


def _no_part(place: Place) -> str:
    return (
        f"the loss reads {place.name} outside of {place.site or 'the model'}, which parallelize cut over {place.ranks} "
        "ranks, and in another way than summing what is computed element by element (a norm, a mean, a product): from "
        "its slice a rank cannot tell the gradient. Allowed: parameter.pow(2).sum(), .abs().sum() and the like; for "
        "decay give the optimizer weight_decay; or add the gradient to the parameter's .grad after backward()"
    )


def _left(inner: _Inner | None) -> str:
    place = None if inner is None else inner.place
    where = "a cut module" if place is None else f"{place.site or 'the model'}, which parallelize cut"
    if inner is not None and inner.own and place is not None:
        return (
            f"the loss reads a value from inside {where}, made of this rank's slice of {place.name}, and in another "
            f"way than summing it: a mean or a norm of a slice is not that of the whole over {place.ranks} ranks. Sum "
            "it (and divide by the count in the uncut model), or use .detach()"
        )
    return (
        f"the loss reads a value from inside {where} that left it by another way than its output (an attribute, a "
        "hook that was registered after parallelize): its gradient would be counted once for each rank. Return it from "
        "the module's forward, in a tuple behind its output (with dp_size=1, or moe_dense_tp_size=attn_tp_size for an "
        "MLP), take it outside of the module, or use .detach()"
    )
