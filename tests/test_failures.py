"""A compiled graph says at the end of a call, and at every later one, that its group gave up."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.distributed as dist

from tpfuse._state import FAILED
from tpfuse.errors import PeerTimeoutError
from tpfuse.kernels.rendezvous import injected
from tpfuse.kernels.symmetric.timeout import GONE, LATE
from tpfuse.kernels.symmetric.workspace import virtual_ranks
from tpfuse.options import parse_options
from tpfuse.report import Report, Step
from tpfuse.runtime.guard import guard

from .graphs import fake_world


def guarded(call, *steps: Step):
    return guard(call, Report(steps=list(steps)), parse_options({"check_plans": False}))


def kernel(module: str, group=(0, 1)) -> Step:
    return Step("all_reduce_norm", group, "bfloat16", 64, module, kernel=True)


def test_a_step_ends_with_a_look_at_what_its_kernels_reported(four_ranks):
    """The call itself returns, as the replay of a CUDA graph does; only host memory is read."""
    pair, other = dist.new_group([0, 1]), dist.new_group([0, 2])
    calls = []
    one, two = kernel("layers.0.mlp"), kernel("layers.1.mlp")
    of_one, of_both = guarded(lambda: calls.append(1), one), guarded(lambda: calls.append(2), one, two)
    elsewhere = guarded(lambda: calls.append(3), kernel("x", (0, 2)))
    plain = guarded(lambda: calls.append(4), Step("all_reduce", (0, 1)))
    ws, healthy = (virtual_ranks(2, "cpu", 4, 1 << 12)[0] for _ in range(2))
    with injected(pair.group_name, ws), injected(other.group_name, healthy):
        of_one()
        ws.watch[LATE + 1], ws.watch[GONE] = 4, 1
        with pytest.raises(PeerTimeoutError, match=r"rank 0, at layers.0.mlp \(all_reduce_norm .* rank 1 \(call 3\)"):
            of_one()
        with pytest.raises(PeerTimeoutError, match=r"one of the boundaries layers.0.mlp, layers.1.mlp"):
            of_both()
        elsewhere()
        plain()
    assert calls == [1, 1, 2, 3, 4]


def test_after_a_wait_in_vain_every_call_raises_until_the_group_is_new():
    calls = []

    def fails():
        calls.append(torch.zeros(3))
        if len(calls) == 1:
            raise dist.DistBackendError("Timed out waiting 2000ms")

    call, other = guarded(fails, kernel("layers.0")), guarded(fails, kernel("y"), kernel("z", (0,)))
    with fake_world(2):
        held = dist.group.WORLD
        for which in (call, call, other, call):
            with pytest.raises(PeerTimeoutError, match=r"rank 0 of group .* boundaries layers.0") as found:
                which()
            assert (found.value.group, found.value.missing, found.value.rank) == ((0, 1), (1,), 0)
            assert found.value.boundary == "one of the boundaries layers.0"
        assert len(calls) == 1 and str(found.value).count("an earlier call gave up") == 1
        tensor = weakref.ref(calls.pop())
        del found
        gc.collect()
        assert tensor() is None  # what is remembered holds nothing of the call
        calls.append(None)
    with fake_world(2):
        call()
        other()
    assert len(calls) == 3 and held is not None
    del held
    gc.collect()
    assert not FAILED
