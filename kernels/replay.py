"""A call as cheap as can be: find the record of one like it, see that it still holds, launch it on new addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch_private import group_exists, raw_stream
from .records import record_of
from .rendezvous import WORKSPACE_REGISTRY, note_capture
from .symmetric.dispatch import Table, default_table
from .symmetric.operands import Launch, Operands
from .symmetric.workspace import Workspace


class Site:
    """Calls of one group that are alike but for the shape, device, strides and addresses of their tensors: one spec's
    (tpfuse/boundary_spec.py), which says the dtypes and which tensors there are."""

    __slots__ = ("group_name",)

    def __init__(self, group_name: str) -> None:
        self.group_name = group_name

    def again(
        self, x: Tensor, y: Tensor, residual: Tensor | None, weight: Tensor | None, hidden: Tensor | None,
        rstd: Tensor | None = None, bias: Tensor | None = None, mean: Tensor | None = None,
        pre_bias: Tensor | None = None, total: Tensor | None = None, eps_tensor: Tensor | None = None,
    ) -> bool:  # fmt: skip
        """Launch what was launched for a call like this one; False, and nothing is done, where there is no record, or
        what it says may not hold any more, or these tensors lie differently."""
        member = WORKSPACE_REGISTRY.get(self.group_name)
        if member is None:
            return False
        device = x.get_device()
        record = member.records.known.get((self, x.shape, device))
        if (
            record is None
            or record.workspace is not member.workspace
            or record.table is not default_table()
            or not group_exists(member.group())
        ):
            return False
        for word in record.late:
            if word.value:
                return False  # the call as a first one raises
        on_x, on_y = x.data_ptr(), y.data_ptr()
        bits, plain = on_x | on_y, x.is_contiguous() and y.is_contiguous()
        on_residual = on_weight = on_hidden = on_rstd = on_bias = on_mean = on_pre_bias = on_total = on_eps = None
        if residual is not None:
            bits |= (on_residual := residual.data_ptr())
            plain = plain and residual.is_contiguous()
        if weight is not None:
            bits |= (on_weight := weight.data_ptr())
            plain = plain and weight.is_contiguous()
        if hidden is not None:
            bits |= (on_hidden := hidden.data_ptr())
            plain = plain and hidden.is_contiguous()
        if rstd is not None:
            bits |= (on_rstd := rstd.data_ptr())
            plain = plain and rstd.is_contiguous()
        if bias is not None:
            bits |= (on_bias := bias.data_ptr())
            plain = plain and bias.is_contiguous()
        if mean is not None:
            bits |= (on_mean := mean.data_ptr())
            plain = plain and mean.is_contiguous()
        if pre_bias is not None:
            bits |= (on_pre_bias := pre_bias.data_ptr())
            plain = plain and pre_bias.is_contiguous()
        if total is not None:
            bits |= (on_total := total.data_ptr())
            plain = plain and total.is_contiguous()
        if eps_tensor is not None:
            on_eps = eps_tensor.data_ptr()
        if bits & 15 or not plain or (device >= 0 and torch.cuda.current_device() != device):
            return False
        if torch.cuda.is_current_stream_capturing():
            note_capture(record.workspace)
        record.launch(
            on_x, on_residual, on_pre_bias, on_weight, on_bias, on_y, on_hidden, on_total, on_mean, on_rstd, on_eps,
            *record.rest, stream=raw_stream(device),
        )  # fmt: skip
        return True

    def leave(self, launch: Launch, op: Operands, ws: Workspace, table: Table) -> None:
        """Leave a record of a call that was just launched, where it can be launched again and still may."""
        member = WORKSPACE_REGISTRY.get(self.group_name)
        if member is None or member.workspace is not ws or op.out is None:
            return
        tensors = (op.x, op.residual, op.pre_bias, op.weight, op.bias, op.out.y, op.out.residual_out, op.sum_out,
                   op.out.mean, op.out.rstd, op.eps if isinstance(op.eps, Tensor) else None)  # fmt: skip
        record = record_of(launch, tensors, ws, table, member.workspaces)
        if record is not None:
            member.records.keep((self, op.x.shape, op.x.get_device()), record)
