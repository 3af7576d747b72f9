"""Hugging Face families by their own tp plan: equal to the unsharded model under every policy, gradients included."""

import copy

import pytest
import torch
import transformers
from torch.distributed.device_mesh import init_device_mesh

from tests.policy_harness import build, loss_of, relative, run_threads
from tpfuse.parallel.parallelize import parallelize
from tpfuse.parallel.rows import rows
from tpfuse.policy import SharingPolicy

COMMON = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=64,
    attn_implementation="eager",
    experts_implementation="eager",
)
ROUTED = dict(
    COMMON,
    moe_intermediate_size=32,
    num_experts_per_tok=2,
    n_routed_experts=4,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
)


def config_of(family: str, **extra):
    if family == "deepseek_v3":
        return transformers.DeepseekV3Config(
            **ROUTED, n_shared_experts=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4,
            v_head_dim=4, **extra,
        )  # fmt: skip
    if family == "glm4_moe":
        fields = {**ROUTED, "num_key_value_heads": 2, "head_dim": 8, "attention_bias": True, "use_qk_norm": True}
        return transformers.Glm4MoeConfig(**fields, **extra)
    if family == "qwen3_moe":
        fields = {**COMMON, "num_key_value_heads": 2, "head_dim": 8, "mlp_only_layers": [0]}
        return transformers.Qwen3MoeConfig(
            **fields, moe_intermediate_size=32, num_experts_per_tok=2, num_experts=4, **extra
        )
    fields = {**COMMON, "num_key_value_heads": 4}
    fields.pop("experts_implementation")
    config = transformers.Qwen3Config if family == "qwen3" else transformers.LlamaConfig
    return config(**fields, head_dim=4, tie_word_embeddings=family == "llama", **extra)


_MODELS: dict[str, torch.nn.Module] = {}


def model_of(family: str) -> torch.nn.Module:
    def make():
        model = transformers.AutoModelForCausalLM.from_config(config_of(family))
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
        return model

    if family not in _MODELS:
        _MODELS[family] = build(make)
    return copy.deepcopy(_MODELS[family])


def compare(rank, model, want, grads, ids, policy):
    dp, attn = policy.dp_size, policy.attn_tp_size
    parallelize(model, init_device_mesh("cpu", (dp, attn), mesh_dim_names=("dp", "attn_tp")), policy)
    with rows([len(i) * i.shape[1] for i in ids[:dp]]):
        logits = model(ids[rank // attn], use_cache=False).logits
        loss_of(logits).backward()
    errors = {"logits": relative(logits, want[rank // attn])}
    for name, parameter in model.named_parameters():
        cut = model._tpfuse.cuts.get(name)
        whole = grads[name] if cut is None else cut.take(grads[name])
        # Mathematically zero gradients (a key bias) are noise on both sides.
        errors[name] = (parameter.grad - whole).abs().max().item() / max(1e-3, whole.abs().max().item())
    return max(errors.items(), key=lambda item: item[1]), len(model._tpfuse.cuts)


CASES = [(tp, dp, dense) for tp, dp in [(2, 1), (2, 2), (4, 2), (8, 2)] for dense in sorted({1, tp // dp, tp})]


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "glm4_moe", "llama", "qwen3"])
def test_family_equals_the_unsharded_model(family):
    plain = model_of(family)
    ids = torch.randint(0, 64, (2, 2, 3), generator=torch.Generator().manual_seed(1))
    want = plain(ids.flatten(0, 1), use_cache=False).logits
    wanted = want.detach().unflatten(0, (2, 2))
    names, parameters = zip(*plain.named_parameters(), strict=True)
    grads = {}
    for dp in (1, 2):  # the sum of all replicas' losses
        loss = loss_of(want[: 2 * dp])
        whole = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        grads[dp] = dict(zip(names, whole, strict=True))

    def run(policy):
        replicas = [model_of(family) for _ in range(policy.tp_size)]
        return run_threads(
            policy.tp_size, lambda r: compare(r, replicas[r], wanted, grads[policy.dp_size], ids, policy)
        )

    for tp, dp, dense in CASES:
        (name, worst), cuts = max(run(SharingPolicy(tp, dp, dense)), key=lambda result: result[0][1])
        # These models compute their norms, softmax and router in float32 whatever the dtype.
        assert worst < 1e-5, (tp, dp, dense, name, worst)
        assert cuts > 0 or (tp // dp, dense) == (1, 1)


@pytest.mark.parametrize("counts", [(2, 1), (0, 2)])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "glm4_moe"])
def test_uneven_and_idle_replicas(family, counts):
    plain = model_of(family)
    ids = torch.randint(0, 64, (sum(counts), 3), generator=torch.Generator().manual_seed(1))
    want = plain(ids, use_cache=False).logits
    names, parameters = zip(*plain.named_parameters(), strict=True)
    whole = torch.autograd.grad(loss_of(want), parameters, allow_unused=True, materialize_grads=True)
    grads = dict(zip(names, whole, strict=True))
    wanted, split = want.detach().split(counts), ids.split(counts)

    def run(policy):
        replicas = [model_of(family) for _ in range(4)]
        return run_threads(4, lambda r: compare(r, replicas[r], wanted, grads, split, policy))

    for dense in (1, 2, 4):
        (name, worst), _ = max(run(SharingPolicy(4, 2, dense)), key=lambda result: result[0][1])
        assert worst < 1e-5, (dense, name, worst)
