"""What the fused boundary is compared with: separate all-reduces, each followed by Inductor's add + norm.

`baselines(ranks)` gives those that the machine can run:

    unfused                           a plain all-reduce by our own fastest kernel on the same pointers
    nccl                              NCCL on the current stream                                    (several GPUs)
    symm_mem one-shot, two-shot       PyTorch's own, on an x that already lies in symmetric memory  (several GPUs)
    flashinfer                        the fused kernel of FlashInfer, where it is installed         (several GPUs)
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpfuse.kernels.bench.measure import Functional, Provider
from tpfuse.kernels.call import AddNormOut, Call
from tpfuse.kernels.symmetric import pieces
from tpfuse.kernels.symmetric.barrier import barrier
from tpfuse.kernels.symmetric.barrier import fits as barrier_fits
from tpfuse.kernels.symmetric.dispatch import Entry, bind, default_table
from tpfuse.kernels.symmetric.one_shot import default_warps, one_shot
from tpfuse.kernels.symmetric.one_shot import fits as one_shot_fits
from tpfuse.kernels.symmetric.two_shot import fits as two_shot_fits
from tpfuse.kernels.symmetric.two_shot import two_shot
from tpfuse.kernels.symmetric.workspace import Workspace


@functools.cache
def inductor_add_norm() -> Callable:
    def add_rms_norm(s: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = s + residual
        return torch.nn.functional.rms_norm(h, weight.shape, weight, 1e-6), h

    return torch.compile(add_rms_norm, dynamic=False)


class Separate:
    """`reduce()` gives the all-reduced tensor; Inductor's kernel adds and normalises it.

    `refill`: brings x back before a call outside a graph, for a reduction in place. `drifts`: replays sum what was
    summed before, which takes as long but means nothing, so only the first call is checked. `may_differ`: each rank's
    Inductor may pick another way to add up a row, so that ranks differ in their last bits.
    """

    programs = 0
    may_differ = True

    def __init__(
        self,
        op: Call,
        reduce: Callable[[], Tensor],
        load: Callable[[], Any] | None = None,
        refill: Callable[[], Any] | None = None,
        drifts: bool = False,
    ) -> None:
        self.op, self.reduce, self.loads, self.refill, self.drifts = op, reduce, load, refill, drifts
        self.out: AddNormOut | None = None
        self.add_norm(op.x)

    def add_norm(self, total: Tensor) -> None:
        y, h = inductor_add_norm()(total, self.op.residual, self.op.weight)
        self.out = AddNormOut(y, h, None, None)

    def load(self) -> Any:
        return self.loads() if self.loads is not None else None

    def run(self) -> None:
        if self.refill is not None and not torch.cuda.is_current_stream_capturing():
            self.refill()
        self.add_norm(self.reduce())


def unfused(op: Call, ws: Workspace, device_name: str) -> Separate:
    """Our own all-reduce, as dispatch would run it at this size, or else the two-shot, or the barrier kernel."""
    plain = dataclasses.replace(op, residual=None, weight=None, norm="none", hidden_dtype=None)
    first = bind(default_table().choose(device_name, ws.world, op.hidden, 2, op.rows), plain, ws)
    if first is None:
        first = two_shot(plain, ws) if two_shot_fits(plain, ws) else barrier(plain, ws)

    def reduce() -> Tensor:
        return first.run()[0].y

    return Separate(op, reduce, first.load)


def dispatched(op: Call, ws: Workspace, device_name: str, group_name: str) -> Any:
    """What the op layer runs at this size by the table in use."""
    entry = default_table().choose(device_name, ws.world, op.hidden, op.x.element_size(), op.rows)
    launch = bind(entry, op, ws)
    if launch is not None or not group_name:
        return launch
    return Functional(op, group_name) if entry.kernel == "functional" else InPieces(entry, op, ws)


class InPieces:
    """A call that the workspace does not hold, as the op layer runs it."""

    programs = 0

    def __init__(self, entry: Entry, op: Call, ws: Workspace) -> None:
        self.given = entry, op, ws
        self.out: AddNormOut | None = None

    def load(self) -> None:
        """Nothing is loaded ahead: on linked GPUs loading does not wait for peers."""

    def run(self) -> None:
        self.out = pieces.run(*self.given)[0]


def nccl(op: Call, group: Any) -> Separate:
    """In place on a copy that the first call makes: the values are summed again and again, which costs the same."""
    total = op.x.clone()

    def reduce() -> Tensor:
        dist.all_reduce(total, group=group)
        return total

    return Separate(op, reduce, refill=lambda: total.copy_(op.x), drifts=True)


def symmetric(op: Call, ranks: Any, shots: int) -> Separate:
    """PyTorch's symmetric-memory all-reduce; x lies in symmetric memory beforehand, which spares it a copy."""
    import torch.distributed._symmetric_memory as memory

    x = symmetric_buffer(ranks.group_name, op.x.numel(), memory)[: op.x.numel()].view(op.x.shape)
    x.copy_(op.x)
    kernel = torch.ops.symm_mem.one_shot_all_reduce if shots == 1 else torch.ops.symm_mem.two_shot_all_reduce_

    def reduce() -> Tensor:
        return kernel(x, "sum", ranks.group_name)

    return Separate(op, reduce, refill=lambda: x.copy_(op.x), drifts=shots == 2)


