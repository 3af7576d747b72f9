"""Whole models over several GPUs: Inductor and tpfuse, with and without CUDA graphs, alternating in one run.

    torchrun --nproc-per-node N benchmarks/end_to_end.py --out results.json
    ... --models llama --decode 1 64 --prefill          a slice of it
    ... --models dp --dp 2                              data-parallel attention under its policies
    ... --models glm4_moe --dp 2 --prefill              the same for a Hugging Face model with a static cache
    python benchmarks/end_to_end.py --plot results.json picture.png

Models are in models.py; every rank holds its part, cut by `tpfuse.parallelize`. For each size four ways to run a step:

    inductor, tpfuse                            torch.compile(backend=...), launched from Python
    inductor + CUDA graph, tpfuse + CUDA graph  the same compiled step, captured and replayed
    ... reduce-overhead                         torch.compile's own CUDA graphs, with --reduce-overhead
    auto_select, auto_select + CUDA graph       Inductor with `_collective.auto_select`, with --auto-select: it lowers
                                                small sums to symmetric memory, and fails when a second size follows in
                                                the same process, so such a run has one model and one size
    tpfuse, quantised outputs                   of llama_fp8: with the rewrite that quantises in the boundary's kernel
    tpfuse, overlapped                          with --overlap: with overlap_all_reduce_norm named

Times are the slowest rank's, medians of alternating rounds. Outputs of the two are compared. One replay of each graph
is profiled: time in boundary kernels (NCCL or fused, and kernels with a norm in them), in all others, and between them.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import plots
from auto_select import auto_select
from machine import join_ranks, machine
from models import Run, Step, build
from records import OfModel, write_run

import tpfuse
from tpfuse.backend import tpfuse as tpfuse_backend
from tpfuse.passes.plan.sites import DEFAULT_REWRITES, OVERLAP, REWRITES

BOUNDARY = re.compile(r"nccl|_one_shot_kernel|_two_shot_kernel|_barrier_kernel|_add_norm_kernel|rsqrt|"
                      r"rms_norm|symm_mem|multimem", re.IGNORECASE)  # fmt: skip


@dataclass(frozen=True)
class Record(OfModel):
    """ms: of one step. The profile's times are in ms too; note says what failed."""

    layers: int
    provider: str
    ms: float | None
    spread: float = 0.0
    tokens_per_s: float = 0.0
    ms_per_layer: float = 0.0
    fused: int = 0
    difference: float | None = None
    boundary_ms: float | None = None
    other_ms: float | None = None
    idle_ms: float | None = None
    note: str = ""


def compiled_steps(step: Step, arguments: argparse.Namespace, quantised: bool) -> dict[str, Callable]:
    modes = [{}, {"mode": "reduce-overhead"}] if arguments.reduce_overhead else [{}]
    ways: dict[str, dict[str, Any]] = {}
    for name, backend in (("inductor", "inductor"), ("tpfuse", tpfuse_backend)):
        ways |= {f"{name} {mode['mode']}" if mode else name: {"backend": backend, **mode} for mode in modes}
    if arguments.auto_select:
        ways["auto_select"] = {"backend": auto_select}
    if quantised:
        rewrites = [name for name in REWRITES if name != OVERLAP]
        ways["tpfuse, quantised outputs"] = {"backend": tpfuse_backend, "options": {"rewrites": rewrites}}
    if arguments.overlap:
        rewrites = [*DEFAULT_REWRITES, OVERLAP]
        ways["tpfuse, overlapped"] = {"backend": tpfuse_backend, "options": {"rewrites": rewrites}}
    return {name: torch.compile(step.call, fullgraph=True, dynamic=False, **way) for name, way in ways.items()}


def captured(step: Step, call: Callable) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    step.reset()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        kept = call(*step.args)
    torch.cuda.synchronize()

    def replay() -> torch.Tensor:
        graph.replay()
        return kept

    return replay


def every_rank(value: Any) -> list[Any]:
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def time_in_turn(step: Step, calls: dict[str, Callable], rounds: int, repeats: int) -> dict[str, tuple[float, float]]:
    """(median, distance between quartiles) in ms of a step of the slowest rank."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            step.reset()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            call()  # under way when the clock starts
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) / repeats)
    everyone = every_rank(samples)
    out = {}
    for name in samples:
        slowest = [max(each) for each in zip(*(rank[name] for rank in everyone), strict=True)]
        quarters = statistics.quantiles(slowest, n=4)
        out[name] = (statistics.median(slowest), quarters[2] - quarters[0])
    return out


def profiled(step: Step, call: Callable) -> dict[str, float]:
    """Where one step's time goes on this rank, from the fastest of three."""
    from torch.profiler import ProfilerActivity, profile

    found = []
    for _ in range(3):
        step.reset()
        call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            call()
            torch.cuda.synchronize()
        kernels = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        if not kernels:
            return {}
        spans = sorted((e.time_range.start, e.time_range.end, bool(BOUNDARY.search(e.name))) for e in kernels)
        whole = max(end for _, end, _ in spans) - spans[0][0]
        busy, reached = 0.0, spans[0][0]
        for start, end, _ in spans:
            busy += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        boundary = sum(end - start for start, end, is_boundary in spans if is_boundary)
        other = sum(end - start for start, end, is_boundary in spans if not is_boundary)
        found.append({"boundary_ms": boundary / 1000, "other_ms": other / 1000, "idle_ms": (whole - busy) / 1000})
    return min(found, key=lambda each: sum(each.values()))


