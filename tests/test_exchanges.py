"""Sequence parallelism where overlap_all_reduce_norm is named: a reduce-scatter, a norm or its backward, and a gather
of two ranks are one operator, with the product in front; what it gives and what is executed stay."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.distributed.device_mesh import init_device_mesh

import tpfuse
from tpfuse.passes.plan.sites import DEFAULT_REWRITES, OVERLAP, REWRITES

from . import sequence_models as models
from . import test_sequence_training
from .graphs import fake_world
from .ranks import run_processes
from .test_sequence_training import beyond, cut, expected, on_a_rank, tokens

SMALL = 64  # bytes
FORWARD, BACKWARD = "product_reduce_scatter_norm_gather", "reduce_norm_backward"


def let_cpus_exchange(put) -> None:
    """As on GPUs whose ranks address each other, but for the kernels: each operator runs the program's collectives."""
    for module in ("tpfuse.product_ops", "tpfuse.passes.rewrite.overlap", "tpfuse.passes.verdict.runs"):
        put(f"{module}.FROM_BYTES", SMALL)
    put("tpfuse.passes.verdict.runs.why_not", lambda *_, **__: "")
    put("tpfuse.passes.rewrite.lower.STAY", ())


@pytest.fixture
def exchanging(monkeypatch):
    torch._dynamo.reset()
    let_cpus_exchange(monkeypatch.setattr)
    with fresh_cache():
        yield
    torch._dynamo.reset()


def operators_of(model: nn.Module, ids: torch.Tensor, dynamic: bool = False, **options) -> list[list[str]]:
    """Those of ours, and collectives, in the code of forward and of backward."""
    options = {"rewrites": REWRITES, **options}
    fn = torch.compile(model, backend="tpfuse", fullgraph=True, dynamic=dynamic, options=options)
    _, codes = run_and_get_code(lambda: fn(ids).square().mean().backward())
    called = r"torch\.ops\.(?:tpfuse|_c10d_functional)\.(\w+)\.\w+\("
    return [[name for name in re.findall(called, code) if name != "wait_tensor"] for code in codes]


@pytest.mark.parametrize("how", ["dtensor", "megatron"])
def test_every_boundary_is_one_operator_forward_and_backward(exchanging, how):
    with fake_world(2):
        ids = tokens(how)[: 1 if how == "dtensor" else None]  # DTensor copies the rows of a larger batch in front
        forward, backward = operators_of(cut(how, 2), ids)
    first, last = ("reduce_scatter_norm_gather", "all_gather_into_tensor") if how == "dtensor" else (None, None)
    assert forward == [*[first or "all_gather_into_tensor"], *[FORWARD] * 4, *([last] if last else [])]
    ends = [] if how == "dtensor" else ["reduce_scatter_tensor", "norm_backward"]
    assert backward == [*[BACKWARD] * (5 if how == "dtensor" else 4), *ends]


def test_symbolic_sizes_keep_the_operators_of_the_joint_graph_where_nothing_has_them(exchanging):
    with fake_world(2):
        forward, backward = operators_of(cut("megatron", 2), tokens("megatron"), dynamic=True)
    assert sum("reduce_scatter_norm_gather" in name for name in forward) == 4
    assert sum("reduce_scatter_norm_backward_gather" in name for name in backward) == 4


@pytest.mark.parametrize("change", ["four ranks", "not named", "small", "batch_invariant"])
def test_collectives_stay_by_themselves_where_ranks_do_not_exchange(exchanging, monkeypatch, change):
    options = {"rewrites": [name for name in REWRITES if name != OVERLAP]} if change == "not named" else {}
    options |= {"batch_invariant": True} if change == "batch_invariant" else {}
    if change == "small":
        monkeypatch.setattr("tpfuse.passes.verdict.runs.FROM_BYTES", 1 << 20)
    with fake_world(4 if change == "four ranks" else 2):
        found = operators_of(cut("megatron", 4 if change == "four ranks" else 2), tokens("megatron"), **options)
    assert FORWARD not in found[0]
    assert (BACKWARD in found[1]) == (change == "batch_invariant")  # of gradients no bits are promised


def test_the_report_and_the_plan_say_so(exchanging):
    with fake_world(2):
        operators_of(cut("megatron", 2), tokens("megatron"))
        report = tpfuse.reports()[-1]
    exchanged = [b for b in report.boundaries if "by copy engines" in b.runs]
    assert [(b.direction, b.collective) for b in exchanged].count(("forward", "all_gather")) == 4
    assert len(exchanged) == 16 and all(b.kernel for b in exchanged)
    assert {step.told for step in report.steps if step.kernel} == {"overlap"}
    assert sum(step.kernel for step in report.steps) == 8


