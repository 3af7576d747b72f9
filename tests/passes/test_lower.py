"""Lowering: the same values by the form that costs the host least, and only what is read is asked for."""

from __future__ import annotations

import copy
import itertools
import threading

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx

from tests.graphs import all_reduce, fake_world, fused, trace
from tests.policy_harness import run_threads
from tests.quantisations import by_hand
from tpfuse._torch_private import operator_full_name
from tpfuse.boundary_spec import FORMS, BoundarySpec, form_for, read_spec
from tpfuse.errors import OpError
from tpfuse.passes.facts.groups import resolve_group
from tpfuse.passes.pipeline import PassOptions, fuse
from tpfuse.passes.plan.sites import REWRITES
from tpfuse.passes.rewrite.lower import lower

H = 16
X_WEIGHT = torch.linspace(0.5, 1.5, H)


@pytest.fixture(autouse=True)
def two_ranks(request):
    if "operator_stays" in request.fixturenames:
        yield  # ranks are threads there
        return
    with fake_world(2):
        yield


def boundary(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, norm: str, read: tuple[str, ...]):
    total = all_reduce(x)
    hidden = residual + total
    normed = F.layer_norm(hidden, (H,), weight, bias) if norm == "layer" else F.rms_norm(hidden, (H,), weight, 1e-6)
    found = {"y": normed, "hidden": hidden, "total": total}
    return tuple(found[name] for name in read)


def lean_calls(graph: fx.Graph) -> list[str]:
    return [str(node.args[0]) for node in graph.nodes if "auto_functionalized" in str(node.target)]


READ = [("y",), ("y", "hidden"), ("y", "hidden", "total"), ("y", "total")]


@pytest.mark.parametrize(("norm", "read", "dynamic"), itertools.product(["rms", "layer"], READ, [False, True]))
def test_a_lowered_graph_computes_the_same(norm, read, dynamic):
    args = torch.randn(3, 5, H), torch.randn(3, 5, H), torch.randn(H), torch.randn(H)
    gm = trace(lambda *given: boundary(*given, norm=norm, read=read), *args, dynamic=dynamic)
    gm, report = fused(gm)
    assert report.fused_forward == 1
    before = gm(*args)
    lowered = copy.deepcopy(gm)
    assert lower(lowered.graph) == 1
    lowered.recompile()
    assert not any(operator_full_name(node.target).startswith("tpfuse::") for node in lowered.graph.nodes)
    assert all(torch.equal(a, b) for a, b in zip(lowered(*args), before, strict=True))
    if dynamic:
        args = torch.randn(2, 7, H), torch.randn(2, 7, H), *args[2:]
        assert all(torch.equal(a, b) for a, b in zip(lowered(*args), gm(*args), strict=True))


def test_the_smallest_form_is_taken_and_unread_outputs_are_not_asked_for():
    args = torch.randn(3, H), torch.randn(3, H), torch.randn(H), torch.randn(H)
    for norm, form in (("rms", "lean"), ("layer", "with_bias")):
        gm, _ = fused(trace(lambda *given, n=norm: boundary(*given, norm=n, read=("y",)), *args))
        assert lower(gm.graph) == 1
        assert lean_calls(gm.graph) == [f"tpfuse.all_reduce_norm.{form}"]
        (call,) = (node for node in gm.graph.nodes if "auto_functionalized" in str(node.target))
        assert read_spec(call.kwargs["spec"]).outputs == ("y",) and call.kwargs["hidden"] is None


def test_only_graphs_with_fused_operations_are_touched():
    gm = trace(lambda x: all_reduce(x) * 2, torch.randn(3, H))
    before = str(gm.graph)
    assert lower(gm.graph) == 0 and str(gm.graph) == before


def test_a_spec_says_every_number_bit_for_bit():
    given = BoundarySpec(
        norm="layer_norm", eps=1.1920928955078125e-07, weight_offset=1.0, alpha=1 / 3, post=True,
        out_dtype=torch.bfloat16, hidden_dtype=None, want_sum=True, stats=False, group_name="a|b", batch_invariant=True,
        operands=(torch.float32, None, torch.float16, None, torch.bfloat16, None),
    )  # fmt: skip
    assert read_spec(given.text()) == given and given.outputs == ("y", "total")
    for wrong in ("", given.text().replace("bfloat16", "nn", 1), "rms_norm|1|2"):
        with pytest.raises(OpError, match="none of tpfuse's"):
            read_spec(wrong)


def test_forms_hold_what_they_are_named_for():
    each = ({"x", "y"}, {"x", "rstd"}, {"x", "bias"}, {"x", "mean"}, {"x", "q"}, {"scale", "rstd"})
    assert [form_for(given) for given in each] == [*FORMS]


