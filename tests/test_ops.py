"""The public functions of `tpfuse.ops`, called as a user calls them: eagerly, compiled, with every form of a group."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

import tpfuse
from tpfuse import ops

from .graphs import on_ranks

WORLD, H, EPS = 4, 24, 1e-5


def partials(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(*shape, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(WORLD)]


def double(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(tensors).double().sum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(H,), (3, H), (2, 3, H), (0, H)])
def test_rms_norm_of_the_sum_of_all_ranks(four_ranks, shape, dtype):
    x, residual, weight = partials(*shape, dtype=dtype), torch.randn(shape).to(dtype), torch.randn(H).to(dtype)
    call = lambda x: ops.all_reduce_add_rms_norm(x, residual, weight, EPS, dist.group.WORLD, weight_offset=1.0)  # noqa: E731
    h = double(x) + residual.double()
    y = F.rms_norm(h, (H,), weight.double() + 1.0, EPS)
    for got_y, got_h in on_ranks(call, WORLD, x):
        assert got_y.dtype == got_h.dtype == dtype
        # A reduced-precision all-reduce rounds its partial sums: that error is the collective's.
        tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=5e-2, atol=5e-2)
        torch.testing.assert_close(got_h.double(), h, **tolerance)
        torch.testing.assert_close(got_y.double(), y, **tolerance)


def test_layer_norm_of_the_sum_of_all_ranks(four_ranks):
    x, residual, weight, bias = partials(3, H), torch.randn(3, H), torch.randn(H), torch.randn(H)
    call = lambda x: ops.all_reduce_add_layer_norm(x, residual, weight, bias, EPS, "0")  # noqa: E731
    h = double(x) + residual.double()
    y = F.layer_norm(h, (H,), weight.double(), bias.double(), EPS)
    for got_y, got_h in on_ranks(call, WORLD, x):
        torch.testing.assert_close(got_h.double(), h, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got_y.double(), y, rtol=1e-5, atol=1e-5)


def test_without_a_residual_the_second_result_is_the_sum(four_ranks):
    x = partials(3, H)
    for call in (
        lambda x: ops.all_reduce_rms_norm(x, None, EPS, "0"),
        lambda x: ops.all_reduce_layer_norm(x, None, None, EPS, "0"),
    ):
        for _, total in on_ranks(call, WORLD, x):
            torch.testing.assert_close(total.double(), double(x), rtol=1e-5, atol=1e-5)


def groups() -> dict[str, object]:
    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("dp", "attn_tp"))
    return {
        "process group": dist.group.WORLD,
        "name": dist.group.WORLD.group_name,
        "1-D mesh": mesh["attn_tp"],
        "mesh and dimension": (mesh, 1),
        "mesh and name": (mesh, "attn_tp"),
    }


@pytest.mark.parametrize("form", ["process group", "name", "1-D mesh", "mesh and dimension", "mesh and name"])
def test_every_form_of_a_group_in_eager_and_in_compiled_code(four_ranks, form):
    group = groups()[form]
    x, residual, weight = torch.randn(2, H), torch.randn(2, H), torch.randn(H)

    def call(x, residual, weight):
        return ops.all_reduce_add_rms_norm(x, residual, weight, EPS, group)

    eager = call(x, residual, weight)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(x, residual, weight)
    for left, right in zip(eager, compiled, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_gradients_are_those_of_the_replicated_computation(four_ranks, norm):
    """On a fake group the sum is this rank's own x, so the plain computation on x is the reference."""
    torch.manual_seed(0)
    x, residual = (torch.randn(3, H, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(H, dtype=torch.float64, requires_grad=True) for _ in range(2))
    if norm == "rms_norm":
        inputs = (x, residual, weight)
        ours = lambda x, r, w: ops.all_reduce_add_rms_norm(x, r, w, EPS, "0", weight_offset=1.0)  # noqa: E731
        plain = lambda x, r, w: (F.rms_norm(x + r, (H,), w + 1.0, EPS), x + r)  # noqa: E731
    else:
        inputs = (x, residual, weight, bias)
        ours = lambda x, r, w, b: ops.all_reduce_add_layer_norm(x, r, w, b, EPS, "0")  # noqa: E731
        plain = lambda x, r, w, b: (F.layer_norm(x + r, (H,), w, b, EPS), x + r)  # noqa: E731
    cotangents = [torch.randn(3, H, dtype=torch.float64) for _ in range(2)]
    got = torch.autograd.grad(ours(*inputs), inputs, cotangents)
    want = torch.autograd.grad(plain(*inputs), inputs, cotangents)
    for left, right in zip(got, want, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_with_an_offset_pass_gradcheck(four_ranks, weighted):
    x = torch.randn(3, H, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(H, dtype=torch.float64, requires_grad=True) if weighted else None
    call = lambda x, w: ops.all_reduce_add_rms_norm(x, None, w, EPS, "0", weight_offset=0.5)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, weight))


def test_eps_may_be_a_tensor(four_ranks):
    x = torch.randn(2, H)
    by_number, _ = ops.all_reduce_rms_norm(x, None, 0.25, "0")
    by_tensor, _ = ops.all_reduce_rms_norm(x, None, torch.tensor(0.25), "0")
    torch.testing.assert_close(by_number, by_tensor)


def test_nothing_is_mutated_and_nothing_aliases(four_ranks):
    x = torch.randn(2, H)
    before = x.clone()
    y, total = ops.all_reduce_rms_norm(x, None, EPS, "0")
    y.zero_()
    total.zero_()
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, H, dtype=torch.int32)}, "x has shape .* and dtype torch.int32"),
        ({"x": [1.0]}, "x is a list; needed: a tensor"),
        ({"residual": torch.ones(3, H)}, r"residual has shape \(3, 24\) .*; needed: None, or \(2, 24\)"),
        ({"residual": torch.ones(2, H).int()}, "residual has shape .* and dtype torch.int32; needed"),
        ({"weight": torch.ones(H + 1)}, r"weight has shape \(25,\) .*; needed: None, or \(24,\)"),
        ({"weight": 1.0}, "weight is a float; needed: None, or"),
        ({"weight": torch.ones(H, device="meta")}, "weight is on meta; needed: the device of x, cpu"),
        ({"eps": torch.ones(2)}, "eps is a tensor of shape"),
        ({"eps": "small"}, "eps is a str"),
        ({"group": 7}, "group=7 is no group on this rank; allowed: a ProcessGroup"),
        ({"group": "tp"}, r"group='tp' is the name of no process group .*; its groups: '0' \(ranks 0, 1, 2, 3\)"),
    ],
)
def test_bad_arguments_are_refused_by_name(four_ranks, change, message):
    arguments = {"x": torch.ones(2, H), "residual": None, "weight": None, "eps": EPS, "group": "0", **change}
    with pytest.raises(tpfuse.OpError, match=message):
        ops.all_reduce_add_rms_norm(**arguments)


