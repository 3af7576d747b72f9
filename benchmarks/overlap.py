"""A product and the boundary behind it, one after the other and overlapped, on 2 linked GPUs.

    torchrun --nproc-per-node 2 benchmarks/overlap.py --out results.json      o_proj and down_proj of Llama 3 8B and 70B
    ... --models 8b --products o_proj --rows 4096 8192 --rounds 7             a slice of it

The product is a row-wise cut linear layer's, [rows, k] x [k, hidden]; the boundary adds the ranks' parts and the
residual and normalises. Every way gives all rows of y and h to both ranks.

    product                    by itself
    one_shot, copied           the boundary by itself, by that kernel; the larger of the product and the faster of these
                               is the limit of any overlap
    product, then ...          one after the other
    overlapped                 by the copied kernel, which is handed the product: rows travel while later rows are
                               multiplied
    NCCL + Inductor            the product, NCCL's all-reduce, Inductor's add + norm

and the form of sequence parallelism, in which each rank adds and normalises half of the rows, y is gathered, and h
stays scattered:

    scattered                  by the exchanged kernel, behind no product
    scattered, overlapped      by the exchanged kernel, which is handed the product
    scattered, NCCL + Inductor the product, NCCL's reduce-scatter, Inductor's add + norm of own rows, NCCL's gather
    async TP                   torch's own product + reduce-scatter, add + norm of own rows, a gather of y

Each way is captured in a CUDA graph of several calls; times are the slower rank's, medians of alternating rounds, in
microseconds a call. y of 512 rows is compared with float64's, and all of y and h bit for bit between the ranks.
`overlap_ways.py` measures the ways that were tried before one was chosen.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import join_ranks, machine
from providers import inductor_add_norm
from records import write_run

from tpfuse.kernels.call import Call
from tpfuse.kernels.rendezvous import workspace_of
from tpfuse.kernels.symmetric import pieces
from tpfuse.kernels.symmetric.entries import Entry
from tpfuse.kernels.symmetric.exchanged import exchanged

EPS = 1e-6  # of `inductor_add_norm`
BF16 = torch.bfloat16
CHECKED = 512
#: Of a model: hidden, and k of each product before it is cut.
MODELS = {"8b": (4096, {"o_proj": 4096, "down_proj": 14336}), "70b": (8192, {"o_proj": 8192, "down_proj": 28672})}
#: Ways that are no whole.
PARTS = ("product", "boundary", "one_shot", "copied", "copy", "local part", "scattered")
#: Ways whose h is of own rows, or whose sum NCCL makes.
Y_ALONE = ("NCCL + Inductor", "async TP", "scattered, overlapped", "scattered, NCCL + Inductor")


@dataclass(frozen=True)
class Record:
    """us: a call. error: of y, relative to float64's. same: both ranks hold the same bits. note: what failed."""

    world: int
    model: str
    product: str
    hidden: int
    k: int
    rows: int
    provider: str
    us: float | None
    spread: float = 0.0
    error: float | None = None
    same: bool | None = None
    note: str = ""


