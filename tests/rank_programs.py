"""Programs whose graphs differ between ranks, and which are right in eager mode all the same."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

HIDDEN, INNER_SIZE = 32, 48


def all_reduce(x: Tensor) -> Tensor:
    return funcol.all_reduce(x, "sum", dist.group.WORLD)


def first() -> bool:
    """Whether this is the rank that logs."""
    return dist.get_rank() == 0


def sum_for_a_log(m, x, y):
    total = all_reduce(y)
    out = m.norm(x + total * 0.5)
    return (out, total) if first() else out


def sum_before_a_gate(m, x, y):
    total = all_reduce(y)
    out = m.norm(x + total * torch.sigmoid(x.mean(-1, keepdim=True)))
    return (out, total) if first() else out


def sum_before_a_choice_of_rows(m, x, y):
    total = all_reduce(y)
    out = m.norm((x + total)[:, -1])
    return (out, total) if first() else out


def hidden_states_of_the_other_rank(m, x, y):
    hidden = x + all_reduce(y)
    out = m.norm(hidden)
    return out if first() else (out, hidden)


def one_of_two_sums(m, x, y):
    a, b = all_reduce(y), all_reduce(y * 2 + x)
    out = m.norm(x + a + b)
    return (out, a.detach()) if first() else out


def a_statistic_of_the_other_sum(m, x, y):
    a, b = all_reduce(y), all_reduce(y * 2 + x)
    out = m.norm(x + a + b)
    return out if first() else (out, b.detach().abs().sum())


def norm_on_one_rank(m, x, y):
    total = all_reduce(y)
    out = m.norm(x + total)
    return (out, F.rms_norm(total, (HIDDEN,)).sum()) if first() else out


def no_norm_on_one_rank(m, x, y):
    hidden = x + all_reduce(y)
    return hidden.sin() * m.norm.weight if first() else m.norm(hidden)


def written_in_another_way(m, x, y):
    if first():
        a = all_reduce(y)
        b = all_reduce(y.sin())
        return m.norm(a * 2 + b + x), a
    return m.norm(x + 2 * all_reduce(y) + all_reduce(y.sin()))


def another_number(m, x, y):
    return m.norm(x + all_reduce(y) * (1.0 + dist.get_rank()) + all_reduce(y.sin()))


def same_on_all_ranks(m, x, y):
    """Nothing differs, so the ranks agree: the two sums are one."""
    return m.norm(x + all_reduce(y) + all_reduce(y.sin()))


DIFFERING = (
    sum_for_a_log, sum_before_a_gate, sum_before_a_choice_of_rows, hidden_states_of_the_other_rank, one_of_two_sums,
    a_statistic_of_the_other_sum, norm_on_one_rank, no_norm_on_one_rank, written_in_another_way, another_number,
)  # fmt: skip


class Boundary(nn.Module):
    """This rank's part of an MLP, then whatever `after(module, x, partial)` does with its partial sums."""

    def __init__(self, after: Callable, rank: int):
        super().__init__()
        torch.manual_seed(100 + rank)
        self.up = nn.Linear(HIDDEN, INNER_SIZE, bias=False)
        self.down = nn.Linear(INNER_SIZE, HIDDEN, bias=False)
        self.norm = nn.RMSNorm(HIDDEN)
        self.after = after

    def forward(self, x):
        return self.after(self, x, self.down(F.silu(self.up(x))))


def results(program: Callable, rank: int, train: bool, dtype: torch.dtype, compiler: Callable) -> list[Tensor]:
    """Outputs, and gradients in training, of a program under `compiler` (a function from module to callable)."""
    torch._dynamo.reset()
    model = Boundary(program, rank).to(dtype)
    x = torch.randn(2, 6, HIDDEN, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_(train)
    with torch.set_grad_enabled(train):
        out = compiler(model)(x)
    found = list(out) if isinstance(out, tuple) else [out]
    if train:
        weights = (torch.arange(t.numel(), dtype=torch.float64).cos().view_as(t) for t in found)
        sum((t.double() * w).sum() for t, w in zip(found, weights, strict=True) if t.requires_grad).backward()
        found += [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    return [t.detach().double() for t in found]


def worst_error(program: Callable, rank: int, train: bool, **options) -> float:
    """The largest relative error of a float32 result of tpfuse against eager float64."""
    compiler = functools.partial(torch.compile, backend="tpfuse", options=options)
    exact = results(program, rank, train, torch.float64, lambda model: model)
    got = results(program, rank, train, torch.float32, compiler)
    return max(float((g - e).norm() / e.norm().clamp_min(1e-30)) for g, e in zip(got, exact, strict=True))
