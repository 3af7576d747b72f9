"""A call as cheap as can be: find the record of one like it, see that it still holds, launch it on new addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._torch_private import current_gpu, group_exists, raw_stream
from .call import Call
from .records import record_of
from .rendezvous import WORKSPACE_REGISTRY, note_capture
from .symmetric.dispatch import Table, default_table
from .symmetric.operands import Launch
from .symmetric.workspace import Workspace


class Site:
    """Calls of one group that are alike but for the shape, device, strides and addresses of their tensors: those of one
    spec (tpfuse/boundary_spec.py), which says the dtypes and which tensors there are."""

    __slots__ = ("group_name",)

    def __init__(self, group_name: str) -> None:
        self.group_name = group_name

    def leave(self, launches: Sequence[Launch], call: Call, ws: Workspace, table: Table) -> None:
        """Leave a record of a call that was just launched, where it can be launched again and still may."""
        member = WORKSPACE_REGISTRY.get(self.group_name)
        if member is None or member.workspace is not ws or call.out is None:
            return
        tensors = (call.x, call.residual, call.pre_bias, call.weight, call.bias, call.out.y, call.out.residual_out,
                   call.sum_out, call.out.mean, call.out.rstd, call.eps_tensor)  # fmt: skip
        record = record_of(launches, tensors, ws, table, member.workspaces)
        if record is not None:
            member.records.keep((self, call.x.shape, call.x.get_device()), record)


def with_records(
    sites: dict[str, Site], first: Callable[..., None], rest: Callable[..., tuple[tuple, tuple, int, bool]]
) -> Callable[..., None]:
    """An operator's kernel: a call that has a record is launched again, any other goes to `first`, with the same
    arguments. `sites`: by spec; `first` adds to them. `rest`: `addresses` or `quantised_addresses`, by what else the
    operator takes.

    One function, and no lock: a Python call costs as much as five of the looks in it. What it looks at changes under
    the locks of its owners, and each look takes one thing: a record, whole and unchangeable, which says for which
    workspace and table it holds. A group that grows meanwhile in another thread keeps its old workspace, so the call
    is one made a moment earlier, as it was before there were records.
    """
    registry, gpu = WORKSPACE_REGISTRY, torch.cuda

    def kernel(
        x: Tensor, y: Tensor, spec: str, residual: Tensor | None = None, weight: Tensor | None = None,
        hidden: Tensor | None = None, *more: Tensor | None, **product: Callable,
    ) -> None:  # fmt: skip
        site = sites.get(spec)
        member = registry.get(site.group_name) if site is not None else None
        if member is None:
            return first(x, y, spec, residual, weight, hidden, *more, **product)
        device = x.get_device()
        record = member.records.known.get((site, x.shape, device))
        if (
            record is None
            or record.workspace is not member.workspace
            or record.table is not default_table()
            or not group_exists(member.group())
            or (device >= 0 and current_gpu() != device)
        ):
            return first(x, y, spec, residual, weight, hidden, *more, **product)
        for word in record.late:
            if word.value:
                return first(x, y, spec, residual, weight, hidden, *more, **product)  # raises
        on_x, on_y = x.data_ptr(), y.data_ptr()
        bits = on_x | on_y
        plain = x.is_contiguous() and y.is_contiguous()
        on_residual = on_weight = on_hidden = None
        if residual is not None:
            bits |= (on_residual := residual.data_ptr())
            plain = plain and residual.is_contiguous()
        if weight is not None:
            bits |= (on_weight := weight.data_ptr())
            plain = plain and weight.is_contiguous()
        if hidden is not None:
            bits |= (on_hidden := hidden.data_ptr())
            plain = plain and hidden.is_contiguous()
        on_rstd = on_bias = on_mean = on_pre_bias = on_total = on_eps = None
        last: tuple = ()
        if more:
            (on_rstd, on_bias, on_mean, on_pre_bias, on_total, on_eps), last, more_bits, more_plain = rest(*more)
            bits |= more_bits
            plain = plain and more_plain
        if bits & 15 or not plain:
            return first(x, y, spec, residual, weight, hidden, *more, **product)
        if gpu.is_current_stream_capturing():
            note_capture(record.workspace)
        record.launch(
            on_x, on_residual, on_pre_bias, on_weight, on_bias, on_y, on_hidden, on_total, on_mean, on_rstd, on_eps,
            *record.rest, *last, stream=raw_stream(device), **product,
        )  # fmt: skip
        return None

    return kernel


def addresses(
    rstd: Tensor | None = None, bias: Tensor | None = None, mean: Tensor | None = None, pre_bias: Tensor | None = None,
    total: Tensor | None = None, eps_tensor: Tensor | None = None,
) -> tuple[tuple, tuple, int, bool]:  # fmt: skip
    """The addresses of what few calls have, nothing for a launch's end, what the last bits of the addresses are, and
    whether all lie row by row."""
    given = (rstd, bias, mean, pre_bias, total)
    found = [None if t is None else t.data_ptr() for t in given]
    bits, plain = 0, True
    for t, address in zip(given, found, strict=True):
        if t is not None and address is not None:
            bits |= address
            plain = plain and t.is_contiguous()
    return (*found, None if eps_tensor is None else eps_tensor.data_ptr()), (), bits, plain


def quantised_addresses(q: Tensor, scale: Tensor, *seldom: Tensor | None) -> tuple[tuple, tuple, int, bool]:
    """The same, with those of q and scale for the launch's end."""
    on_q, on_scale = q.data_ptr(), scale.data_ptr()
    found, _, bits, plain = addresses(*seldom) if seldom else (_NONE, (), 0, True)
    return found, (on_q, on_scale), bits | on_q | on_scale, plain and q.is_contiguous() and scale.is_contiguous()


_NONE = (None,) * 6
