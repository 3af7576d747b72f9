"""The fused boundary at run time: pick the kernel for this call, or say that there is none.

`all_reduce_add_norm` is what the op layer calls first on each boundary. None means that the caller takes the functional
path (a plain all-reduce, then `add_norm`); `why_not` has the sentence for the report.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._torch_private import process_group
from .add_norm import AddNormOut
from .dispatch import bind, choose
from .groups import why_not, workspace_of
from .operands import Operands

__all__ = ["all_reduce_add_norm", "init_workspace", "why_not"]


def all_reduce_add_norm(
    x: Tensor,
    residual: Tensor | None,
    pre_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | Tensor,
    *,
    group_name: str,
    norm: str,
    weight_offset: float = 0.0,
    alpha: float = 1.0,
    post: bool = False,
    out_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    want_sum: bool = False,
    stats: bool = False,
    batch_invariant: bool = False,
) -> tuple[AddNormOut, Tensor | None] | None:
    """`add_norm` of the sum of every rank's `x`, as one kernel; with `want_sum` also that sum, in the dtype of x.

    x, residual: [..., H], the same shape on every rank of the group; H a multiple of 8 up to 16384; float16, bfloat16
    or float32. All results are bitwise equal on all ranks. None when this group, device, size or dtype cannot use the
    symmetric-memory kernels, on all ranks alike. The group's first call is collective and allocates; later ones do
    neither. `batch_invariant`: a row's result does not depend on how many rows there are.
    """
    if not x.is_cuda:
        return None
    op = Operands(x, residual, pre_bias, weight, bias, eps, norm, out_dtype, residual_dtype, weight_offset, alpha, post,
                  want_sum, stats)  # fmt: skip
    if not op.supported():
        return None
    ws = workspace_of(group_name, x.device)
    if ws is None:
        return None
    device = torch.cuda.get_device_name(x.device)
    entry = choose(device, ws.world, op.hidden, x.element_size(), op.rows)
    launch = bind(entry, op, ws, batch_invariant)
    return None if launch is None else launch.run()


def init_workspace(group: Any, max_rows: int, hidden: int, dtype: torch.dtype) -> bool:
    """Set up the workspace of `group` now (collective), large enough for `max_rows` rows in one shot, so that no later
    call allocates. `group`: a ProcessGroup or its name. False where `why_not` has a reason."""
    name = group if isinstance(group, str) else group.group_name
    members = process_group(name)
    if members is None or why_not(name, "cuda", hidden):
        return False
    need = members.size() * max_rows * hidden * dtype.itemsize
    return workspace_of(name, torch.device("cuda", torch.cuda.current_device()), need) is not None
