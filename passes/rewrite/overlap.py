"""overlap_all_reduce_norm: the product in front of an all-reduce and norm becomes a part of the operation.

    x = mm(a, b) [-> view];  y, h = all_reduce_norm(x, ...)      becomes      product_all_reduce_norm(a, b, y, ...)

so that rows of the sum can travel while later rows are multiplied (tpfuse/product_ops.py), where the rewrite is named.
Decided when the graph is split and lowered, for products that nobody else reads. What a rank sends does not depend on
it, but on the name and the size: another rank's graph may differ here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from tpfuse._torch_private import group_size, products_are_tuned
from tpfuse.product_ops import FROM_BYTES, RANKS

from ..facts import aten_ops as ops
from ..facts.graph import same_size, value

_RESHAPES = (ops.aten.view.default, ops.aten.reshape.default, ops.aten._unsafe_view.default)


@dataclass(frozen=True)
class Product:
    """`mm`, and the views (innermost first) through which the boundary alone reads it."""

    mm: fx.Node
    views: tuple[fx.Node, ...]

    @property
    def factors(self) -> dict[str, fx.Node]:
        a, b = self.mm.args[:2]
        assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
        return {"a": a, "b": b}

    def erase(self, graph: fx.Graph) -> None:
        """Once the boundary reads the factors."""
        for node in (*reversed(self.views), self.mm):
            graph.erase_node(node)


def find_product(operands: Mapping[str, fx.Node | None], group_name: str) -> Product | None:
    """The product whose rows a boundary with these operands may take one part after the other; None where x is none,
    anything else reads it (the boundary itself as its residual, too), it is surely too small, another kernel runs, or
    the compiler chooses among products by trying them."""
    x = operands["x"]
    if x is None or group_size(group_name) != RANKS or any(t is x for name, t in operands.items() if name != "x"):
        return None
    node, views = x, list[fx.Node]()
    while node.target in _RESHAPES and len(node.users) == 1 and isinstance(node.args[0], fx.Node):
        views.append(node)
        node = node.args[0]
    fake, rows = value(x), value(node)
    if node.target is not ops.aten.mm.default or len(node.users) != 1 or fake is None or rows is None:
        return None
    if not same_size(fake.shape[-1], rows.shape[-1]) or products_are_tuned():
        return None
    size = fake.numel() * fake.element_size()
    if isinstance(size, int) and size < FROM_BYTES:
        return None
    return Product(node, tuple(reversed(views)))
