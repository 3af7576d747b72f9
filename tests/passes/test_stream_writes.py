"""Writes in place beside the residual stream, and to it: caches and counters do not matter, the stream itself does."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tpfuse.policy import SharingPolicy

from .streams import HIDDEN, Mesh, check, inputs, mix, rms

PAIR, REPLICAS = Mesh(1, 2), Mesh(2, 2)


def own_rows_policy(residual="scattered"):
    return SharingPolicy(2, 1, 1, residual=residual)


def layers(mesh, x, partial, weight, touch, extra, norm=rms):
    """Attention cut over the attention group and an MLP on own rows, twice. touch(place, value, extra): may write to
    `extra` or to the value, which is what stands at the place."""
    for _ in range(2):
        y = norm(x, weight)
        touch("normed", y, extra)
        summed = mesh.all_reduce(mix(y, partial))
        touch("sum", summed, extra)
        x = x + summed
        touch("hidden", x, extra)
        y = norm(x, weight)
        touch("before the MLP", y, extra)
        x = x + mesh.own_rows(lambda rows: mix(rows, weight), y)
        touch("behind the MLP", x, extra)
    return norm(x, weight), extra * 2


def count_tokens(place, value, extra):
    if place == "normed":
        extra.add_(torch.bincount(value[..., 0].flatten().gt(0).long(), minlength=HIDDEN))


def index_add(place, value, extra):
    if place == "normed":
        extra.index_add_(0, value[..., 0].flatten().gt(0).long(), value[..., 1].flatten())


def step(place, value, extra):
    if place == "normed":
        extra.add_(1)


def cache_index_copy(place, value, extra):
    if place == "normed":
        extra.index_copy_(0, torch.tensor([1, 3]), torch.tanh(value).flatten()[:2])


def cache_slice(place, value, extra):
    if place == "normed":
        extra[2:4] = torch.tanh(value).flatten()[:2]


def reused_buffer(place, value, extra):
    if place == "normed":
        extra.copy_(torch.tanh(value).flatten()[: extra.shape[0]])


def out_argument(place, value, extra):
    if place == "normed":
        torch.mul(value.flatten()[: extra.shape[0]], 2, out=extra)


BESIDE = [count_tokens, index_add, step, cache_index_copy, cache_slice, reused_buffer, out_argument]


@pytest.mark.parametrize("touch", BESIDE, ids=lambda fn: fn.__name__)
def test_writes_beside_the_stream_do_not_matter(touch):
    program = lambda *tensors: layers(*tensors[:4], touch, tensors[4])  # noqa: E731
    given = [*inputs(PAIR, 2, 6), torch.zeros(HIDDEN, dtype=torch.float64)]
    report, executed = check(program, PAIR, given, own_rows_policy())
    assert {b.rewrite for b in report.boundaries} == {"scatter_dense"}
    assert executed == {"reduce_scatter": 2, "all_gather": 2}


def test_counting_what_is_normed_needs_all_rows_where_the_mlp_needs_its_own():
    """Two gathers more would be needed in front of the MLPs than the own rows save."""

    def touch(place, value, extra):
        if place == "before the MLP":
            count_tokens("normed", value, extra)

    program = lambda *tensors: layers(*tensors[:4], touch, tensors[4])  # noqa: E731
    given = [*inputs(PAIR, 2, 6), torch.zeros(HIDDEN, dtype=torch.float64)]
    _, executed = check(program, PAIR, given, own_rows_policy("auto"))
    assert executed == {"all_reduce": 2, "all_gather": 2}


def test_a_norm_that_make_fx_traced_whole():
    """F.rms_norm adds its eps in place, to a temporary."""
    norm = lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, 1e-6)  # noqa: E731
    program = lambda *tensors: layers(*tensors, lambda *_: None, tensors[2], norm)  # noqa: E731
    _, executed = check(program, PAIR, inputs(PAIR, 2, 6), own_rows_policy())
    assert executed == {"reduce_scatter": 2, "all_gather": 2}


@pytest.mark.parametrize("place", ["normed", "sum", "hidden", "before the MLP", "behind the MLP"])
@pytest.mark.parametrize("through", ["itself", "a view"])
def test_a_write_to_the_stream_is_refused_by_name(place, through):
    def touch(here, value, extra):
        if here == place:
            (value if through == "itself" else value[0])[..., :2].mul_(0.5)

    program = lambda *tensors: layers(*tensors, touch, tensors[2])  # noqa: E731
    report, _ = check(program, PAIR, inputs(PAIR, 2, 6), own_rows_policy())
    said = [b.reason for b in report.boundaries] + report.notes
    assert any("mul_.Tensor" in words and "writes in place" in words for words in said), said


def test_a_write_to_the_residual_before_it_is_read_again():
    """The own rows of an addend are cut once; a write in between would be lost on the second stage."""

    def program(mesh, x, partial, weight, extra):
        for _ in range(2):
            x = x + mesh.all_reduce(mix(rms(x, weight), partial)) + extra
            x = x + mesh.own_rows(lambda rows: mix(rows, weight), rms(x, weight))
            extra.add_(1)
        return rms(x, weight), extra * 2

    given = [*inputs(PAIR, 2, 6), torch.ones(2, 6, HIDDEN, dtype=torch.float64)]
    report, _ = check(program, PAIR, given, own_rows_policy())
    assert any("add_.Tensor writes in place" in note for note in report.notes)


def test_a_write_to_the_weight_between_the_collective_and_the_norm():
    def touch(here, value, extra):
        if here == "sum":
            extra.mul_(2)

    program = lambda *tensors: layers(*tensors, touch, tensors[2])  # noqa: E731
    check(program, PAIR, inputs(PAIR, 2, 6), own_rows_policy())


@pytest.mark.parametrize("what", ["a counter", "the partial sum", "the sum"])
def test_sums_over_replicas_beside_a_write(what):
    """A sum is paid in factors unless the write is to what is summed, or to the sum."""

    def program(mesh, x, partial, weight, extra):
        y = rms(x + mesh.all_reduce(mix(x, partial)), weight)
        part = mix(mesh.all_gather(y.flatten(0, 1), "dp"), partial)
        whole = mesh.all_reduce(part, "whole")
        {"a counter": extra, "the partial sum": part, "the sum": whole}[what].add_(1)
        h = x + mesh.cut(whole, "dp").view(x.shape)
        return rms(h, weight), extra * 2, part * 1

    given = [*inputs(REPLICAS, 2, 4), torch.zeros(HIDDEN, dtype=torch.float64)]
    policy = SharingPolicy(4, 2, None, residual="scattered", max_rows=1 << 20)
    report, executed = check(program, REPLICAS, given, policy)
    assert (executed["reduce_scatter"] > 1) == (what == "a counter")
    if what != "a counter":
        assert any("add_.Tensor" in b.reason for b in report.boundaries), report
