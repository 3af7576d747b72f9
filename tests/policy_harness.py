"""Models, ranks as threads, and the unsharded oracle, for the tests of policies."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

from tpfuse.parallel.roles import attention, dense_mlp, moe

#: Where threads cannot compile while others run, whatever the backend: plain aot_eager fails on 2.12 as well.
_NOT_IN_THREADS = {
    (2, 11): "Dynamo dies of a segmentation fault when threads compile at once",
    (2, 12): "a thread that runs while another one traces is taken for a part of what is traced",
}
_WHY_NOT = _NOT_IN_THREADS.get(tuple(map(int, torch.__version__.split(".")[:2])), "")
COMPILES_IN_THREADS = not _WHY_NOT
compiles_in_threads = pytest.mark.skipif(bool(_WHY_NOT), reason=f"torch {torch.__version__}: {_WHY_NOT}")

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB = 32, 8, 8, 4, 64, 32


def run_threads(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
    """`fn(rank, *args)` on `world` threads, each with a process group of its own; results in rank order."""
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    _install_threaded_pg()
    store = dist.HashStore()
    results: list[Any] = [None] * world
    errors: list[tuple[int, str]] = []

    def entry(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            results[rank] = fn(rank, *args)
        except BaseException as error:
            errors.append((rank, traceback.format_exc()))
            _wake(error)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    threads = [threading.Thread(target=entry, args=(rank,), daemon=True) for rank in range(world)]
    # A rank that calls its compiled model while another one traces is not inside that tracing, as torch takes it to be.
    torch._dynamo.config.force_compile_during_fx_trace = True
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout)
        hung = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    finally:
        torch._dynamo.config.force_compile_during_fx_trace = False
        ProcessLocalGroup.reset()
        _uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    if errors:
        rank, text = errors[0]  # the others were woken by it
        raise RuntimeError(f"rank {rank} raised:\n{text}")
    if hung:
        raise TimeoutError(f"ranks {hung} hang")
    return results


def _wake(error: BaseException) -> None:
    """Makes ranks that wait for this one raise too."""
    for _ in range(100):
        try:
            return ProcessLocalGroup.exception_handle(error)
        except RuntimeError:  # a rank entered a collective meanwhile: "dictionary changed size during iteration"
            time.sleep(0.01)


class RMSNorm(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(hidden) + 0.5)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@attention(colwise=("q_proj", "k_proj", "v_proj"), rowwise=("o_proj",), heads="num_heads", kv_heads="num_kv_heads")
class Attention(nn.Module):
    """Reshapes by its head counts, has a norm on each head, and a bias on the output."""

    def __init__(self, kv_heads: int = KV_HEADS, bias: bool = True) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = HEADS, kv_heads, HEAD_DIM
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=bias)
        self.k_proj = nn.Linear(HIDDEN, kv_heads * HEAD_DIM, bias=bias)
        self.v_proj = nn.Linear(HIDDEN, kv_heads * HEAD_DIM, bias=bias)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=bias)
        self.q_norm = RMSNorm(HEAD_DIM)

    def forward(self, x):
        b, s, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(b, s, self.num_heads, self.head_dim)).transpose(1, 2)
        k = self.k_proj(x).view(b, s, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, s, self.num_kv_heads, self.head_dim).transpose(1, 2)
        k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for t in (k, v))
        weights = (q @ k.transpose(-1, -2) * self.head_dim**-0.5).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(b, s, self.num_heads * self.head_dim))


@dense_mlp(colwise=("gate_proj", "up_proj"), rowwise=("down_proj",))
class MLP(nn.Module):
    def __init__(self, inner: int = INNER, bias: bool = True) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, inner, bias=bias)
        self.up_proj = nn.Linear(HIDDEN, inner, bias=bias)
        self.down_proj = nn.Linear(inner, HIDDEN, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@dense_mlp(colwise=("gate_up",), rowwise=("down",), packed={"gate_up": 2})
class PackedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(HIDDEN, 2 * INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


@moe(experts="experts", shared="shared_expert")
class MoE(nn.Module):
    """Two of four experts for each row, and a gated shared expert; biases everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 4, bias=False)
        self.experts = nn.ModuleList([MLP(16) for _ in range(4)])
        self.shared_expert = PackedMLP()
        self.shared_gate = nn.Linear(HIDDEN, 1)

    def forward(self, x):
        rows = x.reshape(-1, HIDDEN)
        scores = self.gate(rows).softmax(-1)
        top, chosen = scores.topk(2, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, chosen, top)
        routed = sum(weights[:, i, None] * expert(rows) for i, expert in enumerate(self.experts))
        return (routed + self.shared_gate(rows).sigmoid() * self.shared_expert(rows)).view(x.shape)


class Layer(nn.Module):
    def __init__(self, mlp: nn.Module, kv_heads: int = KV_HEADS) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(kv_heads), mlp
        self.attn_norm, self.mlp_norm = RMSNorm(HIDDEN), RMSNorm(HIDDEN)

    def forward(self, x):
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    """Decorated: a dense layer, a packed dense layer and, when asked for, a routed layer."""

    def __init__(self, routed: bool = True, kv_heads: int = KV_HEADS) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        layers = [Layer(MLP(), kv_heads), Layer(PackedMLP(), kv_heads)] + ([Layer(MoE(), kv_heads)] if routed else [])
        self.layers = nn.ModuleList(layers)
        self.norm, self.head = RMSNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def build(make: Callable[[], nn.Module], seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same model on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().to(dtype)


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    """A sum over rows with a gradient that differs everywhere."""
    return (logits.double() * torch.linspace(-1, 1, logits.shape[-1], dtype=torch.float64)).sin().sum()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest value of b."""
    if a.shape != b.shape:
        return float("inf")
    if not b.numel():
        return 0.0
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()
