"""Whole decoder layers with virtual ranks on one GPU: what the boundaries take of a layer, and what fusing them gives.

    python benchmarks/layers.py --out results.json                     N = 2, 4, 8; decode 1, 8, 64; prefill 512, 2048
    python benchmarks/layers.py --worlds 2 --decode 1 16 --prefill     a slice of it
    python benchmarks/layers.py --plot results.json picture.png

A stack of Llama-3-8B-sized layers is cut for N ranks and compiled as one graph. One compiled graph serves every virtual
rank: weights are its inputs, and `kernels.groups.injected` says whose workspace a call uses. Each rank's step is
captured on its own stream into one CUDA graph. Nothing runs before or during capture: kernels are only loaded.

    tpfuse     torch.compile(backend="tpfuse"), every all-reduce + add + norm one kernel
    unfused    torch.compile, each all-reduce our own fastest kernel on the same pointers, add + norm by Inductor
    no sum     torch.compile without the all-reduces: wrong results; what the rest of the layer takes

All ranks share one GPU, so its memory serves N ranks' weights in turn: a layer takes about as long as the uncut layer,
and the boundary's share of it is smaller than on N linked GPUs. Outputs are compared with the uncut stack.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import plots
from machine import machine
from records import write, write_run

from tpfuse.kernels.bench.virtual import VirtualRanks, time_graphs
from tpfuse.kernels.call import Call
from tpfuse.kernels.rendezvous import injected, workspace_of
from tpfuse.kernels.symmetric import pieces
from tpfuse.kernels.symmetric.dispatch import choose
from tpfuse.kernels.symmetric.operands import Launch

CONTEXT = 1024  # tokens in the cache of each decoded sequence
EPS = 1e-5


@dataclass(frozen=True)
class Sizes:
    """Of Llama-3-8B."""

    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    layers: int = 4


@dataclass(frozen=True)
class Record:
    """us: of one layer, median, or None where the output was wrong; error: relative, of the stack's output against the
    uncut stack in the same dtype."""

    world: int
    phase: str
    rows: int
    provider: str
    us: float | None
    spread: float
    error: float | None


WRONG = 3e-2  # two right stacks differ by about 1e-2


# -- the model --------------------------------------------------------------------------------------------------------


def draw_weights(sizes: Sizes) -> dict[str, list[Tensor]]:
    g = torch.Generator(device="cuda").manual_seed(0)

    def draw(*shape: int) -> list[Tensor]:
        return [
            (torch.randn(*shape, device="cuda", generator=g) * shape[-1] ** -0.5).to(torch.bfloat16)
            for _ in range(sizes.layers)
        ]

    width, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    count = sizes.layers + 1
    norms = [[torch.ones(sizes.hidden, device="cuda", dtype=torch.bfloat16) for _ in range(count)] for _ in range(2)]
    return {
        "q": draw(width, sizes.hidden), "k": draw(kv, sizes.hidden), "v": draw(kv, sizes.hidden),
        "o": draw(sizes.hidden, width), "gate": draw(sizes.inner, sizes.hidden), "up": draw(sizes.inner, sizes.hidden),
        "down": draw(sizes.hidden, sizes.inner), "attn_norm": norms[0], "mlp_norm": norms[1],
    }  # fmt: skip


def cut(weights: dict[str, list[Tensor]], rank: int, world: int) -> dict[str, list[Tensor]]:
    """One rank's part: outputs of q, k, v, gate, up; inputs of o, down. q, k, v and gate, up become one matrix each."""
    out = {name: [w.chunk(world, 0)[rank] for w in weights[name]] for name in ("q", "k", "v", "gate", "up")}
    result = {}
    for packed, names in (("qkv", ("q", "k", "v")), ("gate_up", ("gate", "up"))):
        result[packed] = [torch.cat(parts) for parts in zip(*(out[name] for name in names), strict=True)]
    result |= {name: [w.chunk(world, 1)[rank].contiguous() for w in weights[name]] for name in ("o", "down")}
    return result | {name: weights[name] for name in ("attn_norm", "mlp_norm")}


def draw_caches(sizes: Sizes, world: int, phase: str, rows: int) -> list[list[tuple[Tensor, Tensor]]]:
    """[rank][layer] -> keys and values; nothing for prefill."""
    if phase == "prefill":
        return [[] for _ in range(world)]
    g = torch.Generator(device="cuda").manual_seed(1)
    shape = rows, sizes.kv_heads, CONTEXT, sizes.head_dim
    whole = [
        tuple(torch.randn(shape, device="cuda", generator=g, dtype=torch.bfloat16) for _ in range(2))
        for _ in range(sizes.layers)
    ]
    return [[tuple(t.chunk(world, 1)[rank].contiguous() for t in pair) for pair in whole] for rank in range(world)]


