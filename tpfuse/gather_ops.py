"""An operation on a rank's own rows and the gather of what it gives, one functional operation each.

    tpfuse::rows_norm_gather                       [*the results of rows_norm, y of all ranks]
    tpfuse::reduce_scatter_norm_gather             [*the results of reduce_scatter_norm, y of all ranks]
    tpfuse::reduce_scatter_norm_backward_gather    [*the results of reduce_scatter_norm_backward, dx of all ranks]

Arguments are those of the operation without the gather, and `swap`: b, where own rows are [a, b, H] and gathered as
[b, a, H]. y or dx: [own rows, H]; of all ranks: [ranks * own rows, H], in the order of the ranks. Only training graphs
hold these operators, and on every device they are the functional collectives of the program, in its order: a compiled
graph holds those (passes/rewrite/take_apart.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backward_ops, ops
from ._torch_private import group_size, register_local_tensor_rule

_LIBRARY = torch.library.Library("tpfuse", "FRAGMENT")
_c10d = torch.ops._c10d_functional


def _define(name: str, arguments: str) -> None:
    operator = getattr(torch.ops.tpfuse, name).default

    def run(*operands: Tensor | None, swap: int | None = None, **options: Any) -> list[Tensor]:
        made = operator(*operands, **options)
        group_name = options["group_name"]
        rows = made[0]
        if swap:
            rows = rows.view(-1, swap, rows.shape[-1]).transpose(0, 1).reshape(rows.shape)
        pending = _c10d.all_gather_into_tensor(rows, group_size(group_name), group_name)
        return [*made, _c10d.wait_tensor(pending)]

    def fake(*operands: Tensor | None, swap: Any = None, **options: Any) -> list[Tensor]:
        made = operator(*operands, **options)
        rows, hidden = made[0].shape
        return [*made, made[0].new_empty((rows * group_size(options["group_name"]), hidden))]

    full_name = f"tpfuse::{name}_gather"
    arguments = arguments.replace(") -> Tensor[]", ", SymInt? swap=None) -> Tensor[]")
    _LIBRARY.define(f"{name}_gather{arguments}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(f"{name}_gather", run, "CompositeExplicitAutograd")
    torch.library.register_fake(full_name, fake, lib=_LIBRARY)
    register_local_tensor_rule(full_name, run)


_define("rows_norm", ops.ARGUMENTS)
_define("reduce_scatter_norm", ops.ARGUMENTS)
_define("reduce_scatter_norm_backward", backward_ops.ARGUMENTS)
