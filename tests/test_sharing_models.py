"""Compiled models whose residual stream is no plain sum of [B, S, H]: transposed attention, positions, conditioning."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tpfuse
from tpfuse.backend import tpfuse as tpfuse_backend
from tpfuse.parallel.parallelize import parallelize
from tpfuse.parallel.roles import attention
from tpfuse.policy import SharingPolicy

from .policy_harness import (
    HIDDEN,
    MLP,
    Attention,
    Layer,
    RMSNorm,
    build,
    compiles_in_threads,
    relative,
    run_threads,
)
from .test_parallelize_models import mesh_of

pytestmark = pytest.mark.filterwarnings("error:tpfuse left a graph")
ROWS = (2, 5)


@attention(colwise=("q_proj", "k_proj", "v_proj"), rowwise=("o_proj",), heads="num_heads", kv_heads="num_kv_heads")
class SequenceFirst(nn.Module):
    """Attention over [S, B, H] in a model of [B, S, H]; a running sum over the sequence stands for the scores."""

    def __init__(self) -> None:
        super().__init__()
        whole = Attention(bias=False)
        self.num_heads, self.num_kv_heads = whole.num_heads, whole.num_kv_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = whole.q_proj, whole.k_proj, whole.v_proj, whole.o_proj

    def forward(self, x):
        x = x.transpose(0, 1)
        mixed = torch.tanh(self.q_proj(x)) * self.v_proj(x) + self.k_proj(x).cumsum(0)
        return self.o_proj(mixed).transpose(0, 1)


class Model(nn.Module):
    """Two layers and a final norm. sequence_first: of its attention. shape: of what every layer adds to the stream."""

    def __init__(self, sequence_first: bool = False, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(MLP(bias=False)) for _ in range(2))
        for layer in self.layers if sequence_first else ():
            layer.attn = SequenceFirst()
        self.norm = RMSNorm(HIDDEN)
        self.extra = nn.Parameter(torch.randn(shape)) if shape else None

    def forward(self, x):
        for layer in self.layers:
            if self.extra is not None:
                x = x + layer.attn(layer.attn_norm(x)) + self.extra
                x = x + layer.mlp(layer.mlp_norm(x))
            else:
                x = layer(x)
        return self.norm(x)


def error_and_rewrites(rank, model, policy, x, want):
    parallelize(model, mesh_of(policy), policy)
    run = torch.compile(model, backend=tpfuse_backend, options={"inner": "aot_eager", "strict": True}, fullgraph=True)
    with torch.no_grad():
        error = relative(run(x), want)
    return error, {b.rewrite for b in tpfuse.reports()[-1].boundaries}


@compiles_in_threads
@pytest.mark.parametrize(
    ("sequence_first", "shape"),
    [(True, ()), (False, (1, 1, HIDDEN)), (False, (ROWS[1], HIDDEN)), (True, (ROWS[0], 1, HIDDEN))],
)
def test_own_rows_of_a_stream_that_is_transposed_or_added_to_by_broadcast(sequence_first, shape):
    torch._dynamo.reset()
    plain = build(lambda: Model(sequence_first, shape)).eval()
    x, policy = torch.randn(*ROWS, HIDDEN, dtype=torch.float64), SharingPolicy(2, 1, 1)
    with torch.no_grad():
        want = plain(x)
    models = [copy.deepcopy(plain) for _ in range(2)]
    for error, rewrites in run_threads(2, lambda r: error_and_rewrites(r, models[r], policy, x, want)):
        assert error < 1e-11 and rewrites == {"scatter_dense"}