def measure(run: Run, device: torch.device, arguments: argparse.Namespace) -> list[Record]:
    torch.compiler.reset()
    step = build(run, device, arguments.tiny)
    calls: dict[str, Callable] = {}
    outputs: dict[str, torch.Tensor] = {}
    fused: dict[str, int] = {}
    profiles: dict[str, dict[str, float]] = {}
    notes: dict[str, str] = {}
    with torch.no_grad():
        for name, call in compiled_steps(step, arguments, run.model.endswith("_fp8")).items():
            skipped = counters["inductor"]["cudagraph_skips"]
            for _ in range(3):
                step.reset()
                out = call(*step.args)
            if counters["inductor"]["cudagraph_skips"] > skipped:
                notes[name] = "ran without a CUDA graph"
            outputs[name] = out.float().clone()
            fused[name] = tpfuse.reports()[-1].fused_forward if name.startswith("tpfuse") else 0
            calls[name] = lambda call=call: call(*step.args)
            if "reduce-overhead" not in name and device.type == "cuda":
                replay = captured(step, call)
                step.reset()
                label = f"{name} + CUDA graph"
                replay()
                outputs[label] = replay_output(step, replay)
                calls[label], fused[label] = replay, fused[name]
                profiles[label] = profiled(step, replay)
        if device.type != "cuda":
            return [Record(dist.get_world_size(), run.model, run.phase, run.size, run.layers, name, None,
                           fused=fused[name], difference=_difference(out, outputs["inductor"]))
                    for name, out in outputs.items()]  # fmt: skip
        repeats = min(arguments.repeats, step.most - 2)
        times = time_in_turn(step, calls, arguments.rounds, repeats)
    records = []
    for name, (ms, spread) in times.items():
        records.append(
            Record(dist.get_world_size(), run.model, run.phase, run.size, run.layers, name, round(ms, 4),
                   round(spread, 4), round(step.rows / ms * 1000, 1), round(ms / run.layers, 4), fused[name],
                   _difference(outputs[name], outputs["inductor"]), note=notes.get(name, ""),
                   **{key: round(value, 4) for key, value in profiles.get(name, {}).items()})
        )  # fmt: skip
    return records


def replay_output(step: Step, replay: Callable) -> torch.Tensor:
    step.reset()
    out = replay()
    torch.cuda.synchronize()
    return out.float().clone()


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return round(((a - b).norm() / b.norm()).item(), 6)


def runs_of(arguments: argparse.Namespace, world: int) -> list[Run]:
    models = []
    for name in arguments.models:
        if name in ("dp", "glm4_moe"):
            attn = world // arguments.dp
            models += [f"{name}_{arguments.dp}_{dense}" for dense in sorted({1, attn, world})]
        else:
            models.append(name)
    out = []
    for name in models:
        sizes = [("decode", size) for size in arguments.decode]
        sizes += [("prefill", size) for size in arguments.prefill if not name.startswith("dp_")]
        out += [Run(name, phase, size, arguments.layers, arguments.context) for phase, size in sizes]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama", "qwen3_moe", "dp"])
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 8, 64], help="batch sizes")
    parser.add_argument("--prefill", type=int, nargs="*", default=[1024, 8192], help="tokens")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024, help="tokens in the cache when decoding")
    parser.add_argument("--dp", type=int, default=2, help="replicas of the models dp and glm4_moe")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--reduce-overhead", action="store_true", help="also torch.compile's own CUDA graphs")
    parser.add_argument("--auto-select", action="store_true", help="also Inductor's own way to symmetric memory")
    parser.add_argument("--overlap", action="store_true", help="also tpfuse with overlap_all_reduce_norm named")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on CPUs where there are no GPUs: a rehearsal")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("RESULTS", "PICTURE"))
    arguments = parser.parse_args()
    if arguments.plot:
        plots.end_to_end(*arguments.plot)
        return
    if arguments.auto_select and len(arguments.models) * len(arguments.decode + arguments.prefill) != 1:
        parser.error("--auto-select is for one model and one size: --models llama --decode 1 --prefill")
    rank, device = join_ranks(120)
    cuda = device.type == "cuda"
    records: list[Record] = []
    for run in runs_of(arguments, dist.get_world_size()):
        try:
            here = measure(run, device, arguments)
        except Exception as error:  # the other models may still run
            note = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            here = [Record(dist.get_world_size(), run.model, run.phase, run.size, run.layers, "", None, note=note)]
            if rank == 0:
                traceback.print_exc()
        records += here
        if rank == 0:
            print(f"{run.model} {run.phase} {run.size}:", *map(_cell, here), sep="  ", flush=True)
            if arguments.out and cuda:
                described = machine("linked GPUs, one process each") | {"context": arguments.context}
                write_run(arguments.out, described, records)
    torch.compiler.reset()  # lets go of torch.compile's own CUDA graphs: NCCL waits for those that hold its kernels
    gc.collect()
    dist.destroy_process_group()


def _cell(r: Record) -> str:
    if not r.provider:
        return f"!! {r.note}"
    profile = f" [{r.boundary_ms:.3f}+{r.other_ms:.3f}+{r.idle_ms:.3f}]" if r.boundary_ms is not None else ""
    fused = f" ({r.fused} fused, differs {r.difference})" if r.fused else ""
    return f"{r.provider} {r.ms}{profile}{fused}" + (f" !! {r.note}" if r.note else "")


if __name__ == "__main__":
    main()
