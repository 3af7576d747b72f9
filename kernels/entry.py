"""The fused boundary at run time: pick the kernel for this call, or say that there is none.

`all_reduce_add_norm` is what the op layer calls first on each boundary, `exchange_add_norm` on one whose rows are
scattered and gathered. None means that the caller takes the functional path (plain collectives around `add_norm`);
`why_not` has the sentence for the report.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._torch_private import process_group
from ..errors import OpError
from ..parallel.mesh import group_name_of
from .call import KERNEL_DTYPES, MAX_HIDDEN, AddNormOut, Call
from .norm_backward import NormBackwardCall, NormBackwardOut
from .rendezvous import check_peers, limit_waits, note_capture, why_not, workspace_of
from .replay import Site
from .symmetric.copies import FROM_BYTES, RANKS, refusal
from .symmetric.dispatch import choose, default_table
from .symmetric.exchanged import exchanged, unfit
from .symmetric.norm_backward_by_copies import norm_backward_by_copies
from .symmetric.operands import Launch, lies_ready
from .symmetric.pieces import run
from .symmetric.timeout import new_watch
from .symmetric.workspace import Workspace

__all__ = ["all_reduce_add_norm", "check_peers", "exchange_add_norm", "init_workspace", "reduce_norm_backward",
           "why_not"]  # fmt: skip


def all_reduce_add_norm(call: Call, site: Site | None = None) -> tuple[AddNormOut, Tensor | None] | None:
    """`add_norm` of the sum of every rank's `call.x`, as one kernel; with `want_sum` also that sum, in the dtype of x.

    x, residual: [..., H], the same shape on every rank of the group; H a multiple of 8 up to 16384; float16, bfloat16
    or float32. All results are bitwise equal on all ranks. None when this group, device, size or dtype cannot use the
    symmetric-memory kernels, on all ranks alike. The group's first call is collective and allocates; later ones do
    neither. Without rows nobody is waited for and nothing is touched. `site`: where a call leaves a record of its
    launches.
    """
    x, group_name = call.x, call.group_name
    if not (on_gpu(x) and call.supported()):
        return None
    if call.rows == 0:
        return call.outputs()
    copies = call.overlap and not call.batch_invariant and x.nbytes >= FROM_BYTES
    ws = workspace_of(group_name, x.device, copies=copies)
    if ws is None:
        return None
    check_peers(group_name)  # of older, smaller workspaces too
    if torch.cuda.is_current_stream_capturing():
        note_capture(ws)
    device, table = ws.device_name or torch.cuda.get_device_name(x.device), default_table()
    chosen = choose(device, ws.world, call.hidden, x.element_size(), call.rows)
    if copies and ws.copy_words:
        chosen = replace(chosen, kernel="copied")

    def ran(launches: list[Launch]) -> None:
        # Of a call that may be made by copies, where there is no slot for them yet, none: its peer may find one sooner.
        # Nor of one whose product was made before the launch: the record would leave it out.
        alone = not copies and call.product is None
        if site is not None and (alone or all(launch.multiplies for launch in launches)):
            site.leave(launches, call, ws, table)

    return run(chosen, call, ws, None if site is None else ran)


def exchange_add_norm(call: Call, site: Site | None = None) -> tuple[AddNormOut, Tensor | None] | None:
    """`add_norm` of this rank's half of the rows of the sum, and a gather of y: `call.out.y` and the y of the result
    have all rows, in the order of the ranks; residual and other results those of the own half.

    Otherwise as `all_reduce_add_norm`, a record of it at `site` too: None, on all ranks alike, also for calls that are
    not told `overlap`, have less than FROM_BYTES of x, an odd number of rows, a quantisation, or more ranks than two.
    """
    x, group_name = call.x, call.group_name
    if not (call.overlap and on_gpu(x) and call.supported()) or x.nbytes < FROM_BYTES or unfit(call):
        return None
    ws = _met_for_copies(group_name, x)
    if ws is None:
        return None
    launch = exchanged(call, ws)
    done = launch.run()
    if site is not None:
        site.leave([launch], call, ws, default_table())
    return done


def reduce_norm_backward(
    x: Tensor, dx: Tensor, call: NormBackwardCall, group_name: str, scattered: bool,
    product: Callable[[int, int], None] | None = None, total: Tensor | None = None,
) -> NormBackwardOut | None:  # fmt: skip
    """The backward of a norm of the sum of x [rows, H] over the ranks, into `dx` [rows, H]. scattered: each rank
    finishes its half of the rows, and dx is gathered; `call` (whose dy is put in here), total and the gradients of
    vectors are of the rows that a rank finishes. total: to be filled with their sum; product: as `Call.product`.

    None, on all ranks alike, for fewer than FROM_BYTES of x, an odd number of rows to be scattered, and where the
    group's ranks are not two that can copy to each other.
    """
    rows, hidden = x.shape
    if not on_gpu(x) or x.nbytes < FROM_BYTES or (scattered and rows % 2) or hidden % 8 or hidden > MAX_HIDDEN:
        return None
    other_size = scattered and dx.dtype.itemsize != x.dtype.itemsize  # where dx is sent
    if x.dtype not in KERNEL_DTYPES or other_size:
        return None
    ws = _met_for_copies(group_name, x)
    if ws is None:
        return None
    x = x if product is not None or lies_ready(x) else x.contiguous().clone()
    half = slice(ws.rank * rows // 2, (ws.rank + 1) * rows // 2) if scattered else slice(None)
    return norm_backward_by_copies(x, dx, replace(call, dy=x[half]), ws, product, total, scattered)


def _met_for_copies(group_name: str, x: Tensor) -> Workspace | None:
    """The group's workspace, where its ranks are two that copy to each other, two rows of x at least. How many they are
    is asked before they meet: of more ranks some may run the program's collectives, and never come."""
    group = process_group(group_name)
    if group is None or group.size() != RANKS:
        return None
    ws = workspace_of(group_name, x.device, copies=True)
    if ws is None or refusal(2 * x.shape[-1] * x.element_size() // 4, ws):
        return None
    check_peers(group_name)
    if torch.cuda.is_current_stream_capturing():
        note_capture(ws)
    return ws


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def init_workspace(group: Any, max_rows: int, hidden: int, dtype: torch.dtype, *, timeout: float | None = None) -> bool:
    """Set up the workspace of `group` now, so that no later call of up to `max_rows` rows in one shot allocates.

    Collective: every rank of the group calls it, with the same arguments, outside CUDA-graph capture. Optional: without
    it a group's first fused call does the same with 16 MB slots. Calling it again with a larger size makes the
    workspace grow; a smaller size changes nothing.

    Args:
        group: a ProcessGroup, a group's name, a 1-D DeviceMesh, or (mesh, dim).
        max_rows: the most rows (tokens) of one call, at least 1.
        hidden: elements a row, at least 1.
        dtype: torch.bfloat16, torch.float16 or torch.float32.
        timeout: seconds that a kernel of this group waits for a peer before it gives up (see `PeerTimeoutError`), from
            now on and in captured graphs too. None: what an earlier call said, or what TPFUSE_PEER_TIMEOUT said when
            the workspace was made, or else 600.

    Returns:
        Whether calls of this size will run in symmetric memory. Where they cannot (`why_not` has the sentence) they
        take the functional path, and nothing needs to be set up.

    Raises:
        OpError: an argument that is not allowed, a group that is not known on this rank, or a call inside capture.
        OptionError: a timeout that is not a positive number.
        PeerTimeoutError: a kernel of this group gave up waiting for a peer: the group must be made anew.
    """
    for name, given in (("max_rows", max_rows), ("hidden", hidden)):
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            raise OpError(f"init_workspace: {name}={given!r}; allowed: an integer of at least 1")
    if dtype not in KERNEL_DTYPES:
        raise OpError(f"init_workspace: dtype={dtype!r}; allowed: {', '.join(map(str, KERNEL_DTYPES))}")
    new_watch("cpu", timeout)  # a timeout that is not allowed is refused before anyone is met
    group_name = group_name_of(group)
    members = process_group(group_name)
    if members is None:
        raise OpError(f"init_workspace: group={group!r}: no process group is named {group_name!r} on this rank")
    if not torch.cuda.is_available() or why_not(group_name, "cuda", hidden, dtype):
        return False
    if torch.cuda.is_current_stream_capturing():
        raise OpError("init_workspace: called inside CUDA-graph capture; allowed: before it, since it allocates")
    need = members.size() * max_rows * hidden * dtype.itemsize
    ws = workspace_of(group_name, torch.device("cuda", torch.cuda.current_device()), need)
    check_peers(group_name)
    limit_waits(group_name, timeout)
    return ws is not None and ws.slot_words * 4 >= need
