"""torchtitan's Llama, cut by its own declarations with DTensor: where torchtitan is installed."""

from __future__ import annotations

import importlib
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import tpfuse

from .graphs import relative_error
from .ranks import run_processes
from .small_sizes import HIDDEN, LAYERS, VOCAB, WORLD

pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore")]


def llama(sequence: bool) -> nn.Module:
    """`sequence`: with its sequence parallelism."""
    from torchtitan.distributed.utils import set_spmd_backend
    from torchtitan.models import llama3
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3.sharding import set_llama3_sharding_config

    dimensions = importlib.import_module("torchtitan.distributed.parallel_dims")
    dimensions.device_type = "cpu"  # it takes CUDA where it sees no card
    layers = llama3._build_llama3_layers(
        n_layers=LAYERS,
        dim=HIDDEN,
        n_heads=4,
        n_kv_heads=2,
        hidden_dim=2 * HIDDEN,
        fuse_qkv=False,
        rope=ComplexRoPE.Config(dim=8, max_seq_len=64),
        attn_backend="flex",
    )
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()  # flex attention is for GPUs
    config = llama3.Llama3Model.Config(
        dim=HIDDEN,
        vocab_size=VOCAB,
        tok_embeddings=Embedding.Config(num_embeddings=VOCAB, embedding_dim=HIDDEN, param_init=llama3._EMBEDDING_INIT),
        norm=RMSNorm.Config(normalized_shape=HIDDEN, param_init=llama3._NORM_INIT),
        lm_head=Linear.Config(in_features=HIDDEN, out_features=VOCAB, param_init=llama3._output_linear_init(HIDDEN)),
        layers=layers,
    )
    set_llama3_sharding_config(config, enable_sp=sequence)
    set_spmd_backend("partial_dtensor")
    one = {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "pp": 1, "ep": 1}
    parallel = dimensions.ParallelDims(**one, tp=WORLD, world_size=WORLD, spmd_backend="partial_dtensor")
    parallel.build_mesh()
    model = config.build()
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(len(name))
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1 + float("norm" in name)
    model.parallelize(parallel)
    return model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def results(model: nn.Module, train: bool) -> list[Tensor]:
    ids = torch.randint(0, VOCAB, (1, 8), generator=torch.Generator().manual_seed(1))
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(train):
        found = whole(model(ids))
    if train:
        found.square().mean().backward()
    return [found.detach(), *(whole(p.grad).clone() for p in model.parameters() if p.grad is not None)]


def run(rank: int, sequence: bool, train: bool, blocks: bool) -> tuple[float, Counter]:
    """The greatest error, and how often each kind of collective has each verdict."""
    model = llama(sequence)
    expected = results(model, train)
    for part in model.layers.values() if blocks else [model]:
        part.compile(backend="tpfuse", options={"inner": "aot_eager"})
    got = results(model, train)
    assert len(got) == len(expected) > train
    verdicts = Counter(
        (b.direction, b.collective, b.rewrite if b.fused else "left") for r in tpfuse.reports() for b in r.boundaries
    )
    return max(relative_error(got, [t.double() for t in expected])), verdicts


SUM, SCATTER, GATHER = (("forward", kind) for kind in ("all_reduce", "reduce_scatter", "all_gather"))


@pytest.mark.parametrize(("sequence", "train", "blocks", "seen"), [
    pytest.param(False, False, False, {(*SUM, "all_reduce_norm"): 2 * LAYERS + 1}, id="whole"),
    pytest.param(False, False, True, {(*SUM, "all_reduce_norm"): LAYERS, (*SUM, "left"): LAYERS}, id="blocks"),
    pytest.param(
        True, False, False,
        {(*SCATTER, "share_attention_group"): 2 * LAYERS + 1, (*GATHER, "left"): 2 * LAYERS + 1},
        id="sequence",
    ),
    pytest.param(
        True, True, False,
        {(*SCATTER, "reduce_scatter_norm"): 2 * LAYERS + 1, (*GATHER, "reduce_scatter_norm"): 2 * LAYERS + 1},
        id="sequence-training",
    ),
])  # fmt: skip
def test_boundaries_of_its_llama(sequence, train, blocks, seen):
    """Gathers that are left beside a shared attention group do not run: nothing is left to gather."""
    pytest.importorskip("torchtitan.models.llama3", exc_type=ImportError)
    for error, verdicts in run_processes(WORLD, run, sequence, train, blocks):
        assert error < 1e-5
        assert {key: count for key, count in verdicts.items() if key[0] == "forward"} == seen