_BUFFERS: dict[str, Tensor] = {}  # a rendezvous is expensive, so one allocation serves all sizes


def symmetric_buffer(group_name: str, elements: int, memory: Any) -> Tensor:
    held = _BUFFERS.get(group_name)
    if held is None or held.numel() < elements:
        held = memory.empty(max(elements, 4096 * 8192), dtype=torch.bfloat16, device="cuda")
        memory.rendezvous(held, group_name)
        _BUFFERS[group_name] = held
    return held


def flashinfer(op: Call, ranks: Any) -> Any:
    """FlashInfer's fused all-reduce + residual + RMSNorm (Lamport one-shot or two-shot, its own choice)."""
    import flashinfer.comm as comm

    _, workspace = flashinfer_workspace(ranks, op.hidden, comm)

    class Bound:
        programs = 0
        out: AddNormOut | None = AddNormOut(torch.empty_like(op.x), torch.empty_like(op.x), None, None)

        def load(self) -> None:
            self.run()

        def run(self) -> None:
            comm.trtllm_allreduce_fusion(
                allreduce_in=op.x, world_size=ranks.world, world_rank=ranks.rank, token_num=op.rows,
                hidden_dim=op.hidden, workspace_ptrs=workspace, launch_with_pdl=False, use_oneshot=None,
                trigger_completion_at_end=True, fp32_acc=True,
                pattern_code=comm.AllReduceFusionPattern.kARResidualRMSNorm, allreduce_out=None,
                residual_in=op.residual, residual_out=self.out.residual_out, norm_out=self.out.y, quant_out=None,
                scale_out=None, rms_gamma=op.weight, rms_eps=op.eps, scale_factor=None, layout_code=None,
            )  # fmt: skip

    return Bound()


@functools.cache
def flashinfer_workspace(ranks: Any, hidden: int, comm: Any) -> Any:
    return comm.trtllm_create_ipc_workspace_for_all_reduce_fusion(
        tp_rank=ranks.rank, tp_size=ranks.world, max_token_num=4096, hidden_dim=hidden, group=ranks.group
    )


def baselines(ranks: Any) -> list[Provider]:
    """Those that this machine can run; the same on all ranks of a group."""
    group_name = getattr(ranks, "group_name", "")
    device = ranks.device_name
    out = [
        Provider("dispatched", lambda op, ws: dispatched(op, ws, device, group_name)),
        Provider("unfused", lambda op, ws: unfused(op, ws, device) if barrier_fits(op, ws) else None),
        Provider("one_shot portable", portable),
    ]
    if group_name:
        out += [
            Provider("nccl", lambda op, ws: nccl(op, ranks.group)),
            Provider("symm_mem one-shot", lambda op, ws: symmetric(op, ranks, 1)),
            Provider("symm_mem two-shot", lambda op, ws: symmetric(op, ranks, 2)),
        ]
        if importlib.util.find_spec("flashinfer") is not None:
            out.append(Provider("flashinfer", lambda op, ws: flashinfer(op, ranks)))
    return out


def portable(op: Call, ws: Workspace) -> Any:
    """The one-shot that waits without PTX."""
    return one_shot(op, ws, 1, default_warps(op, 1), spin=False) if one_shot_fits(op, ws, 1) else None
