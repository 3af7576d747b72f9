"""Graphs that write in place: what is read may not be moved past a write."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import tpfuse

from ..graphs import all_reduce, trace
from .unusual import assert_same, fuse, inputs, rms

pytestmark = pytest.mark.usefixtures("two_ranks")


def _write_residual_view(x, r, weight, bias):
    s = all_reduce(x)
    r[0].add_(1)
    h = s + r
    return rms(h), h


def _write_residual_before_the_norm(x, r, weight, bias):
    h = all_reduce(x) + r
    r.zero_()
    return rms(h), h


def _write_partial(x, r, weight, bias):
    s = all_reduce(x)
    x.view(-1)[:5].mul_(0)
    return rms(s + r), s


def _write_weight(x, r, weight, bias):
    h = all_reduce(x) + r
    y = rms(h)
    weight.add_(1)
    return y * weight


def _write_hidden_in_between(x, r, weight, bias):
    h = all_reduce(x) + r
    rstd = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
    h.add_(1)
    return h * rstd, h


def _write_cast_in_between(x, r, weight, bias):
    h = (all_reduce(x) + r).float()
    rstd = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
    h.add_(1)
    return (h * rstd).double()


def _write_what_a_reader_of_the_sum_reads(x, r, weight, bias):
    s = all_reduce(x)
    q = x * 2
    early = s * q
    q.add_(1)
    return rms(s + r + q), early


def _write_the_sum_afterwards(x, r, weight, bias):
    s = all_reduce(x)
    turned = s.transpose(0, 1)
    y = rms(turned)
    s.add_(1)
    return y, turned, s


def _write_hidden_afterwards(x, r, weight, bias):
    h = all_reduce(x) + r
    y = rms(h)
    h.add_(y)
    return y, h


def _write_normed_in_place(x, r, weight, bias):
    h = all_reduce(x) + r
    y = rms(h)
    z = y.mul_(weight)
    return z, y, h


def _write_normed_view(x, r, weight, bias):
    h = all_reduce(x) + r
    y = rms(h)
    y[0].mul_(0)
    return y * weight, h


def _accumulate_in_place(x, r, weight, bias):
    r.add_(all_reduce(x))
    return rms(r) * weight


def _copy_into(x, r, weight, bias):
    s = all_reduce(x)
    r.copy_(s)
    return rms(s), rms(r)


WRITES = [fn for name, fn in list(globals().items()) if name.startswith(("_write_", "_accumulate", "_copy"))]


@pytest.mark.parametrize("run", WRITES, ids=lambda fn: fn.__name__.strip("_"))
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_writes_in_place_are_seen(run, mode):
    fuse(run, tracing_mode=mode)


def test_a_plain_collective_writes_to_its_tensors():
    """`torch.distributed.all_reduce` as make_fx sees it; its operator's schema does not say that it writes."""

    def run(x, r, weight, bias):
        s = all_reduce(x)
        torch.distributed.all_reduce(x)
        return rms(s + r), s

    partials, *rest = inputs()
    report = tpfuse.fuse_graph(make_fx(run)(partials[0], *rest))
    assert not report.fused and "writes in place" in report.boundaries[0].reason


def test_an_in_place_step_of_the_norm_itself_is_no_obstacle():
    def run(x, r, weight, bias):
        h = all_reduce(x) + r
        return h.mul(h.pow(2).mean(-1, keepdim=True).add_(1e-5).rsqrt_()).mul_(weight), h

    assert fuse(run).fused


@pytest.mark.parametrize("dynamic", [False, True])
def test_functional_graphs_of_the_same_programs(dynamic):
    for run in WRITES:
        given = inputs()
        before = trace(run, given[0][0], *given[1:], dynamic=dynamic)
        after = copy.deepcopy(before)
        tpfuse.fuse_graph(after)
        assert_same(before, after, given)
