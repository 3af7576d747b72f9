"""The models of end_to_end.py, with random weights: how to build one, cut it, and make one step of it.

    llama                  Hugging Face Llama, Llama-3-8B's sizes
    llama_fp8              the same, its layers' linears quantised by torchao: FP8, activations by row
    qwen3_moe              Hugging Face Qwen3-MoE, Qwen3-30B-A3B's sizes
    dp_<dp>_<size>         dense layers of DeepSeek-V3's sizes under data-parallel attention, moe_dense_tp_size = <size>
    glm4_moe_<dp>_<size>   Hugging Face GLM4-MoE, GLM-4.5-Air's sizes, all layers but the last dense; the same policies

Models have fewer layers than the originals, and a vocabulary smaller in the same proportion, so that embedding and head
keep their share.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import tpfuse


@dataclass(frozen=True)
class Run:
    """`phase`: "decode" (`size` sequences, one new token each) or "prefill" (one sequence of `size` tokens)."""

    model: str
    phase: str
    size: int
    layers: int
    context: int = 1024


@dataclass
class Step:
    """`call(*args)` is what gets compiled; `reset` brings its caches back to their length, before at most `most` steps.
    `expect_fused`: collectives that must be fused away, or None where the count is the planner's."""

    call: Callable[..., Tensor]
    args: tuple
    reset: Callable[[], Any]
    most: int
    layers: int
    rows: int
    expect_fused: int | None = None


TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}


def hugging_face_config(run: Run, tiny: bool) -> Any:
    import transformers

    common = {
        "num_hidden_layers": run.layers,
        "max_position_embeddings": 16384,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    }
    if run.model.startswith("glm4_moe"):
        return _glm4_moe_config(run, tiny, common)
    if run.model.startswith("llama"):
        sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
        sizes |= TINY if tiny else {}
        return transformers.LlamaConfig(**sizes, **common, vocab_size=_share(128256, run.layers, 32))
    sizes = {
        "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128,
    }  # fmt: skip
    routed = {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
    if tiny:
        sizes, routed = sizes | TINY, {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    return transformers.Qwen3MoeConfig(**sizes, **routed, **common, vocab_size=_share(151936, run.layers, 48))


def _glm4_moe_config(run: Run, tiny: bool, common: dict[str, Any]) -> Any:
    import transformers

    sizes = {
        "hidden_size": 4096, "intermediate_size": 10944, "num_attention_heads": 96, "num_key_value_heads": 8,
        "head_dim": 128, "moe_intermediate_size": 1408, "n_routed_experts": 128, "num_experts_per_tok": 8,
        "n_shared_experts": 1, "first_k_dense_replace": run.layers - 1,
    }  # fmt: skip
    if tiny:
        sizes |= TINY | {"moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2}
    vocabulary = _share(151552, run.layers, 46)
    return transformers.Glm4MoeConfig(**sizes, **common, vocab_size=vocabulary, n_group=1, topk_group=1)


def policy_of(model: str, world: int) -> tpfuse.SharingPolicy:
    """`model` ends in _<dp_size>_<moe_dense_tp_size>, or has no policy: the whole group."""
    parts = re.fullmatch(r".*_(\d+)_(\d+)", model)
    return tpfuse.SharingPolicy(world, int(parts[1]), int(parts[2])) if parts else tpfuse.SharingPolicy(world)


def _mesh(policy: tpfuse.SharingPolicy, device: torch.device) -> Any:
    if policy.dp_size == 1:
        return init_device_mesh(device.type, (policy.tp_size,))
    sizes = (policy.dp_size, policy.attn_tp_size)
    return init_device_mesh(device.type, sizes, mesh_dim_names=("dp", "attn_tp"))


def _share(vocabulary: int, layers: int, of: int) -> int:
    return -(-vocabulary * layers // of // 64) * 64


def build(run: Run, device: torch.device, tiny: bool = False) -> Step:
    """This rank's part of the model and its inputs. Collective."""
    torch.manual_seed(0)  # the same whole weights on every rank, as parallelize asks
    return _dp_attention(run, device, tiny) if run.model.startswith("dp_") else _hugging_face(run, device, tiny)


def _hugging_face(run: Run, device: torch.device, tiny: bool) -> Step:
    import transformers

    config = hugging_face_config(run, tiny)
    policy = policy_of(run.model, dist.get_world_size())
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if not run.model.startswith("llama"):
        model.set_experts_implementation("grouped_mm")
    tpfuse.parallelize(model, _mesh(policy, device), policy)
    model.requires_grad_(False)
    if run.model == "llama_fp8":
        _quantise_by_row(model.model)
    rows = run.size * policy.dp_size
    if run.phase == "prefill":
        ids = torch.randint(0, config.vocab_size, (1, run.size), device=device)

        def prefill(ids: Tensor) -> Tensor:
            return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

        return Step(prefill, (ids,), lambda: None, 1 << 30, run.layers, rows)

    most = 64
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = transformers.StaticCache(config=config, max_cache_len=run.context + most)
    heads = config.num_key_value_heads // policy.attn_tp_size
    cache.early_initialization(run.size, heads, head_dim, torch.bfloat16, device)

    def reset() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(run.context)

    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        for written in (layer.keys, layer.values, layer.cumulative_length):
            torch._dynamo.mark_static_address(written)  # or torch.compile's own CUDA graphs are left out
    ids = torch.randint(0, config.vocab_size, (run.size, 1), device=device)

    def decode(ids: Tensor) -> Tensor:
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits

    return Step(decode, (ids,), reset, most, run.layers, rows)


def _quantise_by_row(model: nn.Module) -> None:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


# -- data-parallel attention ------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Every row is a sequence of its own length-1 context: weights and boundaries as in decode, no cache."""

    def __init__(self, hidden: int, heads: int, dim: int) -> None:
        super().__init__()
        self.num_heads, self.dim = heads, dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden, heads * dim, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(heads * dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(*x.shape[:-1], self.num_heads, self.dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        weights = torch.sigmoid((q * k).sum(-1, keepdim=True) * self.dim**-0.5)
        return self.o_proj((weights * v).flatten(-2))


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


tpfuse.attention(colwise=("q_proj", "k_proj", "v_proj"), rowwise=("o_proj",), heads="num_heads")(Attention)
tpfuse.dense_mlp(colwise=("gate_proj", "up_proj"), rowwise=("down_proj",))(MLP)


class Decoder(nn.Module):
    def __init__(self, layers: int, hidden: int, inner: int, heads: int, dim: int) -> None:
        super().__init__()
        self.attention = nn.ModuleList(Attention(hidden, heads, dim) for _ in range(layers))
        self.mlp = nn.ModuleList(MLP(hidden, inner) for _ in range(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, eps=1e-6) for _ in range(2 * layers + 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x = x + attention(h)
            h = self.norms[2 * i + 1](x)
            x = x + mlp(h)
            h = self.norms[2 * i + 2](x)
        return h


def _dp_attention(run: Run, device: torch.device, tiny: bool) -> Step:
    """Every replica has `run.size` rows."""
    policy = policy_of(run.model, dist.get_world_size())
    sizes = (64, 128, 8, 8) if tiny else (7168, 18432, 64, 128)
    with device:
        model = Decoder(run.layers, *sizes).to(torch.bfloat16).eval()
    tpfuse.parallelize(model, _mesh(policy, device), policy)
    model.requires_grad_(False)
    x = torch.randn(run.size, sizes[0], device=device, dtype=torch.bfloat16)
    return Step(model, (x,), lambda: None, 1 << 30, run.layers, run.size * policy.dp_size)
