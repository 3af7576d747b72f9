"""What a boundary costs the host: in a compiled graph, beside Inductor's own, and as the eager operator.

    python benchmarks/op_overhead.py --out benchmarks/results/op_overhead.json
    python benchmarks/op_overhead.py --cpu                 a fake group, and a stub in place of the kernel's launcher

*slope*: the host time of one boundary in a compiled graph, from graphs of 4 and of 36 layers (two boundaries each),
which leaves out what a call of any graph costs. Inductor's own boundary is its all-reduce, the wait and its kernel for
residual and norm; "auto_select" is Inductor with `_collective.auto_select`, which lowers small sums to symmetric
memory. *eager*: calls of the operator, of the kernel behind it, and of the operations it replaces.

Two NCCL processes on two GPUs (or, with one GPU, two gloo processes that share it, where only the eager calls are
measured and only the fused call's own numbers mean anything). Microseconds, the medians over rounds in which all take
turns; what is queued is not waited for. Beside medians there are the least times, which other work on the machine
disturbs least. CUDA-graph replay pays none of this.
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
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from auto_select import auto_select
from machine import cpu_machine, machine
from records import write_run

from tests.ranks import run_processes

CALLS, ROUNDS = 100, 15
SIZES = ((1, 4096), (32, 4096), (1, 8192))
LAYERS, EACH = (4, 36), 2  # layers of the two graphs, boundaries of a layer
GRAPH_CALLS, GRAPH_ROUNDS = 5, 41  # so few that the device's queue does not fill up


def in_turn(
    calls: dict[str, Callable[[], object]], count: int, rounds: int, clock: Callable[[], float], rest: Callable
) -> dict[str, tuple[float, float]]:
    """(median, least) host time of one call in us, by name."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(20):
            call()
        rest()
    for _ in range(rounds):
        for name, call in calls.items():
            rest()
            started = clock()
            for _ in range(count):
                call()
            samples[name].append((clock() - started) / count * 1e6)
    return {name: (statistics.median(each), min(each)) for name, each in samples.items()}


# -- one boundary of a compiled graph ---------------------------------------------------------------------------------


