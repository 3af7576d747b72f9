"""Parts that are put together again in their order, beside a collective: a view where they are one, and no copy."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from ..graphs import executed_collectives, on_ranks, trace
from .test_gathers import all_gather
from .test_norm_backward import H, example, reduce_scatter
from .test_scattered_norm import normed, rewritten

ROWS = 6


def scattered_along_the_sequence(x, weight):
    """DTensor's form: each rank's part of the sequence is put behind that of the rank before it."""
    h = reduce_scatter(torch.cat(x.sin().chunk(2, 1)), 2)
    y, rstd = normed(h, weight)
    return h, all_gather(y, 2).view(-1, ROWS, H), rstd


def gathered_along_the_sequence(x, weight):
    """torchtitan's `spmd_types`."""
    y, rstd = normed(x, weight)
    return torch.cat(all_gather(y, 2).split(x.shape[0]), 1), rstd


def in_another_order(x, weight):
    first, second = x.sin().chunk(2, 1)
    h = reduce_scatter(torch.cat((second, first)), 2)
    return h, *normed(h, weight)


def some_of_the_parts(x, weight):
    first, second, _ = x.sin().chunk(3, 1)
    h = reduce_scatter(torch.cat((first, second)), 2)
    return h, *normed(h, weight)


def inputs(batch: int, seed: int = 0) -> list:
    g = torch.Generator().manual_seed(seed)
    each = [[torch.randn(batch, ROWS, H, generator=g) for _ in range(2)] for _ in range(2)]
    return [*each, torch.randn(H, generator=g)]


def before_and_after(form, batch: int):
    def run(tangents, x, weight):
        return (*form(x, weight), tangents.exp())

    before = trace(run, *example(inputs(batch)))
    after, report = rewritten(before)
    given = inputs(batch, 1)
    for old, new in zip(on_ranks(before, 2, *given), on_ranks(after, 2, *given), strict=True):
        torch.testing.assert_close(new, old)
    assert executed_collectives(before, *example(given)) == executed_collectives(after, *example(given))
    return Counter(node.target for node in after.graph.nodes), report


FORMS = [scattered_along_the_sequence, gathered_along_the_sequence]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_batch_of_one_is_not_copied(two_ranks, form):
    called, report = before_and_after(form, 1)
    assert not called[torch.ops.aten.cat.default] and not called[torch.ops.aten.split.Tensor]
    assert all(b.fused for b in report.boundaries)
    assert [s.sends for s in report.steps] == [f"#{i}" for i in range(len(report.steps))], "what the program sends"


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_larger_batch_is(two_ranks, form):
    called, report = before_and_after(form, 2)
    assert called[torch.ops.aten.cat.default] == 1
    assert all(b.fused for b in report.boundaries)


@pytest.mark.parametrize("form", [in_another_order, some_of_the_parts], ids=lambda form: form.__name__)
def test_what_only_looks_alike_stays(two_ranks, form):
    called, _ = before_and_after(form, 1)
    assert called[torch.ops.aten.cat.default] == 1


def test_a_graph_that_writes_keeps_its_copies(two_ranks):
    """A view of what is written to later would send what was written."""

    def run(tangents, x, weight):
        return (*scattered_along_the_sequence(x, weight), tangents.exp())

    before = trace(run, *example(inputs(1)))
    (scattered,) = (node for node in before.graph.nodes if "reduce_scatter" in str(node.target))
    (copied,) = (node for node in before.graph.nodes if node.target is torch.ops.aten.sin.default)
    with before.graph.inserting_before(scattered):
        written = before.graph.call_function(torch.ops.aten.add_.Tensor, (copied, 1.0))
        written.meta["val"] = copied.meta["val"]
    after, _ = rewritten(before)
    assert any(node.target is torch.ops.aten.cat.default for node in after.graph.nodes)
