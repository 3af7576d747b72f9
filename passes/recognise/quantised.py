"""Quantisations of a normed value: which steps lead from y to a row of FP8 or INT8 and its scale. Reads only.

Behind the normed value every value that is made of it alone, by steps that `tpfuse.quantisation` knows, is numbered:
equal steps get one number, so chains that a framework writes once for every product are one here. A quantisation is a
number with a quantised dtype that depends on a maximum over the row (or over groups of its columns).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from tpfuse.quantisation import GROUPS, QUANTISED, Quantisation, QuantStep

from ..facts import aten_ops as ops
from ..facts.graph import argument, is_number, same_size, value
from .quantisers import part_of, quantised_rows, quantiser_of

aten = ops.aten
_FP = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_UNARY = {
    aten.abs.default: "abs",
    aten.neg.default: "neg",
    aten.reciprocal.default: "reciprocal",
    aten.round.default: "round",
    aten.floor.default: "floor",
    aten.ceil.default: "ceil",
    aten.log2.default: "log2",
    aten.exp2.default: "exp2",
}
_BINARY = {
    **dict.fromkeys(ops.MULS, "mul"),
    **dict.fromkeys(ops.DIVS, "div"),
    **dict.fromkeys(ops.ADDS, "add"),
    aten.maximum.default: "max",
    aten.minimum.default: "min",
    aten.clamp_min.default: "max",
    aten.clamp_max.default: "min",
    aten.clamp_min.Tensor: "max",
    aten.clamp_max.Tensor: "min",
}
_REDUCTIONS = {aten.amax.default: "amax", aten.amin.default: "amin"}
_RESHAPES = ops.VIEWS - ops.REORDERINGS
SECOND = "a second quantisation of one normed value stays behind it, since a boundary hands out one"
SYMBOLIC = "the quantised rows are viewed in sizes that only the graph knows"


@dataclass(frozen=True)
class Known:
    """What a node is: value `number` of the normed value's steps, of every element (`elements`) or of every scale;
    `group`: how many columns share one, 0 for the row, None where nothing told yet."""

    number: int
    elements: bool
    group: int | None


@dataclass
class _Numbers:
    """Values by number; equal steps have one."""

    steps: list[QuantStep] = field(default_factory=list)
    _known: dict[tuple[QuantStep, int], int] = field(default_factory=dict)

    def of(self, step: QuantStep, group: int = 0) -> int:
        """The number of a step; `group`: of a reduction, over how many columns."""
        if (step, group) not in self._known:
            self.steps.append(step)
            self._known[step, group] = len(self.steps)
        return self._known[step, group]

    def needed(self, *roots: int) -> list[int]:
        """The numbers that these are made of, themselves among them, in order."""
        found: set[int] = set()
        open_ = [root for root in roots if root]
        while open_:
            number = open_.pop()
            if number not in found:
                found.add(number)
                open_ += [arg for arg in self.steps[number - 1].args if isinstance(arg, int) and arg]
        return sorted(found)


@dataclass(frozen=True)
class Quantised:
    """A quantisation behind the normed value `y`. `q`, `scale`: the nodes that are it. `left`: why something beside it
    stays, or nothing."""

    y: fx.Node
    how: Quantisation
    q: tuple[fx.Node, ...]
    scale: tuple[fx.Node, ...]
    left: str = ""


def find_quantised(y: fx.Node) -> Quantised | None:
    """The quantisation behind `y`, a normed value [..., H]; None where there is none."""
    numbers = _Numbers()
    known = _numbered(y, numbers)
    by_number: dict[int, list[fx.Node]] = {}
    for node, what in known.items():
        if node.target not in _RESHAPES and node is not y:
            by_number.setdefault(what.number, []).append(node)
    quantised = [
        number
        for number, nodes in by_number.items()
        if known[nodes[0]].elements and numbers.steps[number - 1].dtype in QUANTISED and _reduces(numbers, number)
    ]
    for q in quantised:
        group = known[by_number[q][0]].group
        dead = _dead(known, set(by_number[q]))
        rows = [
            number
            for number in numbers.needed(q) + [n for n in by_number if n not in numbers.needed(q)]
            if number in by_number
            and not known[by_number[number][0]].elements
            and known[by_number[number][0]].group == group
            and numbers.steps[number - 1].dtype in _FP
        ]
        alive = [number for number in rows if any(node not in dead for node in by_number[number])]
        scale = _handed_out(known, by_number, numbers, q, alive, rows)
        if scale is None or group is None:
            continue
        order = numbers.needed(q, scale)
        renamed = {0: 0, **{number: i + 1 for i, number in enumerate(order)}}
        steps = tuple(
            QuantStep(s.op, tuple(renamed[a] if isinstance(a, int) else a for a in s.args), s.dtype)
            for s in (numbers.steps[number - 1] for number in order)
        )
        how = Quantisation(steps, renamed[q], renamed[scale], group)
        left = SECOND if len(quantised) > 1 else ""
        return Quantised(y, how, tuple(by_number[q]), tuple(by_number[scale]), left)
    return None


def _handed_out(
    known: dict[fx.Node, Known], by_number: dict[int, list[fx.Node]], numbers: _Numbers, q: int, alive: list[int],
    rows: list[int],
) -> int | None:  # fmt: skip
    """The scale to hand out: the last one from which all others that are read can be made, so that no maximum over a
    row is left; one that q is made of where none is read."""
    for scale in sorted(alive, key=lambda n: (len(numbers.needed(n)), n), reverse=True):
        dead = _dead(known, {*by_number[q], *by_number[scale]})
        maxima = [node for node, what in known.items() if numbers.steps[what.number - 1].op in ("amax", "amin")]
        if all(node in dead for node in maxima if known[node].number):
            return scale
    if alive:
        own = [number for number in alive if number in numbers.needed(q)]
        return own[-1] if own else None
    own = [number for number in rows if number in numbers.needed(q)]
    return own[-1] if own else None


def _dead(known: dict[fx.Node, Known], replaced: set[fx.Node]) -> set[fx.Node]:
    """The numbered nodes that nobody reads any more once `replaced` are."""
    dead = set(replaced)
    for node in reversed(list(known)):
        if node not in dead and known[node].number and all(user in dead for user in node.users):
            dead.add(node)
    return dead


def _reduces(numbers: _Numbers, number: int) -> bool:
    return any(numbers.steps[n - 1].op in ("amax", "amin") for n in numbers.needed(number))


# -- numbering --------------------------------------------------------------------------------------------------------


def _numbered(y: fx.Node, numbers: _Numbers) -> dict[fx.Node, Known]:
    """Every node that is made of `y` alone by known steps, in graph order."""
    known: dict[fx.Node, Known] = {y: Known(0, True, None)}
    shape = value(y)
    if shape is None or not isinstance(shape.shape[-1], int):
        return known
    for node in _behind(y):
        found = _number(node, known, numbers, shape.shape[-1])
        if found is not None:
            known[node] = found
    return known


def _behind(y: fx.Node) -> Iterator[fx.Node]:
    """What may be made of `y`, in graph order: readers of readers, through element-wise steps."""
    reached = {y}
    node = y.next
    while node.op != "root":
        known = node.op == "call_function" and (node.target in _RESHAPES or node.target in _KNOWN_TARGETS)
        if (known or quantiser_of(node) is not None) and any(parent in reached for parent in node.all_input_nodes):
            reached.add(node)
            yield node
        node = node.next


_KNOWN_TARGETS = {
    *_UNARY, *_BINARY, *_REDUCTIONS, *ops.CASTS, aten.clamp.default, aten.max.dim, ops.operator.getitem,
}  # fmt: skip


def _number(node: fx.Node, known: dict[fx.Node, Known], numbers: _Numbers, hidden: int) -> Known | None:
    target, result = node.target, value(node)
    first = node.args[0] if node.args else None
    source = known.get(first) if isinstance(first, fx.Node) else None
    if target is ops.operator.getitem:  # of a maximum with its places, or of an operator that quantises
        if isinstance(first, fx.Node) and quantiser_of(first) is not None:
            return _by_operator(node, first, known, numbers, hidden)
        if not isinstance(first, fx.Node) or first.target is not aten.max.dim or node.args[1] != 0:
            return None
        return _reduced("amax", first, known, numbers, hidden, node)
    if result is None or target is aten.max.dim:
        return None
    if target in _RESHAPES:
        return None if source is None else _viewed(node, source, result, hidden)
    if target in _REDUCTIONS:
        dims = argument(node, "dim", [])
        if len(dims) != 1 or (dims[0] + _dim(first)) % max(_dim(first), 1) != _dim(first) - 1:
            return None
        return _reduced(_REDUCTIONS[target], node, known, numbers, hidden, node)
    if target in ops.CASTS:
        if source is None or result.dtype not in (*_FP, *QUANTISED):
            return None
        before = value(first)
        if before is not None and before.dtype == result.dtype:
            return source
        return Known(numbers.of(QuantStep("to", (source.number,), result.dtype)), source.elements, source.group)
    if target in _UNARY:
        if source is None or len(node.args) > 1 or result.dtype not in _FP:
            return None
        step = QuantStep(_UNARY[target], (source.number,), result.dtype)
        return Known(numbers.of(step), source.elements, source.group)
    if target is aten.clamp.default:
        low, high = argument(node, "min"), argument(node, "max")
        if source is None or result.dtype not in _FP:
            return None
        for op, limit in (("max", low), ("min", high)):
            if limit is None:
                continue
            if not is_number(limit):
                return None
            step = QuantStep(op, (source.number, _as(limit, result.dtype)), result.dtype)
            source = Known(numbers.of(step), source.elements, source.group)
        return source
    if target in _BINARY and len(node.args) == 2 and not node.kwargs:
        return _of_two(node, known, numbers, result)
    return None


def _of_two(node: fx.Node, known: dict[fx.Node, Known], numbers: _Numbers, result: torch.Tensor) -> Known | None:
    if result.dtype not in _FP:
        return None
    op = _BINARY[node.target]
    sides: list[int | float] = []
    found: list[tuple[Known, torch.Tensor]] = []
    for side in node.args:
        what = known.get(side) if isinstance(side, fx.Node) else None
        if what is not None:
            seen = value(side)
            assert seen is not None
            if seen.dtype not in _FP:
                return None
            sides.append(what.number)
            found.append((what, seen))
            continue
        constant = _constant(side)
        if constant is None:
            return None
        if isinstance(side, fx.Node) and not _fits_into(value(side), result):
            return None
        sides.append(_as(constant, result.dtype) if op in ("max", "min") else float(constant))
    if not found:
        return None
    groups = {what.group for what, _ in found if what.group is not None}
    if len(groups) > 1:
        return None
    if len(found) == 2 and found[0][0].elements != found[1][0].elements:
        (_, scales), (_, elements) = sorted(found, key=lambda pair: pair[0].elements)
        if not _spread(scales, elements):
            return None
    elif len(found) == 2 and not _same(found[0][1], found[1][1]):
        return None
    elements_too = any(what.elements for what, _ in found)
    step = QuantStep(op, tuple(sides), result.dtype)
    return Known(numbers.of(step), elements_too, groups.pop() if groups else None)


def _reduced(
    op: str, node: fx.Node, known: dict[fx.Node, Known], numbers: _Numbers, hidden: int, out: fx.Node
) -> Known | None:
    source, first, result = known.get(node.args[0]), node.args[0], value(out)  # type: ignore[arg-type]
    if source is None or not source.elements or result is None or result.dtype not in _FP:
        return None
    if node.target is aten.max.dim and (argument(node, "dim") + _dim(first)) % _dim(first) != _dim(first) - 1:
        return None
    given = value(first)
    assert given is not None
    if given.dtype == torch.float64:
        return None  # the kernels look for a maximum in float32
    columns = given.shape[-1]
    group = 0 if columns == hidden else columns
    if group and group not in GROUPS:
        return None
    if source.group not in (None, group):
        return None
    return Known(numbers.of(QuantStep(op, (source.number,), result.dtype), group), False, group)


def _by_operator(
    node: fx.Node, operator: fx.Node, known: dict[fx.Node, Known], numbers: _Numbers, hidden: int
) -> Known | None:
    """One of the results of an operator that quantises rows by itself."""
    rows = quantised_rows(operator)
    source, given = known.get(rows), value(rows)
    if source is None or given is None or not source.elements or source.group or given.shape[-1] != hidden:
        return None
    in_f32 = source.number
    if given.dtype != torch.float32:
        in_f32 = numbers.of(QuantStep("to", (in_f32,), torch.float32))
    part = part_of(node, numbers.of, in_f32)
    return None if part is None else Known(*part, 0)


def _viewed(node: fx.Node, source: Known, result: torch.Tensor, hidden: int) -> Known | None:
    """The same values in another shape, as long as a row's columns stay together."""
    if not source.elements:
        return source
    columns = result.shape[-1] if result.dim() else None
    if columns == hidden or columns in GROUPS:
        return source
    return None


