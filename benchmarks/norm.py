"""Time the local add + norm kernel against Inductor, PyTorch's own norms and Liger-Kernel (where it is installed).

    python benchmarks/norm.py --out results.json

Each provider gets the same bf16 tensors: y and the new residual from s, residual and weight. Inputs rotate through more
memory than the L2 cache holds, and calls are replayed from a CUDA graph, providers taking turns. "share" is the bytes
that must move (two inputs, two outputs) over the time, as a share of the bandwidth of a copy that moves as many bytes,
measured in the same way in the same run. Each kernel is captured several times, in turns, and of the captures' medians
the median counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import machine
from records import write_run

from tpfuse.kernels import add_norm as module
from tpfuse.kernels.add_norm import add_norm
from tpfuse.kernels.bench.virtual import time_graphs
from tpfuse.kernels.call import Call

HIDDEN = (2048, 4096, 7168, 8192)
MEGABYTES = (1 / 16, 1, 2, 4, 8, 16, 32, 64, 256)  # of one tensor; the first is a batch that decodes, 8 rows of 4096
CALLS = 12


def ours(norm: str, **forced: Any) -> Callable:
    """Our kernel, as it runs by itself or with some launch options `forced`."""

    def call(s: Any, residual: Any, weight: Any, bias: Any) -> Any:
        own = module.tuning
        module.tuning = lambda *given: {**own(*given), **forced}
        try:
            out = add_norm(
                Call(s, residual, None, weight, bias, eps=1e-6, norm=norm, out_dtype=s.dtype, hidden_dtype=s.dtype)
            )
        finally:
            module.tuning = own
        return out.y, out.residual_out

    return call


# what `kernels.add_norm.tuning` chooses between
VARIANTS = {
    f"{when}{pieces}{hints}": {"LATE": late, "PIECES": count, "EVICT": evict, "STORE": store}
    for when, late in (("early", False), ("late", True))
    for pieces, count in (("", 1), (" in two", 2))
    for hints, evict, store in (("", "", ""), (" loads", "evict_first", ""), (" loads stores", "evict_first", ".cs"))
}


def eager(norm: str) -> Callable:
    def call(s: Any, residual: Any, weight: Any, bias: Any) -> Any:
        h = s + residual
        if norm == "rms_norm":
            return torch.nn.functional.rms_norm(h, weight.shape, weight, 1e-6), h
        return torch.nn.functional.layer_norm(h, weight.shape, weight, bias, 1e-6), h

    return call


def liger(norm: str) -> Callable | None:
    """Liger-Kernel's fused add + RMSNorm; it has no such LayerNorm, so there the add is PyTorch's."""
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    except ImportError:
        return None

    def call(s: Any, residual: Any, weight: Any, bias: Any) -> Any:
        if norm == "rms_norm":
            return LigerFusedAddRMSNormFunction.apply(s, residual, weight, 1e-6, 0.0, "llama", False)
        h = s + residual
        return LigerLayerNormFunction.apply(h, weight, bias, 1e-6), h

    return call


def captures_of(megabytes: float) -> int:
    """How often each kernel is captured. Two captures of one kernel (outputs at other addresses) may differ by more
    than two good kernels do, the more the shorter they are."""
    return 9 if megabytes <= 4 else 5 if megabytes <= 64 else 2


def capture(fn: Callable, sets: list[tuple]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fn(*sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            fn(*sets[i % len(sets)])
    return graph


def run(
    norm: str, hidden: int, megabytes: float, variants: Iterable[str] = (), warps: Sequence[int] = ()
) -> list[dict]:
    rows = max(int(megabytes * (1 << 20)) // (2 * hidden), 1)
    count = max(2, min(12, (512 << 20) // (rows * hidden * 8) + 1))

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.float32).to(torch.bfloat16)

    weight, bias = draw(hidden), draw(hidden) if norm == "layer_norm" else None
    sets = [(draw(rows, hidden), draw(rows, hidden), weight, bias) for _ in range(count)]
    moved = 4 * rows * hidden * 2
    sources = [torch.empty(moved // 2, dtype=torch.int8, device="cuda") for _ in range(count)]
    torch._dynamo.reset()
    calls: dict[str, Callable | None] = {
        "ours": ours(norm), "inductor": torch.compile(eager(norm), dynamic=False), "torch": eager(norm),
        "liger": liger(norm),
    }  # fmt: skip
    for name in variants:
        calls[f"ours {name}"] = ours(norm, **VARIANTS[name])
        calls |= {f"ours {name} w{w}": ours(norm, num_warps=w, **VARIANTS[name]) for w in warps}
    truth = eager(norm)(*(t if t is None else t.double() for t in sets[0]))
    timed: dict[str, tuple[Callable, list[tuple]]] = {}
    notes: dict[str, str] = {}
    for name, fn in calls.items():
        if fn is None:
            continue
        try:
            y, h = fn(*sets[0])
            for got, right in ((y, truth[0]), (h, truth[1])):
                error = ((got.double() - right).norm() / right.norm()).item()
                if not error < 6e-3:
                    notes[name] = f"error {error:.1e}"
            timed[name] = fn, sets
        except Exception as error:
            notes[name] = f"{type(error).__name__}: {error}"[:200]
    del truth
    timed["copy"] = lambda a: torch.empty_like(a).copy_(a), [(source,) for source in sources]
    graphs: dict[str, list[torch.cuda.CUDAGraph]] = {name: [] for name in timed}
    for _ in range(captures_of(megabytes)):  # in turns, so that no one's outputs lie together
        for name in list(graphs):
            try:
                graphs[name].append(capture(*timed[name]))
            except Exception as error:
                notes[name] = f"{type(error).__name__}: {error}"[:200]
                del graphs[name]
    times = time_graphs(graphs, CALLS)
    copy = times["copy"][0]
    out = []
    for name, (us, spread) in times.items():
        out.append({"norm": norm, "hidden": hidden, "rows": rows, "megabytes": megabytes, "provider": name,
                    "us": round(us, 3), "spread": round(spread, 3), "share": round(copy / us, 3),
                    "tb_s": round(moved / us / 1e6, 3), "note": notes.pop(name, "")})  # fmt: skip
    return out + [{"norm": norm, "hidden": hidden, "megabytes": megabytes, "provider": n, "us": None, "note": t}
                  for n, t in notes.items()]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--norms", nargs="*", default=["rms_norm", "layer_norm"])
    parser.add_argument("--hidden", type=int, nargs="*", default=HIDDEN)
    parser.add_argument("--megabytes", type=float, nargs="*", default=MEGABYTES)
    parser.add_argument("--warps", type=int, nargs="*", default=[], help="--variants also with these")
    ways = f"also time our kernel in these ways: {', '.join(VARIANTS)}; none named: in all"
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, metavar="NAME", help=ways)
    arguments = parser.parse_args()
    records = []
    variants = () if arguments.variants is None else arguments.variants or VARIANTS
    for norm in arguments.norms:
        for hidden in arguments.hidden:
            for megabytes in arguments.megabytes:
                here = run(norm, hidden, megabytes, variants, arguments.warps)
                records += here
                cells = "  ".join(
                    f"{r['provider']} {r['us']:.1f} ({r['share']:.2f})" if r["us"] else f"{r['provider']}: {r['note']}"
                    for r in sorted(here, key=lambda r: r["us"] or 1e9)
                )
                print(norm, hidden, f"{megabytes:g} MB |", cells, flush=True)
                if arguments.out:
                    write_run(arguments.out, machine("one GPU"), records)


if __name__ == "__main__":
    main()
