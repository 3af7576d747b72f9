"""Properties of the passes over random programs: numbers, sums and collectives.

Whatever the vocabulary of a boundary is put together to, the graph computes the same after the passes as before: in
float64 up to its rounding, in low precision within the error rule. A sum paid twice, or not at all, changes the
numbers, and so does one paid over the wrong ranks. No group communicates more often than before.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, example, given, settings
from torch import Tensor, fx

from ..graphs import fake_world, fused, on_ranks, relative_error, trace
from .random_programs import GROUPS, Program, Step, as_function, programs

WORLD, SHAPE = 4, (4, 8, 16)
FEW = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))


@contextmanager
def four_ranks_in_groups() -> Iterator[dict[tuple[int, ...], str]]:
    with fake_world(WORLD):
        yield {ranks: dist.new_group(list(ranks)).group_name for ranks in GROUPS}


def arguments(seed: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """(x of each rank, r of each rank, weight, bias): the ranks' x differ and their r do not. In every dtype the same
    values."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(torch.bfloat16).to(dtype)

    x, r = [draw(*SHAPE) for _ in range(WORLD)], [draw(*SHAPE)] * WORLD
    return x, r, draw(SHAPE[-1]) + 1, draw(SHAPE[-1])


def both(program: Program, groups: dict, dtype: torch.dtype, exact: bool) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The program's graph before and after the passes; checks what can be read off the graphs."""
    x, r, *rest = arguments(0, dtype)
    before = trace(as_function(program, groups, exact), x[0], r[0], *rest, dynamic=program.dynamic)
    after, report = fused(before, strict=True)
    assert len(report.boundaries) == sum(communications(before).values())
    assert all(bool(b.reason) != b.fused for b in report.boundaries), report
    old, new = communications(before), communications(after)
    assert new <= old, f"{new} communications, {old} before\n{after.graph}"
    assert report.collectives_after == sum(new.values())
    return before, after


def communications(gm: fx.GraphModule) -> Counter:
    """How often each group communicates when the graph runs: every node of a graph runs once, read or not."""
    names: Counter = Counter()
    for node in gm.graph.nodes:
        if "_c10d_functional.all_reduce" in str(node.target):
            names[node.args[2]] += 1
        elif "tpfuse.all_reduce_norm" in str(node.target):
            names[node.kwargs["group_name"]] += 1
    return names


def outputs(gm: fx.GraphModule, *given: list[Tensor] | Tensor) -> list[Tensor]:
    """Every output, all ranks' one behind the other."""
    return [torch.stack([t.double() for t in ranks]) for ranks in zip(*on_ranks(gm, WORLD, *given), strict=True)]


def check(program: Program) -> None:
    with four_ranks_in_groups() as groups:
        before, after = both(program, groups, torch.float64, exact=True)
        given = arguments(1, torch.float64)
        exact = outputs(before, *given)
        for error in relative_error(outputs(after, *given), exact):
            # A norm magnifies what little is left of a difference that cancels; float64 leaves room for that.
            assert error < 1e-9, f"relative error {error} in float64\n{after.graph}"
        before, after = both(program, groups, torch.bfloat16, exact=False)
        given = arguments(1, torch.bfloat16)
        old = relative_error(outputs(before, *given), exact)
        new = relative_error(outputs(after, *given), exact)
        rounding = torch.finfo(torch.bfloat16).eps / 2
        for o, n in zip(old, new, strict=True):
            assert n <= 1.1 * o + rounding or math.isnan(o), (
                f"relative error {n} in bfloat16, {o} before\n{after.graph}"
            )


WORLD_GROUP, PAIR, OTHER_PAIR = GROUPS
SUMMED, RMS = (WORLD_GROUP, "sum"), "rms_llama"


@FEW
@given(program=programs)
@example(Program((Step("all_reduce", what=SUMMED), Step("add", 0, 2), Step("norm", what=RMS)), (0, 1)))
@example(
    # Two groups of equal size and different members meet before one norm.
    Program(
        (
            Step("all_reduce", 0, what=(PAIR, "sum")),
            Step("all_reduce", 1, what=(OTHER_PAIR, "sum")),
            Step("add", 0, 1),
            Step("norm", what=RMS),
        ),
        (0,),
    )
)
@example(
    Program(
        (
            Step("all_reduce", 0, what=(PAIR, "sum")),
            Step("all_reduce", 2, what=(OTHER_PAIR, "sum")),
            Step("add", 0, 1),
            Step("all_reduce", 3, what=(PAIR, "sum")),
            Step("sub", 1, 0),
        ),
        (0,),
        backward=True,
    )
)
@example(
    # A gate from a rank's own part of the sum, and one that is equal on two ranks of four.
    Program((Step("all_reduce", what=SUMMED), Step("add", 1, 4), Step("gate", 1, 0), Step("norm", what=RMS)), (0,))
)
@example(
    Program(
        (
            Step("all_reduce", 0, what=(PAIR, "sum")),
            Step("all_reduce", 1, what=SUMMED),
            Step("gate", 0, 1),
            Step("norm", what=RMS),
        ),
        (0,),
    )
)
def test_random_programs_compute_the_same(program):
    check(program)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@MANY
@given(program=programs)
def test_many_random_programs_compute_the_same(program):
    check(program)


def test_a_sum_paid_twice_would_be_noticed(monkeypatch):
    """The check itself: a rewrite that pays the sum of an already summed value must not pass it."""
    from tpfuse.passes.rewrite import all_reduce_norm as rewrite

    partial = rewrite._partial

    def paid_before(graph, total, scale, waits):
        node = partial(graph, total, scale, waits)
        name = next(iter(waits.values())).group_name
        return graph.call_function(
            torch.ops._c10d_functional.wait_tensor.default,
            (graph.call_function(torch.ops._c10d_functional.all_reduce.default, (node, "sum", name)),),
        )

    monkeypatch.setattr(rewrite, "_partial", paid_before)
    program = Program((Step("all_reduce", what=SUMMED), Step("add", 0, 2), Step("norm", what=RMS)), (0, 1))
    with pytest.raises(Exception):  # noqa: B017  (whichever check sees it first)
        check(program)
