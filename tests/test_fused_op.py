"""The fused operator and the kernels: which outputs it takes from them, when it goes without, and what the report says.

The kernels themselves need GPUs; a stand-in that computes by the reference takes their place here.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import tpfuse
from tests.graphs import all_reduce, fused, trace
from tpfuse.kernels.add_norm import add_norm_reference
from tpfuse.passes.plan.sites import REWRITES

BF16, F32 = torch.bfloat16, torch.float32
VARIANTS = list(itertools.product(["rms_norm", "layer_norm"], [False, True], [None, BF16, F32], [False, True]))


def call(x, residual, *, norm="rms_norm", post=False, hidden_dtype=BF16, want_sum=False, stats=True, eps_tensor=None):
    ones, zeros = torch.ones(x.shape[-1], dtype=x.dtype), torch.zeros(x.shape[-1], dtype=x.dtype)
    return torch.ops.tpfuse.all_reduce_norm(
        x, residual, zeros, ones, zeros, eps_tensor, norm=norm, eps=1e-6, weight_offset=0.5, alpha=2.0, post=post,
        out_dtype=x.dtype, hidden_dtype=hidden_dtype, want_sum=want_sum, stats=stats, group_name="0",
    )  # fmt: skip


@pytest.fixture
def kernel(monkeypatch):
    """A kernel that takes every call, and the calls it was given."""
    calls = []

    def all_reduce_add_norm(call, site):
        calls.append(call)
        return add_norm_reference(call), call.x.clone() if call.want_sum else None

    monkeypatch.setattr("tpfuse.ops.all_reduce_add_norm", all_reduce_add_norm)
    return calls


@pytest.mark.parametrize(("norm", "post", "hidden_dtype", "want_sum"), VARIANTS)
def test_the_kernel_gives_every_output_the_functional_path_gives(
    four_ranks, monkeypatch, kernel, norm, post, hidden_dtype, want_sum
):
    """Same values, in the same order, and as the fake implementation announces them. (On a fake group of ranks an
    all-reduce changes nothing.)"""
    x, residual = torch.randn(2, 3, 16).to(BF16), torch.randn(2, 3, 16).to(BF16)
    variant = {"norm": norm, "post": post, "hidden_dtype": hidden_dtype, "want_sum": want_sum}
    by_kernel = call(x, residual, **variant)
    assert len(kernel) == 1 and kernel[0].group_name == "0"
    monkeypatch.setattr("tpfuse.ops.all_reduce_add_norm", lambda *_, **__: None)
    functional = call(x, residual, **variant)
    announced = call(x.to("meta"), residual.to("meta"), **variant)
    assert len(by_kernel) == len(functional) == len(announced)
    for mine, theirs, fake in zip(by_kernel, functional, announced, strict=True):
        torch.testing.assert_close(mine, theirs)
        assert (fake.shape, fake.dtype, fake.stride()) == (mine.shape, mine.dtype, mine.stride())


def test_an_eps_tensor_is_handed_on_as_it_is(four_ranks, kernel):
    eps = torch.tensor(1e-3)
    call(torch.randn(2, 8), None, eps_tensor=eps, hidden_dtype=None)
    assert kernel[0].eps_tensor is eps


def test_gradients_flow_through_the_kernel(four_ranks, kernel):
    x, residual = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    weight = torch.randn(8, requires_grad=True)
    y, h = tpfuse.ops.all_reduce_add_rms_norm(x, residual, weight, 1e-6, "0")
    (y.square().sum() + h.sum()).backward()
    wide = [t.detach().double().requires_grad_() for t in (x, residual, weight)]
    hidden = wide[0] + wide[1]
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6) * wide[2]
    (normed.square().sum() + hidden.sum()).backward()
    for mine, truth in zip((x, residual, weight), wide, strict=True):
        torch.testing.assert_close(mine.grad.double(), truth.grad, rtol=1e-4, atol=1e-4)


def test_tensors_on_the_cpu_take_the_functional_path(four_ranks):
    y, h = tpfuse.ops.all_reduce_add_rms_norm(torch.ones(2, 8), None, None, 0.0, "0")
    assert torch.equal(y, torch.ones(2, 8)) and torch.equal(h, y)


# -- what the report says of it ---------------------------------------------------------------------------------------


def boundary(x, r, weight):
    h = r + all_reduce(x)
    return torch.nn.functional.rms_norm(h, (x.shape[-1],), weight, 1e-6), h


def test_the_report_says_how_each_boundary_will_run(four_ranks, monkeypatch):
    args = torch.randn(4, 16), torch.randn(4, 16), torch.randn(16)
    _, report = fused(trace(boundary, *args))
    (verdict,) = report.boundaries
    assert verdict.fused and verdict.reason == ""
    assert verdict.runs.startswith("functional: Tensors are on cpu; the symmetric-memory kernels need NVIDIA GPUs")
    assert str(report).count(verdict.runs) == 1

    monkeypatch.setattr("tpfuse.passes.verdict.runs.why_not", lambda *_, **__: "")
    _, report = fused(trace(boundary, *args))
    assert report.boundaries[0].runs == "symmetric memory"
    assert tpfuse.Report.from_json(report.to_json()) == report


def test_an_unfused_boundary_does_not_run_fused(four_ranks):
    from tpfuse.passes.facts.groups import resolve_group
    from tpfuse.passes.pipeline import PassOptions, fuse

    graph = trace(boundary, torch.randn(4, 16), torch.randn(4, 16), torch.randn(16)).graph
    switched_off = PassOptions(rewrites=tuple(name for name in REWRITES if name != "all_reduce_norm"))
    (verdict,) = fuse(graph, resolve_group, switched_off).report.boundaries
    assert not verdict.fused and verdict.runs == ""


# -- init_workspace ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_rows": 0}, "max_rows=0; allowed: an integer of at least 1"),
        ({"max_rows": True}, "max_rows=True"),
        ({"hidden": 12.0}, "hidden=12.0"),
        ({"dtype": torch.float64}, "dtype=torch.float64; allowed: torch.bfloat16"),
        ({"group": "nobody"}, "group='nobody'"),
        ({"group": 7}, "group=7"),
    ],
)
def test_init_workspace_refuses_by_name(four_ranks, change, message):
    arguments = {"group": "0", "max_rows": 8, "hidden": 16, "dtype": BF16, **change}
    with pytest.raises(tpfuse.OpError, match=message):
        tpfuse.init_workspace(**arguments)


def test_init_workspace_without_a_gpu_says_that_nothing_was_set_up(four_ranks):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert tpfuse.init_workspace(torch.distributed.group.WORLD, 8, 16, BF16) is False
