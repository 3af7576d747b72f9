"""overlap_all_reduce_norm: the product in front of a boundary that is made by copies becomes a part of the operation.

    x = mm(a, b) [-> view];  y, h = all_reduce_norm(x, ...)   becomes   product_all_reduce_norm([a, b], "mm", y, ...)

so that rows of the sum can travel while later rows are multiplied (tpfuse/product_ops.py), where the rewrite is named.
Decided when the graph is split and lowered, for products that nobody else reads and whose rows depend on no others:
`_TAKEN` says which, and sum_of_products.py which sums of them. What a rank sends does not depend on it, but on the name
and the size: another rank's graph may differ here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tpfuse._torch_private import group_size, products_are_tuned
from tpfuse.product_ops import FROM_BYTES, RANKS

from ..facts import aten_ops as ops
from ..facts.graph import argument, is_call, same_size, val, value
from .sum_of_products import RESHAPES, find_sum

#: Not float4: a byte holds two numbers of it, and its scales are of blocks.
_FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}


@dataclass(frozen=True)
class Product:
    """A product, or a sum of some. nodes: it, and the views through which the boundary alone reads it, in the graph's
    order. word, factors: as `product_ops.PRODUCTS` has them."""

    nodes: tuple[fx.Node, ...]
    word: str
    factors: tuple[fx.Node, ...]

    @property
    def arguments(self) -> dict[str, Any]:
        """What the operator is told of it."""
        return {"factors": list(self.factors), "product": self.word}

    def erase(self, graph: fx.Graph) -> None:
        """Once the boundary reads the factors."""
        for node in reversed(self.nodes):
            graph.erase_node(node)


def find_product(operands: Mapping[str, fx.Node | None], group_name: str) -> Product | None:
    """The product whose rows a boundary with these operands may take one part after the other; None where x is none,
    anything else reads it (the boundary itself as its residual, too), it is surely too small, another kernel runs, or
    the compiler chooses among products by trying them."""
    x = operands["x"]
    fake = value(x)
    if x is None or fake is None or group_size(group_name) != RANKS:
        return None
    if any(t is x for name, t in operands.items() if name != "x") or products_are_tuned():
        return None
    size = fake.numel() * fake.element_size()
    if isinstance(size, int) and size < FROM_BYTES:
        return None
    if (one := _find_one(x)) is not None:
        return one
    found = find_sum(x)
    return Product(found.nodes, "mms", found.factors) if found is not None else None


def _find_one(x: fx.Node) -> Product | None:
    node, nodes = x, [x]
    while node.target in RESHAPES and len(node.users) == 1 and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        nodes.append(node)
    rows = value(node)
    if node.target not in _TAKEN or len(node.users) != 1 or rows is None:
        return None
    if any(value(factor) is None for factor in node.all_input_nodes):
        return None
    if not same_size(val(x).shape[-1], rows.shape[-1]):
        return None
    found = _TAKEN[node.target](node)
    return Product(tuple(reversed(nodes)), *found) if found is not None else None


# -- the products that are taken: the word for each and its factors, or None where rows are not surely on their own ----

_Found = tuple[str, tuple[fx.Node, ...]] | None


def _mm(node: fx.Node) -> _Found:
    return "mm", (argument(node, "self"), argument(node, "mat2"))


def _addmm(node: fx.Node) -> _Found:
    """With one bias for all rows."""
    bias, a, b, beta, alpha = (argument(node, name) for name in ("self", "mat1", "mat2", "beta", "alpha"))
    while is_call(bias, ops.SPREADS):
        bias = bias.args[0]
    hidden = val(b).shape[1]
    if beta != 1 or alpha != 1 or not (_has(bias, hidden) or _has(bias, 1, hidden)):
        return None
    return "addmm", (bias, a, b)


def _scaled_mm(node: fx.Node) -> _Found:
    """Of float8 with one scale, or one for each row and column; not of blocks."""
    a, b, scale_a, scale_b, bias, scale_result, fast = (argument(node, name) for name in _OF_SCALED_MM)
    left, right = val(a), val(b)
    rows, hidden = left.shape[0], right.shape[1]
    ours = {left.dtype, right.dtype} <= _FLOAT8 and val(scale_a).dtype == val(scale_b).dtype == torch.float32
    if not ours or scale_result is not None or not (bias is None or _has(bias, hidden)):
        return None
    by_rows = _has(scale_a, rows, 1) and _has(scale_b, 1, hidden)
    if not by_rows and not all(_has(scale, *[1] * val(scale).dim()) for scale in (scale_a, scale_b)):
        return None
    if not same_size(left.stride(1), 1) or not same_size(right.stride(0), 1):
        return None
    return "scaled_mm, fast" if fast else "scaled_mm", (a, b, scale_a, scale_b, *([] if bias is None else [bias]))


def _has(node: object, *shape: Any) -> bool:
    """Whether it surely has this shape."""
    fake = value(node)
    return fake is not None and fake.dim() == len(shape) and all(map(same_size, fake.shape, shape))


_OF_SCALED_MM = ("self", "mat2", "scale_a", "scale_b", "bias", "scale_result", "use_fast_accum")
_TAKEN: dict[Any, Callable[[fx.Node], _Found]] = {
    ops.aten.mm.default: _mm,
    ops.aten.addmm.default: _addmm,
    ops.aten._scaled_mm.default: _scaled_mm,
}
