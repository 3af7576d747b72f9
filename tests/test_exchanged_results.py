"""Where there is no exchange, its operators run the program's collectives."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tpfuse.kernels import norm_backward
from tpfuse.kernels.call import Call

from .graphs import fake_world


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
