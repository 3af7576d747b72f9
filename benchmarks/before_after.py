"""Time the boundary kernels of several commits against each other, in one process, graphs taking turns.

    git archive OLD kernels tpfuse | tar x -C /tmp/old
    python benchmarks/before_after.py before=/tmp/old after=. --worlds 2 4            virtual ranks on one GPU
    torchrun --nproc-per-node 2 benchmarks/before_after.py before=/tmp/old after=.    linked GPUs

A version ending in `+relaxed` has its pushes compiled to st.relaxed.sys. TREE:KERNEL,SPLIT,WARPS runs a version in
another way than the last version's table says. Each version is bound, captured and timed in
several workspaces of its own: where memory lies changes a call of 3 us by more than what is looked for. Results must be
bitwise equal between versions. Appends a line of JSON a size to --out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
import torch
import torch.distributed as dist

RELAXED = "+relaxed"
SIZES = [f"{hidden}x{rows}" for hidden in (4096, 8192) for rows in (1, 8, 32, 128)]
PARTS = ("bench.virtual", "bench.linked", "symmetric.one_shot", "symmetric.two_shot", "symmetric.barrier",
         "symmetric.operands", "symmetric.dispatch", "symmetric.tables")  # fmt: skip


def load(tree: str) -> dict[str, Any]:
    """The kernels of one tree by themselves: without the package's own start, which registers operators once."""
    for name in [name for name in sys.modules if name.split(".")[0] == "tpfuse"]:
        del sys.modules[name]
    package = types.ModuleType("tpfuse")
    package.__path__ = [str(Path(tree).resolve() / "tpfuse")]
    sys.modules["tpfuse"] = package
    loaded = {part.split(".")[-1]: importlib.import_module(f"tpfuse.kernels.{part}") for part in PARTS}
    loaded["dispatch"].default_table()  # imports the table now, while this tree is the one that is found
    return loaded


@contextlib.contextmanager
def relaxed_pushes(on: bool) -> Iterator[None]:
    """Within the context, kernels are compiled with st.relaxed.sys for what is stored before the last wait."""
    if not on:
        yield
        return
    import triton
    from triton.backends.nvidia.compiler import CUDABackend

    plain, before = CUDABackend.make_ptx, triton.knobs.cache.dir

    def make_ptx(self: Any, *args: Any) -> str:
        ptx = plain(self, *args)
        last = ptx.rfind("ld.volatile.global.v4")
        pushes, rest = ptx[: max(last, 0)], ptx[max(last, 0) :]
        return re.sub(r"st\.global\.v4\.b32", "st.relaxed.sys.global.v4.b32", pushes) + rest

    CUDABackend.make_ptx, triton.knobs.cache.dir = make_ptx, f"{before}-relaxed"
    try:
        yield
    finally:
        CUDABackend.make_ptx, triton.knobs.cache.dir = plain, before


def binder(version: dict[str, Any], entry: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    operands, tensors = version["operands"], (x, residual, None, weight)
    if hasattr(operands, "Operands"):  # commits that had no `Call` yet
        op = operands.Operands(*tensors, None, 1e-6, "rms_norm", x.dtype, x.dtype)
    else:
        op = operands.Call(*tensors, norm="rms_norm", eps=1e-6, out_dtype=x.dtype, hidden_dtype=x.dtype)

    kernel, split, warps = version["way"] or (entry.kernel, entry.split, entry.warps)

    def bind(ws: Any) -> Any:
        if kernel == "one_shot":
            return version["one_shot"].one_shot(op, ws, int(split), int(warps))
        return version[kernel].__dict__[kernel](op, ws, int(warps))

    return bind


def measure(versions: dict[str, dict], entry: Any, ranks: dict[str, list], hidden: int, rows: int) -> dict[str, Any]:
    """Microseconds a call of each version, (median, spread)."""
    generator = torch.Generator("cuda").manual_seed(hidden + rows)
    [some, *_] = ranks[next(iter(ranks))]
    xs = [torch.randn(rows, hidden, device="cuda", generator=generator).to(torch.bfloat16) for _ in range(some.world)]
    residual = torch.randn(rows, hidden, device="cuda", generator=generator).to(torch.bfloat16)
    weight = torch.randn(hidden, device="cuda", generator=generator).to(torch.bfloat16)
    graphs: dict[str, list] = {name: [] for name in versions}
    kept, marks, ptx = [], {}, {}
    for turn in range(len(next(iter(ranks.values())))):
        for name, version in versions.items():
            here = ranks[name][turn]
            with relaxed_pushes(name.endswith(RELAXED)):
                binds = [binder(version, entry, x, residual, weight) for x in xs]
                launches = here.bind(lambda ws, binds=binds: binds[ws.rank](ws))
                ptx[name] = launches[0].load().asm["ptx"].count("st.relaxed.sys")
            torch.cuda.synchronize()
            here.run(launches)
            torch.cuda.synchronize()
            marks.setdefault(name, launches[0].out.y.clone())
            graphs[name].append(here.capture(launches))
            kept.append(launches)
    time_graphs = next(iter(versions.values()))["virtual"].time_graphs
    times = time_graphs(graphs, rounds=15, gather=some.gather)
    first = next(iter(marks.values()))
    if not any(version["way"] for version in versions.values()):
        assert all(torch.equal(first, y) for y in marks.values()), "versions differ"
    assert all((ptx[name] > 0) == name.endswith(RELAXED) for name in versions), ptx
    return {name: (round(us, 4), round(spread, 4)) for name, (us, spread) in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="+", metavar="NAME=TREE")
    parser.add_argument("--worlds", type=int, nargs="+", default=[2])
    parser.add_argument("--captures", type=int, default=9)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="HIDDENxROWS")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    versions = {}
    for name, tree in (each.split("=", 1) for each in arguments.trees):
        tree, _, way = tree.partition(":")
        versions[name] = load(tree) | {"way": way.split(",") if way else None}
    linked = "LOCAL_RANK" in os.environ
    if linked:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
        arguments.worlds = [dist.get_world_size()]
    table = list(versions.values())[-1]["dispatch"].default_table()
    for world in arguments.worlds:
        ranks: dict[str, list] = {name: [] for name in versions}
        # Streams of their own: among many from one pool is also the one that captures, behind which others would wait.
        streams = [torch.cuda.Stream(priority=-1) for _ in range(world)]
        for _ in range(arguments.captures):
            for name, version in versions.items():
                if linked:  # a workspace belongs to its group
                    group = dist.new_group(list(range(world)))
                    ranks[name].append(version["linked"].LinkedRanks(group))
                else:
                    ranks[name].append(version["virtual"].VirtualRanks(world, slot_bytes=8 << 20))
                    ranks[name][-1].streams = streams
        for hidden, rows in (map(int, size.split("x")) for size in arguments.sizes):
            entry = table.choose("NVIDIA H200", world, hidden, 2, rows)
            times = measure(versions, entry, ranks, hidden, rows)
            base = next(iter(times.values()))[0]
            how = f"{entry.kernel} s{entry.split} w{entry.warps}"
            if not linked or dist.get_rank() == 0:
                each = (f"{name} {us:.3f} ({100 * (us / base - 1):+.1f} %)" for name, (us, _) in times.items())
                print(f"N={world} hidden {hidden} rows {rows} {how} |", "  ".join(each), flush=True)
                if arguments.out:
                    setting = "linked" if linked else "virtual"
                    record = {"setting": setting, "device": torch.cuda.get_device_name(), "world": world,
                              "hidden": hidden, "rows": rows, "how": how, "us": times}  # fmt: skip
                    with arguments.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
