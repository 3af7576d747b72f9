"""Rows of residual streams that are gathered, in every layout that leaves a gather: quantised first, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tpfuse.passes.plan.sites import DEFAULT_REWRITES
from tpfuse.policy import SharingPolicy

from ..quantisations import SPELLINGS, same
from .streams import HIDDEN, Mesh, collectives, inputs, mix, rewritten, rms, run_together

QUANTISED = (*DEFAULT_REWRITES, "quantised_outputs")
BF16 = torch.bfloat16


def product(rows: Tensor, vector: Tensor, name: str) -> Tensor:
    """What stands for a product of quantised rows."""
    q, scale = SPELLINGS[name](rows)
    return mix((q.float() * scale).to(rows.dtype), vector)


def layers(mesh, x, partial, weight, name="by_hand", block="all_rows"):
    """Attention cut over the attention group; an MLP cut over the whole mesh, or whole and on own rows; twice."""
    for _ in range(2):
        x = x + mesh.all_reduce(product(rms(x, weight), partial, name))
        vector = partial if block == "all_rows" else weight
        x = x + getattr(mesh, block)(lambda rows, v=vector: product(rows, v, name), rms(x, weight))
    return (rms(x, weight),)


def rms(x: Tensor, weight: Tensor) -> Tensor:  # noqa: F811 (in the dtype that models have, rounded as they do)
    h = x.float().unflatten(-1, (HIDDEN,))  # which is known, as it is in models
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def quantised(program, mesh: Mesh, policy: SharingPolicy, shape: tuple[int, ...], dynamic: bool = False):
    """Rank 0's reports without and with it, the collectives of both being as many; bits are the same on every rank."""
    given = [[t.to(BF16) for t in each] if isinstance(each, list) else each.to(BF16) for each in inputs(mesh, *shape)]
    _, plain, before = rewritten(program, mesh, given, policy, dynamic)
    _, after, reports = rewritten(program, mesh, given, policy, dynamic, QUANTISED)
    assert collectives(plain[0]) == collectives(after[0])
    for was, now in zip(run_together(plain, mesh, given), run_together(after, mesh, given), strict=True):
        assert all(map(same, was, now))
    assert len({tuple(step.sends for step in report.steps) for report in reports}) == 1, "ranks say the same"
    return before[0], reports[0]


def gathered(report) -> list[tuple[tuple[int, ...], int]]:
    """(over which ranks, bytes) of every gather that is performed, in the order of what the program has there."""
    return [(t.group, t.bytes) for b in report.boundaries for t in b.after if t.collective == "all_gather"]


def fewer(before) -> list[tuple[tuple[int, ...], int]]:
    """The same where all rows are quantised but those of the last norm, which no product reads."""
    rows = gathered(before)
    last = len(rows) - (before.boundaries[-1].after[-1].collective == "all_gather")
    return [(group, count * (HIDDEN + 4) // (2 * HIDDEN)) for group, count in rows[:last]] + rows[last:]


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [("float8_per_row", False), *(pytest.param("by_hand", each, marks=pytest.mark.nightly) for each in (False, True))],
)
@pytest.mark.parametrize("residual", ["replicated", "scattered"])
def test_rows_of_every_replica_are_gathered_quantised(name, residual, dynamic):
    """`moe_dense_tp_size=None` with two replicas: over the replicas, or over the whole mesh from scattered rows; where
    it is not known that rows divide, over the one group and then over the other."""
    mesh, policy = Mesh(2, 2), SharingPolicy(4, 2, None, residual=residual)
    program = lambda *tensors: layers(*tensors, name=name)  # noqa: E731
    before, report = quantised(program, mesh, policy, (2, 6), dynamic)
    over = [(0, 2)] if residual == "replicated" else [(0, 1), (0, 2)] if dynamic else [tuple(range(4))]
    assert {group for group, _ in gathered(report)} >= {*over}
    assert gathered(report) == fewer(before)


@pytest.mark.parametrize("shape", [(2, 6), (1, 5), (1, 1)], ids=["even", "padded", "fewer rows than ranks"])
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_own_rows_are_gathered_quantised_and_padding_is_dropped(shape, dynamic):
    """`moe_dense_tp_size=1`: attention wants all rows of what stays scattered."""
    mesh, policy = Mesh(1, 2), SharingPolicy(2, 1, 1, residual="scattered")
    program = lambda *tensors: layers(*tensors, block="own_rows")  # noqa: E731
    before, report = quantised(program, mesh, policy, shape, dynamic)
    assert gathered(report) == fewer(before)


def test_gathers_over_two_groups_both_say_how_rows_are_quantised():
    """The ranks of the second group may have met none that quantise otherwise in the first."""
    mesh, policy = Mesh(2, 2), SharingPolicy(4, 2, None, residual="scattered")
    said = []
    for name in ("by_hand", "float8_per_row"):
        program = lambda *tensors, name=name: layers(*tensors, name=name)  # noqa: E731
        given = [[t.to(BF16) for t in x] if isinstance(x, list) else x.to(BF16) for x in inputs(mesh, 2, 6)]
        _, _, (report, *_) = rewritten(program, mesh, given, policy, True, QUANTISED)
        said.append([(s.group, s.sends) for s in report.steps if s.dtype == "uint8"])
    first, second = said
    assert {group for group, _ in first} == {(0, 1), (0, 2)} and len(first) == len(second)
    assert all(a != b for a, b in zip(first, second, strict=True))
