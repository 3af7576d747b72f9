"""Whether the padding of own rows can be seen. Reads only.

Rows are cut into ceil(rows / n) each, and the last ranks' are padded: with zeros where a cut is written, with whatever
a norm makes of zeros where a stage works on own rows. A block that works row by row, up to the gather whose padding is
dropped, cannot tell the difference; any other block is given zeros again.
"""

from __future__ import annotations

import torch
from torch import fx

from ..facts import aten_ops as ops
from ..facts.collectives import is_collective
from ..facts.graph import argument, is_call, last_dim, same_size, val, value
from .streams import TRIM_ROWS, calls, flat_rows

aten = ops.aten

#: Products of rows with a matrix: the position of the rows.
_PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1, aten.linear.default: 0, aten.matmul.default: 0}
#: Cut one dimension into parts, or take one of them.
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor}


def padding_is_dropped(rows: fx.Node) -> bool:
    """Whether everything that reads `rows` works row by row, and drops the padding once the rows are gathered."""
    pending, seen = [rows], {rows}
    while pending:
        node = pending.pop()
        for user in node.users:
            if user in seen or user.target is aten.sym_size.int:
                continue
            seen.add(user)
            if is_collective(user):
                if "all_gather" not in str(user.target) or not all(_is_trimmed(wait) for wait in user.users):
                    return False
            elif _works_row_by_row(user, node):
                pending.append(user)
            else:
                return False
    return True


def _is_trimmed(wait: fx.Node) -> bool:
    return all(calls(user, TRIM_ROWS) or user.target is aten.sym_size.int for user in wait.users)


def _works_row_by_row(user: fx.Node, node: fx.Node) -> bool:
    if user.op != "call_function":
        return False
    if user.target in _SPLITS:
        dims = val(node).dim()
        return dims > 1 and argument(user, "dim", 0) in (-1, dims - 1)
    if user.target is ops.operator.getitem:
        return True
    if value(user) is None or value(node) is None or not same_size(flat_rows(user), flat_rows(node)):
        return False
    if user.target in _PRODUCTS:
        position = _PRODUCTS[user.target]
        return [at for at, arg in enumerate(user.args) if arg is node] == [position]
    if is_call(user, ops.VIEWS - ops.REORDERINGS):
        return same_size(last_dim(user), last_dim(node))
    return is_call(user, ops.CASTS) or torch.Tag.pointwise in getattr(user.target, "tags", ())