def stack_of(sizes: Sizes, world: int, all_reduce: Callable[[Tensor], Tensor]) -> Callable:
    """`step(x, weights, caches)`: x [rows, hidden]; with caches every row is one sequence's next token, else all rows
    are one sequence."""
    heads, kv_heads, dim = sizes.heads // world, sizes.kv_heads // world, sizes.head_dim

    def attention(h: Tensor, qkv: Tensor, cache: Any) -> Tensor:
        rows = h.shape[0]
        q, k, v = F.linear(h, qkv).split([heads * dim, kv_heads * dim, kv_heads * dim], -1)
        if cache is None:
            q, k, v = (t.view(1, rows, -1, dim).transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).reshape(rows, heads * dim)
        keys, values = cache
        keys[:, :, -1], values[:, :, -1] = k.view(rows, kv_heads, dim), v.view(rows, kv_heads, dim)
        out = F.scaled_dot_product_attention(q.view(rows, heads, 1, dim), keys, values, enable_gqa=True)
        return out.reshape(rows, heads * dim)

    def step(x: Tensor, weights: dict[str, list[Tensor]], caches: list) -> Tensor:
        shape = (sizes.hidden,)
        h = F.rms_norm(x, shape, weights["attn_norm"][0], EPS)
        for i in range(sizes.layers):
            attended = attention(h, weights["qkv"][i], caches[i] if caches else None)
            x = x + all_reduce(F.linear(attended, weights["o"][i]))
            h = F.rms_norm(x, shape, weights["mlp_norm"][i], EPS)
            gate, up = F.linear(h, weights["gate_up"][i]).chunk(2, -1)
            x = x + all_reduce(F.linear(F.silu(gate) * up, weights["down"][i]))
            h = F.rms_norm(x, shape, weights["attn_norm"][i + 1], EPS)
        return h

    return step


# -- the three ways to pay the sums -----------------------------------------------------------------------------------


