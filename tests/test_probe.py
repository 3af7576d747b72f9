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
