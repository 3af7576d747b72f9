"""Model families in tiny random configurations: how each is cut, and how many all-reduces feed a norm.

Used by the tests and by `benchmarks/coverage.py`. Importable by spawned ranks.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Eight ranks hold eight columns of an expert each: grouped products want rows of whole 16 bytes.
HIDDEN, INNER, EXPERT_INNER, VOCAB, HEADS, LAYERS, POSITIONS = 64, 128, 64, 128, 8, 2, 64

#: Every family is also cut over 8 ranks, so every count that is cut divides by 8.
COMMON = dict(
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=HEADS,
    vocab_size=VOCAB,
    max_position_embeddings=POSITIONS,
    pad_token_id=0,
)
HEAD_DIM = dict(head_dim=HIDDEN // HEADS)
EXPERTS = dict(moe_intermediate_size=EXPERT_INNER, num_experts_per_tok=2)


@dataclass(frozen=True)
class Family:
    """One family.

    name: what the tables call it. config: the name of its configuration class in transformers. fields: its arguments.
    feeding: how many all-reduces of a forward pass of `LAYERS` layers feed a norm, worked out on paper in `why`.
    plan: None for Hugging Face's own plan; otherwise styles for `torch.distributed.tensor.parallel`, by module name.
    heads: attributes of the attention modules that count heads, to be divided where the plan is ours.
    exceptions: for a mode in which fewer are fused than feed a norm, how many are, and what it would take.
    cannot: for a mode in which the model itself fails once it is cut, in eager mode too, what it says.
    """

    name: str
    config: str
    feeding: int
    why: str
    fields: dict[str, Any] = field(default_factory=lambda: dict(COMMON))
    plan: dict[str, str] | None = None
    heads: tuple[str, ...] = ()
    exceptions: dict[str, tuple[int, str]] = field(default_factory=dict)
    cannot: dict[str, str] = field(default_factory=dict)

    @property
    def modes(self) -> tuple[str, ...]:
        return tuple(mode for mode in MODES if mode not in self.cannot)

    def fused_in(self, mode: str) -> int:
        """How many all-reduces have to be fused in `mode`."""
        return self.exceptions.get(mode, (self.feeding, ""))[0]


def _plain(name: str, config: str, **fields: Any) -> Family:
    """A decoder with attention and a dense MLP in every layer and a cut embedding."""
    return Family(name, config, 2 * LAYERS + 1, "embedding, then attention and MLP of each layer", {**COMMON, **fields})


def _routed(
    name: str,
    config: str,
    feeding: int,
    why: str,
    cannot: dict[str, str] | None = None,
    exceptions: dict[str, tuple[int, str]] | None = None,
    **fields: Any,
) -> Family:
    fields = {**COMMON, **EXPERTS, **fields}
    return Family(name, config, feeding, why, fields, exceptions=exceptions or {}, cannot=cannot or {})


def _opt(name: str, dropout: float, **facts: Any) -> Family:
    return Family(
        name,
        "OPTConfig",
        2 * LAYERS + 1,
        "embedding (position embedding added), then attention and MLP of each layer, each with a bias after the sum",
        dict(
            hidden_size=HIDDEN, ffn_dim=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS, vocab_size=VOCAB,
            max_position_embeddings=POSITIONS, word_embed_proj_dim=HIDDEN, dropout=dropout, tie_word_embeddings=False,
        ),
        {
            "model.decoder.embed_tokens": "embedding",
            **{f"model.decoder.layers.*.self_attn.{p}_proj": "colwise" for p in "qkv"},
            "model.decoder.layers.*.self_attn.out_proj": "rowwise",
            "model.decoder.layers.*.fc1": "colwise",
            "model.decoder.layers.*.fc2": "rowwise",
        },
        ("num_heads",),
        **facts,
    )  # fmt: skip


FAMILIES = (
    _plain("llama", "LlamaConfig"),
    _plain("mistral", "MistralConfig", **HEAD_DIM),
    _plain("qwen3", "Qwen3Config", **HEAD_DIM),
    _plain("phi3", "Phi3Config"),
    _plain("gemma2", "Gemma2Config", **HEAD_DIM, sliding_window=32),
    _plain("gemma3", "Gemma3TextConfig", **HEAD_DIM, sliding_window=32),
    Family(
        "gpt_neox",
        "GPTNeoXConfig",
        2 * LAYERS,
        "attention and MLP of each layer, the two added up; the embedding is not cut by the plan",
        {k: v for k, v in COMMON.items() if k != "num_key_value_heads"},
    ),
    _opt("opt", dropout=0.0),
    _opt(
        "opt_dropout",
        dropout=0.1,
        exceptions={
            "training": (
                1,
                "Dropout stands between the sums and the norms (the embedding's norm comes before any). The mask could "
                "move in front of the all-reduce only if all ranks drew the same one, and nothing in a graph says that "
                "their random states agree. It would take a kernel that applies the mask to the sum it has just made.",
            )
        },
    ),
    Family(
        "falcon",
        "FalconConfig",
        2 * LAYERS + 1,
        "embedding, then attention and MLP of each layer, the two added up",
        dict(
            hidden_size=HIDDEN, ffn_hidden_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_kv_heads=HEADS, vocab_size=VOCAB, new_decoder_architecture=True, parallel_attn=True, bias=False,
            max_position_embeddings=POSITIONS, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        ),
        {
            "transformer.word_embeddings": "embedding",
            "transformer.h.*.self_attention.query_key_value": "colwise",
            "transformer.h.*.self_attention.dense": "rowwise",
            "transformer.h.*.mlp.dense_h_to_4h": "colwise",
            "transformer.h.*.mlp.dense_4h_to_h": "rowwise_copied",
        },
        ("num_heads", "num_kv_heads"),
    ),
    _plain("cohere", "CohereConfig"),
    _routed(
        "deepseek_v3",
        "DeepseekV3Config",
        4,
        "embedding, the dense MLP of layer 0, routed and shared experts of layer 1; attention is not cut by the plan",
        n_routed_experts=8, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
    ),
    _routed("mixtral", "MixtralConfig", 2 * LAYERS + 1, "embedding, attention and experts of each layer",
            num_local_experts=4),
    _routed("qwen3_moe", "Qwen3MoeConfig", 2 * LAYERS + 1, "embedding, attention and MLP (layer 0) or experts",
            **HEAD_DIM, num_experts=8, mlp_only_layers=[0]),
    _routed("glm4_moe", "Glm4MoeConfig", 2 * LAYERS + 2,
            "embedding, attention of each layer, dense MLP of layer 0, routed and shared experts of layer 1",
            **HEAD_DIM, n_routed_experts=8, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1,
            attention_bias=True, use_qk_norm=True),
    # Tried because each does something of its own.
    _plain("cohere2", "Cohere2Config", **HEAD_DIM, sliding_window=32),
    _plain("glm4", "Glm4Config", **HEAD_DIM),
    Family("olmo2", "Olmo2Config", 2 * LAYERS,
           "attention and MLP of each layer, normed before they are added; no norm follows the embedding"),
    _plain("granite", "GraniteConfig", residual_multiplier=0.22, embedding_multiplier=12.0, logits_scaling=8.0),
    _plain("starcoder2", "Starcoder2Config", use_bias=True, sliding_window=None),
    Family("phi", "PhiConfig", 2 * LAYERS + 1, "embedding, then attention and MLP of each layer, the two added up"),
    _routed("qwen2_moe", "Qwen2MoeConfig", 2 * LAYERS + 1,
            "embedding, attention and routed experts of each layer; the gated shared expert is not cut",
            num_experts=8, shared_expert_intermediate_size=EXPERT_INNER),
    _routed("olmoe", "OlmoeConfig", 2 * LAYERS + 1, "embedding, attention and experts of each layer", num_experts=8),
    _routed("llama4", "Llama4TextConfig", 2 * LAYERS + 2,
            "embedding, attention of each layer, dense MLP of layer 0, routed experts (a row for each, added up behind "
            "the all-reduce) and the shared one of layer 1",
            {"training": "the experts' result is added in place to what a custom autograd function handed out"},
            **HEAD_DIM, intermediate_size_mlp=INNER, num_local_experts=4, interleave_moe_layer_step=2),
    _routed("qwen3_next", "Qwen3NextConfig", 2 * LAYERS + 2,
            "embedding, routed and gated shared experts of each layer, attention of layer 1; the linear attention of "
            "layer 0 gathers its output",
            exceptions={"training": (4, "A gate multiplies the shared expert's sum, and its gradient reads that sum: "
                                        "it is finished by itself, and the routed experts' beside it is fused.")},
            **HEAD_DIM, num_experts=8, shared_expert_intermediate_size=EXPERT_INNER, linear_num_key_heads=HEADS,
            linear_num_value_heads=HEADS, linear_key_head_dim=8, linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"]),
)  # fmt: skip
#: The families that were asked for by name; the others each do something of their own.
NAMED = FAMILIES[:15]
BY_NAME = {family.name: family for family in FAMILIES}
MODES = ("inference", "dynamic", "decode", "training")


def config_of(family: Family) -> Any:
    import transformers

    return getattr(transformers, family.config)(**family.fields)


def whole_model(family: Family, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """The uncut model with random weights that are not near zero anywhere."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
        elif "norm" in name or name.endswith("bias"):
            nn.init.normal_(parameter, mean=float("bias" not in name), std=0.1)
    return model.to(dtype).eval()


