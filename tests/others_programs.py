"""Tensor-parallel models in the forms in which public programs write them, small. Each builds one rank's part.

Weights that are cut are drawn by rank, all others alike, so that a lost or doubled sum shows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn

WORLD, HEADS, HEAD, LAYERS, VOCAB, SEQUENCE = 2, 4, 8, 3, 32, 8
DIM = HEADS * HEAD
#: Names of the weights that are cut.
CUT = ("wqkv", "wo", "w1", "w2", "w3", "q_proj", "k_proj", "v_proj", "out_proj", "fc1.", "fc2.weight", "shard")


def drawn(model: nn.Module, rank: int, cut: tuple[str, ...] = CUT) -> nn.Module:
    """Random weights: those of cut layers are the rank's own."""
    alike, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(rank + 1)
    for name, parameter in model.named_parameters():
        generator = own if any(word in name for word in cut) else alike
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2 + float("norm" in name)
    return model.eval()


def summed(module: nn.Module, take: Callable[[Tensor], Tensor] = lambda output: output) -> nn.Module:
    """A hook that sums what a module returns over all ranks, given as a list of them."""
    module.register_forward_hook(lambda _, __, output: funcol.all_reduce(take(output), "sum", list(range(WORLD))))
    return module


# -- gpt-fast: hooks that reduce, the attention's with `output[0]`; a static key-value cache --------------------------


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x):
        h = x.float()
        return (h * torch.rsqrt(torch.mean(h * h, dim=-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


class CachedAttention(nn.Module):
    """Half of the heads, and all keys and values so far in two buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS // WORLD
        self.wqkv = nn.Linear(DIM, 3 * DIM // WORLD, bias=False)
        self.wo = nn.Linear(DIM // WORLD, DIM, bias=False)
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(1, self.heads, SEQUENCE, HEAD))

    def forward(self, x, mask, position):
        batch, length, _ = x.shape
        q, k, v = (t.view(batch, length, self.heads, HEAD).transpose(1, 2) for t in self.wqkv(x).chunk(3, dim=-1))
        self.k_cache[:, :, position], self.v_cache[:, :, position] = k, v
        y = F.scaled_dot_product_attention(q, self.k_cache, self.v_cache, attn_mask=mask)
        return self.wo(y.transpose(1, 2).contiguous().view(batch, length, -1))


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(DIM, 2 * DIM // WORLD, bias=False) for _ in range(2))
        self.w2 = nn.Linear(2 * DIM // WORLD, DIM, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class ChosenExperts(nn.Module):
    """Each token's experts, one row each: [tokens, 2, DIM]."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Parameter(torch.empty(4, DIM // WORLD, DIM)) for _ in range(2))
        self.w2 = nn.Parameter(torch.empty(4, DIM, DIM // WORLD))

    def forward(self, x, chosen):
        gate, up = (torch.einsum("ti,taoi->tao", x, w[chosen]) for w in (self.w1, self.w3))
        return torch.einsum("tao,taio->tai", F.silu(gate) * up, self.w2[chosen])


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.cond_ffn = nn.Linear(DIM, 4, bias=False), summed(ChosenExperts())

    def forward(self, x):
        rows = x.view(-1, DIM)
        weights, chosen = torch.topk(F.softmax(self.gate(rows), dim=-1), 2, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        return torch.einsum("tai,ta->ti", self.cond_ffn(rows, chosen), weights)


class HookedBlock(nn.Module):
    def __init__(self, mlp: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.attention, self.feed_forward = summed(CachedAttention(), lambda output: output[0]), mlp()
        self.attention_norm, self.ffn_norm = RMSNorm(), RMSNorm()

    def forward(self, x, mask, position):
        h = x + self.attention(self.attention_norm(x), mask, position)
        return h + self.feed_forward(self.ffn_norm(h))


class Hooked(nn.Module):
    def __init__(self, mlp: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(HookedBlock(mlp) for _ in range(LAYERS))
        self.norm, self.output = RMSNorm(), nn.Linear(DIM, VOCAB, bias=False)
        self.register_buffer("causal", torch.tril(torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool)))

    def forward(self, ids, position):
        mask, x = self.causal[None, None, position], self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x, mask, position)
        return self.output(self.norm(x))


def gpt_fast(rank: int) -> nn.Module:
    return drawn(Hooked(lambda: summed(GatedMLP())), rank)


def gpt_fast_mixtral(rank: int) -> nn.Module:
    return drawn(Hooked(Experts), rank)


def one_token():
    return torch.tensor([[5]]), torch.tensor([3])


# -- Hugging Face encoders, cut by hand: no plan of theirs is needed to see what their layers do with a sum -----------


def _halved(linear: nn.Linear, rows: bool) -> nn.Linear:
    """The layer with half its outputs, or half its inputs and its bias once over all ranks."""
    if rows:
        cut = nn.Linear(linear.in_features // WORLD, linear.out_features, bias=linear.bias is not None)
        return summed(cut)
    return nn.Linear(linear.in_features, linear.out_features // WORLD, bias=linear.bias is not None)


def _cut_by_hand(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in ("q_proj", "k_proj", "v_proj", "fc1"):
                setattr(module, name, _halved(child, rows=False))
            elif name in ("out_proj", "fc2"):
                setattr(module, name, _halved(child, rows=True))
        if hasattr(module, "out_proj"):
            for heads in ("num_heads", "num_attention_heads"):
                if hasattr(module, heads):
                    setattr(module, heads, getattr(module, heads) // WORLD)
            module.embed_dim = getattr(module, "embed_dim", DIM) // WORLD if hasattr(module, "embed_dim") else DIM
    return model


def whisper_encoder(rank: int) -> nn.Module:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        num_mel_bins=8, encoder_layers=2, encoder_attention_heads=HEADS, d_model=DIM, encoder_ffn_dim=2 * DIM,
        max_source_positions=SEQUENCE,
    )  # fmt: skip
    return drawn(_cut_by_hand(WhisperEncoder(config)), rank)


def sound():
    return (torch.randn(1, 8, 2 * SEQUENCE, generator=torch.Generator().manual_seed(0)),)


def _vision(kind: str) -> dict:
    return {
        "hidden_size": DIM, "intermediate_size": 2 * DIM, "num_hidden_layers": 2, "num_attention_heads": HEADS,
        "image_size": 8, "patch_size": 4, **({"vision_use_head": False} if kind == "siglip" else {}),
    }  # fmt: skip


def clip_vision(rank: int) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return drawn(_cut_by_hand(CLIPVisionModel(CLIPVisionConfig(**_vision("clip")))), rank)


def siglip_vision(rank: int) -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return drawn(_cut_by_hand(SiglipVisionModel(SiglipVisionConfig(**_vision("siglip")))), rank)


def picture():
    return (torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


# -- torch's own test model, cut by DTensor ---------------------------------------------------------------------------


def torch_transformer(rank: int, tied: bool = True) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed._tensor.common_dtensor import ModelArgs, Transformer

    torch.manual_seed(0)
    sizes = {"n_layers": 2, "vocab_size": VOCAB, "dim": DIM, "n_heads": HEADS}
    model = Transformer(ModelArgs(**sizes, dropout_p=0.0, weight_tying=tied)).eval()
    mesh = init_device_mesh("cpu", (WORLD,))
    return Transformer.parallelize(model, mesh, use_seq_parallel=False, local_output_for_attn=True)


def torch_transformer_untied(rank: int) -> nn.Module:
    return torch_transformer(rank, tied=False)


def tokens():
    return (torch.arange(2 * SEQUENCE).view(2, SEQUENCE) % VOCAB,)


# -- Megatron: sequence first, the sum transposed behind the embedding ------------------------------------------------


class MegatronForm(nn.Module):
    """A vocabulary-parallel embedding whose sum becomes [sequence, batch, DIM], then layers that return their bias
    beside their output, which the residual takes in."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.first = rank * VOCAB // WORLD
        self.embedding_shard = nn.Parameter(torch.empty(VOCAB // WORLD, DIM))
        self.positions = nn.Embedding(SEQUENCE, DIM)
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(3))
        self.w1 = nn.ModuleList(nn.Linear(DIM, DIM // WORLD) for _ in range(2))
        self.w2 = nn.ModuleList(nn.Linear(DIM // WORLD, DIM, bias=False) for _ in range(2))
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(DIM)) for _ in range(2))

    def forward(self, ids):
        outside = (ids < self.first) | (ids >= self.first + VOCAB // WORLD)
        parts = self.embedding_shard[(ids - self.first).masked_fill(outside, 0)]
        parts = parts.masked_fill(outside[..., None], 0.0)
        x = funcol.all_reduce(parts, "sum", dist.group.WORLD).transpose(0, 1).contiguous()
        for norm, up, down, bias in zip(self.norms, self.w1, self.w2, self.biases, strict=False):
            output = funcol.all_reduce(down(F.gelu(up(norm(x)))), "sum", dist.group.WORLD)
            x = x + (output + bias)
        return self.norms[-1](x)


def megatron(rank: int) -> nn.Module:
    return drawn(MegatronForm(rank), rank)
