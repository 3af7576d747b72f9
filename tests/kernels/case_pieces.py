"""Calls larger than the workspace, and batch invariance: a row's bits whatever the other rows are."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tpfuse.kernels.add_norm import add_norm_reference
from tpfuse.kernels.call import Call
from tpfuse.kernels.symmetric.dispatch import Entry
from tpfuse.kernels.symmetric.pieces import most_rows, run
from tpfuse.kernels.symmetric.two_shot import fits

from . import protocol
from .protocol import Seat

BF16 = torch.bfloat16
HIDDEN, ROWS = 128, 19


def call(rank: int, world: int, take: slice) -> tuple[Call, torch.Tensor]:
    """This rank's operands on some of ROWS rows, and the float32 sum of all ranks' x. Magnitudes differ, so that the
    order of a sum shows."""
    g = torch.Generator().manual_seed(7)
    scale = 10.0 ** torch.randint(-2, 3, (world, ROWS, HIDDEN), generator=g)
    xs = (torch.randn(world, ROWS, HIDDEN, generator=g) * scale).to(BF16)
    residual, weight = torch.randn(ROWS, HIDDEN, generator=g).to(BF16), torch.randn(HIDDEN, generator=g).to(BF16)
    op = Call(
        xs[rank][take],
        residual[take],
        None,
        weight,
        norm="layer_norm",
        out_dtype=BF16,
        hidden_dtype=BF16,
        eps=1e-6,
        want_sum=True,
        stats=True,
    )
    return op, xs[:, take].float().sum(0)


def in_memory_of_y(op: Call) -> Call:
    """The same call, whose x is a product that lies where y will."""
    out, total = op.outputs()
    x = out.y.fill_(float("nan"))

    def product(first: int, stop: int) -> None:
        x[first:stop] = op.x[first:stop]

    return dataclasses.replace(op, x=x, product=product, out=out, sum_out=total)


def answer(
    seat: Seat, entry: Entry, take: slice, batch_invariant: bool = False, in_place: bool = False
) -> list[torch.Tensor]:
    op, total = call(seat.ws.rank, seat.ws.world, take)
    seat.dawdle()
    given = in_memory_of_y(op) if in_place else op
    done = run(entry, dataclasses.replace(given, batch_invariant=batch_invariant), seat.ws)
    assert done is not None
    out, summed = done
    right = add_norm_reference(
        Call(
            total, op.residual, None, op.weight, eps=op.eps, norm=op.norm, out_dtype=BF16, hidden_dtype=BF16, stats=True
        )
    )
    for name in ("y", "residual_out", "mean", "rstd"):
        torch.testing.assert_close(getattr(out, name), getattr(right, name), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(summed, total.to(BF16), rtol=2e-2, atol=2e-2)
    return [t.view(torch.int16) for t in (out.y, out.residual_out, summed)]


def in_pieces(seat: Seat, kernel: str) -> Any:
    entry = Entry("H", seat.ws.world, HIDDEN, ROWS, kernel)
    op, _ = call(0, seat.ws.world, slice(None))
    assert 1 < most_rows(kernel, op, seat.ws) < ROWS  # else this tests nothing
    return [answer(seat, entry, slice(None), in_place=in_place) for in_place in (False, True, False)]


@pytest.mark.parametrize(("world", "kernel"), [(2, "two_shot"), (2, "barrier"), (2, "copied"), (3, "two_shot")])
def test_a_call_that_the_workspace_does_not_hold_runs_in_pieces(world: int, kernel: str) -> None:
    """A row does not divide into three equal chunks, so it takes more of a slot."""
    room = {"two_shot": 4, "barrier": 8, "copied": 1}[kernel]
    answers = protocol.run(world, in_pieces, kernel, slot_bytes=room * 2 * HIDDEN * 2, max_blocks=3)
    first = answers[0][0][0]
    for (calls,) in answers:
        for each in calls:
            assert all(torch.equal(a, b) for a, b in zip(first, each, strict=True))


# What a table might say at the different sizes: kernels that round differently, programs that split a row.
WAYS = [Entry("H", 4, HIDDEN, 4, "two_shot"), Entry("H", 4, HIDDEN, ROWS, "one_shot")]
TAKES = [slice(3, 4), slice(2, 6), slice(0, ROWS)]


def each_size(seat: Seat, batch_invariant: bool) -> list[Any]:
    out = []
    for take in TAKES:
        op, _ = call(0, seat.ws.world, take)
        entry = WAYS[0] if op.rows <= WAYS[0].rows and fits(op, seat.ws) else WAYS[1]
        out.append([t[3 - take.start] for t in answer(seat, entry, take, batch_invariant)])
    return out


@pytest.mark.parametrize("batch_invariant", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_a_rows_bits_do_not_depend_on_the_batch(batch_invariant: bool) -> None:
    """With the option they are equal at every size, in pieces too; without it this very row is not."""
    answers = protocol.run(4, each_size, batch_invariant, slot_bytes=9 * 4 * HIDDEN * 2, max_blocks=3)
    one_row, few_rows, all_rows = answers[0][0]
    equal = [all(torch.equal(a, b) for a, b in zip(one_row, other, strict=True)) for other in (few_rows, all_rows)]
    assert equal == [True, batch_invariant]
    assert all(
        torch.equal(a, b) for (rank,) in answers for one, two in zip(rank, answers[0][0], strict=True)
        for a, b in zip(one, two, strict=True)
    )  # fmt: skip
