"""What an exchange hands out is the caller's: no result lies in another one; and where there is no exchange, its
operators run the program's collectives."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn

import tpfuse
from tpfuse.kernels import norm_backward
from tpfuse.kernels.call import Call
from tpfuse.passes.plan.sites import DEFAULT_REWRITES, OVERLAP, REWRITES

from .graphs import fake_world
from .test_exchanges import Scattered, exchanging  # noqa: F401 (a fixture)


def memory_of(t: torch.Tensor) -> int:
    return t.untyped_storage().data_ptr()


@pytest.mark.parametrize("how", ["as they are", "views", "parts"])
def test_own_and_gathered_rows_share_no_memory_where_both_are_results(exchanging, how):  # noqa: F811
    class Viewed(Scattered):
        def forward(self, x):
            rows, h, y = super().forward(x)
            if how == "parts":
                return rows.split(4)[1], h, y.chunk(2)[0]
            return (rows.view(2, -1, 32), h, y.t()) if how == "views" else (rows, h, y)

    options = {"rewrites": [*DEFAULT_REWRITES, OVERLAP], "policy": tpfuse.SharingPolicy(2, residual="scattered")}
    with fake_world(2), torch.no_grad():
        fn = torch.compile(Viewed(True).eval(), backend="tpfuse", options=options, dynamic=False)
        rows, _, y = fn(torch.randn(8, 32))
    assert memory_of(rows) != memory_of(y)


class Between(nn.Module):
    """A boundary whose partial rows and residual are both inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.proj = nn.RMSNorm(32), nn.Linear(32, 32, bias=False)

    def forward(self, part: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        h = residual + funcol.reduce_scatter_tensor_autograd(part, "sum", 0, dist.group.WORLD)
        return self.proj(funcol.all_gather_tensor_autograd(self.norm(h), 0, dist.group.WORLD))


def test_gradients_of_own_and_of_all_rows_share_no_memory(exchanging):  # noqa: F811
    """Both are accumulated in place."""
    with fake_world(2):
        fn = torch.compile(Between(), backend="tpfuse", dynamic=False, options={"rewrites": REWRITES})
        part, residual = torch.randn(8, 32, requires_grad=True), torch.randn(4, 32, requires_grad=True)
        fn(part, residual).square().mean().backward()
        assert any("by copy engines" in b.runs and b.direction == "backward" for b in tpfuse.reports()[-1].boundaries)
    assert memory_of(part.grad) != memory_of(residual.grad)


def operands(scattered: bool) -> tuple[list, dict]:
    own = 4 if scattered else 8
    given = [torch.randn(8, 32), torch.randn(own, 32), None, torch.rand(own, 1), torch.randn(32), torch.randn(own, 32)]
    told = {"norm": "rms_norm", "eps": 1e-6, "weight_offset": 0.0, "out_dtype": torch.float32}
    return given, told | {"want_sum": True, "want_weight": True, "want_bias": False}


@pytest.mark.parametrize("name", ["all_reduce_norm_backward", "reduce_scatter_norm_backward_gather"])
def test_without_copies_the_functional_operators_run_the_collectives(name):
    given, told = operands(name.startswith("reduce_scatter"))
    with fake_world(2):
        told["group_name"] = dist.group.WORLD.group_name
        plain, named = (getattr(torch.ops.tpfuse, name)(*given, **told, overlap=overlap) for overlap in (False, True))
    assert len(plain) == len(named) and all(map(torch.equal, plain[:3], named[:3]))


@pytest.mark.parametrize("name", ["all_reduce_norm_backward", "reduce_scatter_norm_backward_gather",
                                  "reduce_scatter_norm_gather"])  # fmt: skip
def test_more_ranks_than_two_do_not_meet_for_it(monkeypatch, name):
    """Those whose graph was compiled without the operator would never come."""
    monkeypatch.setattr("tpfuse.kernels.entry.on_gpu", lambda _: True)
    monkeypatch.setattr("tpfuse.kernels.entry.FROM_BYTES", 1)
    monkeypatch.setattr("tpfuse.kernels.entry.workspace_of", lambda *_, **__: pytest.fail("ranks meet"))
    monkeypatch.setattr(Call, "supported", lambda _: True)
    given, told = operands(scattered=False)
    if name == "reduce_scatter_norm_gather":
        given = [given[0], *[None] * 5]
        told = {"norm": "rms_norm", "eps": 1e-6, "weight_offset": 0.0, "alpha": 1.0, "post": False, "want_sum": False,
                "out_dtype": torch.float32, "hidden_dtype": None, "stats": False}  # fmt: skip
    elif name.startswith("reduce_scatter"):
        given = [given[0], *(t if t is None or t.dim() < 2 else t[:2] for t in given[1:])]
    with fake_world(4):
        group_name = dist.group.WORLD.group_name
        getattr(torch.ops.tpfuse, name)(*given, **told, group_name=group_name, overlap=True)


def test_partial_sums_are_added_up_on_their_own_device(monkeypatch):
    """Triton launches on the current one, and copies of a call end before its sums are added up."""
    here = []

    class OnDeviceOf:
        def __init__(self, t: torch.Tensor) -> None:
            self.t = t

        def __enter__(self) -> None:
            here.append(self.t)

        def __exit__(self, *_: object) -> None:
            here.pop()

    launched = []
    monkeypatch.setattr(norm_backward, "on_device_of", OnDeviceOf)
    monkeypatch.setattr(norm_backward, "_add_up", lambda partial: launched.append(list(here)) or [torch.zeros(32)])
    h = torch.randn(4, 32)
    call = norm_backward.NormBackwardCall(h, h, norm="rms_norm", eps=1e-6, out_dtype=h.dtype, want_weight=True,
                                          want_bias=False)  # fmt: skip
    norm_backward.Parts(call, 2).added_up()
    assert len(launched[0]) == 1
