"""What stands in the way of an overlap: parts of it left out, and the power that each way draws, on 2 linked GPUs.

    torchrun --nproc-per-node 2 benchmarks/overlap_power.py --out results.json
    ... --products o_proj --rows 8192 --prefill             a slice of it, without a prefill

Needs the package nvidia-ml-py. The products and boundaries of `overlap.py`, Llama 3 8B's sizes, and with them the
products that read the result: gate and up behind o_proj, q, k and v behind down_proj.

    product, products in chunks, boundary       by themselves; chunks as the copied kernel makes them
    copies, add + norm                          the copied kernel without the other, behind no product
    chunks + copies, chunks + add + norm        the copied kernel without the third part
    one after the other, overlapped             the product and the boundary, by the one-shot and by the copied kernel
    ..., then readers                           the same, and the products that read y
    exchanged, then readers                     by the exchanged kernel (each rank normalises half), then those products
    exchanged, readers of halves                the same, but they begin with the rank's own half, while the other comes

and a prefill of 8192 tokens, Llama with 4 layers, by end_to_end.py's model: Inductor; tpfuse; tpfuse, overlapped; and
Inductor's own step with every all-reduce left out, which is wrong and sends nothing: what it would give to hide
all that is sent.

Ways are CUDA graphs, each replayed for as long as --seconds says without a pause, in --rounds turns, so that the device
is as warm as in a model that is served. us: the slower rank's, medians of the turns; watts and mhz: of the rank that
draws more. Results are not compared: overlap.py does so for the ways that are shipped.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from overlap import BF16, MODELS, Layer, captured, together
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import join_ranks, machine
from models import Run, build
from power import Drawn, Meter
from records import write_run

from tpfuse.backend import tpfuse as tpfuse_backend
from tpfuse.kernels.call import Call
from tpfuse.kernels.symmetric.copied import Whole, copied
from tpfuse.kernels.symmetric.copies import Copies, chunks_of, slot
from tpfuse.kernels.symmetric.exchanged import exchanged, halves_of
from tpfuse.passes.plan.sites import DEFAULT_REWRITES, OVERLAP

HIDDEN, PRODUCTS = MODELS["8b"]
#: Columns, before they are cut, of the products that read what is behind one.
READERS = {"o_proj": (14336, 14336), "down_proj": (4096, 1024, 1024)}
ONCE = 4  # calls in one graph


@dataclass(frozen=True)
class Record:
    """us: a call; spread: between the quartiles of the turns. watts, mhz: see `power.Drawn`. limit_watts: what the
    device may draw."""

    world: int
    model: str
    product: str
    rows: int
    provider: str
    us: float = 0.0
    spread: float = 0.0
    watts: float = 0.0
    mhz: float = 0.0
    limit_watts: float = 0.0


class Read(Layer):
    """A product, its boundary, and the products that read y, of this rank."""

    def __init__(self, rows: int, product: str, device: torch.device) -> None:
        super().__init__(rows, PRODUCTS[product] // dist.get_world_size(), HIDDEN, device)
        widths = [columns // dist.get_world_size() for columns in READERS[product]]
        self.weights = [torch.randn(n, HIDDEN, dtype=BF16, device=device) * HIDDEN**-0.5 for n in widths]
        self.read = [torch.empty(rows, n, dtype=BF16, device=device) for n in widths]
        share = rows // 2
        self.own = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
        self.theirs = slice((1 - dist.get_rank()) * share, (2 - dist.get_rank()) * share)
        self.given: Call = replace(self.call, product=self.multiply)
        self.half: Call = replace(self.given, residual=self.residual[self.own])

    def readers(self, y: Tensor | None = None, rows: slice = slice(None)) -> None:
        """The products that read y, or that of some rows."""
        y = self.out[0] if y is None else y
        for weight, into in zip(self.weights, self.read, strict=True):
            torch.mm(y, weight.t(), out=into[rows])

    def chunked(self, product: bool, copies: bool, norm: bool) -> None:
        """The copied kernel, or parts of it."""
        launch = copied(self.given, self.ws)
        steps = Whole(self.ws, self.x, self.multiply if product else None)

        def finish(first: int, stop: int) -> None:
            if norm:
                launch.finish(first, stop)

        if copies:
            steps.run(lambda *_: finish)
            return
        for part in (steps.multiply if product else None, finish):
            for first, stop in chunks_of(self.rows) if part is not None else ():
                part(first, stop)

    def readers_of_halves(self) -> None:
        """An exchange whose rows are read as they come: the peer's from the slot."""
        launch = exchanged(self.half, self.ws)
        row, share = launch.exchange.row, self.rows // 2
        x, y = (t.view(-1).view(torch.int32) for t in (self.x, launch.gathered))
        with Copies(self.ws, x) as copies:
            copies.begin()
            launch.exchange.send(copies, halves_of(share), self.theirs.start)
            self.multiply(self.own.start, self.own.stop)
            for i in range(2):
                copies.receive(i)
            launch.finisher(0, share)(0, share)
            copies.send(2, y[self.own.start * row : self.own.stop * row], share * row)
            self.readers(launch.gathered[self.own], self.own)
            copies.receive(2)
            there = slot(self.ws, share * row, BF16)[: share * self.hidden].view(share, self.hidden)
            self.readers(there, self.theirs)


