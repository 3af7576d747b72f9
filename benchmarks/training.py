"""One training step of tensor-parallel layers over several GPUs: Inductor and tpfuse, alternating in one run.

    torchrun --nproc-per-node N benchmarks/training.py --out results.json               Llama 3 8B's sizes, 4 layers
    ... --layouts plain sequence --tokens 8192 --rounds 10                              what is run
    ... --providers inductor tpfuse norm_backward micro_pipeline                        tpfuse with norm_backward named;
                                                                                        PyTorch's async TP
    ... --providers inductor tpfuse overlap all_named                                   overlap_all_reduce_norm named;
                                                                                        norm_backward as well
    ... --providers inductor tpfuse reuse                                               tpfuse, and Inductor reuses
                                                                                        buffers (peak_memory.py)
    torchrun --nproc-per-node 2 benchmarks/training.py --tiny                           tiny sizes on the CPU

The model is cut by DTensor's plans: `plain` tensor parallelism, or `sequence` parallelism as torchtitan declares it. A
step is forward, backward and SGD; the loss is the mean log-sum-exp over a rank's own part of the vocabulary less one
logit, as cheap as a sharded cross entropy and without its collectives. Times are the slowest rank's, of several
steps in a row, medians of alternating rounds; memory is the most that the allocator held during a step. All providers
take the same steps from the same start, so the first and the last loss show whether they compute alike; where they do
not, the run fails. loss_curves.py has longer runs on the CPU.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import join_ranks, machine
from records import OfModel, write_run

import tpfuse
from tpfuse.backend import tpfuse as tpfuse_backend
from tpfuse.passes.plan.sites import DEFAULT_REWRITES, OVERLAP


@dataclass(frozen=True)
class Sizes:
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    inner: int = 14336
    vocabulary: int = 128256
    layers: int = 4


SMALL = Sizes(64, 4, 2, 96, 64, 2)
PROVIDERS: dict[str, dict[str, Any]] = {
    "inductor": {"backend": "inductor"},
    "tpfuse": {"backend": tpfuse_backend},
    "norm_backward": {"backend": tpfuse_backend, "options": {"rewrites": [*DEFAULT_REWRITES, "norm_backward"]}},
    "overlap": {"backend": tpfuse_backend, "options": {"rewrites": [*DEFAULT_REWRITES, OVERLAP]}},
    "all_named": {"backend": tpfuse_backend, "options": {"rewrites": [*DEFAULT_REWRITES, "norm_backward", OVERLAP]}},
    "reuse": {"backend": tpfuse_backend, "options": {"inductor": {"allow_buffer_reuse": True}}},
    "micro_pipeline": {"backend": "inductor", "options": {"_micro_pipeline_tp": True}},
}
#: How far apart losses may be, by dtype: they are about log(vocabulary).
LOSSES_APART = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Record(OfModel):
    """ms: of one step. fused: collectives, forward and backward; loss, last_loss: of the first and the last step."""

    provider: str
    ms: float
    spread: float
    tokens_per_s: float
    peak_mb: float
    fused: int
    loss: float
    last_loss: float


# -- the model --------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.dim = sizes.hidden // sizes.heads
        self.q = nn.Linear(sizes.hidden, sizes.heads * self.dim, bias=False)
        self.k, self.v = (nn.Linear(sizes.hidden, sizes.kv_heads * self.dim, bias=False) for _ in range(2))
        self.out = nn.Linear(sizes.heads * self.dim, sizes.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (linear(x).view(batch, length, -1, self.dim).transpose(1, 2) for linear in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(sizes.hidden, sizes.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(sizes.inner, sizes.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(sizes.hidden, eps=1e-5), Attention(sizes)
        self.norm2, self.mlp = nn.RMSNorm(sizes.hidden, eps=1e-5), MLP(sizes)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.attention(self.norm1(x))
        return h + self.mlp(self.norm2(h))


class Model(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.layers = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.hidden, eps=1e-5)
        self.output = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for layer in self.layers:
            h = layer(h)
        logits = self.output(self.norm(h)).float()
        return (logits.logsumexp(-1) - logits[..., 0]).mean()


def cut(model: nn.Module, mesh: DeviceMesh, layout: str, layers: int) -> nn.Module:
    sequence = layout == "sequence"
    rows = Shard(1) if sequence else Replicate()
    plan: dict[str, Any] = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=rows),
        "output": ColwiseParallel(input_layouts=rows, output_layouts=Shard(-1)),
    }
    norms = ["norm"]
    for i in range(layers):
        columns = ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up")
        plan |= {f"layers.{i}.{name}": ColwiseParallel() for name in columns}
        plan |= {f"layers.{i}.{name}": RowwiseParallel(output_layouts=rows) for name in ("attention.out", "mlp.down")}
        norms += [f"layers.{i}.norm1", f"layers.{i}.norm2"]
        if sequence:
            gathered = {"input_layouts": (Shard(1),), "desired_input_layouts": (Replicate(),)}
            plan |= {f"layers.{i}.{name}": PrepareModuleInput(**gathered) for name in ("attention", "mlp")}
    if sequence:
        plan |= {name: SequenceParallel() for name in norms}
    return parallelize_module(model, mesh, plan)


def build(sizes: Sizes, mesh: DeviceMesh, layout: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    with device:
        model = Model(sizes).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
    return cut(model, mesh, layout, sizes.layers)


class Step:
    """Forward, backward and an SGD step of one model; returns the loss."""

    def __init__(self, model: nn.Module, run: Callable[..., Any]) -> None:
        # one operation for many parameters, which takes DTensors and plain tensors but not both at once
        whole, cut = ([p for p in model.parameters() if isinstance(p, DTensor) == kind] for kind in (False, True))
        groups = [{"params": each} for each in (whole, cut) if each]
        self.run, self.optimizer = run, torch.optim.SGD(groups, lr=1e-3)

    def __call__(self, tokens: Tensor) -> Tensor:
        loss = self.run(tokens)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


# -- times ------------------------------------------------------------------------------------------------------------


def measured(arguments: argparse.Namespace, device: torch.device) -> list[Record]:
    sizes = SMALL if arguments.tiny else Sizes(layers=arguments.layers)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    length = 32 if arguments.tiny else arguments.tokens // arguments.batch
    world = dist.get_world_size()
    mesh = init_device_mesh(device.type, (world,))
    g = torch.Generator(device="cpu").manual_seed(0)
    tokens = torch.randint(sizes.vocabulary, (arguments.batch, length), generator=g).to(device)
    records: list[Record] = []
    for layout in arguments.layouts:
        steps: dict[str, Step] = {}
        found: dict[str, tuple[float, int]] = {}
        peaks: dict[str, float] = {}
        for name in arguments.providers:
            torch._dynamo.reset()
            model = build(sizes, mesh, layout, dtype, device)
            steps[name] = Step(model, torch.compile(model, fullgraph=True, **PROVIDERS[name]))
            before = len(tpfuse.reports())
            loss = float(steps[name](tokens))
            fused = sum(len(report.fused) for report in tpfuse.reports()[before:])
            found[name] = loss, fused
            for _ in range(2):
                steps[name](tokens)
            peaks[name] = _peak_mb(steps[name], tokens, device)
        times = _alternating(steps, tokens, arguments.rounds, arguments.in_a_row, device)
        last = {name: float(step(tokens)) for name, step in steps.items()}
        for name in arguments.providers:
            ms = statistics.median(times[name])
            spread = _quartiles(times[name]) / ms
            loss, fused = found[name]
            per_second = tokens.numel() / ms * 1000
            records.append(
                Record(
                    world, "llama-3-8b" if sizes != SMALL else "small", layout, tokens.numel(), name, round(ms, 3),
                    round(spread, 3), round(per_second), round(peaks[name], 1), fused, loss, last[name],
                )
            )  # fmt: skip
            if dist.get_rank() == 0:
                print(records[-1], flush=True)
        for losses in ([loss for loss, _ in found.values()], [*last.values()]):
            if max(losses) - min(losses) > LOSSES_APART[dtype]:
                raise SystemExit(f"{layout}: {', '.join(arguments.providers)} compute other losses: {losses}")
        del steps
    return records


def _quartiles(times: list[float]) -> float:
    """How far apart they are."""
    quarters = statistics.quantiles(times, n=4)
    return quarters[2] - quarters[0]


def _alternating(
    steps: dict[str, Step], tokens: Tensor, rounds: int, in_a_row: int, device: torch.device
) -> dict[str, list[float]]:  # fmt: skip
    """Milliseconds of a step, of so many in a row: as in a training loop, the host goes ahead of the device."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            dist.barrier()
            _synchronise(device)
            began = time.perf_counter()
            for _ in range(in_a_row):
                step(tokens)
            _synchronise(device)
            slowest = torch.tensor((time.perf_counter() - began) * 1000 / in_a_row, device=device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            times[name].append(float(slowest))
    return times


def _peak_mb(step: Step, tokens: Tensor, device: torch.device) -> float:
    """The most of one step above what was held before it."""
    if device.type != "cuda":
        return 0.0
    _synchronise(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step(tokens)
    _synchronise(device)
    return (torch.cuda.max_memory_allocated(device) - held) / 1e6


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layouts", nargs="+", default=["plain", "sequence"], choices=["plain", "sequence"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--in-a-row", type=int, default=4, help="steps of one sample")
    parser.add_argument("--providers", nargs="+", default=["inductor", "tpfuse", "norm_backward"], choices=PROVIDERS)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cpu")
    if arguments.tiny:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))
    else:
        _, device = join_ranks(300)
    records = measured(arguments, device)
    if arguments.out is not None and dist.get_rank() == 0:
        host = {"device": "cpu", "torch": torch.__version__} if arguments.tiny else machine("training")
        write_run(arguments.out, host, records)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
