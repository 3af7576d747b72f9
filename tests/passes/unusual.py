"""Legal and strange graphs: fuse one as it is, and run it before and after on two ranks."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch.fx.experimental.proxy_tensor import make_fx

import tpfuse

from ..graphs import all_reduce, on_ranks

HIDDEN = 16


def named(value: object) -> str:
    """A test's id: the same in every process, which the repr of a bare object is not."""
    return "object" if type(value) is object else repr(value)


def inputs(*shape, dtype=torch.float64):
    """(one partial sum per rank, residual, weight, bias)."""
    shape = shape or (2, 3, HIDDEN)
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    return [draw(*shape), draw(*shape)], draw(*shape), draw(shape[-1]) + 1, draw(shape[-1])


def results(gm, given):
    """Outputs of both ranks; every rank has arguments of its own, which in-place operators may change."""
    per_rank = [[t.clone() for t in (a if isinstance(a, list) else [a, a])] for a in given]
    return on_ranks(gm, 2, *per_rank), per_rank


def assert_same(before, after, given):
    """Equal outputs, effects on the inputs, shapes, dtypes and strides."""
    (old, old_inputs), (new, new_inputs) = results(before, given), results(after, given)
    torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(new_inputs, old_inputs, equal_nan=True)
    for a, b in zip(chain(*old), chain(*new), strict=True):
        assert [s for s, n in zip(a.stride(), a.shape, strict=True) if n > 1 and a.numel()] == [
            s for s, n in zip(b.stride(), b.shape, strict=True) if n > 1 and b.numel()
        ]


def fuse(run, given=None, graph=None, **options):
    """Fuse `run`'s graph as it is, in-place operators included. Returns the first verdict."""
    given = given or inputs()
    before = graph or make_fx(run, **options)(*((a[0] if isinstance(a, list) else a).clone() for a in given))
    after = copy.deepcopy(before)
    report = tpfuse.fuse_graph(after)
    assert_same(before, after, given)
    assert all(bool(b.reason) != b.fused and b.reason.count("\n") == 0 for b in report.boundaries)
    return report.boundaries[0] if report.boundaries else None


def rms(x, eps=1e-5):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def plain(x, r, weight, bias):
    h = all_reduce(x) + r
    return rms(h) * weight, h


def plain_graph():
    given = inputs()
    return make_fx(plain, tracing_mode="fake")(given[0][0], *given[1:]), given


def nodes(gm, name):
    return [node for node in gm.graph.nodes if name in str(node.target)]
