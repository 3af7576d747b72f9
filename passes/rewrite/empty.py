"""A result that an operator fills: memory with nothing in it, made in the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tpfuse._torch_private import new_fake_like

from ..facts import aten_ops as ops
from ..facts.graph import carry_meta, insert_call


def empty(graph: fx.Graph, sizes: Any, fake: torch.Tensor, like: fx.Node) -> fx.Node:
    """`sizes`: a sequence of numbers, or of (node, dimension) where that node's is meant."""
    size = [
        each if isinstance(each, int) else insert_call(graph, ops.aten.sym_size.int, each, like=like) for each in sizes
    ]
    options: dict[str, Any] = {"dtype": fake.dtype, "device": fake.device, "pin_memory": False}
    node = graph.call_function(ops.aten.empty.memory_format, (size,), options)
    carry_meta(like, node)
    node.meta["val"] = new_fake_like(fake)
    return node
