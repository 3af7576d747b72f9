"""Random programs that gather rows and quantise them: quantised first or not, no rank has another bit."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ..graphs import all_reduce, executed_collectives, fake_world, on_ranks, trace
from ..quantisations import OPERATORS, SPELLINGS, same
from .test_norm_backward import example, reduce_scatter
from .test_quantised_gathers import EPS, WITHOUT, H, flat, inputs, rewritten

#: Steps on rows [N, H] or [A, B, H]; one that does not fit does nothing.
STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "three dimensions": lambda x: x.view(2, -1, H) if x.dim() == 2 and x.shape[0] % 2 == 0 else x,
    "flat": lambda x: x.reshape(-1, H),
    "flipped": lambda x: x.flip(0),
    "padded": lambda x: torch.constant_pad_nd(x, (0, 0, *([0, 0] * (x.dim() - 2)), 0, 2)),
    "permuted": lambda x: x.permute(1, 0, 2).contiguous() if x.dim() == 3 else x,
    "some": lambda x: x[1:],
    "joined": lambda x: torch.cat(x.chunk(2), 1) if x.dim() == 3 and x.shape[0] % 2 == 0 else x,
    "chosen": lambda x: x[0] if x.dim() == 3 else x,
    "cast": lambda x: x.float().to(x.dtype),
}
#: What is read besides: nothing, the own rows, the gathered rows, another quantisation of the own or the gathered ones.
BESIDES = ("nothing", "nothing", "own", "gathered", "own quantised", "own quantised otherwise", "gathered otherwise")
NAMES = [*SPELLINGS, *(name for name in OPERATORS if name != "bitsandbytes")]


def drawn(seed: int, world: int) -> tuple[Callable, int, bool]:
    """(program, rows of a rank, whether sizes are symbolic)."""
    rng = random.Random(seed)
    quantise = (SPELLINGS | OPERATORS)[rng.choice(NAMES)]
    before, after = (rng.choices([*STEPS], k=rng.randint(0, most)) for most in (2, 3))
    made_by, besides = rng.choice(("reduce_scatter", "reduce_scatter", "all_reduce", "nothing")), rng.choice(BESIDES)

    def program(partial: Tensor, own: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        if made_by == "reduce_scatter":
            hidden = own + reduce_scatter(partial, world)
        else:
            hidden = torch.cat([own] * world) + all_reduce(partial) if made_by == "all_reduce" else own * 2
        y = rows = hidden if made_by == "nothing" else F.rms_norm(hidden, (H,), weight, EPS)
        for step in before:
            rows = STEPS[step](rows)
        gathered = read = flat(rows)
        for step in after:
            read = STEPS[step](read)
        more = {
            "nothing": lambda: (),
            "own": lambda: (y @ y.t(),),
            "gathered": lambda: (gathered.sin(),),
            "own quantised": lambda: quantise(y),
            "own quantised otherwise": lambda: SPELLINGS["int8_per_row"](y),
            "gathered otherwise": lambda: SPELLINGS["power_of_two"](read),
        }
        return (*quantise(read), hidden, *more[besides]())

    return program, rng.choice((2, 4, 6)), rng.random() < 0.3


def check(seed: int, world: int) -> bool:
    """Whether rows are quantised first; the collectives are as many, and the bits and strides the same."""
    program, rows, dynamic = drawn(seed, world)
    given = inputs(world, rows)
    before = trace(program, *example(given), dynamic=dynamic)
    (plain, _), (after, report) = rewritten(before, WITHOUT), rewritten(before)
    assert executed_collectives(plain, *example(given)) == executed_collectives(after, *example(given))
    for was, now in zip(on_ranks(plain, world, *given), on_ranks(after, world, *given), strict=True):
        assert all(map(same, was, now)) and [t.stride() for t in was] == [t.stride() for t in now]
    return any(b.quantised for b in report.boundaries if b.collective == "all_gather")


@pytest.mark.parametrize("seeds", [range(12), pytest.param(range(12, 200), marks=pytest.mark.nightly)], ids=len)
def test_no_bit_changes_on_any_rank(seeds):
    first = 0
    for seed in seeds:
        world = (2, 4)[seed % 2]
        with fake_world(world):
            first += check(seed, world)
    assert first >= len(seeds) // 3, "most programs are of the kind that is rewritten"