class Layer:
    """One product and its boundary, of this rank."""

    def __init__(self, rows: int, k: int, hidden: int, device: torch.device) -> None:
        own = torch.Generator(device).manual_seed(1 + dist.get_rank())
        same = torch.Generator(device).manual_seed(9)

        def numbers(*shape: int, by: torch.Generator = own, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=by, device=device, dtype=BF16) * scale

        self.rows, self.hidden, self.group = rows, hidden, dist.group.WORLD
        self.a, self.w = numbers(rows, k), numbers(hidden, k, scale=k**-0.5)
        self.residual, self.weight = numbers(rows, hidden, by=same), numbers(hidden, by=same)
        self.x = torch.empty_like(self.residual)
        self.call = Call(self.x, self.residual, weight=self.weight, norm="rms_norm", eps=EPS, out_dtype=BF16,
                         hidden_dtype=BF16, group_name=self.group.group_name, overlap=True)  # fmt: skip
        self.ws = workspace_of(self.group.group_name, device, copies=True)
        self.out: tuple[Tensor, Tensor | None] = self.residual, None

    def multiply(self, first: int, stop: int) -> None:
        torch.mm(self.a[first:stop], self.w.t(), out=self.x[first:stop])

    def product(self) -> None:
        self.multiply(0, self.rows)

    def by(self, kernel: str, call: Call | None = None) -> None:
        entry = Entry("*", 2, self.hidden, self.rows, kernel, warps=16)
        self._keep(pieces.run(entry, call or self.call, self.ws))

    def overlapped(self) -> None:
        self.by("copied", dataclasses.replace(self.call, product=self.multiply))

    def scattered(self, product: bool) -> None:
        """y of all rows, h of the own ones."""
        half = slice(dist.get_rank() * self.rows // 2, (dist.get_rank() + 1) * self.rows // 2)
        given = {"residual": self.residual[half], "product": self.multiply if product else None}
        self._keep(exchanged(dataclasses.replace(self.call, **given), self.ws).run())

    def scattered_nccl(self) -> None:
        self.product()
        part = self.x.new_empty(self.rows // 2, self.hidden)
        dist.reduce_scatter_tensor(part, self.x)
        self._gather(part)

    def nccl(self) -> None:
        self.product()
        dist.all_reduce(self.x)
        self.out = inductor_add_norm()(self.x, self.residual, self.weight)

    def async_tp(self) -> None:
        part = torch.ops.symm_mem.fused_matmul_reduce_scatter(self.a, self.w.t(), "sum", 0, self.group.group_name)
        self._gather(part)

    def _gather(self, part: Tensor) -> None:
        first = dist.get_rank() * len(part)
        y, _ = inductor_add_norm()(part, self.residual[first : first + len(part)], self.weight)
        dist.all_gather_into_tensor(whole := torch.empty_like(self.x), y)
        self.out = whole, None

    def _keep(self, done: Any) -> None:
        assert done is not None, "no kernel for this boundary"
        self.out = done[0].y, done[0].residual_out


def ways_of(layer: Layer) -> dict[str, Callable[[], Any]]:
    def after(kernel: str) -> Callable[[], None]:
        def run() -> None:
            layer.product()
            layer.by(kernel)

        return run

    return {
        "product": layer.product,
        "one_shot": lambda: layer.by("one_shot"),
        "copied": lambda: layer.by("copied"),
        "product, then one_shot": after("one_shot"),
        "product, then copied": after("copied"),
        "overlapped": layer.overlapped,
        "NCCL + Inductor": layer.nccl,
        "scattered": lambda: layer.scattered(False),
        "scattered, overlapped": lambda: layer.scattered(True),
        "scattered, NCCL + Inductor": layer.scattered_nccl,
        "async TP": layer.async_tp,
    }


# -- measuring --------------------------------------------------------------------------------------------------------


def reference(layer: Layer) -> Tensor:
    """y of the first rows in float64."""
    h = layer.a[:CHECKED].double() @ layer.w.double().t()
    dist.all_reduce(h)
    h += layer.residual[:CHECKED].double()
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS) * layer.weight.double()


def same_everywhere(*tensors: Tensor | None) -> bool:
    given = [t for t in tensors if t is not None]
    mine = torch.cat([t.contiguous().view(-1).view(torch.int32) for t in given])
    other = mine.clone()
    dist.broadcast(other, src=0)
    differ = (other != mine).any().to(torch.int32)
    dist.all_reduce(differ)
    return differ.item() == 0


def captured(call: Callable[[], Any], calls: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            call()
    torch.cuda.synchronize()
    return graph


def together(value: Any) -> list[Any]:
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def measure(
    layer: Any, ways: dict[str, Callable[[], Any]], about: Record, rounds: int, calls: int
) -> list[Record]:  # fmt: skip
    right = reference(layer)
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    found: dict[str, Record] = {}
    for name, call in ways.items():
        note = ""
        try:
            call()
            torch.cuda.synchronize()
        except Exception as failure:  # the other ways may still run
            note = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
        if failed := next((each for each in together(note) if each), ""):
            found[name] = replace(about, provider=name, note=failed)
            continue
        graphs[name] = captured(call, calls)
        dist.barrier()
        for t in layer.out:
            if t is not None and name not in PARTS:
                t.zero_()
        graphs[name].replay()
        torch.cuda.synchronize()
        record = replace(about, provider=name)
        if name not in PARTS:
            error = ((layer.out[0][:CHECKED].double() - right).norm() / right.norm()).item()
            whole = layer.out if name not in Y_ALONE else layer.out[:1]
            record = replace(record, error=round(error, 6), same=same_everywhere(*whole))
        found[name] = record
    for name, (us, spread) in in_turn(graphs, rounds, calls).items():
        found[name] = replace(found[name], us=round(us, 1), spread=round(spread, 1))
    return list(found.values())


def in_turn(graphs: dict[str, torch.cuda.CUDAGraph], rounds: int, calls: int) -> dict[str, tuple[float, float]]:
    """(median, distance between the quartiles) of the slower rank's microseconds a call."""
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            dist.barrier()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graph.replay()
            start.record()
            graph.replay()
            graph.replay()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) * 1000 / calls / 2)
    everyone = together(samples)
    out = {}
    for name in graphs:
        slower = [max(each) for each in zip(*(rank[name] for rank in everyone), strict=True)]
        quarters = statistics.quantiles(slower, n=4)
        out[name] = statistics.median(slower), quarters[2] - quarters[0]
    return out


