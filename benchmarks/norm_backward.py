"""Time the local kernel of a norm's backward against Inductor and Liger-Kernel (where it is installed).

    python benchmarks/norm_backward.py --out results.json

    dx = backward of the norm + the residual's gradient,  dweight = sum over rows of dy * n

Each provider gets the same bf16 tensors: the gradient, the norm's input, its rstd in float32 (LayerNorm: its mean too),
the weight and the residual's gradient, as a training graph holds them. Liger's backward adds no residual gradient, so
PyTorch's add comes behind it, and it is timed for RMSNorm only. "share" is the bytes that must move (three inputs, one
output) over the time, as a share of what a copy of as many bytes reaches in the same run. Captures, rotation and turns
are those of norm.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import machine
from norm import CALLS, capture, captures_of
from records import write_run

from tpfuse.kernels.bench.virtual import time_graphs
from tpfuse.kernels.norm_backward import NormBackwardCall, norm_backward

HIDDEN = (2048, 4096, 7168, 8192)
ROWS = (64, 512, 2048, 4096, 8192)
EPS = 1e-6
BF16 = torch.bfloat16


def ours(norm: str) -> Callable:
    def call(dy: Tensor, h: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor, residual: Tensor) -> Any:
        layer = norm == "layer_norm"
        out = norm_backward(
            NormBackwardCall(
                dy, h, mean, rstd, weight, residual, norm=norm, eps=EPS, out_dtype=dy.dtype, want_weight=True,
                want_bias=layer,
            )
        )  # fmt: skip
        return out.dx, out.dweight, out.dbias

    return call


def formula(dy: Tensor, h: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor, residual: Tensor) -> Any:
    """What a training graph holds, operation by operation; in float64 where its inputs are."""
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    n = (h.to(wide) - (0.0 if mean is None else mean)) * rstd
    g = dy.to(wide) * weight.to(wide)
    dx = g - n * (g * n).mean(-1, keepdim=True)
    if mean is not None:
        dx = dx - g.mean(-1, keepdim=True)
    dbias = None if mean is None else dy.to(wide).sum(0)
    return (dx * rstd + residual.to(wide)).to(dy.dtype), (dy.to(wide) * n).sum(0), dbias


def liger(norm: str) -> Callable | None:
    try:
        from liger_kernel.ops.rms_norm import rms_norm_backward
        from liger_kernel.ops.utils import calculate_settings
    except ImportError:
        return None

    def call(dy: Tensor, h: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor, residual: Tensor) -> Any:
        block, warps = calculate_settings(h.shape[-1])
        dx, dweight = rms_norm_backward(dy, h, weight, rstd.view(-1), 0.0, 0, block, warps, False, None)[:2]
        return dx + residual, dweight, None

    return call if norm == "rms_norm" else None


def run(norm: str, hidden: int, rows: int) -> list[dict]:
    moved = 4 * rows * hidden * 2
    count = max(2, min(12, (512 << 20) // moved + 1))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.float32).to(BF16)

    weight, sets = draw(hidden), []
    for _ in range(count):
        dy, h, residual = draw(rows, hidden), draw(rows, hidden), draw(rows, hidden)
        mean = h.float().mean(-1, keepdim=True) if norm == "layer_norm" else None
        centred = h.float() - (0.0 if mean is None else mean)
        sets.append((dy, h, mean, torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS), weight, residual))
    sources = [torch.empty(moved // 2, dtype=torch.int8, device="cuda") for _ in range(count)]
    torch._dynamo.reset()
    calls = {"ours": ours(norm), "inductor": torch.compile(formula, dynamic=False), "liger": liger(norm)}
    truth = formula(*(t if t is None else t.double() for t in sets[0]))
    timed: dict[str, tuple[Callable, list[tuple]]] = {}
    for name, fn in calls.items():
        if fn is None:
            continue
        for got, right in zip(fn(*sets[0]), truth, strict=True):
            if right is not None:
                error = ((got.double() - right).norm() / right.norm()).item()
                if not error < 6e-3:
                    raise SystemExit(f"{name}, {norm}, {rows} rows of {hidden}: an error of {error:.1e}")
        timed[name] = fn, sets
    timed["copy"] = lambda a: torch.empty_like(a).copy_(a), [(source,) for source in sources]
    graphs: dict[str, list[torch.cuda.CUDAGraph]] = {name: [] for name in timed}
    for _ in range(captures_of(rows * hidden * 2 / (1 << 20))):
        for name, each in graphs.items():
            each.append(capture(*timed[name]))
    times = time_graphs(graphs, CALLS)
    copy = times["copy"][0]
    return [
        {"norm": norm, "hidden": hidden, "rows": rows, "provider": name, "us": round(us, 3),
         "spread": round(spread, 3), "share": round(copy / us, 3)}
        for name, (us, spread) in times.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--norms", nargs="*", default=["rms_norm", "layer_norm"])
    parser.add_argument("--hidden", type=int, nargs="*", default=HIDDEN)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    arguments = parser.parse_args()
    records = []
    for norm in arguments.norms:
        for hidden in arguments.hidden:
            for rows in arguments.rows:
                here = run(norm, hidden, rows)
                records += here
                cells = "  ".join(f"{r['provider']} {r['us']:.1f} ({r['share']:.2f})" for r in here)
                print(norm, hidden, rows, "|", cells, flush=True)
                if arguments.out:
                    write_run(arguments.out, machine("one GPU"), records)


if __name__ == "__main__":
    main()
