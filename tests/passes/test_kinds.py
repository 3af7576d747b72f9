"""Boundaries are named by roles first, then by the modules a node was traced in, then by the operators around it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn

import tpfuse

from ..graphs import fake_world, fused, trace
from ..models import HIDDEN, Stack

WORLD = 2


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN // WORLD, bias=False)
        self.out = nn.Linear(HIDDEN // WORLD, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return funcol.all_reduce(self.out(attended), "sum", dist.group.WORLD)


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(HIDDEN, HIDDEN // WORLD, bias=False)
        self.down = nn.Linear(HIDDEN // WORLD, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return funcol.all_reduce(self.down(self.up(x).relu()), "sum", dist.group.WORLD)


# Names that tell nothing: only the operators inside do.
Mixer = type("Mixer", (SelfAttention,), {})
Channels = type("Channels", (FeedForward,), {})


@tpfuse.dense_mlp(colwise=("up",), rowwise=("down",))
class AttentiveThing(FeedForward):
    """An MLP whose name would make it an attention; its role says what it is."""


class Sandwich(nn.Module):
    """Gemma's layer: a norm before and behind each block. "post_feedforward_norm" is a norm, not a feed-forward."""

    def __init__(self, first: type[nn.Module], second: type[nn.Module], first_name: str, second_name: str):
        super().__init__()
        self.names = (first_name, second_name)
        self.add_module(first_name, first())
        self.add_module(second_name, second())
        for name in ("input_norm", "post_attention_norm", "pre_feedforward_norm", "post_feedforward_norm"):
            self.add_module(name, nn.RMSNorm(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (getattr(self, name) for name in self.names)
        x = x + self.post_attention_norm(first(self.input_norm(x)))
        return x + self.post_feedforward_norm(second(self.pre_feedforward_norm(x)))


class Pooler(nn.Module):
    """BERT's, over the first row."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(HIDDEN, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x[:, 0]))


def kinds_of(first: type[nn.Module], second: type[nn.Module], *names: str, training: bool = False) -> list[str]:
    with fake_world(WORLD), torch.set_grad_enabled(training):
        layers = [Sandwich(first, second, *names) for _ in range(2)]
        model = nn.Sequential(*layers, nn.RMSNorm(HIDDEN), Pooler())
        report = tpfuse.explain(model, (torch.randn(1, 4, HIDDEN),))
    forward = [boundary for boundary in report.boundaries if boundary.direction == "forward"]
    assert all(boundary.fused for boundary in forward), report
    return [boundary.kind for boundary in forward]


EXPECTED = ["attention→dense_mlp", "dense_mlp→attention", "attention→dense_mlp", "dense_mlp→final_norm"]


def test_names_and_classes():
    assert kinds_of(SelfAttention, FeedForward, "self_attn", "ffn") == EXPECTED


def test_operators_where_no_name_tells():
    assert kinds_of(Mixer, Channels, "a", "b") == EXPECTED


@pytest.mark.parametrize("first, second", [(SelfAttention, FeedForward), (Mixer, Channels)])
def test_in_training_the_backward_pass_is_no_block_behind_the_norm(first, second):
    assert kinds_of(first, second, "a", "b", training=True) == EXPECTED


class BiasedMixer(nn.Module):
    """T5's attention: a softmax in parts, and a bias for each distance, looked up in an embedding."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN // WORLD, bias=False)
        self.out, self.distances = nn.Linear(HIDDEN // WORLD, HIDDEN, bias=False), nn.Embedding(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        order = torch.arange(x.shape[1])
        bias = self.distances((order[:, None] - order[None]).abs())[..., 0]
        attended = torch.softmax(q @ k.mT + bias, -1) @ v
        return funcol.all_reduce(self.out(attended), "sum", dist.group.WORLD)


def test_an_attention_that_looks_up_a_bias_is_no_embedding():
    assert kinds_of(BiasedMixer, Channels, "a", "b") == EXPECTED


class GatedChannels(FeedForward):
    """RWKV's: a gate beside the product, whose own product is the first to read the normed value."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x).sigmoid()
        return gate * super().forward(x)


def test_a_gate_beside_a_block_is_not_the_end_of_the_model():
    assert kinds_of(Mixer, GatedChannels, "a", "b") == EXPECTED


def test_a_role_beats_a_name():
    assert kinds_of(SelfAttention, AttentiveThing, "x", "attention_like") == EXPECTED


def test_compiling_each_block_by_itself_is_explained():
    """The MLP's sum is normed in the next block's graph, so only the attention's boundary can be fused."""
    with fake_world(WORLD), torch.no_grad():
        model = Stack(WORLD)
        for layer in model.layers:
            layer.compile(backend="tpfuse", options={"inner": "aot_eager"})
        before = len(tpfuse.reports())
        model(torch.randn(3, HIDDEN))
        reports = tpfuse.reports()[before:]
    assert reports
    for report in reports:
        assert [boundary.fused for boundary in report.boundaries] == [True, False]
        assert "compile the whole model instead of each block" in report.boundaries[1].reason
        assert not report.missed, "what is in another graph is no failure of this one"


def test_the_block_behind_a_gather_of_rows_reads_the_norm(four_ranks):
    """Sequence parallelism without modules: only the operators behind the gather tell."""

    def run(x: Tensor, weight: Tensor) -> Tensor:
        c10d, group = torch.ops._c10d_functional, dist.group.WORLD.group_name
        for _ in range(2):
            own = c10d.wait_tensor(c10d.reduce_scatter_tensor(torch.relu(x @ weight), "sum", 4, group))
            normed = nn.functional.rms_norm(own, (HIDDEN,))
            x = c10d.wait_tensor(c10d.all_gather_into_tensor(normed, 4, group))
        return x

    _, report = fused(trace(run, torch.randn(8, HIDDEN), torch.randn(HIDDEN, HIDDEN)))
    assert report.boundaries[0].kind == "dense_mlp→dense_mlp"


def test_an_output_projection_whose_logits_are_summed_is_no_block():
    class RowwiseHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(Sandwich(SelfAttention, FeedForward, "self_attn", "ffn"), nn.RMSNorm(HIDDEN))
            self.head = nn.Linear(HIDDEN // WORLD, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return funcol.all_reduce(self.head(self.blocks(x).chunk(WORLD, -1)[0]), "sum", dist.group.WORLD)

    with fake_world(WORLD), torch.no_grad():
        report = tpfuse.explain(RowwiseHead(), (torch.randn(1, 4, HIDDEN),))
    assert [boundary.kind for boundary in report.boundaries[:-1]] == ["attention→dense_mlp", "dense_mlp→final_norm"]


def test_products_of_quantised_weights_are_products(four_ranks):
    def run(x, w, r, weight):
        h = r + torch.ops._c10d_functional.wait_tensor(
            torch.ops._c10d_functional.all_reduce(torch._int_mm(x, w).float() * 0.1, "sum", "0")
        )
        return nn.functional.rms_norm(h, (HIDDEN,), weight)

    x, w = torch.ones(32, 16, dtype=torch.int8), torch.ones(16, HIDDEN, dtype=torch.int8)
    (verdict,) = fused(trace(run, x, w, torch.randn(32, HIDDEN), torch.randn(HIDDEN)))[1].boundaries
    assert verdict.kind == "dense_mlp→final_norm" and verdict.fused
