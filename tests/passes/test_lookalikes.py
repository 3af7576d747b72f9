"""What only looks like a sum, a norm or a collective that can be fused: never an internal error, never another number,
and the reason said."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import tpfuse

from ..graphs import all_reduce
from .unusual import HIDDEN, fuse, inputs, named, nodes, plain_graph, rms

pytestmark = pytest.mark.usefixtures("two_ranks")
c10d = torch.ops._c10d_functional


# -- sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 4, 30])
def test_a_sum_added_to_itself(times):
    """2 s, 16 s and 2^30 s: a graph of thirty nodes must not become a sum of a billion terms."""

    def run(x, r, weight, bias):
        s = h = all_reduce(x)
        for _ in range(times):
            h = h + h
        return rms(h + r), s

    fuse(run)


def test_a_long_chain_of_additions():
    def run(x, r, weight, bias):
        h = all_reduce(x)
        for _ in range(1200):
            h = h + r
        return rms(h)

    fuse(run)


def test_hundreds_of_sums_before_one_norm():
    def run(x, r, weight, bias):
        h = r
        for _ in range(300):
            h = h + all_reduce(x)
        return rms(h)

    assert "more than 64 terms" in fuse(run).reason


@pytest.mark.parametrize("number", [0, 0.0, -0.0, float("inf"), float("nan"), 5e-324, 1e300, True, 2**62])
def test_numbers_at_the_edge(number):
    def run(x, r, weight, bias):
        s = all_reduce(x)
        return rms(s * number + r), rms(s / 3 - s * number), s

    fuse(run)


def test_a_sum_and_a_rearrangement_of_it():
    def run(x, r, weight, bias):
        s = all_reduce(x)
        return rms(s + s.transpose(0, 1)), s

    fuse(run, inputs(3, 3, HIDDEN))


# -- norms that are none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm",
    [
        lambda h: (h - h.mean(0, keepdim=True)) * torch.rsqrt(h.var(-1, keepdim=True, unbiased=False) + 1e-5),
        lambda h: (h - h.mean(-1, keepdim=True)) * torch.rsqrt(h.var(0, keepdim=True, unbiased=False) + 1e-5),
        lambda h: (h - h.mean(-1, keepdim=True)) * torch.rsqrt(h.var(-1, keepdim=True) + 1e-5),
        lambda h: torch.sub(h, h.mean(-1, keepdim=True), alpha=2)
        * torch.rsqrt(torch.sub(h, h.mean(-1, keepdim=True), alpha=2).pow(2).mean(-1, keepdim=True) + 1e-5),
        lambda h: h * torch.rsqrt(h.pow(3).mean(-1, keepdim=True).abs() + 1e-5),
        lambda h: h * torch.rsqrt(h.pow(2).mean((0, -1), keepdim=True) + 1e-5),
        lambda h: h * torch.rsqrt(h.pow(2).mean() + 1e-5),
        lambda h: h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) / 7 + 1e-5),
        lambda h: h * torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5),
        lambda h: torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) / h,
        lambda h: h.abs() * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5),
        lambda h: h * torch.rsqrt(torch.add(h.pow(2).mean(-1, keepdim=True), 1e-5, alpha=3)),
        lambda h: F.layer_norm(h, h.shape[1:]),
        lambda h: F.group_norm(h.transpose(1, 2), 4).transpose(1, 2),
        lambda h: F.normalize(h, dim=-1),
        lambda h: torch.softmax(h, -1),
    ],
    ids=[
        "mean of rows", "variance of rows", "corrected variance", "twice the mean", "cubes", "two dimensions",
        "all dimensions", "another divisor", "multiplied by the root", "root over value", "another value scaled",
        "scaled eps", "whole, two dimensions", "group norm", "l2", "softmax",
    ],
)  # fmt: skip
def test_what_only_looks_like_a_norm(norm):
    def run(x, r, weight, bias):
        h = all_reduce(x) + r
        return norm(h), h

    assert not fuse(run).fused


@pytest.mark.parametrize(
    "norm",
    [
        lambda h, r, weight, squares: h * r * torch.rsqrt(squares + 1e-5),
        lambda h, r, weight, squares: h * (r * torch.rsqrt(squares + 1e-5)),
        lambda h, r, weight, squares: weight * h * (weight * torch.rsqrt(squares + 1e-5)),
        lambda h, r, weight, squares: h / (weight * torch.sqrt(squares + 1e-5)),
        lambda h, r, weight, squares: (weight + h) * torch.rsqrt(squares + 1e-5),
    ],
    ids=["rows before", "rows on the root", "two weights", "divided by the weight", "added before"],
)
def test_what_stands_before_the_root_and_is_no_weight(norm):
    def run(x, r, weight, bias):
        h = all_reduce(x) + r
        return norm(h, r, weight, h.pow(2).mean(-1, keepdim=True)), h

    assert "in a spelling that is not recognised" in fuse(run).reason


@pytest.mark.parametrize("made_of", ["sum", "input"])
def test_an_eps_that_is_computed(made_of):
    def run(x, r, weight, bias):
        s = all_reduce(x)
        eps = (s if made_of == "sum" else r).abs().mean()
        return rms(s + r, eps)

    assert fuse(run).fused == (made_of == "input")


def test_a_weight_that_differs_by_row():
    def run(x, r, weight, bias):
        h = all_reduce(x) + r
        return rms(h) * r, rms(h) * weight * weight

    fuse(run)


# -- collectives ------------------------------------------------------------------------------------------------------


def test_a_wait_used_twice():
    gm, given = plain_graph()
    (collective,), (wait,), (add, *_) = nodes(gm, "all_reduce"), nodes(gm, "wait_tensor"), nodes(gm, "add.Tensor")
    with gm.graph.inserting_after(wait):
        again = gm.graph.call_function(c10d.wait_tensor.default, (collective,))
    again.meta["val"] = wait.meta["val"]
    add.args = (wait, again)
    gm.recompile()
    assert fuse(None, given, gm).fused  # the result of the one wait, twice


def test_a_wait_on_a_finished_result():
    def run(x, r, weight, bias):
        return rms(c10d.wait_tensor(all_reduce(x)) + r)

    fuse(run)


def test_a_collective_without_a_wait():
    def run(x, r, weight, bias):
        return rms(c10d.all_reduce(x, "sum", "0") + r)

    assert "never waited for" in fuse(run).reason


def test_a_wait_on_a_view_of_the_unfinished_result():
    def run(x, r, weight, bias):
        return rms(c10d.wait_tensor(c10d.all_reduce(x, "sum", "0").view(6, HIDDEN)))

    assert not fuse(run).fused


def test_a_result_nobody_reads():
    def run(x, r, weight, bias):
        all_reduce(x)
        return rms(r)

    assert not fuse(run).fused


@pytest.mark.parametrize("group", [7, None, "", "no such group", 3.5, ("0",), object()], ids=named)
def test_groups_that_are_no_names(group):
    gm, _ = plain_graph()
    before = copy.deepcopy(gm)
    for node in nodes(gm, "all_reduce"):
        node.args = (*node.args[:2], group)
    report = tpfuse.fuse_graph(gm)
    assert not report.fused and "group" in report.boundaries[0].reason
    assert [n.target for n in gm.graph.nodes] == [n.target for n in before.graph.nodes]


@pytest.mark.parametrize("op", ["sum ", "product", "premul_sum", "", None, 0, torch.distributed.ReduceOp.SUM], ids=repr)
def test_reduce_operations_that_are_no_sums(op):
    gm, _ = plain_graph()
    for node in nodes(gm, "all_reduce"):
        node.args = (node.args[0], op, node.args[2])
    report = tpfuse.fuse_graph(gm)
    assert not report.fused and "reduce op" in report.boundaries[0].reason


def test_coalesced_and_in_place_collectives():
    def coalesced(x, r, weight, bias):
        a, b = c10d.all_reduce_coalesced([x, r], "sum", "0")
        return rms(c10d.wait_tensor(a) + c10d.wait_tensor(b))

    def in_place(x, r, weight, bias):
        return rms(c10d.wait_tensor(c10d.all_reduce_(x.clone(), "sum", "0")) + r)

    assert "all_reduce_coalesced" in fuse(coalesced).reason
    assert "all_reduce_" in fuse(in_place).reason
