"""DTensor's sequence parallelism as torchtitan declares it: hidden states [batch, sequence, hidden], ranks with parts
of the sequence, a reduce-scatter behind each block and a gather in front of the next. Real ranks, gloo."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import tpfuse
from tpfuse.backend import tpfuse as tpfuse_backend

from .graphs import executed_collectives, relative_error
from .models import HIDDEN, INTER
from .policy_harness import compiles_in_threads, run_threads
from .ranks import run_processes

WORLD, LAYERS, TOKENS, BATCH, LENGTH = 2, 2, 50, 2, 6


class Pair(nn.Module):
    """Two cut linears with something in between; stands for attention and for the MLP."""

    def __init__(self, inner: int):
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, inner, bias=False), nn.Linear(inner, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class Block(nn.Module):
    def __init__(self, pair: type[nn.Module] = Pair):
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(HIDDEN), pair(HIDDEN)
        self.ffn_norm, self.feed_forward = nn.RMSNorm(HIDDEN), pair(INTER)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x))
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    def __init__(self, pair: type[nn.Module] = Pair):
        super().__init__()
        self.embeddings = nn.Embedding(TOKENS, HIDDEN)
        self.layers = nn.ModuleList(Block(pair) for _ in range(LAYERS))
        self.norm, self.output = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, TOKENS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embeddings(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.output(self.norm(h))


def model(mesh: DeviceMesh | None, pair: type[nn.Module] = Pair) -> nn.Module:
    """Whole without a mesh."""
    torch.manual_seed(0)
    whole = Transformer(pair)
    if mesh is None:
        return whole
    gathered = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    plan = {
        "embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    for index in range(LAYERS):
        for norm, block in (("attention_norm", "attention"), ("ffn_norm", "feed_forward")):
            plan |= {
                f"layers.{index}.{norm}": SequenceParallel(),
                f"layers.{index}.{block}": gathered,
                f"layers.{index}.{block}.up": ColwiseParallel(),
                f"layers.{index}.{block}.down": RowwiseParallel(output_layouts=Shard(1)),
            }
    return parallelize_module(whole, mesh, plan)


def run(rank: int) -> dict:
    mesh, tokens = init_device_mesh("cpu", (WORLD,)), torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % TOKENS
    options = {"inner": "aot_eager"}
    whole, cut = model(None), model(mesh)
    compiled = torch.compile(cut, backend="tpfuse", options=options, fullgraph=True)
    with torch.no_grad():
        inference = relative_error([compiled(tokens)], [whole(tokens).double()])
        executed = executed_collectives(compiled, tokens)
    (report,) = tpfuse.reports()

    compiled(tokens).square().mean().backward()
    whole(tokens).square().mean().backward()
    grads = [p.grad.full_tensor() for p in cut.parameters()]
    training = relative_error(grads, [p.grad.double() for p in whole.parameters()])
    return {
        "errors": inference + training,
        "executed": executed,
        "fused": [(b.kind, b.collective, b.rewrite) for b in report.fused],
        "training": {(b.collective, b.fused, b.reason) for b in tpfuse.reports()[1].boundaries if b.feeds_norm},
    }


@pytest.fixture(scope="module")
def seen() -> list[dict]:
    return run_processes(WORLD, run)


def test_inference_and_gradients_are_those_of_the_whole_model(seen):
    assert max(error for rank in seen for error in rank["errors"]) < 1e-5


def test_every_reduce_scatter_becomes_an_all_reduce_fused_with_its_norm(seen):
    """As many bytes as the reduce-scatter and the gather it replaces, in one operation. The last gather is that of the
    logits."""
    kinds = ["embedding→attention", *["attention→dense_mlp", "dense_mlp→attention"] * LAYERS]
    kinds[-1] = "dense_mlp→final_norm"
    for rank in seen:
        assert rank["fused"] == [(kind, "reduce_scatter", "share_attention_group") for kind in kinds]
        assert rank["executed"] == Counter(all_reduce=2 * LAYERS + 1, all_gather=1)


def test_in_training_they_stay_scattered_and_are_fused_with_their_norm(seen):
    for rank in seen:
        assert rank["training"] == {("reduce_scatter", True, "")}


# -- hidden states that arrive scattered: a stage of a pipeline, a stretch of layers that is compiled alone -----------


class Stretch(nn.Module):
    """Blocks over [S / n, B, H] as Megatron writes them: gathered and reduce-scattered along the first dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(4))
        self.blocks = nn.ModuleList(Pair(HIDDEN) for _ in range(3))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, own: Tensor) -> Tensor:
        self.steps += 1
        group = dist.group.WORLD
        for norm, block in zip(self.norms, self.blocks, strict=False):
            everybody = funcol.all_gather_tensor(norm(own), 0, group)
            own = own + funcol.reduce_scatter_tensor(block(everybody), "sum", 0, group)
        return self.norms[-1](own)


def error_and_rewrites(rank: int, model: nn.Module) -> tuple[float, list[set]]:
    x = torch.randn(3, 2, HIDDEN, generator=torch.Generator().manual_seed(rank))
    before = len(tpfuse.reports())
    options = {"inner": "aot_eager", "strict": True, "policy": tpfuse.SharingPolicy(WORLD, residual="replicated")}
    run = torch.compile(model, backend=tpfuse_backend, options=options, fullgraph=True)
    with torch.no_grad():
        error = relative_error([run(x)], [model(x).double()])[0]
    return error, [{b.rewrite for b in report.fused} for report in tpfuse.reports()[before:]]


@compiles_in_threads
def test_rows_that_arrive_scattered_are_each_ranks_own():
    """They are gathered once; that they differ between ranks is no reason to leave the graph as it is written."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    models = [Stretch() for _ in range(WORLD)]  # their blocks are parts of no common weight, and differ
    for error, rewrites in run_threads(WORLD, lambda rank: error_and_rewrites(rank, models[rank])):
        assert error < 1e-5
        assert {"share_attention_group"} in rewrites and set() not in rewrites