def test_a_mesh_of_several_dimensions_is_no_group(four_ranks):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "attn_tp"))
    with pytest.raises(tpfuse.OpError, match="1-D DeviceMesh or"):
        ops.all_reduce_rms_norm(torch.ones(2, H), None, EPS, mesh)
    for dim in ("tp", 2):
        with pytest.raises(tpfuse.OpError, match=r"allowed: one of its 2 dimensions, named \('dp', 'attn_tp'\)"):
            ops.all_reduce_rms_norm(torch.ones(2, H), None, EPS, (mesh, dim))


OPTIONS = dict(
    norm="rms_norm", eps=EPS, weight_offset=0.0, alpha=1.0, post=False, out_dtype=torch.float32,
    hidden_dtype=torch.float32, want_sum=False, stats=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape", "needed"),
    [
        ("all_reduce_norm", (1, H), (6, H)),
        ("reduce_scatter_norm", (6, H), (2, H)),
        ("reduce_scatter_norm", (1, H), (2, H)),
        ("rows_norm", (H,), (6, H)),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operators_refuse_a_residual_of_another_shape_than_their_result(four_ranks, name, shape, needed, device):
    x, residual = torch.randn(6, H, device=device), torch.randn(shape, device=device)
    with pytest.raises(
        tpfuse.OpError, match=re.escape(f"residual has shape {shape}; needed: that of the result, {needed}")
    ):
        getattr(torch.ops.tpfuse, name)(x, residual, None, None, None, None, group_name="0", **OPTIONS)
