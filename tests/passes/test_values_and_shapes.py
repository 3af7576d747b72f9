"""Values that are missing, wrong or no plain tensors, and shapes at the edge: never an internal error, never another
number, and the reason said."""

from __future__ import annotations

import copy

import pytest
import torch

from tpfuse.passes.facts import aten_ops as ops
from tpfuse.passes.facts.graph import permutation
from tpfuse.passes.facts.sizes import Place, find_size

from ..graphs import all_reduce, fused, on_ranks, trace
from . import spellings
from .unusual import HIDDEN, fuse, inputs, named, nodes, plain_graph, rms

pytestmark = pytest.mark.usefixtures("two_ranks")


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(13))
def test_any_one_value_may_be_missing(index):
    gm, given = plain_graph()
    node = list(gm.graph.nodes)[index]
    if "val" in node.meta:
        del node.meta["val"]
    fuse(None, given, gm)


def test_all_values_missing():
    gm, given = plain_graph()
    for node in gm.graph.nodes:
        node.meta.clear()
    assert "no fake value" in fuse(None, given, gm).reason


@pytest.mark.parametrize("val", ["text", 3, None, [], torch.device("cpu"), object()], ids=named)
def test_values_that_are_no_tensors(val):
    for name in ("all_reduce", "wait_tensor", "add.Tensor", "rsqrt", "mul.Tensor"):
        gm, given = plain_graph()
        for node in nodes(gm, name):
            node.meta["val"] = val
        fuse(None, given, gm)


@pytest.mark.parametrize(
    "meta", ["nn_module_stack", "stack_trace", "source_fn_stack", "from_node", "custom", "recompute"]
)
@pytest.mark.parametrize(
    "garbage", [None, 7, "x", [1], {"a": 1}, {"a": ("L['self']", None)}, {1: ("a", "b", "c")}], ids=repr
)
def test_other_metadata_may_be_anything(meta, garbage):
    gm, given = plain_graph()
    for node in gm.graph.nodes:
        node.meta[meta] = garbage
    assert fuse(None, given, gm).fused


def test_a_tensor_subclass():
    gm, given = plain_graph()

    class Wrapped(torch.Tensor):
        pass

    for node in (*nodes(gm, "wait_tensor"), *nodes(gm, "r_1")):
        fresh = copy.deepcopy(gm)
        twin = next(n for n in fresh.graph.nodes if n.name == node.name)
        twin.meta["val"] = torch.zeros(2, 3, HIDDEN, dtype=torch.float64).as_subclass(Wrapped)
        assert "Wrapped" in fuse(None, given, fresh).reason


@pytest.mark.parametrize("layout", ["sparse", "nested"])
def test_a_tensor_that_is_not_dense(layout):
    gm, given = plain_graph()
    dense = torch.zeros(6, HIDDEN, dtype=torch.float64)
    val = dense.to_sparse() if layout == "sparse" else torch.nested.nested_tensor([dense, dense], layout=torch.jagged)
    for name in ("wait_tensor", "r_1", "add.Tensor"):
        fresh = copy.deepcopy(gm)
        for node in nodes(fresh, name)[:1]:
            node.meta["val"] = val
        assert not fuse(None, given, fresh).fused


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex128, torch.bool, torch.float8_e4m3fn], ids=str)
def test_dtypes_that_are_no_plain_floats(dtype):
    gm, given = plain_graph()
    for name in ("x_1", "wait_tensor", "r_1", "mul.Tensor"):
        fresh = copy.deepcopy(gm)
        for node in nodes(fresh, name):
            node.meta["val"] = torch.empty(2, 3, HIDDEN, dtype=dtype)
        assert not fuse(None, given, fresh).fused


def test_complex_numbers():
    def run(x, r, weight, bias):
        s = all_reduce(x)
        return rms((torch.complex(s, r) * (1 + 0j)).imag + s)

    assert not fuse(run).fused


def test_a_cast_to_integers_and_back_is_no_rounding():
    def run(x, r, weight, bias):
        h = all_reduce(x) * 8 + r
        return h * torch.rsqrt(h.long().double().pow(2).mean(-1, keepdim=True) + 1)

    assert not fuse(run).fused


def test_another_device_on_the_way():
    gm, given = plain_graph()
    for node in nodes(gm, "add.Tensor"):
        node.meta["val"] = torch.empty(2, 3, HIDDEN, device="meta", dtype=torch.float64)
    assert "meta" in fuse(None, given, gm).reason


# -- shapes and strides -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, HIDDEN), (2, 0, HIDDEN), (3, 0), (0, 0), (1,), (HIDDEN,), (1, 1), (2, 3, 1)])
@pytest.mark.parametrize("norm", [spellings.rms_llama, spellings.layer_functional, spellings.layer_written_out])
def test_empty_and_tiny_shapes(shape, norm):
    def run(x, r, weight, bias):
        h = all_reduce(x) + r
        return norm(h, weight, bias), h

    fuse(run, inputs(*shape))