def _constant(side: object) -> float | None:
    """The number that an argument is, or that fills a tensor."""
    if is_number(side):
        return float(side)
    while isinstance(side, fx.Node):
        if side.target in (aten.full.default, aten.full_like.default):
            fill = side.args[1]
            made = value(side)
            return _as(fill, made.dtype) if is_number(fill) and made is not None else None
        if side.target in _RESHAPES or side.target is aten.expand.default or side.target in ops.CASTS:
            made = value(side)
            if side.target in ops.CASTS and (made is None or not _unchanged(side, made.dtype)):
                return None
            side = side.args[0]
            continue
        return None
    return None


def _unchanged(cast: fx.Node, dtype: torch.dtype) -> bool:
    """Whether a cast leaves the number that fills a tensor as it is."""
    number = _constant(cast.args[0])
    return number is not None and _as(number, dtype) == number


def _as(number: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(number, dtype=dtype))


def _fits_into(filled: torch.Tensor | None, result: torch.Tensor) -> bool:
    """Whether a filled tensor adds nothing to the shape of the result."""
    if filled is None or filled.dim() > result.dim():
        return False
    return all(same_size(a, b) or a == 1 for a, b in zip(filled.shape[::-1], result.shape[::-1], strict=False))


def _dim(node: object) -> int:
    seen = value(node)
    return 0 if seen is None else seen.dim()


def _spread(scales: torch.Tensor, elements: torch.Tensor) -> bool:
    """Whether scales [..., 1] are spread over the columns of the elements."""
    if scales.dim() != elements.dim() or scales.shape[-1] != 1:
        return False
    return all(same_size(a, b) for a, b in zip(scales.shape[:-1], elements.shape[:-1], strict=True))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dim() == b.dim() and all(same_size(x, y) for x, y in zip(a.shape, b.shape, strict=True))