def cut_plainly(how: str, world: int, norm=nn.RMSNorm, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    model = models.whole(norm, dtype, seed)
    return models.cut_plainly(model, init_device_mesh("cpu", (world,)))


def test_all_reduces_of_gradients_and_their_norms_are_one_operator_too(exchanging):
    with fake_world(2):
        forward, backward = operators_of(cut_plainly("", 2), tokens("dtensor"))
        report = tpfuse.reports()[-1]
    assert forward == [*["all_reduce_norm"], *["product_all_reduce_norm"] * 4, "all_gather_into_tensor"]
    assert backward == [BACKWARD] * 5
    assert sum(step.kernel for step in report.steps) == 10


def on_a_rank_that_exchanges(rank: int, *args) -> dict:
    if args[2] == "plain":
        test_sequence_training.cut = cut_plainly
    def put(name: str, value: object) -> None:
        module, _, attribute = name.rpartition(".")
        setattr(__import__(module, fromlist=["_"]), attribute, value)

    let_cpus_exchange(put)
    return on_a_rank(rank, *args)


@pytest.mark.parametrize("how", ["dtensor", "plain", pytest.param("megatron", marks=pytest.mark.nightly)])
def test_gradients_and_executed_collectives_are_those_of_the_program(how):
    answers = run_processes(
        2, on_a_rank_that_exchanges, 2, torch.bfloat16, how, "inductor", REWRITES, 4, "", timeout=400
    )
    for its in answers:
        if how != "plain":  # whose gradients are merged: fewer all-reduces
            assert its["fused"] == expected(how, REWRITES)
            assert its["executed"]["compiled"] == its["executed"]["eager"]
        assert beyond(its["errors"], torch.bfloat16) == [], its["errors"]


class Scattered(nn.Module):
    """Inference, its rows scattered by hand. `own_too`: own rows of the normed value are read as well."""

    def __init__(self, own_too: bool) -> None:
        super().__init__()
        self.own_too, self.proj, self.norm = own_too, nn.Linear(32, 32, bias=False), nn.RMSNorm(32)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = x.view(2, -1, 32).select(0, 0) + funcol.reduce_scatter_tensor(self.proj(x), "sum", 0, dist.group.WORLD)
        y = self.norm(h)
        rows = funcol.all_gather_tensor(y, 0, dist.group.WORLD)
        return (rows, h, y) if self.own_too else (rows, h)


@pytest.mark.parametrize("own_too", [False, True])
def test_inference_exchanges_too(exchanging, own_too):
    options = {"rewrites": [*DEFAULT_REWRITES, OVERLAP], "policy": tpfuse.SharingPolicy(2, residual="scattered")}
    with fake_world(2), torch.no_grad():
        fn = torch.compile(Scattered(own_too).eval(), backend="tpfuse", options=options, dynamic=False)
        results, (code, *_) = run_and_get_code(fn, torch.randn(8, 32))
    assert "reduce_scatter_norm_gather" in code and "all_gather_into_tensor" not in code
    shapes = [tuple(each.shape) for each in results]
    assert shapes == [(8, 32), (4, 32), (4, 32)][: len(shapes)]


class NotGathered(nn.Module):
    """Own rows of the normed value, and nothing gathers them."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm = nn.Linear(32, 32, bias=False), nn.RMSNorm(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(funcol.reduce_scatter_tensor(self.proj(x), "sum", 0, dist.group.WORLD))


def test_rows_that_nobody_gathers_take_no_product(exchanging, monkeypatch):
    """Where the operator stays: a graph with `quantised_outputs` may hold it on GPUs, too."""
    monkeypatch.setattr("tpfuse.passes.rewrite.lower.STAY", ("cpu",))
    options = {"rewrites": [*DEFAULT_REWRITES, OVERLAP], "policy": tpfuse.SharingPolicy(2, residual="scattered")}
    with fake_world(2), torch.no_grad():
        fn = torch.compile(NotGathered().eval(), backend="tpfuse", options=options, dynamic=False)
        _, (code, *_) = run_and_get_code(fn, torch.randn(8, 32))
    assert "tpfuse.reduce_scatter_norm.lean" in code and "extern_kernels.mm" in code
