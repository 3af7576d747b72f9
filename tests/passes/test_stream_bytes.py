"""No rewrite of layouts sends more bytes than it found, on whole models and on single blocks: before and after."""

from __future__ import annotations

import pytest
import torch

from tpfuse.passes.plan.layouts import SCATTERED, TP_ATTN_FULL, Sizes, Stage, choose, stage_steps
from tpfuse.policy import SharingPolicy

from .streams import HIDDEN, Mesh, check, inputs, mix, rms

PAIR, REPLICAS = Mesh(1, 2), Mesh(2, 2)
#: A tensor of [4, 4, H] in float64, in bytes: what a gather over two ranks sends half of.
ALL = 4 * 4 * HIDDEN * 8


def sent(report):
    """(bytes that a rank sends before, and after)."""
    return tuple(sum(getattr(b, name) for b in report.boundaries) for name in ("bytes_before", "bytes_after"))


def scattered_block(mesh, own, partial, weight):
    """One block of a sequence-parallel model, as it is when it is compiled alone: its residual comes scattered."""
    h = own + mesh.reduce_scatter(mix(mesh.all_gather(rms(own, weight)), partial))
    return (h + mesh.reduce_scatter(mix(mesh.all_gather(rms(h, weight)), partial)),)


def scattered_model(mesh, x, partial, weight):
    """The stream begins with a sum, so nothing need be gathered to keep it replicated."""
    own = mesh.reduce_scatter(mix(x, partial))
    for _ in range(2):
        (own,) = scattered_block(mesh, own, partial, weight)
    return (mesh.all_gather(rms(own, weight)),)


def own_rows_block(mesh, x, partial, weight):
    x = x + mesh.all_reduce(mix(rms(x, weight), partial))
    return (x + mesh.own_rows(lambda rows: mix(rows, weight), rms(x, weight)),)


def own_rows_model(mesh, x, partial, weight):
    for _ in range(2):
        (x,) = own_rows_block(mesh, x, partial, weight)
    return (rms(x, weight),)


def replicas_block(mesh, x, partial, weight):
    x = x + mesh.all_reduce(mix(rms(x, weight), partial))
    return (x + mesh.all_rows(lambda rows: mix(rows, partial), rms(x, weight)),)


def replicas_model(mesh, x, partial, weight):
    for _ in range(2):
        (x,) = replicas_block(mesh, x, partial, weight)
    return (rms(x, weight),)


#: program, mesh, whether the rows arrive scattered, rewrites that must have happened, bytes before and after in units
#: of half of `ALL`: what is gathered or scattered over two ranks counts one, an all-reduce over two ranks two.
CASES = [
    (scattered_block, PAIR, True, {"reduce_scatter_norm"}, 4, 4),
    (scattered_model, PAIR, False, {"share_attention_group"}, 10, 10),
    (own_rows_block, PAIR, False, set(), 3, 3),
    (own_rows_model, PAIR, False, {"scatter_dense"}, 6, 4),
    (replicas_block, REPLICAS, False, {"gather_full_tp"}, 10, 8),
    (replicas_model, REPLICAS, False, {"gather_full_tp"}, 20, 16),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
@pytest.mark.parametrize("rows", [None, 1 << 20])
def test_bytes_before_and_after(case, rows):
    program, mesh, scattered, rewrites, before, after = case
    given = inputs(mesh, 4, 4)
    if scattered:
        given[0] = [torch.randn(2, 4, HIDDEN, dtype=torch.float64) for _ in range(2)]
    policy = SharingPolicy(mesh.size, mesh.dp, None, max_rows=rows)
    report, _ = check(program, mesh, given, policy)
    written, performed = (total / (ALL / 2) for total in sent(report))
    assert written == before and performed <= written
    if rows:
        assert rewrites <= {b.rewrite for b in report.boundaries}
        assert performed == after


# -- the choice by itself ---------------------------------------------------------------------------------------------

SIZES = Sizes(attn=4, dp=2, payload=1 << 20)
WHOLE = frozenset({"all_rows"})


def test_a_residual_that_arrives_scattered_is_not_gathered_for_one_boundary():
    alone = Stage("owed_attn", WHOLE, linked=False, outside=False, arriving=1)
    assert choose([alone], SIZES) == [SCATTERED]
    assert choose([alone] + [Stage("owed_attn", WHOLE, True, False)] * 40, SIZES)[0] == TP_ATTN_FULL


def test_a_stage_that_is_bound_to_one_layout_is_priced_in_it():
    free = Stage("owed_attn", frozenset({"own_rows"}), True, False)
    bound = Stage("owed_attn", WHOLE, True, False, fixed=TP_ATTN_FULL)
    assert choose([free, free], SIZES) == [SCATTERED, SCATTERED]
    # A gather of the residual would cost as much as the reduce-scatter saved, and one more start.
    assert choose([free, bound], SIZES) == [TP_ATTN_FULL, TP_ATTN_FULL]
    assert choose([free, bound], SIZES, "scattered") == [SCATTERED, TP_ATTN_FULL]


def test_what_cannot_cross_at_once_is_paid_over_both_groups():
    stage = Stage("owed_whole", frozenset({"dp_rows"}), True, False)
    apart = Stage("owed_whole", frozenset({"dp_rows"}), True, False, apart=True)
    steps = [(step.collective, step.over) for step in stage_steps(stage, SCATTERED, SIZES)]
    assert steps == [("reduce_scatter", "whole"), ("all_gather", "whole")]
    steps = [(step.collective, step.over) for step in stage_steps(apart, SCATTERED, SIZES)]
    assert steps == [
        ("reduce_scatter", "dp"),
        ("reduce_scatter", "attention"),
        ("all_gather", "attention"),
        ("all_gather", "dp"),
    ]


# -- rows that stay scattered: one operation --------------------------------------------------------------------------


def scattered_on_the_second_dimension(mesh, own, partial, weight, form):
    """[B, S / n, H]. As DTensor writes it, by splitting and joining; as torchtitan does, by permuting."""

    def gather(y):
        everybody = mesh.all_gather(y)
        if form == "split":
            return torch.cat(everybody.split(y.shape[0]), 1)
        return everybody.unflatten(0, (mesh.attn, -1)).transpose(0, 1).flatten(1, 2)

    def scatter(y):
        if form == "split":
            return mesh.reduce_scatter(torch.cat(y.chunk(mesh.attn, 1)))
        there = y.permute(1, 0, 2).clone(memory_format=torch.contiguous_format)
        return mesh.reduce_scatter(there).permute(1, 0, 2)

    for _ in range(2):
        own = own + scatter(mix(gather(rms(own, weight)), partial))
    return (gather(rms(own, weight)),)


@pytest.mark.parametrize("form", ["split", "permute"])
def test_rows_that_are_scattered_on_the_second_dimension(form):
    given = inputs(PAIR, 3, 4)
    given[0] = [torch.randn(3, 2, HIDDEN, dtype=torch.float64) for _ in range(2)]
    program = lambda *tensors: scattered_on_the_second_dimension(*tensors, form)  # noqa: E731
    report, executed = check(program, PAIR, given, SharingPolicy(2, 1, None, residual="scattered"))
    assert [b.rewrite for b in report.boundaries if b.collective == "reduce_scatter"] == ["reduce_scatter_norm"] * 2
    assert executed == {"reduce_scatter": 2, "all_gather": 3}
