"""What random programs (own_programs.py) call, the module that one becomes, and how it is run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .own_programs import Drawn

BATCH, ROWS, HIDDEN, INNER = 2, 8, 16, 24
#: Partial sums this large cancel: what each rank adds is far from the sum. float16 ends at 65504.
APART = {torch.float32: 1e3, torch.bfloat16: 1e2, torch.float16: 3.3e4, torch.float64: 1e3}
C10D = torch.ops._c10d_functional
WAIT = C10D.wait_tensor


# -- what programs call -----------------------------------------------------------------------------------------------


class Gather(torch.autograd.Function):
    """All ranks' rows; backward sums the gradients and takes this rank's: the gather of contrastive losses."""

    @staticmethod
    def forward(ctx, x):
        return funcol.all_gather_tensor(x, 0, dist.group.WORLD)

    @staticmethod
    def backward(ctx, g):
        n = g.shape[0] // dist.get_world_size()
        own = dist.get_rank() * n
        return funcol.all_reduce(g, "sum", dist.group.WORLD)[own : own + n]


class Selected(torch.autograd.Function):
    """The identity; backward sums gradients and keeps a rank's own rows of them."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        rows = torch.arange(g.shape[-2]) % dist.get_world_size() == dist.get_rank()
        return funcol.all_reduce(g, "sum", dist.group.WORLD) * rows[:, None].to(g.dtype)


class Scaled(torch.autograd.Function):
    """The identity; backward sums gradients and multiplies them by a rank's own number."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return funcol.all_reduce(g, "sum", dist.group.WORLD) * (1.0 + dist.get_rank())


class Copied(torch.autograd.Function):
    """The identity; backward sums gradients: what stands before a column-parallel linear."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return funcol.all_reduce(g, "sum", dist.group.WORLD)


@torch.library.custom_op("own_fuzz::asked", mutates_args=())
def asked(x: Tensor) -> Tensor:
    """A gate that the graph does not show to be a rank's own: the operator asks for the rank."""
    return torch.sigmoid(x) * (1.0 + dist.get_rank())


@torch.library.custom_op("own_fuzz::unasked", mutates_args=())
def unasked(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * 1.5


def _saved(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _times(number):
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * s * (1 - s) * number()

    return backward


for _op, _number in ((asked, lambda: 1.0 + dist.get_rank()), (unasked, lambda: 1.5)):
    _op.register_fake(lambda x: torch.empty_like(x))
    _op.register_autograd(_times(_number), setup_context=_saved)


def by_hand_rms(h, weight, eps, acc):
    wide = h.to(acc)
    y = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(h.dtype)
    return y if weight is None else y * weight


def by_hand_layer(h, weight, bias, eps, acc):
    wide = h.to(acc)
    away = wide - wide.mean(-1, keepdim=True)
    y = (away * torch.rsqrt(away.pow(2).mean(-1, keepdim=True) + eps)).to(h.dtype)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def ar(v, group):
    return WAIT(C10D.all_reduce(v, "sum", group))


def rs(v, group):
    """This rank's rows of a sum, of those of the first dimension."""
    return WAIT(C10D.reduce_scatter_tensor(v, "sum", dist.get_world_size(), group))


def ag(v, group):
    return WAIT(C10D.all_gather_into_tensor(v, dist.get_world_size(), group))


class Block(nn.Module):
    """This rank's part of two layers, and constants of which those named `own` are this rank's own."""

    def __init__(self, program, rank: int, world: int, big: float):
        super().__init__()
        torch.manual_seed(100 + rank)
        self.up, self.down = nn.Linear(HIDDEN, INNER, bias=False), nn.Linear(INNER, HIDDEN, bias=False)
        self.second = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.own_weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.own_bias = nn.Parameter(torch.randn(HIDDEN))
        torch.manual_seed(7)
        self.weight, self.bias = nn.Parameter(torch.rand(HIDDEN) + 0.5), nn.Parameter(torch.randn(HIDDEN))
        rows = torch.arange(ROWS)
        for name, mask in (("own", rows % world == rank), ("same", rows < 3)):
            self.register_buffer(f"{name}_mask", mask[:, None])
            self.register_buffer(f"{name}_gate", 0.5 + mask[:, None].double())
        self.register_buffer("own_rows", torch.tensor([rank, 5]))
        self.register_buffer("same_rows", torch.tensor([1, 5]))
        self.register_buffer("apart", torch.tensor(big * {0: 1.0, 1: -1.0}.get(rank, 0.0), dtype=torch.float64))
        self.own_int, self.same_int = rank, 1
        self.own_size, self.same_size = 1 + rank % 2, 2
        self.own_float, self.same_float = 1.0 + rank, 1.5
        self.cfg = SimpleNamespace(own_int=rank, same_int=1, own_float=1.0 + rank, same_float=1.5)
        self.program = program

    def partial(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.up.weight)), self.down.weight)

    def second_of(self, x: Tensor) -> Tensor:
        return F.linear(x, self.second.weight)

    def forward(self, x, k, j, p, q):
        return self.program(self, x, self.partial(x), k, j, p, q)


