"""Products in front of a boundary, of every kind that overlap_all_reduce_norm takes along."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn

from tpfuse.product_ops import PRODUCTS

from .models import HIDDEN

F8 = torch.float8_e4m3fn


def whole_numbers(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape).float()


def of_float8(scale_a: tuple, scale_b: tuple, rows: int = 7, k: int = 32, hidden: int = 16) -> list[torch.Tensor]:
    a, b = whole_numbers(rows, k).to(F8), whole_numbers(hidden, k).to(F8).t()
    return [a, b, 2.0 ** torch.randint(-2, 3, scale_a), 2.0 ** torch.randint(-2, 3, scale_b)]


def scales_of_rows() -> bool:
    """Whether the CPU's product of float8 takes them in this torch."""
    try:
        PRODUCTS["scaled_mm"](slice(0, 2), torch.empty(2, 16), *of_float8((2, 1), (1, 16), 2))
    except RuntimeError:
        return False
    return True


class Float8(nn.Module):
    """A product as torchao's quantised layers have it. `rows`: with a scale of each row and column, else with one."""

    def __init__(self, rows: bool, bias: bool = False, fast: bool = False):
        super().__init__()
        self.rows, self.fast = rows, fast
        scale = 2.0 ** torch.randint(-2, 3, (1, HIDDEN) if rows else ())
        self.weight, self.scale = whole_numbers(HIDDEN, HIDDEN).to(F8), scale
        self.bias = whole_numbers(HIDDEN) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach()  # torch has no gradient of this product
        scale = x.abs().amax(-1, keepdim=True) if self.rows else x.abs().amax()
        scale = torch.exp2(torch.ceil(torch.log2(scale)) - 2)  # nothing is rounded: sums are equal in any order
        given = (x / scale).to(F8), self.weight.t(), scale, self.scale, self.bias
        return torch._scaled_mm(*given, out_dtype=torch.float32, use_fast_accum=self.fast)


class Linear(nn.Module):
    """`how`: who adds the bias, or whether there is one."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.weight = how, nn.Parameter(whole_numbers(HIDDEN, HIDDEN))
        self.bias = nn.Parameter(whole_numbers(HIDDEN)) if how != "none" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "linear":
            return nn.functional.linear(x, self.weight, self.bias)
        if self.how == "spread":
            return torch.addmm(self.bias.expand(x.shape[0], -1), x, self.weight)
        return x @ self.weight + self.bias if self.how == "added" else x @ self.weight


class Added(nn.Module):
    """Several products, each added to those in front of it. `views`: of a batch of one, so that all are views."""

    def __init__(self, count: int, views: bool = False):
        super().__init__()
        self.views = views
        self.weights = nn.ParameterList(whole_numbers(HIDDEN, HIDDEN) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = x[None] if self.views else x
        made = [given.roll(i, -1) @ weight for i, weight in enumerate(self.weights)]
        return sum(made[1:], made[0]).view(x.shape)


#: By name: a product, and the word for it in the operator.
KINDS = {
    "none": (lambda: Linear("none"), "mm"),
    "bias": (lambda: Linear("linear"), "addmm"),
    "bias behind the product": (lambda: Linear("added"), "addmm"),
    "a bias that is spread": (lambda: Linear("spread"), "addmm"),
    "two products": (lambda: Added(2), "mms"),
    "two products in views": (lambda: Added(2, views=True), "mms"),
    "three products": (lambda: Added(3), "mms"),
    "three products in views": (lambda: Added(3, views=True), "mms"),
    "one scale": (lambda: Float8(rows=False), "scaled_mm"),
    "one scale, bias": (lambda: Float8(rows=False, bias=True, fast=True), "scaled_mm, fast"),
    "scales": (lambda: Float8(rows=True), "scaled_mm"),
    "scales, bias": (lambda: Float8(rows=True, bias=True, fast=True), "scaled_mm, fast"),
}


class Behind(nn.Module):
    """One boundary behind a product."""

    def __init__(self, kind: str):
        super().__init__()
        self.proj, self.norm = KINDS[kind][0](), nn.RMSNorm(HIDDEN)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = x + funcol.all_reduce(self.proj(x), "sum", dist.group.WORLD)
        return self.norm(hidden), hidden
