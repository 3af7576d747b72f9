"""Own rows that are quantised before they are gathered, in compiled programs on real ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

import tpfuse
from tpfuse.passes.plan.sites import REWRITES

from .graphs import executed_collectives
from .quantisations import SPELLINGS
from .ranks import run_processes

H, BF16 = 256, torch.bfloat16
STAYS = tuple(name for name in REWRITES if name != "share_attention_group")
WITHOUT = tuple(name for name in STAYS if name != "quantised_outputs")


def program(name: str, differs: bool) -> Callable:
    """A block between scattered hidden states [S / n, B, H], a norm, quantised rows of all ranks; where it `differs`,
    one rank reads these rows as they are besides."""

    def run(own: Tensor, weight: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
        group = dist.group.WORLD
        partial = torch.tanh(funcol.all_gather_tensor(own, 0, group).flip(-1) * factor)
        hidden = own + funcol.reduce_scatter_tensor(partial, "sum", 0, group)
        y = torch.nn.functional.rms_norm(hidden, (H,), weight, 1e-6)
        rows = funcol.all_gather_tensor(y, 0, group)
        q, scale = SPELLINGS[name](rows.flatten(0, -2))
        return (q, scale, hidden, rows.float().sum()) if differs and dist.get_rank() == 0 else (q, scale, hidden)

    return run


def inputs(rank: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(rank)
    own, factor = (torch.randn(shape, generator=g).to(BF16) for shape in ((rows, 2, H), (H,)))
    return own, torch.linspace(0.5, 2, H).to(BF16), factor


def run(rank: int, name: str, inner: str, differs: bool, rewrites: tuple[str, ...]) -> tuple[list, Counter, list]:
    """What calls with 3, 5 and no rows give, what one of them performs, and the first report. (To view no rows in
    groups of columns is an error of the program's.)"""
    numbers = (3, 5) if name == "groups" else (3, 5, 0)
    options = {"inner": inner, "rewrites": rewrites, "plan_timeout": 60}
    function = program(name, differs)
    function = torch.compile(function, backend="tpfuse", dynamic=True, fullgraph=True, options=options)
    with torch.no_grad():
        outputs = [[t.float().numpy() for t in function(*inputs(rank, rows))] for rows in numbers]
        executed = executed_collectives(function, *inputs(rank, 3))
    return outputs, executed, [(b.fused, b.quantised, b.bytes_after) for b in tpfuse.reports()[0].boundaries]


def both(name: str, inner: str, differs: bool = False):
    """Of each rank: the answers of the program that quantises behind the gather, and of that which does in front."""
    return zip(*(run_processes(2, run, name, inner, differs, rewrites) for rewrites in (WITHOUT, STAYS)), strict=True)


def equal(was: list, now: list) -> bool:
    """Bit for bit: float32 has all numbers of the formats. NaN counts as itself."""
    pairs = [pair for a, b in zip(was, now, strict=True) for pair in zip(a, b, strict=True)]
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("by_hand", "aot_eager"),
        pytest.param("by_hand", "inductor", marks=pytest.mark.nightly),
        *(pytest.param(name, "aot_eager", marks=pytest.mark.nightly) for name in SPELLINGS if name != "by_hand"),
    ],
)
def test_every_rank_has_the_bits_of_the_program_for_half_the_bytes(name, inner):
    for (plain, executed, before), (first, executed_first, after) in both(name, inner):
        assert executed == executed_first == Counter(reduce_scatter=1, all_gather=2)
        assert equal(plain, first)
        scales = 4 * H // 128 if name == "groups" else 4
        assert before[0] == after[0] == before[2] == (False, "", 6 * H * 2)
        assert after[1][1] == after[2][1] != "" and after[2][2] == 6 * (H + scales)


def test_a_rank_that_reads_the_rows_besides_is_joined_by_its_peers():
    """It cannot quantise first, and says so; the other sends what the program wrote, too, and no bytes are mistaken.
    Its norm is then computed step by step, which moves some values by one step of e4m3."""
    ended = both("by_hand", "aot_eager", differs=True)
    for rank, ((plain, _, _), (together, executed, planned)) in enumerate(ended):
        assert executed == Counter(reduce_scatter=1, all_gather=2)
        assert [text != "" for _, text, _ in planned] == [False, rank == 1, rank == 1]
        for (q, scale, *_), (other, its_scale, *_) in zip(plain, together, strict=True):
            assert np.allclose(q * scale, other * its_scale, rtol=0.13, atol=1e-3)
