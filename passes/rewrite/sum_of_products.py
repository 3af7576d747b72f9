"""The products that a value is the sum of, where each may be added to the sum of those in front of it.

    x = mm(a1, b1) + mm(a2, b2) + ...     the gradients of q, k and v; attention and MLP that run in parallel

Additions are `add` or, as Inductor writes some, `addmm` of the sum so far; views and casts may stand anywhere, as long
as products, and x, are of one type. Every value of it is read once, and x by whoever asks.

Computed one after the other (product_ops.py), the sum so far is rounded once for each product. A graph rounds every
product and some of the sums; altogether it must round as much. A rounding of a sum of n products counts n: where
products are of one size, that is its part in the square of x's error. In float16 no sum may come about that the graph
has not: it may be infinite where x is finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..facts import aten_ops as ops
from ..facts.graph import argument, input_node, same_shape, same_size, val, value

RESHAPES = (ops.aten.view.default, ops.aten.reshape.default, ops.aten._unsafe_view.default)
#: Of one value, which they keep as it is but for its shape or its type.
_OF_ONE = (*RESHAPES, ops.prims.convert_element_type.default)
_MM, _ADDMM = ops.aten.mm.default, ops.aten.addmm.default


@dataclass(frozen=True)
class Sum:
    """nodes: all that is x's alone, in the graph's order. factors: [a1, b1, a2, b2, ...]."""

    nodes: tuple[fx.Node, ...]
    factors: tuple[fx.Node, ...]


def find_sum(x: fx.Node) -> Sum | None:
    """What `x` is the sum of; None where it is something else."""
    tree = _tree(x)
    if tree is None:
        return None
    dtype, nodes = val(x).dtype, tuple(sorted(tree))
    products_of: dict[fx.Node, tuple[fx.Node, ...]] = {}
    rounded = []
    for node in nodes:
        parts = tree[node]
        made = sum(sorted((products_of[part] for part in parts), key=len, reverse=True), ())
        products_of[node] = made if node.target not in (_MM, _ADDMM) else (*made, node)
        if val(node).dtype == dtype and not (node.target in _OF_ONE and val(parts[0]).dtype == dtype):
            rounded.append(frozenset(products_of[node]))
    products = products_of[x]
    ours = [frozenset(products[:count]) for count in range(1, len(products) + 1)]
    if sum(map(len, ours)) > sum(map(len, rounded)):
        return None
    if dtype == torch.float16 and not set(ours[1:]) <= set(rounded):
        return None
    factors = tuple(factor for product in products for factor in _factors(product))
    if any(value(factor) is None or factor in tree for factor in factors):
        return None
    return Sum(nodes, factors)


def _tree(x: fx.Node) -> dict[fx.Node, tuple[fx.Node, ...]] | None:
    """All nodes of the sum, and what of it each is made of; None where it is made of anything but products as large as
    x, or has another reader."""
    found: dict[fx.Node, tuple[fx.Node, ...]] = {}
    stack = [x]
    while stack:
        node = stack.pop()
        parts = _parts(node, val(x)) if value(node) is not None else None
        if parts is None or node in found or len(node.users) != 1:
            return None
        found[node] = parts
        stack.extend(reversed(parts))
    return found


def _parts(node: fx.Node, x: torch.Tensor) -> tuple[fx.Node, ...] | None:
    """Of one node. Sizes that nobody can tell apart for certain are none: nothing is spread over others."""
    fake, parts = val(node), tuple[Any, ...]()
    if node.target in _OF_ONE:
        parts = (input_node(node),)
    elif node.target is ops.aten.add.Tensor and argument(node, "alpha") == 1:
        parts = argument(node, "self"), argument(node, "other")
    elif node.target is _ADDMM and argument(node, "alpha") == argument(node, "beta") == 1:
        parts = (argument(node, "self"),)
    elif node.target is not _MM:
        return None
    if node.target in (_MM, _ADDMM) and not (fake.dtype == x.dtype and same_size(fake.shape[-1], x.shape[-1])):
        return None
    if node.target not in _OF_ONE and not all(same_shape(part, node) for part in parts):
        return None
    return parts if fake.dtype == x.dtype or _is_wider(fake.dtype, x.dtype) else None


def _is_wider(dtype: torch.dtype, than: torch.dtype) -> bool:
    """Whether a number of the one type is also one of the other."""
    return {dtype, than} <= set(ops.FLOATS) and torch.finfo(dtype).bits > torch.finfo(than).bits


def _factors(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    return argument(product, "self" if product.target is _MM else "mat1"), argument(product, "mat2")
