"""DTensor's sequence parallelism as torchtitan declares it: hidden states [batch, sequence, hidden], ranks with parts
of the sequence, a reduce-scatter behind each block and a gather in front of the next. Real ranks, gloo."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
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

from .graphs import executed_collectives, relative_error
from .models import HIDDEN, INTER
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
    def __init__(self):
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(HIDDEN), Pair(HIDDEN)
        self.ffn_norm, self.feed_forward = nn.RMSNorm(HIDDEN), Pair(INTER)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x))
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(TOKENS, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.output = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, TOKENS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embeddings(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.output(self.norm(h))


def model(mesh: DeviceMesh | None) -> nn.Module:
    """Whole without a mesh."""
    torch.manual_seed(0)
    whole = Transformer()
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


def test_in_training_they_stay_and_the_report_says_so(seen):
    words = "it is a reduce-scatter in a training graph; those are fused with their norm in inference graphs only"
    for rank in seen:
        assert rank["training"] == {("reduce_scatter", False, words)}