def cut_model(family: Family, whole: nn.Module, rank: int, world: int) -> nn.Module:
    """This rank's part of `whole`: by Hugging Face's own plan, or by the family's with `parallelize_module`.

    Needs a process group of `world` ranks, which may be a fake one.
    """
    if family.plan is not None:
        return _cut_with_parallelize_module(family, whole, world)
    from transformers import AutoModelForCausalLM

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    fake = dist.get_backend() == "fake"
    with tempfile.TemporaryDirectory() as folder:
        # Hugging Face saves on the main rank only, so all ranks read rank 0's folder.
        shared = [folder]
        if not fake:
            dist.broadcast_object_list(shared)
        whole.save_pretrained(shared[0], is_main_process=fake or rank == 0)
        if not fake:
            dist.barrier()
        dtype = next(whole.parameters()).dtype
        cut = AutoModelForCausalLM.from_pretrained(shared[0], tp_plan="auto", dtype=dtype).eval()
        if not fake:
            dist.barrier()
    return cut


def _cut_with_parallelize_module(family: Family, whole: nn.Module, world: int) -> nn.Module:
    import copy
    import fnmatch

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    class RowwiseCopied(RowwiseParallel):
        """For a model that adds to its output in place: autograd forbids that on what a DTensor hands out (Falcon)."""

        @staticmethod
        def _prepare_output_fn(layouts: Any, use_local: bool, module: Any, outputs: Any, mesh: Any) -> Any:
            return RowwiseParallel._prepare_output_fn(layouts, use_local, module, outputs, mesh).clone()

    styles: dict[str, Callable[[], Any]] = {
        "colwise": ColwiseParallel,
        "rowwise": RowwiseParallel,
        "rowwise_copied": RowwiseCopied,
        "embedding": lambda: RowwiseParallel(input_layouts=Replicate()),
    }
    cut = copy.deepcopy(whole)
    owners = set()
    plan = {}
    for name, _ in cut.named_modules():
        for pattern, style in (family.plan or {}).items():
            if fnmatch.fnmatchcase(name, pattern):
                plan[name] = styles[style]()
                owners.add(name.rpartition(".")[0])
    for owner in owners:
        module = cut.get_submodule(owner)
        for attribute in family.heads:
            if hasattr(module, attribute) and "attention" in type(module).__name__.lower():
                setattr(module, attribute, getattr(module, attribute) // world)
    return parallelize_module(cut, init_device_mesh("cpu", (world,)), plan)


# -- what is run ------------------------------------------------------------------------------------------------------


def token_ids(rows: int = 2, length: int = 8) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def call_of(model: nn.Module, mode: str) -> tuple[Callable[..., Tensor], dict[str, Any], bool]:
    """(function to compile, its keyword arguments, whether gradients are on) for a mode.

    "decode" is one step of generation on a static cache that a prefill has filled.
    """

    def logits(**kwargs: Any) -> Tensor:
        return model(**kwargs).logits

    ids = token_ids()
    if mode == "training":
        model.train()
        return logits, dict(input_ids=ids, use_cache=False), True
    model.eval()
    if mode in ("inference", "dynamic"):
        return logits, dict(input_ids=ids, use_cache=False), False
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=2 * ids.shape[1])
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    step = dict(
        input_ids=ids[:, -1:],
        past_key_values=cache,
        position_ids=torch.full((ids.shape[0], 1), ids.shape[1]),
        use_cache=True,
    )
    if model.config.model_type == "opt":
        # Without a mask the model makes one whose size depends on what is in the cache: a graph break.
        step["attention_mask"] = torch.ones(ids.shape[0], ids.shape[1] + 1)
    return logits, step, False
