"""torchtitan's Llama, cut by its own declarations with DTensor or its `spmd_types`: where torchtitan is installed."""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import tpfuse
from tpfuse.passes.plan.sites import REWRITES

from .graphs import relative_error
from .ranks import run_processes
from .small_sizes import HIDDEN, LAYERS, VOCAB, WORLD

pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore")]


@contextlib.contextmanager
def llama(sequence: bool, spmd: str) -> Iterator[nn.Module]:
    """The model, and what its training loop runs it under. `sequence`: with its sequence parallelism."""
    from torchtitan.distributed.utils import get_spmd_context, set_spmd_backend
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
    set_spmd_backend(spmd)
    one = {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "pp": 1, "ep": 1}
    parallel = dimensions.ParallelDims(**one, tp=WORLD, world_size=WORLD, spmd_backend=spmd)
    parallel.build_mesh()
    model = config.build()
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(len(name))
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1 + float("norm" in name)
    model.parallelize(parallel)
    with get_spmd_context(parallel_dims=parallel)():
        yield model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def results(model: nn.Module, train: bool, batch: int) -> list[Tensor]:
    ids = torch.randint(0, VOCAB, (batch, 8), generator=torch.Generator().manual_seed(1))
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(train):
        found = whole(model(ids))
    if train:
        found.square().mean().backward()
    return [found.detach(), *(whole(p.grad).clone() for p in model.parameters() if p.grad is not None)]


def run(rank: int, spmd: str, sequence: bool, train: bool, blocks: bool, batch: int) -> tuple[float, list[Counter]]:
    """The greatest error, and how often each kind of collective has each verdict, by graph."""
    with llama(sequence, spmd) as model:
        expected = results(model, train, batch)
        for part in model.layers.values() if blocks else [model]:
            part.compile(backend="tpfuse", options={"inner": "aot_eager", "rewrites": REWRITES})
        got = results(model, train, batch)
    assert len(got) == len(expected) > train
    verdicts = [
        Counter((b.direction, b.collective, b.rewrite if b.fused else "left") for b in report.boundaries)
        for report in tpfuse.reports()
    ]
    return max(relative_error(got, [t.double() for t in expected])), verdicts


SUM, SCATTER, GATHER = (("forward", kind) for kind in ("all_reduce", "reduce_scatter", "all_gather"))
SCATTER_BACK, GATHER_BACK = (("backward", kind) for kind in ("reduce_scatter", "all_gather"))
NORMS = 2 * LAYERS + 1
#: Where rows are gathered in another order than they are scattered in (`spmd_types`), the stream stays as it is.
INFERRED = {
    "partial_dtensor": {(*SCATTER, "share_attention_group"): NORMS, (*GATHER, "left"): NORMS},
    "spmd_types": {(*SCATTER, "reduce_scatter_norm"): NORMS, (*GATHER, "left"): NORMS},
}
#: All of them.
TRAINED = {
    (*SCATTER, "reduce_scatter_norm"): NORMS, (*GATHER, "reduce_scatter_norm"): NORMS,
    (*SCATTER_BACK, "norm_backward"): NORMS, (*GATHER_BACK, "norm_backward"): NORMS,
}  # fmt: skip
#: All but what is cut off: a block's last reduce-scatter has its norm in the next one, as has its gradient's gather.
TRAINED_BLOCK = {
    (*GATHER, "norm_gather"): 1, (*SCATTER, "reduce_scatter_norm"): 1, (*GATHER, "reduce_scatter_norm"): 1,
    (*SCATTER, "left"): 1, (*GATHER_BACK, "left"): 1, (*SCATTER_BACK, "norm_backward"): 2,
    (*GATHER_BACK, "norm_backward"): 1,
}  # fmt: skip
SPMD = ("partial_dtensor", "spmd_types")


@pytest.mark.parametrize("spmd", SPMD)
@pytest.mark.parametrize(("blocks", "seen"), [
    pytest.param(False, {(*SUM, "all_reduce_norm"): NORMS}, id="whole"),
    pytest.param(True, {(*SUM, "all_reduce_norm"): 1, (*SUM, "left"): 1}, id="blocks"),
])  # fmt: skip
def test_sums_of_its_llama(spmd, blocks, seen):
    judged(spmd, False, False, blocks, 1, seen)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("spmd", SPMD)
def test_inference_with_its_sequence_parallelism(spmd, batch):
    """Gathers that are left beside a shared attention group do not run: nothing is left to gather."""
    judged(spmd, True, False, False, batch, INFERRED[spmd])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
@pytest.mark.parametrize("spmd", SPMD)
def test_training_with_its_sequence_parallelism(spmd, blocks, batch):
    judged(spmd, True, True, blocks, batch, TRAINED_BLOCK if blocks else TRAINED)


def judged(spmd: str, sequence: bool, train: bool, blocks: bool, batch: int, seen: dict) -> None:
    pytest.importorskip("torchtitan.models.llama3", exc_type=ImportError)
    for error, verdicts in run_processes(WORLD, run, spmd, sequence, train, blocks, batch):
        assert error < 1e-5
        assert len(verdicts) == 1 or blocks  # of blocks that are alike one may be compiled for all
        assert all(graph == seen for graph in verdicts) and verdicts
