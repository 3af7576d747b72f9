"""What one call of the eager operator costs the host: fused in symmetric memory, and as the operations it replaces.

    python benchmarks/op_overhead.py --out benchmarks/results/op_overhead.json

Two NCCL processes on two GPUs (or, with one GPU, two gloo processes that share it, where only the fused call's own
numbers mean anything). Microseconds of host time a call, the median over rounds of 100 calls that are queued without
waiting for the device. CUDA-graph replay pays none of this.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import machine
from records import write

from tests.ranks import run_processes

CALLS, ROUNDS = 100, 15
SIZES = ((1, 4096), (32, 4096), (1, 8192))


def host_us(call: Callable[[], object]) -> float:
    for _ in range(20):
        call()
    samples = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        torch.distributed.barrier()
        started = time.perf_counter()
        for _ in range(CALLS):
            call()
        samples.append((time.perf_counter() - started) / CALLS * 1e6)
    return round(statistics.median(samples), 2)


def measure(rank: int) -> list[dict]:
    import torch.distributed._functional_collectives as funcol

    import tpfuse
    from tpfuse.kernels import entry as all_reduce
    from tpfuse.kernels import rendezvous as groups
    from tpfuse.kernels.symmetric.timeout import raise_if_late

    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    name = torch.distributed.group.WORLD.group_name
    records = []
    for rows, hidden in SIZES:
        x, residual = (torch.randn(rows, hidden, device=device).bfloat16() for _ in range(2))
        weight = torch.ones(hidden, device=device).bfloat16()

        def operator(x=x, residual=residual, weight=weight):
            with torch.no_grad():
                return tpfuse.ops.all_reduce_add_rms_norm(x, residual, weight, 1e-6, name)

        def kernel(x=x, residual=residual, weight=weight):
            return all_reduce.all_reduce_add_norm(
                x, residual, None, weight, None, 1e-6, group_name=name, norm="rms_norm", out_dtype=x.dtype,
                residual_dtype=x.dtype, stats=True,
            )  # fmt: skip

        def unfused(x=x, residual=residual, weight=weight):
            h = residual + funcol.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", name))
            return torch.nn.functional.rms_norm(h, weight.shape, weight, 1e-6), h

        assert kernel() is not None, all_reduce.why_not(name, device, hidden, x.dtype)
        ws = groups.WORKSPACE_REGISTRY[name].workspace
        calls = {"operator": operator, "kernel": kernel, "unfused": unfused,
                 "look at the watch": lambda ws=ws: raise_if_late(ws, name)}  # fmt: skip
        for what, call in calls.items():
            records.append({"rows": rows, "hidden": hidden, "what": what, "host_us": host_us(call)})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    linked = torch.cuda.device_count() > 1
    if not linked:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    records = run_processes(2, measure, backend="nccl" if linked else "gloo")[0]
    for record in records:
        print(*record.values())
    if arguments.out:
        setting = "2 NCCL processes, a GPU each" if linked else "2 gloo processes that share one GPU"
        write(arguments.out, {"machine": machine(setting), "records": records})


if __name__ == "__main__":
    main()
