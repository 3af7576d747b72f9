"""Small tensor-parallel models, cut the way users cut theirs. Importable by spawned ranks."""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn

HIDDEN, INTER, VOCAB = 64, 96, 128


class Block(nn.Module):
    """A decoder layer without its attention mathematics: two cut pairs of linears, pre-norm, residual.

    `how` is the way the sums are paid: "funcol", "inplace" (dist.all_reduce), or "dtensor" (left to the caller).
    """

    def __init__(self, world: int, how: str, norm: type[nn.Module]):
        super().__init__()
        cut = 1 if how == "dtensor" else world
        self.how = how
        self.attn_norm, self.mlp_norm = norm(HIDDEN), norm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, HIDDEN // cut, bias=False)
        self.o_proj = nn.Linear(HIDDEN // cut, HIDDEN, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INTER // cut, bias=False)
        self.down_proj = nn.Linear(INTER // cut, HIDDEN, bias=False)

    def reduced(self, partial: Tensor) -> Tensor:
        if self.how == "funcol":
            return funcol.all_reduce(partial, "sum", dist.group.WORLD)
        if self.how == "inplace":
            dist.all_reduce(partial)
        return partial

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.reduced(self.o_proj(torch.tanh(self.qkv(self.attn_norm(x)))))
        return x + self.reduced(self.down_proj(torch.nn.functional.silu(self.up_proj(self.mlp_norm(x)))))


class Stack(nn.Module):
    """`layers` blocks and a final norm: a norm reads every sum, 2 * layers in all."""

    def __init__(self, world: int, how: str = "funcol", layers: int = 2, norm: type[nn.Module] = nn.RMSNorm):
        super().__init__()
        self.layers = nn.ModuleList(Block(world, how, norm) for _ in range(layers))
        self.norm = norm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class SplitBlock(nn.Module):
    """A decoder layer with a linear for each of query, key, value, gate and up, as most models have them: backward adds
    the gradients of three linears, and of two.

    `how`: "dtensor" (parallelize_module is the caller's), or "pairs" (conjugate pairs of collectives by hand).
    """

    def __init__(self, world: int, how: str, norm: type[nn.Module]):
        super().__init__()
        cut = world if how == "pairs" else 1
        self.how = how
        self.attn_norm, self.mlp_norm = norm(HIDDEN), norm(HIDDEN)
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(HIDDEN, HIDDEN // cut, bias=False))
        for name in ("gate_proj", "up_proj"):
            setattr(self, name, nn.Linear(HIDDEN, INTER // cut, bias=False))
        self.o_proj = nn.Linear(HIDDEN // cut, HIDDEN, bias=False)
        self.down_proj = nn.Linear(INTER // cut, HIDDEN, bias=False)

    def column(self, name: str, x: Tensor) -> Tensor:
        from tpfuse.parallel.collectives import copy_to

        return getattr(self, name)(copy_to(x, dist.group.WORLD.group_name) if self.how == "pairs" else x)

    def row(self, name: str, x: Tensor) -> Tensor:
        from tpfuse.parallel.collectives import reduce_from

        partial = getattr(self, name)(x)
        return reduce_from(partial, dist.group.WORLD.group_name) if self.how == "pairs" else partial

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn_norm(x)
        q, k, v = (self.column(name, y) for name in ("q_proj", "k_proj", "v_proj"))
        x = x + self.row("o_proj", torch.tanh(q) * k + v)
        y = self.mlp_norm(x)
        gate, up = (self.column(name, y) for name in ("gate_proj", "up_proj"))
        return x + self.row("down_proj", torch.nn.functional.silu(gate) * up)


class SplitStack(nn.Module):
    """`layers` split blocks and a final norm. `wrap` runs a block (a checkpoint, say)."""

    def __init__(self, world: int, how: str, layers: int = 2, norm: type[nn.Module] = nn.RMSNorm, wrap=None):
        super().__init__()
        self.layers = nn.ModuleList(SplitBlock(world, how, norm) for _ in range(layers))
        self.norm = norm(HIDDEN)
        self.wrap = wrap or (lambda block, x: block(x))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.wrap(layer, x)
        return self.norm(x)


COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def split_stack(rank: int, mesh, how: str, dtype: torch.dtype = torch.float32, **options) -> SplitStack:
    """This rank's part of a split stack with random weights, over the 1-D `mesh`: the same whole for every `how`."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    whole = SplitStack(1, "dtensor", **options).to(dtype)
    if how == "dtensor":
        styles = {name: ColwiseParallel() for name in COLUMNS} | {n: RowwiseParallel() for n in ("o_proj", "down_proj")}
        for layer in whole.layers:
            parallelize_module(layer, mesh, styles)
        return whole
    world = mesh.size()
    part = SplitStack(world, how, **options).to(dtype)
    dims = dict.fromkeys((f"{name}.weight" for name in COLUMNS), 0) | {"o_proj.weight": 1, "down_proj.weight": 1}
    state = {}
    for name, tensor in whole.state_dict().items():
        dim = next((dim for end, dim in dims.items() if name.endswith(end)), None)
        state[name] = tensor if dim is None else tensor.chunk(world, dim)[rank].contiguous()
    part.load_state_dict(state)
    return part


def loss(y: Tensor) -> Tensor:
    """A loss whose gradient does not vanish: the sum of squares of a normed value is a constant, and so nearly is one
    whose weights hardly differ within a row, which leaves rounding errors for a gradient."""
    weights = torch.arange(y.numel(), dtype=torch.float32, device=y.device).cos()
    return (y * weights.to(y.dtype).view_as(y)).square().sum()


def cut_from(whole: Stack, rank: int, world: int, how: str) -> Stack:
    """The rank's own part of an uncut stack."""
    norm = type(whole.norm)
    part = Stack(world, how, len(whole.layers), norm).to(next(whole.parameters()).dtype)
    state = {}
    for name, tensor in whole.state_dict().items():
        dim = 0 if name.endswith(("qkv.weight", "up_proj.weight")) else 1 if "_proj.weight" in name else None
        state[name] = tensor if dim is None else tensor.chunk(world, dim)[rank].contiguous()
    part.load_state_dict(state)
    return part


def hugging_face_config(family: str, layers: int = 2):
    """A tiny random configuration of a Hugging Face family."""
    import transformers as tf

    common = dict(
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=64,
    )
    if family == "llama":
        return tf.LlamaConfig(**common)
    if family == "qwen3":
        return tf.Qwen3Config(**common, head_dim=16)
    if family == "deepseek_v3":
        return tf.DeepseekV3Config(
            **{**common, "num_key_value_heads": 4},
            moe_intermediate_size=32,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=32,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
        )
    raise ValueError(family)


def load_with_tp_plan(config, rank: int, world: int, dtype: torch.dtype, seed: int = 0):
    """(the model cut by Hugging Face's own plan, the uncut model in float64); random weights, equal on all ranks."""
    from transformers import AutoModelForCausalLM

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.manual_seed(seed)
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).eval()
    # Hugging Face saves on the main rank only, so all ranks read rank 0's folder.
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        whole.save_pretrained(shared[0])
        dist.barrier()
        cut = AutoModelForCausalLM.from_pretrained(shared[0], tp_plan="auto", dtype=dtype).eval()
        dist.barrier()
    # The grouped matrix product that experts default to has no float64 form.
    whole.config._experts_implementation = "eager"
    return cut, whole.double()