def ways_of(layer: Read) -> dict[str, Callable[[], Any]]:
    def then(*steps: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for step in steps:
                step()

        return run

    def part(**parts: bool) -> Callable[[], None]:
        return lambda: layer.chunked(**({"product": False, "copies": False, "norm": False} | parts))

    def boundary() -> None:
        layer.by("one_shot")

    def exchange() -> None:
        layer.scattered(True)

    return {
        "product": layer.product,
        "products in chunks": part(product=True),
        "boundary": boundary,
        "copies": part(copies=True),
        "add + norm": part(norm=True),
        "chunks + copies": part(product=True, copies=True),
        "chunks + add + norm": part(product=True, norm=True),
        "one after the other": then(layer.product, boundary),
        "overlapped": layer.overlapped,
        "readers": layer.readers,
        "one after the other, then readers": then(layer.product, boundary, layer.readers),
        "overlapped, then readers": then(layer.overlapped, layer.readers),
        "exchanged, then readers": then(exchange, layer.readers),
        "exchanged, readers of halves": layer.readers_of_halves,
    }


# -- a step that sends nothing ----------------------------------------------------------------------------------------


class Silent(CustomGraphPass):
    """Leaves every all-reduce out."""

    def __call__(self, graph: fx.Graph) -> None:
        functional = torch.ops._c10d_functional
        for node in list(graph.nodes):
            if node.target is functional.all_reduce.default:
                for wait in list(node.users):
                    wait.replace_all_uses_with(node.args[0])
                    graph.erase_node(wait)
                graph.erase_node(node)

    def uuid(self) -> str:
        return "every all-reduce left out"


def steps_of(tokens: int, device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A prefill by each way, compiled."""
    step = build(Run("llama", "prefill", tokens, 4), device)
    overlapped = {"rewrites": [*DEFAULT_REWRITES, OVERLAP]}
    ways: dict[str, dict[str, Any]] = {
        "Inductor": {"backend": "inductor"},
        "tpfuse": {"backend": tpfuse_backend},
        "tpfuse, overlapped": {"backend": tpfuse_backend, "options": overlapped},
        "Inductor, nothing sent": {"backend": "inductor", "options": {"post_grad_custom_pre_pass": Silent()}},
    }
    for name, way in ways.items():
        compiled = torch.compile(step.call, fullgraph=True, dynamic=False, **way)
        for _ in range(3):
            compiled(*step.args)
        torch.cuda.synchronize()
        yield name, lambda compiled=compiled: compiled(*step.args)


# -- measuring --------------------------------------------------------------------------------------------------------


def microseconds(calls: Callable[[], Any], count: int) -> float:
    """Of a call, about."""
    calls()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        calls()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e6 / count


def measure(
    ways: Iterator[tuple[str, Callable[[], Any]]], about: Record, meter: Meter, once: int, seconds: float, rounds: int
) -> list[Record]:
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    counts: dict[str, int] = {}
    for name, call in ways:
        call()
        torch.cuda.synchronize()
        graphs[name] = captured(call, once)
        dist.barrier()
        took = microseconds(graphs[name].replay, 5)
        counts[name] = together(max(1, int(seconds * 1e6 / took)))[0]  # the same on both ranks
    found: dict[str, list[Drawn]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            dist.barrier()
            for _ in range(counts[name] // 3):  # until clocks have settled
                graph.replay()
            found[name].append(meter.over(graph.replay, counts[name]))
    return [_record(replace(about, provider=name), drawn, once, meter.limit) for name, drawn in found.items()]


def _record(about: Record, turns: list[Drawn], once: int, limit: float) -> Record:
    every = [[Drawn(**each) for each in rank] for rank in together([asdict(drawn) for drawn in turns])]
    us = [max(pair, key=lambda drawn: drawn.us).us / once for pair in zip(*every, strict=True)]
    more = max(every, key=lambda rank: statistics.median(drawn.watts for drawn in rank))
    quarters = statistics.quantiles(us, n=4) if len(us) > 1 else [0.0] * 3
    watts, mhz = (statistics.median(getattr(drawn, name) for drawn in more) for name in ("watts", "mhz"))
    return replace(about, us=round(statistics.median(us), 1), spread=round(quarters[2] - quarters[0], 1),
                   watts=round(watts), mhz=round(mhz), limit_watts=round(limit))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", nargs="*", choices=PRODUCTS, default=list(PRODUCTS))
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--prefill", type=int, nargs="*", default=[8192], help="tokens")
    parser.add_argument("--seconds", type=float, default=0.6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rank, device = join_ranks(120)
    if dist.get_world_size() != 2 or device.type != "cuda":
        raise SystemExit(f"{dist.get_world_size()} ranks on {device.type}; this is for 2 linked GPUs")
    meter, records = Meter(device), []
    for tokens in arguments.prefill:
        with torch.no_grad():
            about = Record(2, "llama", "prefill", tokens, "")
            records += measure(steps_of(tokens, device), about, meter, 1, arguments.seconds, arguments.rounds)
            _show(records, rank, arguments.out)
    for product in arguments.products:
        for rows in arguments.rows:
            torch.compiler.reset()
            ways, about = ways_of(Read(rows, product, device)), Record(2, "8b", product, rows, "")
            here = measure(iter(ways.items()), about, meter, ONCE, arguments.seconds, arguments.rounds)
            records += here
            _show(records, rank, arguments.out, here)
    torch.compiler.reset()
    dist.destroy_process_group()


def _show(records: list[Record], rank: int, out: Path | None, here: list[Record] | None = None) -> None:
    if rank == 0:
        for r in here or records:
            print(f"{r.product} {r.rows} {r.provider}: {r.us} ({r.spread}) us, {r.watts} W, {r.mhz} MHz", flush=True)
        if out:
            write_run(out, machine("2 linked GPUs, one process each"), records)


if __name__ == "__main__":
    main()
