"""Hugging Face's `generate` with `tp_plan="auto"` and a static cache: tokens a second, eager, Inductor and tpfuse.

    torchrun --nproc-per-node N benchmarks/generate.py --out results.json
    ... --batch 1 8 --tokens 128 --ways default          a slice of it
    torchrun --nproc-per-node 2 benchmarks/generate.py --tiny           on CPUs: a rehearsal

The model has Llama-3-8B's sizes, fewer layers, random weights; it is saved once and loaded by every rank. Each way has
a model of its own (`generate` keeps one compiled call a model) and is warmed up. A round runs `generate` once in every
way; time is the slowest rank's, of the whole call, prefill included; figures are medians of the rounds.

    eager                                       disable_compile=True
    inductor default, tpfuse default            compile_config=CompileConfig(backend=..., mode="default")
    inductor reduce-overhead, tpfuse ...        the same with torch.compile's own CUDA graphs
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from generation import loaded_models, rates_of
from machine import join_ranks, machine
from records import write_run

import tpfuse
from tpfuse.backend import tpfuse as tpfuse_backend

MODES = ("default", "reduce-overhead")


@dataclass(frozen=True)
class Record:
    """tokens_per_s: new tokens of all sequences over seconds of `generate`; spread: between the quartiles.

    same_tokens: the share of new tokens that are eager's (sums in bfloat16 may round otherwise, and tokens part there).
    """

    world: int
    batch: int
    prompt: int
    tokens: int
    layers: int
    provider: str
    tokens_per_s: float
    spread: float
    same_tokens: float
    fused: int


def ways_of(modes: list[str], everywhere: bool) -> dict[str, dict[str, Any]]:
    """Provider -> arguments of `generate`, which compiles on CPUs only when told to: `everywhere`."""
    from transformers import CompileConfig

    out: dict[str, dict[str, Any]] = {"eager": {"disable_compile": True}}
    for mode in modes:
        for name, backend in (("inductor", "inductor"), ("tpfuse", tpfuse_backend)):
            compiled = CompileConfig(backend=backend, mode=mode, fullgraph=True)
            compiled._compile_all_devices = everywhere
            out[f"{name} {mode}"] = {"compile_config": compiled}
    return out


def seconds_of(model: Any, ids: torch.Tensor, tokens: int, way: dict[str, Any]) -> tuple[float, torch.Tensor]:
    """One call of `generate` from a common start, and its new tokens."""
    dist.barrier()
    began = time.perf_counter()
    out = model.generate(
        ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, cache_implementation="static",
        pad_token_id=0, **way,
    )  # fmt: skip
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began, out[:, ids.shape[1] :]


def measure(models: dict[str, Any], ways: dict[str, dict], batch: int, arguments: argparse.Namespace) -> list[Record]:
    device = next(models["eager"].parameters()).device
    vocabulary = models["eager"].config.vocab_size
    ids = torch.randint(3, vocabulary, (batch, arguments.prompt), generator=torch.Generator().manual_seed(1)).to(device)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens, fused = {}, {}
    for name, way in ways.items():
        before = len(tpfuse.reports())
        for _ in range(3):
            _, tokens[name] = seconds_of(models[name], ids, arguments.tokens, way)
        fused[name] = max((report.fused_forward for report in tpfuse.reports()[before:]), default=0)
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            seconds[name].append(seconds_of(models[name], ids, arguments.tokens, way)[0])
    rates = rates_of(seconds, batch * arguments.tokens)
    records = []
    for name in ways:
        same = (tokens[name] == tokens["eager"]).float().mean().item()
        records.append(
            Record(dist.get_world_size(), batch, arguments.prompt, arguments.tokens, arguments.layers, name,
                   *rates[name], round(same, 4), fused[name])
        )  # fmt: skip
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--ways", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="small sizes: a rehearsal")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rank, device = join_ranks(300)
    cuda = device.type == "cuda"
    ways = ways_of(arguments.ways, everywhere=not cuda)
    models = loaded_models(ways, arguments.layers, arguments.tiny, device)
    records: list[Record] = []
    for batch in arguments.batch:
        here = measure(models, ways, batch, arguments)
        records += here
        if rank == 0:
            for r in here:
                print(f"generate {r.batch}: {r.provider} {r.tokens_per_s} tokens/s (+- {r.spread}), {r.fused} fused, "
                      f"{r.same_tokens:.0%} of the tokens are eager's", flush=True)  # fmt: skip
            if arguments.out and cuda:
                described = machine("linked GPUs, one process each; Hugging Face generate, tp_plan=auto")
                write_run(arguments.out, described, records)
    models.clear()
    torch.compiler.reset()  # lets go of torch.compile's own CUDA graphs: NCCL waits for those that hold its kernels
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
