"""Sequence-parallel models for training: DTensor's plan; Megatron's and torchtitan's forms, collectives by hand. And
the same model cut plainly.

Two layers of attention and MLP. `whole` holds all weights; `cut_*` give this rank's model, whose parameters are slices
of them. Hidden states are [B, S, H], or [S, B, H] as Megatron has them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

HIDDEN, HEAD, INNER, TOKENS, LAYERS = 32, 8, 48, 40, 2


class SavingNorm(torch.autograd.Function):
    """RMSNorm that hands x-hat to its backward, or what it gave (Apex's `memory_efficient`)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, saves_output: bool) -> Tensor:
        rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
        normed = x.float() * rstd
        y = (normed * weight).to(x.dtype)
        ctx.saves_output = saves_output
        ctx.save_for_backward(y if saves_output else normed.to(x.dtype), rstd, weight)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        saved, rstd, weight = ctx.saved_tensors
        normed = saved.float() / weight if ctx.saves_output else saved.float()
        scaled = grad.float() * weight
        dx = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd
        dweight = (grad.float() * normed).sum(tuple(range(grad.dim() - 1)))
        return dx.to(grad.dtype), dweight.to(weight.dtype), None


class NormedRowsSaved(nn.Module):
    saves_output = False

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return SavingNorm.apply(x, self.weight, self.saves_output)


class OutputSaved(NormedRowsSaved):
    saves_output = True


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first, second, _ = x.shape
        q, k, v = (linear(x).view(first, second, -1, HEAD).transpose(1, 2) for linear in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(first, second, -1))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(HIDDEN, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def plain(x: Tensor) -> Tensor:
    return x


class Block(nn.Module):
    """`into` and `out_of` stand around each cut part: a gather in front and a reduce-scatter behind."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = norm(HIDDEN), Attention(), norm(HIDDEN), MLP()
        self.into: Callable[[Tensor], Tensor] = plain
        self.out_of: Callable[[Tensor], Tensor] = plain

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.out_of(self.attention(self.into(self.norm1(x))))
        return h + self.out_of(self.mlp(self.into(self.norm2(h))))


class Model(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module] = nn.RMSNorm) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, HIDDEN)
        self.layers = nn.ModuleList(Block(norm) for _ in range(LAYERS))
        self.norm, self.output = norm(HIDDEN), nn.Linear(HIDDEN, TOKENS, bias=False)
        self.into: Callable[[Tensor], Tensor] = plain
        self.run_block: Callable[[nn.Module, Tensor], Tensor] | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for layer in self.layers:
            h = layer(h) if self.run_block is None else self.run_block(layer, h)
        return self.output(self.into(self.norm(h)))


def whole(norm: Callable[[int], nn.Module] = nn.RMSNorm, dtype: torch.dtype = torch.float32, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    model = Model(norm)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.2)
    return model.to(dtype)


def cut_plainly(model: Model, mesh: DeviceMesh, **instead: ParallelStyle | None) -> Model:
    """Plain tensor parallelism by DTensor: every rank has all rows between the blocks. instead: other styles of the
    embedding and the output projection, None for none."""
    plan: dict = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "output": ColwiseParallel(output_layouts=Replicate()),
    }
    for i in range(LAYERS):
        plan |= {f"layers.{i}.{part}": ColwiseParallel() for part in COLUMNS}
        plan |= {f"layers.{i}.{part}": RowwiseParallel() for part in ROWS}
    return _parallelized(model, mesh, plan | instead)


def _parallelized(model: Model, mesh: DeviceMesh, plan: dict[str, ParallelStyle | None]) -> Model:
    return parallelize_module(model, mesh, {name: style for name, style in plan.items() if style is not None})


def cut_by_dtensor(model: Model, mesh: DeviceMesh, dim: int = 1, **instead: ParallelStyle | None) -> Model:
    """As torchtitan declares it: rows are parts of the sequence, dimension `dim`, between the blocks."""
    gathered = PrepareModuleInput(input_layouts=(Shard(dim),), desired_input_layouts=(Replicate(),))
    plan: dict = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(dim)),
        "norm": SequenceParallel(sequence_dim=dim),
        "output": ColwiseParallel(input_layouts=Shard(dim), output_layouts=Replicate()),
    }
    for i in range(LAYERS):
        plan |= {f"layers.{i}.{norm}": SequenceParallel(sequence_dim=dim) for norm in ("norm1", "norm2")}
        plan |= {f"layers.{i}.{part}": gathered for part in ("attention", "mlp")}
        plan |= {f"layers.{i}.{part}": ColwiseParallel() for part in COLUMNS}
        plan |= {f"layers.{i}.{part}": RowwiseParallel(output_layouts=Shard(dim)) for part in ROWS}
    return _parallelized(model, mesh, plan | instead)


COLUMNS = ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up")
ROWS = ("attention.out", "mlp.down")


class Gather(torch.autograd.Function):
    """Rows of all ranks along the first dimension; backward reduce-scatters."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return funcol.all_gather_tensor(x, 0, dist.group.WORLD)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return funcol.reduce_scatter_tensor(grad.contiguous(), "sum", 0, dist.group.WORLD)


class Scatter(torch.autograd.Function):
    """The sum's own rows along the first dimension; backward gathers."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return funcol.reduce_scatter_tensor(x.contiguous(), "sum", 0, dist.group.WORLD)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return funcol.all_gather_tensor(grad.contiguous(), 0, dist.group.WORLD)


def gathered(x: Tensor) -> Tensor:
    return Gather.apply(x)


def scattered(x: Tensor) -> Tensor:
    return Scatter.apply(x)


def permuted(function: type[torch.autograd.Function]) -> Callable[[Tensor], Tensor]:
    """torchtitan's form: the sequence is the second dimension, and is put first for the collective."""

    def run(x: Tensor) -> Tensor:
        first = x.permute(1, 0, 2).clone(memory_format=torch.contiguous_format)
        return function.apply(first).permute(1, 0, 2)

    return run


class OwnRows(nn.Module):
    """An embedding that every rank holds whole, of which it takes its own part of the sequence."""

    def __init__(self, embed: nn.Embedding, dim: int) -> None:
        super().__init__()
        self.embed, self.dim = embed, dim

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens).chunk(dist.get_world_size(), self.dim)[dist.get_rank()]


def cut_by_hand(model: Model, dim: int) -> Model:
    """Megatron's form (`dim` 0), or torchtitan's (1): weights sliced, collectives written by hand. The embedding and
    the output projection are whole on every rank, and every rank's logits are those of all rows."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def cut(part: nn.Module, along: int) -> None:
        part.weight = nn.Parameter(part.weight.detach().chunk(world, along)[rank].clone())

    into, out_of = (gathered, scattered) if dim == 0 else (permuted(Gather), permuted(Scatter))
    for layer in model.layers:
        for name in COLUMNS:
            cut(layer.get_submodule(name), 0)
        for name in ROWS:
            cut(layer.get_submodule(name), 1)
        layer.into, layer.out_of = into, out_of
    model.embed, model.into = OwnRows(model.embed, dim), into
    return model