@torch.library.custom_op("tpfuse_bench::all_reduce", mutates_args=())
def own_all_reduce(x: Tensor, group_name: str) -> Tensor:
    """A plain all-reduce by the kernel that dispatch picks at this size."""
    ws = workspace_of(group_name, x.device)
    entry = choose(ws.device_name, ws.world, x.shape[-1], x.element_size(), x.numel() // x.shape[-1])
    op = Call(x, norm="none", out_dtype=x.dtype, hidden_dtype=None, eps=0.0)
    done = pieces.run(entry, op, ws)
    if done is None:  # the table says functional; there is none here
        done = pieces.run(dataclasses.replace(entry, kernel="two_shot"), op, ws)
    return done[0].y


@own_all_reduce.register_fake
def _(x: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(x)


def providers(sizes: Sizes, world: int) -> dict[str, Callable]:
    name = dist.group.WORLD.group_name
    paid = {
        "tpfuse": lambda x: funcol.all_reduce(x, "sum", dist.group.WORLD),
        "unfused": lambda x: own_all_reduce(x, name),
        "no sum": lambda x: x,
    }
    steps = {provider: stack_of(sizes, world, all_reduce) for provider, all_reduce in paid.items()}
    options = {"expect_fused": 2 * sizes.layers}
    from tpfuse.backend import tpfuse as backend

    def fused(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        return backend(gm, inputs, options=options)

    compiled = {"tpfuse": torch.compile(steps["tpfuse"], backend=fused, dynamic=False)}
    return compiled | {n: torch.compile(steps[n], dynamic=False) for n in ("unfused", "no sum")}


# -- running ----------------------------------------------------------------------------------------------------------


class only_loading:
    """Within it the boundary kernels are compiled and loaded, and not launched: they would wait for ranks that are yet
    to come."""

    def __enter__(self) -> None:
        self.run = Launch.run

        def load(launch: Launch) -> tuple:
            launch.load()
            return launch.out, launch.sum

        Launch.run = load

    def __exit__(self, *_: Any) -> None:
        Launch.run = self.run


class Case:
    """One size: inputs of every rank, and the uncut stack's answer."""

    def __init__(self, sizes: Sizes, world: int, phase: str, rows: int, ranks: VirtualRanks) -> None:
        self.sizes, self.world, self.phase, self.rows, self.ranks = sizes, world, phase, rows, ranks
        g = torch.Generator(device="cuda").manual_seed(2)
        self.x = torch.randn(rows, sizes.hidden, device="cuda", generator=g).to(torch.bfloat16)
        weights = draw_weights(sizes)
        self.weights = [cut(weights, rank, world) for rank in range(world)]
        self.caches = draw_caches(sizes, world, phase, rows)
        uncut = stack_of(sizes, 1, lambda x: x)
        with torch.no_grad():
            self.truth = uncut(self.x, cut(weights, 0, 1), draw_caches(sizes, 1, phase, rows)[0])

    @torch.no_grad()
    def load(self, compiled: Callable, ranks: range) -> None:
        name = dist.group.WORLD.group_name
        workspaces = self.ranks.workspaces
        with only_loading():
            for rank in ranks:
                with injected(name, workspaces[rank]):
                    compiled(self.x, self.weights[rank], self.caches[rank])
        torch.cuda.synchronize()

    @torch.no_grad()
    def capture(self, compiled: Callable) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        self.load(compiled, range(self.world))
        name, outs = dist.group.WORLD.group_name, []
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="relaxed"):
            current = torch.cuda.current_stream()
            for rank, stream in enumerate(self.ranks.streams):
                stream.wait_stream(current)
                with torch.cuda.stream(stream), injected(name, self.ranks.workspaces[rank]):
                    outs.append(compiled(self.x, self.weights[rank], self.caches[rank]))
            for stream in self.ranks.streams:
                current.wait_stream(stream)
        torch.cuda.synchronize()
        return graph, outs

    def measure(self, compiled: dict[str, Callable]) -> list[Record]:
        graphs, errors = {}, {}
        for provider, step in compiled.items():
            graph, outs = self.capture(step)
            for out in outs:
                out.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            graphs[provider] = graph
            if provider != "no sum":
                right = self.truth.float()
                errors[provider] = max(((out.float() - right).norm() / right.norm()).item() for out in outs)
        times = time_graphs(graphs, calls=self.sizes.layers, rounds=9, replays=5)
        records = []
        for provider, (us, spread) in times.items():
            error = errors.get(provider)
            right = error is None or error < WRONG  # a NaN is wrong
            median = round(us, 2) if right else None
            records.append(Record(self.world, self.phase, self.rows, provider, median, round(spread, 2), error))
        return records


def cases_of(arguments: argparse.Namespace) -> list[tuple[str, int]]:
    return [("decode", rows) for rows in arguments.decode] + [("prefill", rows) for rows in arguments.prefill]


def save(records: list[Record], arguments: argparse.Namespace) -> None:
    """After each size, so that a run that is cut short leaves what it measured."""
    if arguments.out:
        model = {"sizes": asdict(Sizes(layers=arguments.layers)), "context": CONTEXT}
        write_run(arguments.out, machine("virtual ranks on one GPU") | model, records)


def run_world(world: int, arguments: argparse.Namespace) -> None:
    # PyTorch's group of one process that says it has `world` ranks; its collectives do nothing.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    sizes = Sizes(layers=arguments.layers)
    records = []
    ranks = VirtualRanks(world, slot_bytes=64 << 20)
    # Here a rank that waits shares the device with a rank that still multiplies. With as many waiting programs as fit,
    # N = 4 with 64 sequences waited for ever (most likely the matrix kernels found no pair of free multiprocessors).
    programs = ranks.multiprocessors // world // 2
    ranks.workspaces = [dataclasses.replace(ws, max_blocks=programs) for ws in ranks.workspaces]
    for phase, rows in cases_of(arguments):
        torch.compiler.reset()
        case = Case(sizes, world, phase, rows, ranks)
        compiled = providers(sizes, world)
        if arguments.load:
            for step in compiled.values():
                case.load(step, range(1))
            continue
        here = case.measure(compiled)
        records += here
        save(records, arguments)
        by = {r.provider: r for r in here}
        cells = [f"{r.provider} {r.us:.1f}±{r.spread:.1f}" if r.us else f"{r.provider} WRONG" for r in here]
        cells += [f"error of {r.provider} {r.error:.1e}" for r in here if r.error is not None]
        ratio = (by["unfused"].us or float("nan")) / (by["tpfuse"].us or float("nan"))
        print(f"N={world} {phase} {rows}: unfused/tpfuse {ratio:.3f}", *cells, sep="  ", flush=True)
    dist.destroy_process_group()


def side_by_side(arguments: argparse.Namespace) -> None:
    """Fill the compile caches: one process for each size and world."""
    running = []
    for world in arguments.worlds:
        for phase, rows in cases_of(arguments):
            one = ["--decode", str(rows), "--prefill"] if phase == "decode" else ["--prefill", str(rows), "--decode"]
            common = ["--load", "--layers", str(arguments.layers), "--worlds", str(world)]
            running.append(subprocess.Popen([sys.executable, __file__, *common, *one], stdout=subprocess.DEVNULL))
    for process in running:
        try:
            process.wait(timeout=arguments.limit)
        except subprocess.TimeoutExpired:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 8, 64], help="sequences, one new token each")
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048], help="tokens of one sequence")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("RESULTS", "PICTURE"))
    parser.add_argument("--limit", type=float, default=120, help="seconds for compiling, and for measuring one world")
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
    if arguments.plot:
        plots.layers(*arguments.plot)
        return
    if len(arguments.worlds) == 1 or arguments.load:
        run_world(arguments.worlds[0], arguments)
        return
    side_by_side(arguments)
    merged: dict[str, Any] = {}
    parts = arguments.out or Path(tempfile.mkdtemp(), "layers.json")
    for world in arguments.worlds:
        part = Path(f"{parts}.{world}")
        own = ["--worlds", str(world), "--layers", str(arguments.layers), "--out", str(part)]
        own += ["--decode", *map(str, arguments.decode), "--prefill", *map(str, arguments.prefill)]
        try:
            subprocess.run([sys.executable, __file__, *own], check=True, timeout=arguments.limit)
        except (subprocess.SubprocessError, OSError) as error:
            print(f"N={world}: {error}", flush=True)
            continue
        data = json.loads(part.read_text())
        part.unlink()
        merged = {"machine": data["machine"], "records": merged.get("records", []) + data["records"]}
        if arguments.out:
            write(arguments.out, merged)


if __name__ == "__main__":
    main()
