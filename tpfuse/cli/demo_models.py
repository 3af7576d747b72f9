"""The demo's models: tiny configurations of real Hugging Face architectures, and their float64 references."""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import dataclass, field
from typing import Any

import torch

from .._torch_private import backward_hooks

DTYPE = torch.bfloat16
_VOCABULARY = 256
_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Family:
    """A model of the demo. It fails when fewer than `must_fuse` all-reduces are fused, or more than `may_miss` are not.

    How many there are depends on the version of transformers: older ones do not shard the embedding.
    """

    name: str
    title: str
    config_class: str
    must_fuse: int
    may_miss: int = 0
    sizes: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        import transformers

        return getattr(transformers, self.config_class)(**{**_SIZES, **self.sizes})


_DEEPSEEK = {
    "num_key_value_heads": 8,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}

FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "Llama, 2 layers", "LlamaConfig", 4),
        Family("qwen3", "Qwen3, 2 layers", "Qwen3Config", 4, sizes={"head_dim": 16}),
        Family("deepseek_v3", "DeepSeek-V3, 1 dense + 1 MoE layer", "DeepseekV3Config", 1, 2, _DEEPSEEK),
    )
}


def transformers_version() -> str:
    import transformers

    return transformers.__version__


def token_ids() -> torch.Tensor:
    return torch.randint(0, _VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))


def save_with_reference(family: Family, folder: str) -> Any:
    """Save the model with random weights; returns its logits for `token_ids`, computed in float64 on one process."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family.config(), dtype=DTYPE)
    for name, weight in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            # Random router weights leave the experts nearly tied, and rounding then picks other ones than float64
            # does; a trained router tells them apart.
            weight.data *= 8
    model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped matrix product knows no float64
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            _compute_in_own_dtype(module)
    with torch.no_grad():
        return model(input_ids=token_ids(), use_cache=False).logits.numpy()


def _compute_in_own_dtype(norm: Any) -> None:
    """Hugging Face's norms compute in float32, whatever the model's dtype: too coarse for a reference."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))

    norm.forward = forward


def load_sharded(folder: str) -> Any:
    """This rank's part of the model, cut as its own tensor-parallel plan says, for inference."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=DTYPE).eval()
    for module in model.modules():
        # Some versions of transformers hang hooks for training on q/k norms, and Dynamo breaks the graph at each.
        backward_hooks(module).clear()
    return model


def repair_gloo_all_gather() -> torch.library.Library:
    """Gloo's functional all-gather dies on CUDA tensors (torch 2.11); its other all-gather works, so take that one.

    For the demo on one shared GPU only. lm_head's logits go this way. The repair lasts as long as the library returned.
    """
    import torch.distributed as dist

    from .._torch_private import process_group

    def all_gather(x: torch.Tensor, group_size: int, group_name: str) -> torch.Tensor:
        gathered = x.new_empty((x.shape[0] * group_size, *x.shape[1:]))
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=process_group(group_name))
        return gathered

    library = torch.library.Library("_c10d_functional", "IMPL")
    library.impl("all_gather_into_tensor", all_gather, "CUDA")
    return library


def why_inductor_cannot_compile_for_cpu() -> str:
    """What is missing for Inductor's C++ code, or ''."""
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        return "there is no C++ compiler here (g++)"
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        return "Python.h is missing here (python3-dev)"
    return ""