def chain(boundaries: int, hidden: int) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """So many boundaries, each on the result of the one before it."""
    import torch.distributed as dist
    import torch.distributed._functional_collectives as funcol

    def run(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(boundaries):
            residual = residual + funcol.all_reduce(x, "sum", dist.group.WORLD)
            x = torch.nn.functional.rms_norm(residual, (hidden,), weight, 1e-6)
        return x, residual

    run.__code__ = run.__code__.replace(co_name=f"chain_of_{boundaries}")  # Dynamo keeps what it compiled by code
    return run


def slopes(
    providers: list[str], rows: int, hidden: int, device: torch.device, dtype: torch.dtype, layers: tuple[int, int],
    clock: Callable[[], float], rest: Callable,
) -> list[dict]:  # fmt: skip
    import tpfuse
    from tpfuse.backend import tpfuse as backend

    x, residual = (torch.zeros(rows, hidden, device=device, dtype=dtype) for _ in range(2))
    weight = torch.ones(hidden, device=device, dtype=dtype)
    calls: dict[str, Callable[[], object]] = {}
    with torch.no_grad():
        for provider in providers:
            for count in layers:
                chosen = {"tpfuse": backend, "auto_select": auto_select}.get(provider, "inductor")
                fn = torch.compile(chain(EACH * count, hidden), backend=chosen, fullgraph=True, dynamic=False)
                fn(x, residual, weight)
                if provider == "tpfuse":
                    assert tpfuse.reports()[-1].fused_forward == EACH * count
                calls[f"{provider} {count}"] = lambda fn=fn: fn(x, residual, weight)
        times = in_turn(calls, GRAPH_CALLS, GRAPH_ROUNDS, clock, rest)
    few, many = layers
    found = []
    for provider in providers:
        median, least = (
            (times[f"{provider} {many}"][which] - times[f"{provider} {few}"][which]) / (EACH * (many - few))
            for which in (0, 1)
        )
        found.append({"rows": rows, "hidden": hidden, "what": f"slope, {provider}", "host_us": round(median, 2),
                      "least_us": round(least, 2)})  # fmt: skip
    own = next(record for record in found if record["what"] == "slope, inductor")
    for record in found:
        record["of_inductor"] = round(record["host_us"] / own["host_us"], 3)
    return found


# -- eager calls ------------------------------------------------------------------------------------------------------


def eager_calls(rows: int, hidden: int, device: torch.device, dtype: torch.dtype, name: str) -> dict[str, Callable]:
    import torch.distributed._functional_collectives as funcol

    import tpfuse
    from tpfuse.kernels import entry
    from tpfuse.kernels.call import Call

    x, residual = (torch.randn(rows, hidden, device=device).to(dtype) for _ in range(2))
    weight = torch.ones(hidden, device=device, dtype=dtype)
    trained = torch.ones(hidden, device=device, dtype=dtype, requires_grad=True)

    def operator() -> object:
        with torch.no_grad():
            return tpfuse.ops.all_reduce_add_rms_norm(x, residual, weight, 1e-6, name)

    def with_gradients() -> object:
        return tpfuse.ops.all_reduce_add_rms_norm(x, residual, trained, 1e-6, name)

    def unfused() -> object:
        h = residual + funcol.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", name))
        return torch.nn.functional.rms_norm(h, weight.shape, weight, 1e-6), h

    def kernel() -> object:
        return entry.all_reduce_add_norm(
            Call(
                x,
                residual,
                None,
                weight,
                eps=1e-6,
                group_name=name,
                norm="rms_norm",
                out_dtype=x.dtype,
                hidden_dtype=x.dtype,
            )
        )

    return {"operator": operator, "operator, differentiated": with_gradients, "kernel": kernel, "unfused": unfused}


def measure(rank: int, layers: tuple[int, int], linked: bool) -> list[dict]:
    from tpfuse.kernels import rendezvous as groups
    from tpfuse.kernels.symmetric.timeout import raise_if_late

    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    name = torch.distributed.group.WORLD.group_name

    def rest() -> None:
        torch.cuda.synchronize()
        torch.distributed.barrier()

    records = []
    for rows, hidden in SIZES:
        calls = eager_calls(rows, hidden, device, torch.bfloat16, name)
        calls["operator"]()
        ws = groups.WORKSPACE_REGISTRY[name].workspace
        assert ws is not None, groups.why_not(name, device, hidden, torch.bfloat16)
        calls["look at the watch"] = lambda ws=ws: raise_if_late(ws, name)
        for what, (median, least) in in_turn(calls, CALLS, ROUNDS, time.perf_counter, rest).items():
            records.append({"rows": rows, "hidden": hidden, "what": what, "host_us": round(median, 2),
                            "least_us": round(least, 2)})  # fmt: skip
    if linked:
        for providers in (["inductor", "tpfuse"], ["inductor", "tpfuse", "auto_select"]):
            try:  # auto_select is private, and not in every release
                found = slopes(providers, *SIZES[0], device, torch.bfloat16, layers, time.perf_counter, rest)
            except Exception as error:
                found = [{"rows": 0, "hidden": 0, "what": f"slopes of {providers}", "host_us": None,
                          "note": f"{type(error).__name__}: {error}".splitlines()[0][:200]}]  # fmt: skip
            records += found
    return records


def measure_on_cpu(layers: tuple[int, int]) -> list[dict]:
    """A fake group of two ranks: its collectives do nothing, and neither does the stub. So these are the host's own
    costs around both, but for a launch. Time that the thread itself used, since a CPU has others to serve."""
    import pytest

    from tests.graphs import fake_world
    from tests.kernels.stub_kernel import in_place_of_gpus

    patch, hidden, device = pytest.MonkeyPatch(), 64, torch.device("cpu")
    torch.set_num_threads(1)
    with fake_world(2):
        in_place_of_gpus(patch, computes=False)
        calls = eager_calls(1, hidden, device, torch.float32, "0")
        records = [
            {"rows": 1, "hidden": hidden, "what": what, "host_us": round(median, 2), "least_us": round(least, 2)}
            for what, (median, least) in in_turn(calls, CALLS, ROUNDS, time.thread_time, int).items()
        ]
        records += slopes(["inductor", "tpfuse"], 1, hidden, device, torch.float32, layers, time.thread_time, int)
    patch.undo()
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cpu", action="store_true", help="one process, a fake group and a stub for the launcher")
    parser.add_argument("--layers", type=int, nargs=2, default=LAYERS, help="of the two graphs of a slope")
    arguments = parser.parse_args()
    layers = tuple(arguments.layers)
    linked = torch.cuda.device_count() > 1
    if arguments.cpu:
        records, setting = measure_on_cpu(layers), "one CPU thread, a fake group, a stub for the launcher"
    else:
        if not linked:
            os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        records = run_processes(2, measure, layers, linked, backend="nccl" if linked else "gloo", timeout=280)[0]
        setting = "2 NCCL processes, a GPU each" if linked else "2 gloo processes that share one GPU"
    for record in records:
        print(*record.values())
    if arguments.out:
        described = cpu_machine() | {"setting": setting} if arguments.cpu else machine(setting)
        write_run(arguments.out, described, records)


if __name__ == "__main__":
    main()
