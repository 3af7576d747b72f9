"""Fuzzing: random programs, and real graphs with random damage. Never an internal error, never another number.

pytest tests/passes/test_fuzz.py -m nightly      thousands of examples instead of dozens
"""

from __future__ import annotations

import copy
import random
import warnings
from itertools import chain

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

import tpfuse

from ..graphs import fake_world, on_ranks, trace
from .programs import HIDDEN, ROWS, program, programs

MODES = ("real", "fake", "symbolic", "functional")
QUICK = settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
LONG = settings(QUICK, max_examples=3000)


@pytest.fixture(autouse=True, scope="module")
def two_ranks():
    """Two ranks, and no internal error: those are warnings."""
    with fake_world(2), warnings.catch_warnings():
        warnings.filterwarnings("error", message="tpfuse left a graph")
        yield


@pytest.fixture(autouse=True)
def no_process_group_left_behind():
    """The module's group stays for all of its examples."""


def arguments():
    """One list of (partial, residual, weight, bias) for each rank, equal but for the partial."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    first, second = draw(*ROWS, HIDDEN), draw(*ROWS, HIDDEN)
    rest = draw(*ROWS, HIDDEN), draw(HIDDEN) + 1, draw(HIDDEN)
    return [first, *rest], [second, *(t.clone() for t in rest)]


def graph_of(fn, mode):
    given_arguments = arguments()[0]
    if mode == "functional":
        return trace(fn, *given_arguments)
    return make_fx(fn, tracing_mode=mode)(*given_arguments)


def run(gm):
    """Outputs of both ranks, and what became of the inputs."""
    per_rank = [list(tensors) for tensors in zip(*arguments(), strict=True)]
    return on_ranks(gm, 2, *per_rank), per_rank


def check(before, after):
    """Equal outputs, effects on the inputs, shapes, dtypes and strides."""
    (old, old_inputs), (new, new_inputs) = run(before), run(after)
    torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(new_inputs, old_inputs, equal_nan=True)
    for a, b in zip(chain(*old), chain(*new), strict=True):
        assert not a.numel() or strides(a) == strides(b)


def strides(x):
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


REFUSED = "more than one element"  # a write to an expanded tensor, which eager mode refuses just as well


def graph_unless_refused(drawn, mode):
    """None for a program that eager mode would refuse: in some modes tracing runs it."""
    try:
        return graph_of(program(*drawn), mode)
    except RuntimeError as error:
        assert REFUSED in str(error)
        return None


def check_program(drawn, mode):
    before = graph_unless_refused(drawn, mode)
    if before is None:
        return
    after = copy.deepcopy(before)
    report = tpfuse.fuse_graph(after)
    assert all(bool(b.reason) != b.fused for b in report.boundaries)
    try:
        check(before, after)
    except RuntimeError as error:
        assert REFUSED in str(error)
        return
    code = after.code
    tpfuse.fuse_graph(after)
    assert not report.fused or "all_reduce_norm" in code


@QUICK
@given(drawn=programs(), mode=st.sampled_from(MODES))
def test_random_programs(drawn, mode):
    check_program(drawn, mode)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@LONG
@given(drawn=programs(), mode=st.sampled_from(MODES))
def test_many_random_programs(drawn, mode):
    check_program(drawn, mode)


# -- damage -----------------------------------------------------------------------------------------------------------


def _drop_value(node, rng):
    node.meta.pop("val", None)


def _foreign_value(node, rng):
    if "val" in node.meta:
        node.meta["val"] = rng.choice([None, "x", 3, [], torch.zeros(()), torch.zeros(3, dtype=torch.int8)])


def _other_dtype(node, rng):
    if isinstance(node.meta.get("val"), torch.Tensor):
        node.meta["val"] = node.meta["val"].to(rng.choice([torch.int64, torch.complex64, torch.bool]))


def _other_layout(node, rng):
    if isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].dim() > 1:
        node.meta["val"] = rng.choice([node.meta["val"].transpose(0, 1), torch.zeros(2, 2).to_sparse()])


def _by_name(node, rng):
    schema = getattr(node.target, "_schema", None)
    if schema is not None and node.args:
        names = [argument.name for argument in schema.arguments]
        node.kwargs = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        node.args = ()


def _foreign_metadata(node, rng):
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack", "recompute", "custom", "tensor_meta"):
        node.meta[key] = rng.choice([None, 3, "x", {}, [1], {"a": 1}, {"a": ("b", None)}])


def _kept_alive(node, rng):
    """A second reader of the value, right behind it."""
    if isinstance(node.meta.get("val"), torch.Tensor) and node.op == "call_function":
        with node.graph.inserting_after(node):
            twin = node.graph.call_function(torch.ops.aten.clone.default, (node,))
        twin.meta["val"] = node.meta["val"]


DAMAGE = (_drop_value, _foreign_value, _other_dtype, _other_layout, _by_name, _foreign_metadata, _kept_alive)


def check_damaged(drawn, mode, seed):
    """Metadata may lie in any way: the graph computes what it computed, or is left as it was."""
    rng = random.Random(seed)
    before = graph_unless_refused(drawn, mode)
    if before is None:
        return
    nodes = [node for node in before.graph.nodes if node.op != "output"]
    for node in rng.sample(nodes, min(len(nodes), rng.randint(1, 3))):
        rng.choice(DAMAGE)(node, rng)
    before.recompile()
    after = copy.deepcopy(before)
    report = tpfuse.fuse_graph(after)
    if not report.fused:
        assert after.code == before.code


@QUICK
@given(drawn=programs(), mode=st.sampled_from(MODES), seed=st.integers(0, 2**32))
def test_damaged_graphs(drawn, mode, seed):
    check_damaged(drawn, mode, seed)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@LONG
@given(drawn=programs(), mode=st.sampled_from(MODES), seed=st.integers(0, 2**32))
def test_many_damaged_graphs(drawn, mode, seed):
    check_damaged(drawn, mode, seed)
