"""A call in pieces of rows that no kernel can load as they lie. A stub stands for the kernel (stub_kernel.py)."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from tests.graphs import fake_world
from tpfuse.kernels.add_norm import add_norm_reference
from tpfuse.kernels.call import Call
from tpfuse.kernels.rendezvous import WORKSPACE_REGISTRY
from tpfuse.kernels.symmetric import dispatch, pieces
from tpfuse.lean import call_leanly

from .stub_kernel import in_place_of_gpus

H, F32 = 64, torch.float32
MOST = (1 << 16) // (2 * H * 4)  # rows of float32, in a slot for two ranks


@pytest.fixture
def bound(monkeypatch):
    """The launches of pieces that were bound; all but the last must be gone when the next one is."""
    seen: list[Any] = []
    bind = pieces.bind

    def noted(*given: Any) -> Any:
        assert all(launch() is None for launch, _ in seen[:-1])
        launch = bind(*given)
        if launch is not None:
            seen.append((weakref.ref(launch), launch.args[0].untyped_storage().data_ptr()))
        return launch

    with fake_world(2):
        in_place_of_gpus(monkeypatch)
        monkeypatch.setattr(pieces, "bind", noted)
        yield seen
    dispatch.default_table.cache_clear()
    dispatch.choose.cache_clear()


@pytest.mark.parametrize("lies", ["rows apart", "turned round", "off 16 bytes"])
def test_copies_of_rows_are_made_once_and_not_kept_for_a_record(bound: list, lies: str) -> None:
    x = {
        "rows apart": torch.randn(3, MOST, 2 * H)[..., :H],
        "turned round": torch.randn(MOST, 3, H).transpose(0, 1),
        "off 16 bytes": torch.randn(3 * MOST * H + 1)[1:].view(3, MOST, H),
    }[lies]
    residual, weight = torch.randn(3, MOST, H), torch.randn(H)
    found = call_leanly(x, residual, weight, None, 1e-6, "0", "rms_norm", 0.0)
    out = add_norm_reference(
        Call(x, residual, None, weight, eps=1e-6, norm="rms_norm", out_dtype=F32, hidden_dtype=F32)
    )
    assert torch.equal(found[0], out.y) and torch.equal(found[1], out.residual_out)
    assert len(bound) == 3 and not WORKSPACE_REGISTRY["0"].records.known
    assert lies != "turned round" or len({storage for _, storage in bound}) == 1
