"""What PyTorch's async tensor parallelism finds in a split graph of ours: the collectives of the program, each with the
products around it.

Its pass needs NVLinked GPUs to put anything in; where it looks can be asked of any graph.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx
from torch._inductor.fx_passes.micro_pipeline_tp import find_all_gather_patterns, find_reduce_scatter_patterns

from tpfuse import backend
from tpfuse.passes.plan.sites import REWRITES
from tpfuse.passes.rewrite import lower
from tpfuse.passes.rewrite.take_apart import take_apart

from ..graphs import executed_collectives, fake_world, on_ranks, taken_apart_with_the_same_bits, trace
from ..test_sequence_training import HOWS, cut, tokens
from .test_norm_backward import Case, composite, example, fused


def scattered(graph: fx.Graph) -> list[tuple[int, str]]:
    """Along which dimension of which value each reduce-scatter goes, as async tensor parallelism sees it."""
    return [(found.scatter_dim, found.input_node.name) for found in find_reduce_scatter_patterns(graph)]


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=pytest.mark.nightly) for how in HOWS if how != "dtensor"] + ["dtensor"]
)
def test_it_finds_every_collective_of_the_program(how, monkeypatch):
    graphs: list[tuple[fx.Graph, fx.Graph]] = []
    fuse = backend.fuse

    def keeping(graph, *args):
        outcome = fuse(graph, *args)
        graphs.append((copy.deepcopy(graph), copy.deepcopy(outcome.graph)))
        return outcome

    monkeypatch.setattr("tpfuse.backend.fuse", keeping)
    monkeypatch.setattr(lower, "STAY", ())  # as on GPUs
    with fake_world(2):
        torch._dynamo.reset()
        options = {"inner": "aot_eager", "rewrites": REWRITES}
        torch.compile(cut(how, 2), backend="tpfuse", options=options, fullgraph=True)(tokens(how))
        before, after = graphs[0]
        wanted = scattered(before)
        assert len(wanted) >= 9
        assert scattered(after) == [], "each is inside of an operation"
        take_apart(after)
        after.eliminate_dead_code()
        assert scattered(after) == wanted
        assert len(find_all_gather_patterns(after)) == len(find_all_gather_patterns(before))


@pytest.mark.parametrize("form", ["rows", "sequence", "permuted"])
def test_rows_are_scattered_in_the_programs_dimensions_and_to_the_bit(form):
    with fake_world(2):
        case = Case(composite, form)
        inputs = case.inputs(0)
        after, _ = fused(case.traced(inputs))
        taken_apart_with_the_same_bits(after, inputs)
        (scatter,) = after.graph.find_nodes(
            op="call_function", target=torch.ops._c10d_functional.reduce_scatter_tensor.default
        )
        assert scatter.args[0].meta["val"].dim() == 3
        assert executed_collectives(after, *example(inputs)).total() == 1


def test_rows_that_do_not_divide_in_the_first_dimension_stay_flat():
    """Three times two rows for two ranks: each gets three, of one and a half of the first dimension's."""

    def program(tangents, h, weight):
        flat = (tangents * 2).reshape(-1, h.shape[-1])
        name = torch.distributed.group.WORLD.group_name
        c10d = torch.ops._c10d_functional
        dy = c10d.wait_tensor(c10d.reduce_scatter_tensor(flat, "sum", 2, name))
        return composite(h, weight, weight, dy)[:3]

    with fake_world(2):
        inputs = [[torch.randn(3, 2, 16) for _ in range(2)], [torch.randn(3, 16) for _ in range(2)], torch.rand(16) + 1]
        after, report = fused(trace(program, *example(inputs)))
        assert [b.fused for b in report.boundaries] == [True]
        whole = on_ranks(after, 2, *inputs)
        take_apart(after.graph)
        after.recompile()
        for old, new in zip(whole, on_ranks(after, 2, *inputs), strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=0)
