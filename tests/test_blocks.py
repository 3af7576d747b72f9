"""A routed block pays one sum at its output only where it does no more than to weigh its parts and to add them up."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tpfuse.errors import PlanError
from tpfuse.parallel.blocks import parts_with_sums
from tpfuse.parallel.hf_plan import Planned
from tpfuse.parallel.roles import Role

HIDDEN, INNER = 16, 24
ROLE = Role("moe", experts="experts", shared="shared")
PLANNED = Planned({}, {}, trusted=False)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, x):
        return self.down_proj(F.gelu(self.up_proj(x)))


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(2, INNER, HIDDEN))
        self.down_proj = nn.Parameter(torch.randn(2, HIDDEN, INNER))

    def forward(self, x, weights):
        ups = torch.einsum("bth,eih->btei", x, self.up_proj)
        return torch.einsum("bte,bteh->bth", weights, torch.einsum("btei,ehi->bteh", F.gelu(ups), self.down_proj))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 2)
        self.experts, self.shared = nn.ModuleList(Expert() for _ in range(2)), Expert()
        self.post, self.bias, self.third = nn.LayerNorm(HIDDEN), nn.Parameter(torch.zeros(HIDDEN)), Expert()

    def routed(self, x):
        weights = self.gate(x).softmax(-1)
        return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))

    def forward(self, x):
        return self.routed(x) + torch.sigmoid(self.gate(x)[..., :1]) * self.shared(x)


def of(body):
    return type("Spelled", (Block,), {"forward": body})()


WRONG = {
    "a residual": lambda m, x: x + m.routed(x) + m.shared(x),
    "a bias": lambda m, x: m.routed(x) + m.shared(x) + m.bias,
    "an activation": lambda m, x: torch.tanh(m.routed(x)) + m.shared(x),
    "a limit": lambda m, x: (m.routed(x) + m.shared(x)).clamp(-7, 7),
    "a norm of the shared expert": lambda m, x: m.routed(x) + m.post(m.shared(x)),
    "a norm by function": lambda m, x: F.normalize(m.routed(x) + m.shared(x), dim=-1),
    "a product": lambda m, x: m.routed(x) * m.shared(x),
    "one behind the other": lambda m, x: m.shared(m.routed(x)),
    "an MLP that stays whole": lambda m, x: m.routed(x) + m.shared(x) + m.third(x),
    "the input as an expert": lambda m, x: m.routed(x) + m.shared(x) + m.gate(x)[..., :1] * x,
}


@pytest.mark.parametrize("how", WRONG)
def test_what_stands_on_the_wrong_side_of_a_blocks_sum_is_refused(how):
    with pytest.raises(PlanError, match="add it up, and does more"):
        parts_with_sums("block", of(WRONG[how]), ROLE, PLANNED)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_block_that_weighs_and_adds_pays_once(device):
    block = Block().to(device)
    before = {id(m): vars(m).get("forward") for m in block.modules()}
    assert parts_with_sums("block", block, ROLE, PLANNED) == []
    assert before == {id(m): vars(m).get("forward") for m in block.modules()}, "nothing is left changed"


def test_parts_that_are_one_module_each_pay_by_themselves_where_the_block_does_more():
    class Whole(Block):
        def __init__(self):
            super().__init__()
            self.experts = Fused()

        def forward(self, x):
            return x + self.post(self.experts(x, self.gate(x).softmax(-1)) + self.shared(x))

    block = Whole()
    assert parts_with_sums("block", block, ROLE, PLANNED) == [block.experts, block.shared]
    block.shared.forward = lambda x: x + Expert.forward(block.shared, x)
    with pytest.raises(PlanError, match=r"block\.shared"):
        parts_with_sums("block", block, ROLE, PLANNED)