@pytest.mark.parametrize(("norm", "read", "dynamic"), [("rms", READ[2], True), ("layer", READ[1], False)])
def test_a_group_without_a_kernel_gets_plain_operations(monkeypatch, norm, read, dynamic):
    """The same collective, the operator's own formula, no operator of ours. (On a CPU this is not done of itself.)"""
    monkeypatch.setattr("tpfuse.passes.rewrite.lower.STAY", ())
    args = torch.randn(3, 5, H), torch.randn(3, 5, H), torch.randn(H), torch.randn(H)
    gm, _ = fused(trace(lambda *given: boundary(*given, norm=norm, read=read), *args, dynamic=dynamic))
    plain = copy.deepcopy(gm)
    assert lower(plain.graph) == 1
    plain.recompile()
    names = [operator_full_name(node.target) for node in plain.graph.nodes]
    assert not any(name.startswith("tpfuse::") for name in names) and not lean_calls(plain.graph)
    assert names.count("_c10d_functional::all_reduce") == names.count("_c10d_functional::wait_tensor") == 1
    if dynamic:
        args = torch.randn(2, 7, H), torch.randn(2, 7, H), *args[2:]
    for got, expected in zip(plain(*args), gm(*args), strict=True):
        torch.testing.assert_close(got, expected)
        assert got.dtype == expected.dtype


TRACING = threading.Lock()  # ranks are threads, and one traces at a time


def written_out(rank: int, name: str, rows: int, dynamic: bool) -> tuple[list[str], Tensor, Tensor]:
    """The names in the lowered graph of one operator without a kernel, what it gives, and what the operator gives."""
    options = dict(
        norm="rms_norm", eps=1e-6, weight_offset=0.0, alpha=1.0, post=False, out_dtype=torch.float32, stats=False,
        hidden_dtype=torch.float32, want_sum=False, group_name=dist.group.WORLD.group_name, batch_invariant=False,
    )  # fmt: skip
    x = torch.randn(rows, H, generator=torch.Generator().manual_seed(rank))
    with TRACING:
        operator = getattr(torch.ops.tpfuse, name)
        gm = trace(lambda x, w: tuple(operator(x, None, None, w, None, None, **options)), x, X_WEIGHT, dynamic=dynamic)
        plain = copy.deepcopy(gm)
        lower(plain.graph)
        plain.recompile()
    names = [operator_full_name(node.target) for node in plain.graph.nodes]
    return names + lean_calls(plain.graph), torch.cat(plain(x, X_WEIGHT)), torch.cat(gm(x, X_WEIGHT))


@pytest.mark.parametrize(
    ("name", "rows", "dynamic", "operator_stays"),
    [
        ("rows_norm", 3, True, False),
        ("reduce_scatter_norm", 4, False, False),
        ("reduce_scatter_norm", 3, False, True),  # it pads, which plain operations would do in a pass of their own
        ("reduce_scatter_norm", 4, True, True),  # and nothing says that they divide at every size
    ],
)
def test_what_no_kernel_does_as_one_is_written_out(monkeypatch, name, rows, dynamic, operator_stays):
    monkeypatch.setattr("tpfuse.passes.rewrite.lower.STAY", ())
    for names, got, expected in run_threads(2, written_out, name, rows, dynamic):
        torch.testing.assert_close(got, expected)
        assert any("tpfuse" in each for each in names) == operator_stays
        sent = "_c10d_functional::reduce_scatter_tensor"
        assert names.count(sent) == (name == "reduce_scatter_norm" and not operator_stays)


@pytest.mark.parametrize("invariant", [False, True])
def test_what_must_not_depend_on_the_rows_stays_an_operator(monkeypatch, invariant):
    monkeypatch.setattr("tpfuse.passes.rewrite.lower.STAY", ())
    args = torch.randn(3, H), torch.randn(3, H), torch.randn(H), torch.randn(H)
    gm, _ = fused(trace(lambda *given: boundary(*given, norm="rms", read=("y",)), *args))
    (node,) = (node for node in gm.graph.nodes if operator_full_name(node.target) == "tpfuse::all_reduce_norm")
    node.update_kwarg("batch_invariant", invariant)
    assert lower(gm.graph) == 1 and bool(lean_calls(gm.graph)) == invariant


def test_what_quantises_stays_an_operator(monkeypatch):
    """A compiler would quantise the normed value as it is before it is rounded."""
    monkeypatch.setattr("tpfuse.passes.rewrite.lower.STAY", ())
    args = torch.randn(3, H), torch.randn(3, H), torch.randn(H), torch.randn(H)
    program = lambda *given: by_hand(*boundary(*given, norm="rms", read=("y",)))  # noqa: E731
    outcome = fuse(trace(program, *args).graph, resolve_group, PassOptions(REWRITES, strict=True))
    assert [b.quantised for b in outcome.report.boundaries] == ["FP8 (e4m3) per row"]
    assert lower(outcome.graph) == 1 and len(lean_calls(outcome.graph)) == 1
