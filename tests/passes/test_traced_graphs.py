"""Graphs however they were traced, and whatever stands around the boundary: never an internal error, never another
number, and the reason said."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

import tpfuse

from ..graphs import all_reduce
from .unusual import HIDDEN, assert_same, fuse, inputs, nodes, plain, plain_graph, rms

pytestmark = pytest.mark.usefixtures("two_ranks")


# -- how the graph was traced -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_every_tracing_mode_of_make_fx(mode):
    assert fuse(plain, tracing_mode=mode).fused


def test_real_tensors_for_values_start_no_collective(monkeypatch):
    gm, given = plain_graph()
    for node in gm.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = torch.zeros(node.meta["val"].shape, dtype=node.meta["val"].dtype)
    before = copy.deepcopy(gm)

    def forbidden(*_):
        raise AssertionError("a collective ran inside a pass")

    monkeypatch.setattr("tpfuse.ops._all_reduced", forbidden)
    assert tpfuse.fuse_graph(gm).fused
    monkeypatch.undo()
    assert_same(before, gm, given)


@pytest.mark.parametrize("strict", [False, True])
def test_a_program_of_torch_export(strict):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, HIDDEN, dtype=torch.float64))

        def forward(self, x, r):
            h = all_reduce(x) + r
            return F.rms_norm(h, (HIDDEN,), self.weight, 1e-5), h

    given = inputs()[:2]
    program = torch.export.export(Block(), (given[0][0], given[1]), strict=strict)
    assert fuse(None, given, program.module()).fused
    decomposed = program.run_decompositions()
    assert fuse(None, given, decomposed.module()).fused


def test_gradients_of_a_graph_rewritten_for_inference_are_refused():
    gm, (partials, *rest) = plain_graph()
    assert tpfuse.fuse_graph(gm).fused
    y, _ = gm(partials[0].requires_grad_(), *rest)
    with pytest.raises(tpfuse.OpError, match="for inference"):
        y.sum().backward()


def test_fusing_twice_changes_nothing():
    gm, given = plain_graph()
    before = copy.deepcopy(gm)
    first = tpfuse.fuse_graph(gm)
    code = gm.code
    again = tpfuse.fuse_graph(gm)
    assert first.fused and not again.boundaries and gm.code == code
    assert again.collectives_after == first.collectives_after == 1
    assert_same(before, gm, given)


def test_a_graph_that_holds_a_fused_operation_already():
    def run(x, r, weight, bias):
        y, h = tpfuse.ops.all_reduce_add_rms_norm(x, r, weight, 1e-5, "0")
        h = h + all_reduce(torch.tanh(y))
        return rms(h), h

    assert fuse(run).fused


def test_arguments_by_name():
    gm, given = plain_graph()
    for node in gm.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None:
            names = [a.name for a in schema.arguments]
            node.kwargs = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            node.args = ()
    gm.recompile()
    assert fuse(None, given, gm).fused


# -- around the boundary ----------------------------------------------------------------------------------------------


def test_results_in_any_structure():
    def run(x, r, weight, bias):
        h = all_reduce(x) + r
        y = rms(h)
        return {"y": y, "again": (y, [h, None, 3]), "h": h}

    given = inputs()
    before = make_fx(run)(given[0][0], *given[1:])
    after = copy.deepcopy(before)
    assert tpfuse.fuse_graph(after).fused
    assert after(given[0][0], *given[1:]).keys() == {"y", "again", "h"}


def test_a_change_of_mode_between_the_sum_and_the_norm():
    def graph():
        gm, given = plain_graph()
        (wait,), (norm,) = nodes(gm, "wait_tensor"), nodes(gm, "rsqrt")
        with gm.graph.inserting_after(wait):
            enter = gm.graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, None))
        with gm.graph.inserting_before(norm):
            gm.graph.call_function(torch.amp.autocast_mode._exit_autocast, (enter,))
        gm.recompile()
        return gm, given

    gm, given = graph()
    assert "autocast" in fuse(None, given, gm).reason


def test_autocast_around_the_boundary_is_no_obstacle():
    def run(x, r, weight, bias):
        with torch.autocast("cpu", torch.bfloat16):
            h = all_reduce(x) + r
            return rms(h) * weight, h

    assert fuse(run).fused


def test_random_numbers_keep_their_order():
    def run(x, r, weight, bias):
        s = all_reduce(x)
        first = F.dropout(s, 0.5)
        second = F.dropout(r, 0.5)
        return rms(s + r), first, second

    given = inputs()
    before = make_fx(run)(given[0][0], *given[1:])
    after = copy.deepcopy(before)
    tpfuse.fuse_graph(after)

    def seeded(gm):
        torch.manual_seed(3)
        return gm(given[0][0], *given[1:])

    torch.testing.assert_close(seeded(after), seeded(before))


def test_opaque_calls():
    """Modules and methods nobody knows anything about: they may write to what they are given."""

    class Doubles(torch.nn.Module):
        def forward(self, x):
            return x.mul_(2)

    for method in (False, True):
        gm, given = plain_graph()
        (wait,) = nodes(gm, "wait_tensor")
        residual = next(n for n in gm.graph.nodes if n.name == "r_1")
        gm.add_submodule("doubles", Doubles())
        with gm.graph.inserting_after(wait):
            if method:
                gm.graph.call_method("mul_", (residual, 2))
            else:
                gm.graph.call_module("doubles", (residual,))
        gm.recompile()
        assert "writes in place" in fuse(None, given, gm).reason


@pytest.mark.parametrize("operator", ["checkpoint", "cond"])
def test_collectives_inside_higher_order_operators_are_listed(operator):
    def block(x, r):
        return rms(all_reduce(x) + r)

    inner = make_fx(block, tracing_mode="fake")(torch.ones(2, HIDDEN), torch.ones(2, HIDDEN))
    outer = fx.GraphModule(torch.nn.Module(), fx.Graph())
    outer.add_submodule("body", inner)
    x, r = outer.graph.placeholder("x"), outer.graph.placeholder("r")
    body = outer.graph.get_attr("body")
    if operator == "cond":
        call = (torch.ops.higher_order.cond, (True, body, body, (x, r)))
    else:
        call = (torch.ops.higher_order.tag_activation_checkpoint, (body, x, r))
    outer.graph.output(outer.graph.call_function(*call))
    outer.recompile()
    report = tpfuse.fuse_graph(outer)
    (verdict,) = report.boundaries
    assert verdict.collective == "all_reduce" and "graph 'body' of" in verdict.reason and verdict.group == (0, 1)
    assert report.collectives_after == 1


def test_effect_tokens_are_left_where_they_are():
    gm, _ = plain_graph()
    (wait,) = nodes(gm, "wait_tensor")
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        token = gm.graph.call_function(torch.ops.prims._make_token.default)
    with gm.graph.inserting_after(wait):
        gm.graph.call_function(torch.ops.higher_order.with_effects, (token, torch.ops.aten._print.default, "x"))
    report = tpfuse.fuse_graph(gm)
    assert report.fused and len(nodes(gm, "with_effects")) == 1


def test_an_autograd_function_in_the_graph():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    def run(x, r, weight, bias):
        h = all_reduce(Scale.apply(x)) + Scale.apply(r)
        return rms(h), h

    assert fuse(run).fused


def test_an_unfinished_tensor_of_the_functional_collectives():
    from torch.distributed import _functional_collectives as funcol

    def run(x, r, weight, bias):
        return rms(funcol.all_reduce(x, "sum", "0") + r)

    fuse(run)


def test_a_graph_without_an_owner_and_an_empty_one():
    from tpfuse.passes.facts.groups import resolve_group
    from tpfuse.passes.pipeline import fuse as fuse_plain

    gm, _ = plain_graph()
    assert fuse_plain(copy.deepcopy(gm.graph), resolve_group).report.fused
    assert fuse_plain(fx.Graph(), resolve_group).report.boundaries == []
