"""A module whose cut would compute something else than slices of the whole is refused, however it is spelled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tpfuse.parallel.cuts import Cut
from tpfuse.parallel.probe import miscut

HIDDEN, INNER, RANKS = 16, 32, 2


class Mlp(nn.Module):
    width = INNER

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, self.width), nn.Linear(INNER, HIDDEN)
        self.norm, self.drop = nn.LayerNorm(INNER), nn.Dropout(0.5)

    def forward(self, x):
        return self.down(F.gelu(self.drop(self.up(x))))


class Packed(Mlp):
    width = 2 * INNER



def of(base, inside):
    """A subclass of `base` whose features between its projections are `inside(module, features)`."""
    return type("Spelled", (base,), {"forward": lambda self, x: self.down(inside(self, self.up(x)))})


def parts_of(x):
    return F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]


WRONG = {
    "glu": of(Packed, lambda m, x: F.glu(x)),
    "a helper that chunks": of(Packed, lambda m, x: parts_of(x)),
    "narrow": of(Packed, lambda m, x: torch.mul(*[t[..., : x.shape[-1] // 2] for t in (x, x.flip(-1))])),
    "softmax": of(Mlp, lambda m, x: x.softmax(-1)),
    "amax": of(Mlp, lambda m, x: x / x.abs().amax(-1, keepdim=True)),
    "roll": of(Mlp, lambda m, x: x.roll(1, -1)),
    "cumsum": of(Mlp, lambda m, x: x.cumsum(-1)),
    "a norm": of(Mlp, lambda m, x: m.norm(x)),
    "a norm without weights": of(Mlp, lambda m, x: F.rms_norm(x, x.shape[-1:])),
}
RIGHT = {"plain": Mlp, "gated by itself": of(Mlp, lambda m, x: x * x.sigmoid())}


def cuts_of(module, parts=1):
    width = module.up.weight.shape[0]
    up = Cut(0, "attention", (width // parts,) * parts, (RANKS,) * parts, RANKS, 0)
    return {"up": up}, {"down": Cut(1, "attention", (INNER,), (RANKS,), RANKS, 0)}


@pytest.mark.parametrize("spelling", WRONG)
def test_a_cut_that_gives_no_slices_is_refused(spelling):
    module = WRONG[spelling]()
    assert miscut(module, *cuts_of(module), [])


@pytest.mark.parametrize("spelling", RIGHT)
def test_a_cut_that_gives_slices_is_taken(spelling):
    module = RIGHT[spelling]()
    assert miscut(module, *cuts_of(module), []) == ""


def test_a_weight_that_holds_two_matrices_is_named_and_taken_once_that_is_said():
    module = WRONG["a helper that chunks"]()
    assert "packed={'up': 2}" in miscut(module, *cuts_of(module), [])
    assert miscut(module, *cuts_of(module, parts=2), []) == ""


def test_a_projection_that_is_not_called_as_a_module_is_refused():
    module = type("Inlined", (Mlp,), {"forward": lambda self, x: F.linear(self.up(x), self.down.weight)})()
    assert "does not call down as a module" in miscut(module, *cuts_of(module), [])


def test_the_module_is_left_as_it_was():
    module, x = Mlp(), torch.randn(2, HIDDEN)
    module.train()
    module.drop.eval()
    state = torch.random.get_rng_state()
    want = module(x)
    miscut(module, *cuts_of(module), [(module, {"width": 1})])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(module(x), want) and module.width == INNER
    assert module.training and not module.drop.training and "forward" not in vars(module.up)


def test_a_projection_of_what_was_summed_before_is_refused():
    module = type("Twice", (Mlp,), {"forward": lambda self, x: self.down(self.up(self.down(self.up(x))))})()
    cut = Cut(0, "whole", (INNER,), (RANKS,), RANKS, 0)
    assert "calls up on what down gave" in miscut(module, {"up": cut}, {"down": cut}, [])


class Attention(nn.Module):
    d = 4

    def __init__(self):
        super().__init__()
        self.qkv, self.up, self.down = (nn.Linear(HIDDEN, n) for n in (3 * INNER, INNER, HIDDEN))
        self.down = nn.Linear(INNER, HIDDEN)
        self.weight = nn.Parameter(torch.randn(2 * INNER, HIDDEN))
        self.slopes = nn.Parameter(torch.rand(INNER // self.d))

    def heads(self, x):
        return x.unflatten(-1, (-1, self.d)).transpose(-2, -3)

    def attend(self, q, k, v, mask=None):
        q, k, v = map(self.heads, (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(-2, -3).flatten(-2)


class Rotated(Attention):
    def forward(self, x, position_embeddings, attention_mask):
        cos, sin = position_embeddings
        x = self.heads(self.up(x))
        x = (x * cos[:, None] + x.flip(-1) * sin[:, None]).transpose(-2, -3).flatten(-2)
        return self.down(self.attend(x, x, x, attention_mask))


class Crossed(Attention):
    def forward(self, x, memory, *, scale):
        return self.down(scale * self.attend(self.up(x), self.up(x), self.up(x))) + memory


class Slopes(Attention):
    def forward(self, x, mask):
        x = self.up(x)
        return self.down(self.attend(x, x, x, self.slopes[: x.shape[-1] // self.d, None, None] * torch.eye(3)))


class Helper(Attention):
    def forward(self, x, mask):
        return self.down(self.attend(*self.qkv(x).chunk(3, -1), mask))


class ByWeight(Attention):
    def forward(self, x, mask, positions):
        return F.linear(self.up(x), self.down.weight)


class Bare(Attention):
    def forward(self, x, mask):
        return self.down(F.glu(F.linear(x, self.weight)))


GUESSED = {
    "rotated": (Rotated, "up", ""),
    "behind the sum": (Crossed, "up", ""),
    "one number a head": (Slopes, "up", "no slice"),
    "three in one": (Helper, "qkv", "holds 3 matrices"),
    "not as a module": (ByWeight, "up", "does not call down as a module"),
    "two in a bare parameter": (Bare, "weight", "holds 2 matrices"),
}


@pytest.mark.parametrize("name", GUESSED)
def test_what_a_module_takes_beside_its_hidden_states_is_guessed(name):
    cls, leaf, words = GUESSED[name]
    module = cls()
    width = module.get_parameter(leaf if leaf == "weight" else f"{leaf}.weight").shape[0]
    rowwise = {"down": Cut(1, "attention", (INNER,), (RANKS,), RANKS, 0)}
    before = {n: t.clone() for n, t in module.state_dict().items()}
    problem = miscut(module, {leaf: Cut(0, "attention", (width,), (RANKS,), RANKS, 0)}, rowwise, [], guess=True)
    assert words in problem and bool(words) == bool(problem)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert not miscut(module, {leaf: Cut(0, "attention", (width,), (RANKS,), RANKS, 0)}, rowwise, [])


def test_matrices_that_alternate_are_cut_as_one():
    alternating = of(Packed, lambda m, x: F.silu(x[..., ::2]) * x[..., 1::2])
    assert not miscut(alternating(), *cuts_of(alternating()), [])
    assert "the matrices of up alternate" in miscut(alternating(), *cuts_of(alternating(), parts=2), [])


def test_a_cut_is_named_in_words():
    assert str(Cut(0, "attention", (8, 8), (2, 2), 2, 0)) == (
        "along dimension 0 over 2 ranks of the attention group, 2 matrices of (8, 8) each by itself"
    )