def test_a_single_number():
    def run(x, r, weight, bias):
        h = all_reduce(x.sum()) + r.sum()
        return h * torch.rsqrt(h.pow(2).mean(-1) + 1e-5)

    assert "single number" in fuse(run).reason


def test_statistics_of_a_single_row_keep_their_shape():
    def run(x, r, weight, bias):
        h = all_reduce(x) + r
        rstd = torch.rsqrt(h.pow(2).mean(-1) + 1e-5)
        return h * rstd, rstd

    fuse(run, inputs(HIDDEN))


@pytest.mark.parametrize("what", ["partial", "residual", "sum", "hidden", "normed"])
def test_strides_of_what_is_not_contiguous(what):
    def run(x, r, weight, bias):
        x = x.transpose(0, 1) if what == "partial" else x
        r = r.transpose(0, 1) if what in ("partial", "residual") else r
        s = all_reduce(x)
        if what == "residual":
            return rms(r + s.transpose(0, 1)), r + s.transpose(0, 1)
        s = s.transpose(0, 1) if what == "sum" else s
        h = (r.transpose(0, 1) + s) if what == "sum" else s + r
        h = h.transpose(0, 1) if what == "hidden" else h
        y = rms(h)
        return (y.transpose(0, 1) if what == "normed" else y), h

    fuse(run)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_residual_that_is_broadcast(rows):
    def run(x, r, weight, bias):
        return rms(all_reduce(x) + r[:1, :1].expand(1, rows, HIDDEN)), r

    fuse(run)


@pytest.mark.parametrize("again", [False, True])
def test_a_broadcast_residual_whose_size_no_input_has(again):
    """It is read off what is owed: off the collective's input, or where a view comes first, off the partial sum."""

    def run(x, r, weight, bias):
        longer = torch.cat([x[:, :1], x], 1)
        s = all_reduce(longer.flatten(0, 1)).view(longer.shape) if again else all_reduce(longer)
        return rms(s + r[:1, :1])

    assert fuse(run, tracing_mode="symbolic").fused


@pytest.mark.parametrize(
    ("view", "shape"),
    [
        (lambda x: x.permute(-1, 0, 1), (2, 3, 5)),
        (lambda x: x.transpose(-1, 0), (2, 3, 5)),
        (lambda x: x.t(), (2, 3)),
        (lambda x: x.t(), (2,)),
        (lambda x: x.transpose(0, -1), (2,)),
        (lambda x: x.transpose(0, -1), ()),
    ],
)
def test_every_spelling_of_a_permutation_is_read(view, shape):
    x = torch.empty(shape)
    gm = trace(view, x, decompose=False)
    (node,) = gm.graph.find_nodes(op="output")[0].all_input_nodes
    assert node.target in ops.REORDERINGS
    assert [shape[dim] for dim in permutation(node)] == list(view(x).shape)


def test_a_size_is_not_read_off_an_incoming_gradient():
    """The forward half of a joint graph has no such input."""
    rows = torch.randn(3, HIDDEN), torch.randn(3, HIDDEN)

    def both(tangents, x):
        return tangents * 2, x * 2

    def one(tangents):
        return (tangents * 2,)

    joint, backward = trace(both, *rows, dynamic=True).graph, trace(one, rows[0], dynamic=True).graph
    gradient, x = joint.find_nodes(op="placeholder")
    (only,) = backward.find_nodes(op="placeholder")
    x.meta["val"] = gradient.meta["val"]  # both have the same symbols
    assert find_size(joint, x.meta["val"].shape[0]) == Place(x, 0)
    assert find_size(backward, only.meta["val"].shape[0]) is None


@pytest.mark.parametrize("read", ["between", "also outside", "in another view"])
def test_a_symbolic_size_that_a_view_of_the_sum_brings(read):
    """The view goes with the sum, and its size is read off what stays."""

    def run(s, r, w):
        v = all_reduce(s).view(-1, 2, HIDDEN)
        y = torch.nn.functional.rms_norm((v + r[:1]).view(v.shape[0], 2 * HIDDEN), (2 * HIDDEN,), w)
        if read == "also outside":
            return y, r[0, 0] * v.shape[0]
        return (y, v.shape[0] * r.view(v.shape[0], -1)) if read == "in another view" else (y,)

    partials = [torch.randn(6, HIDDEN) for _ in range(2)]
    rest = torch.randn(3, 2, HIDDEN), torch.randn(2 * HIDDEN)
    before = trace(run, partials[0], *rest, dynamic=True)
    after, report = fused(before)
    assert [b.fused for b in report.boundaries] == [True], report
    for expected, got in zip(*(on_ranks(gm, 2, partials, *rest) for gm in (before, after)), strict=True):
        torch.testing.assert_close(got, expected)
