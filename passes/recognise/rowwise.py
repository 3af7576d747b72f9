"""What operators compute of rows, tried out on a few rows of random numbers in float64. Reads only.

A norm's backward is written in many ways, and all of them are one rational function of a row: of the incoming gradient,
the hidden states, the weight. So spellings are not told apart; a node is evaluated, casts left out, and compared with
the formula. Two different rational functions agree on random numbers with probability zero.

Only operators are evaluated that treat every row alike (`Rows.value`): element by element, over the last dimension,
over all rows. A value is held in one of four shapes, whatever its own: rows [R, H], one number a row [R, 1], one
number a hidden unit [1, H], one number [1, 1].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..facts import aten_ops as ops
from ..facts.graph import argument, is_call, is_float, is_number, same_size, val, value
from .statistics import keeps_order

aten = ops.aten
#: As many rows as tell a row from its neighbours.
ROWS = 3
_DEPTH = 60
_POINTWISE = (
    ops.ADDS
    | ops.SUBS
    | ops.MULS
    | ops.DIVS
    | {aten.neg.default, aten.pow.Tensor_Scalar, aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default}
)
_EXPANDS = {aten.expand.default}
_KEEPS = (ops.VIEWS - ops.REORDERINGS) | ops.CASTS
_SHAPES = {"full": (ROWS, 0), "row": (ROWS, 1), "flat": (ROWS, 1), "vector": (1, 0), "one": (1, 1)}


class Rows:
    """Values of one graph over rows of `hidden` units; `leading`: how many rows there are, by the sizes of `like`
    without the last."""

    def __init__(self, like: fx.Node):
        *self.leading, self.hidden = val(like).shape
        self.count: Any = 1
        for size in self.leading:
            self.count = self.count * size
        self.known: dict[fx.Node, Tensor | None] = {}
        self.generator = torch.Generator().manual_seed(0)

    @property
    def problem(self) -> str:
        if not isinstance(self.hidden, int) or self.hidden < 2:
            return "how many hidden units a row has is not known"
        return "there is one row" if same_size(self.count, 1) else ""

    def random(self, node: fx.Node) -> Tensor | None:
        """Take `node` as given, with random numbers; None for what is held in none of the four shapes."""
        kind = self.kind(node)
        if kind is None:
            return None
        numbers = torch.randn(self._shape(kind), generator=self.generator, dtype=torch.float64)
        self.known[node] = numbers
        return numbers

    def kind(self, node: fx.Node) -> str | None:
        """In which shape a node's value is held, and "flat" for one number a row without a dimension of 1."""
        tensor = value(node)
        if tensor is None or tensor.dtype not in ops.FLOATS:
            return None
        sizes = list(tensor.shape)
        rest: Any = 1
        for size in sizes[:-1]:
            rest = rest * size
        alone = all(same_size(size, 1) for size in sizes[:-1])
        if not sizes or (alone and same_size(sizes[-1], 1)):
            return "one"
        if same_size(sizes[-1], self.hidden) and same_size(rest, self.count):
            return "full"
        if same_size(sizes[-1], self.hidden) and alone:
            return "vector"
        if same_size(sizes[-1], 1) and same_size(rest, self.count):
            return "row"
        return "flat" if same_size(rest * sizes[-1], self.count) else None

    def value(self, node: fx.Node, depth: int = _DEPTH) -> Tensor | None:
        """The numbers of `node`; None where it is not computed row by row from what is known."""
        if node not in self.known:
            self.known[node] = None if depth == 0 else self._computed(node, depth - 1)
        return self.known[node]

    def _computed(self, node: fx.Node, depth: int) -> Tensor | None:
        kind = self.kind(node)
        if node.op != "call_function" or kind is None:
            return None
        found = self._operator(node, kind, depth)
        shape = self._shape(kind)
        if found is None or found.shape != shape:
            return None
        return found

    def _operator(self, node: fx.Node, kind: str, depth: int) -> Tensor | None:
        if is_call(node, aten.full.default) and is_number(node.args[1]):
            return torch.full(self._shape(kind), float(node.args[1]), dtype=torch.float64)
        source = node.args[0] if node.args else None
        if is_call(node, _KEEPS | _EXPANDS | ops.REORDERINGS | ops.ROW_SUMS):
            if not isinstance(source, fx.Node) or not is_float(source):
                return None
            given = self.value(source, depth)
            if given is None:
                return None
            if is_call(node, ops.ROW_SUMS):
                return self._summed(node, source, given)
            if is_call(node, _EXPANDS):
                return given.expand(self._shape(kind)) if self.kind(source) != "flat" else None
            if is_call(node, ops.REORDERINGS) and not keeps_order(node):
                return None
            return given
        return self._pointwise(node, depth) if is_call(node, _POINTWISE) else None

    def _pointwise(self, node: fx.Node, depth: int) -> Tensor | None:
        kinds, given = set(), {}
        for parent in node.all_input_nodes:
            numbers = self.value(parent, depth)
            kind = self.kind(parent)
            if numbers is None or kind is None:
                return None
            given[parent] = numbers
            kinds.add(kind)
        if "flat" in kinds and kinds - {"flat", "one"}:
            return None
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), given.__getitem__)
        if any(not isinstance(each, Tensor) and not is_number(each) for each in (*args, *kwargs.values())):
            return None
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _summed(self, node: fx.Node, source: fx.Node, given: Tensor) -> Tensor | None:
        """A sum or a mean over the last dimension, or a sum over all rows."""
        count, dims = val(source).dim(), argument(node, "dim")
        if self.kind(source) != "full" or not isinstance(dims, (list, tuple)):
            return None
        dims = {dim % count for dim in dims}
        mean = is_call(node, aten.mean.dim)
        if dims == {count - 1}:
            return given.mean(-1, keepdim=True) if mean else given.sum(-1, keepdim=True)
        rows = {dim for dim in range(count - 1) if not same_size(val(source).shape[dim], 1)}
        if mean or count - 1 in dims or not rows <= dims:
            return None
        return given.sum(0, keepdim=True)

    def _shape(self, kind: str) -> tuple[int, int]:
        rows, last = _SHAPES[kind]
        return rows, last or self.hidden


__all__ = ["ROWS", "Rows"]