# -- running ----------------------------------------------------------------------------------------------------------


def groups(rank: int, world: int) -> list[str]:
    """Names of the groups that programs sum over: all ranks, pairs of neighbours, pairs of every other rank."""
    halves = [[[0, 1], [2, 3]], [[0, 2], [1, 3]]] if world == 4 else [[list(range(world))]] * 2
    made = [dist.new_subgroups_by_enumeration(half)[0] for half in halves]
    return [dist.group.WORLD.group_name, *(group.group_name for group in made)]


def block(
    drawn: Drawn, rank: int, world: int, names: list[str], dtype: torch.dtype, rounding: float = 0.0
) -> Block:
    """The program as a module, in `dtype`. `rounding`: by which share each number that is sent is moved up or down, as
    one more rounding of all partial sums might."""
    signs = torch.Generator().manual_seed(rank)

    def sent(v):
        if not rounding:
            return v
        return v * (1 + rounding * (2 * torch.randint(2, v.shape, generator=signs, dtype=v.dtype) - 1))

    def summed(v, kind):
        return ar(sent(v), names[kind])

    def scattered(v):
        return rs(sent(v), names[0])

    def gathered(v):
        return ag(v, names[0])

    # Dynamo looks globals up in the module that a function says it is of.
    home = sys.modules[f"program_{drawn.seed}"] = ModuleType(f"program_{drawn.seed}")
    known = {name: value for name, value in globals().items() if not name.startswith("__")}
    acc = torch.promote_types(dtype, torch.float32)
    known.update(ar=summed, rs=scattered, ag=gathered, R=rank, ONE=1, W=world, H=HIDDEN, ACC=acc)
    vars(home).update(known)
    exec(compile(drawn.text, f"<program {drawn.seed}>", "exec"), vars(home))
    return Block(home.program, rank, world, APART[drawn.dtype]).to(dtype)


def inputs(drawn: Drawn, rank: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, tuple]]:
    """x and the numbers of each call."""
    for rows in (ROWS, ROWS + 4)[: 1 + drawn.two_calls]:
        x = torch.randn(BATCH, rows, HIDDEN, generator=torch.Generator().manual_seed(3 + rows))
        # What every dtype can hold, so that errors are those of the program.
        yield x.bfloat16().to(dtype).requires_grad_(drawn.train), (rank, 1, 1.0 + rank, 1.5)


def tangents(out: Sequence[Tensor]) -> list[Tensor]:
    """What the gradients of those results are that have one."""
    return [
        torch.arange(t.numel(), dtype=torch.float64).cos().view_as(t).to(t.dtype) for t in out if t.requires_grad
    ]  # fmt: skip


def results(drawn: Drawn, model: Block, call, rank: int, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, and gradients in training, of `call`, which is `model` or what was compiled of it."""
    found = []
    for x, numbers in inputs(drawn, rank, dtype):
        model.zero_grad()
        with torch.set_grad_enabled(drawn.train):
            out = list(call(x, *numbers))
        found += out
        if drawn.train:
            torch.autograd.backward([t for t in out if t.requires_grad], tangents(out))
            found += [x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return [t.detach().double() for t in found]