def parsed(description: str | None, models: list[str], rows: list[int]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=models)
    parser.add_argument("--products", nargs="+", default=["o_proj", "down_proj"])
    parser.add_argument("--rows", type=int, nargs="+", default=rows)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=4, help="in one graph")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def run(
    arguments: argparse.Namespace, layer_of: Callable[..., Any], ways: Callable[[Any], dict[str, Callable[[], Any]]],
    show: Callable[[list[Record]], None],
) -> None:  # fmt: skip
    """Measure and record every size. `layer_of(rows, k, hidden, device)` makes one, `ways` its ways."""
    rank, device = join_ranks(120)
    world = dist.get_world_size()
    if world != 2 or device.type != "cuda":
        raise SystemExit(f"{world} ranks on {device.type}; this is for 2 linked GPUs")
    records: list[Record] = []
    for name in arguments.models:
        hidden, products = MODELS[name]
        for product in arguments.products:
            for rows in arguments.rows:
                torch.compiler.reset()
                k = products[product] // world
                about = Record(world, name, product, hidden, k, rows, "", None)
                layer = layer_of(rows, k, hidden, device)
                here = measure(layer, ways(layer), about, arguments.rounds, arguments.calls)
                records += here
                if rank == 0:
                    show(here)
                    if arguments.out:
                        write_run(arguments.out, machine("2 linked GPUs, one process each"), records)
    dist.destroy_process_group()


def _show(records: list[Record]) -> None:
    first, by = records[0], {r.provider: r.us or float("nan") for r in records}
    limit = max(by["product"], min(by["one_shot"], by["copied"]))
    cells = [f"{r.provider} {r.us or r.note}{'' if r.same in (True, None) else ' RANKS DIFFER'}" for r in records]
    print(f"{first.model} {first.product} {first.rows}: {by['overlapped'] / limit:.2f} of the limit", *cells, sep="  ",
          flush=True)  # fmt: skip


if __name__ == "__main__":
    run(parsed(__doc__, list(MODELS), [1024, 2048, 4096, 8192, 16384]), Layer, ways_of, _show)
