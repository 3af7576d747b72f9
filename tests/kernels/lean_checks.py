"""Checks of launches from records on GPUs: a call from a record gives the bits of the first call, wherever it is made.

torchrun --nproc-per-node 2 -m tests.kernels.lean_checks        without pytest
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.passes.test_quantised import recognised
from tests.quantisations import float8_per_row, int8_per_row
from tpfuse import ops
from tpfuse.boundary_spec import BoundarySpec
from tpfuse.kernels.entry import init_workspace
from tpfuse.kernels.rendezvous import WORKSPACE_REGISTRY, check_peers
from tpfuse.quantisation import read_quantisation

BF16 = torch.bfloat16


class Call:
    """Calls of one shape. `exact`: what the functional operator gives, which never uses a record. `quant`: how y is
    quantised, or nothing."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, group_name: str, quant: str = "") -> None:
        self.device, self.group_name = device, group_name
        self.x, self.residual = (torch.empty(shape, device=device, dtype=BF16) for _ in range(2))
        self.weight = torch.empty(shape[-1], device=device, dtype=BF16)
        self.y, self.hidden = torch.empty_like(self.x), torch.empty_like(self.x)
        self.text = BoundarySpec(
            norm="rms_norm", eps=1e-6, out_dtype=BF16, hidden_dtype=BF16, group_name=group_name,
            operands=(BF16, BF16, None, BF16, None, None), quant=quant,
        ).text()  # fmt: skip
        self.quant, self.outputs = quant, [self.y, self.hidden]
        if quant:
            how = read_quantisation(quant)
            self.outputs.append(torch.empty(shape, device=device, dtype=how.q_dtype))
            self.outputs.append(torch.empty(how.scales_of(shape), device=device, dtype=how.scale_dtype))

    def fill(self, seed: int) -> Call:
        g = torch.Generator().manual_seed(seed)
        for t in (self.residual, self.weight):
            t.copy_(torch.randn(t.shape, generator=g))
        own = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
        self.x.copy_(torch.randn(self.x.shape, generator=own))
        return self

    def exact(self) -> list[Tensor]:
        return torch.ops.tpfuse.all_reduce_norm.default(
            self.x, self.residual, None, self.weight, None, None, norm="rms_norm", eps=1e-6, weight_offset=0.0,
            alpha=1.0, post=False, out_dtype=BF16, hidden_dtype=BF16, want_sum=False, stats=False,
            group_name=self.group_name, quant=self.quant,
        )  # fmt: skip

    def run(self) -> None:
        y, hidden, *more = self.outputs
        if more:
            torch.ops.tpfuse.all_reduce_norm.quantised(self.x, y, self.text, self.residual, self.weight, hidden, *more)
        else:
            torch.ops.tpfuse.all_reduce_norm.lean(self.x, y, self.text, self.residual, self.weight, hidden)

    def check(self, what: str) -> None:
        right = self.exact()
        for t in self.outputs:
            t.fill_(7)
        self.run()
        assert all(same_bytes(*pair) for pair in zip(self.outputs, right, strict=True)), what


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


class Firsts:
    """Within it: how many calls were made as first ones, without a record."""

    def __enter__(self) -> Firsts:
        self.count, self.own = 0, ops.all_reduce_add_norm

        def counted(call: Any, site: Any = None) -> Any:
            self.count += site is not None
            return self.own(call, site)

        ops.all_reduce_add_norm = counted
        return self

    def __exit__(self, *_: Any) -> None:
        ops.all_reduce_add_norm = self.own


def records_give_the_bits_of_the_first_call(device: torch.device, group_name: str) -> int:
    """Rows in turn, views off a 16-byte boundary, growth between calls, capture. How many calls were compared."""
    made = 0
    with Firsts() as firsts:
        for n, rows in enumerate((1, 4, 33, 4, 1, 33, 512, 1, 512)):
            Call((rows, 4096), device, group_name).fill(n).check(f"{rows} rows, call {n}")
            made += 1
        assert firsts.count == 4, f"{firsts.count} first calls for four numbers of rows"
        call = Call((4, 4096), device, group_name).fill(20)
        held = torch.empty(call.x.numel() + 3, device=device, dtype=BF16)
        aligned, call.x = call.x, held[3:].view(call.x.shape)
        call.x.copy_(aligned)
        call.check("x off a 16-byte boundary")
        wide = torch.empty(4, 2 * 4096, device=device, dtype=BF16)
        call.x = wide[:, 4096:]
        call.x.copy_(aligned)
        call.check("rows of x apart")
        assert firsts.count == 6, "a tensor that lies otherwise was launched from a record"
        call.x = aligned
        call.check("aligned again")
        assert firsts.count == 6
        before = WORKSPACE_REGISTRY[group_name].workspace
        assert init_workspace(group_name, 4096, 8192, BF16) and WORKSPACE_REGISTRY[group_name].workspace is not before
        for n in range(3):
            call.fill(30 + n).check(f"after growth, call {n}")
        assert firsts.count == 7, "a record outlived its workspace"
        captured(device, group_name)
        made += 3 + 3
    torch.cuda.synchronize()
    check_peers()
    return made


def quantised_calls(device: torch.device, group_name: str, quant: str) -> None:
    """From records as well, plain and quantised calls in turn, and in a graph."""
    call, plain = Call((5, 4096), device, group_name, quant), Call((5, 4096), device, group_name)
    with Firsts() as firsts:
        for n in range(4):
            call.fill(100 + n).check(f"quantised, call {n}")
            plain.fill(100 + n).check(f"plain beside it, call {n}")
        assert firsts.count <= 2, f"{firsts.count} first calls of a quantised and a plain shape"
        aligned = call.outputs[2]
        held = torch.empty(aligned.numel() + 3, device=device, dtype=aligned.dtype)
        call.outputs[2] = held[3:].view(aligned.shape)
        call.check("q off a 16-byte boundary")
        assert firsts.count <= 3
        call.outputs[2] = aligned
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call.run()
    for n in range(5):
        right = call.fill(120 + n).exact()
        graph.replay()
        assert all(same_bytes(*pair) for pair in zip(call.outputs, right, strict=True)), f"quantised, replay {n}"


def captured(device: torch.device, group_name: str) -> None:
    """A graph of launches from records, replayed between calls from records on another stream's tensors."""
    call, other = Call((6, 4096), device, group_name), Call((5, 2048), device, group_name)
    for each in (call, other):
        each.fill(40).check("before capture")
        each.check("from a record, before capture")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(3):
            call.run()
    for n in range(20):
        call.fill(50 + n)
        right = call.exact()
        graph.replay()
        assert all(same_bytes(*pair) for pair in zip(call.outputs, right, strict=True)), f"replay {n}"
        other.fill(80 + n).check(f"between replays, {n}")


def another_device_is_current(device: torch.device, group_name: str) -> None:
    """A call on tensors of a device that is not the current one."""
    call = Call((3, 4096), device, group_name).fill(90)
    call.check("on the current device")
    call.check("on the current device, from a record")
    others = [n for n in range(torch.cuda.device_count()) if n != device.index]
    for n in others[:1]:
        with torch.cuda.device(n):
            call.fill(91).check("while another device is current")


def main() -> None:
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    name = dist.group.WORLD.group_name
    made = records_give_the_bits_of_the_first_call(device, name)
    another_device_is_current(device, name)
    for spelling in (float8_per_row, int8_per_row):
        quantised_calls(device, name, recognised(spelling).text())
    dist.barrier()
    if rank == 0:
        print(f"lean checks passed: {made} calls compared bit for bit", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
