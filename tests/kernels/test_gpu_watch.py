"""On a GPU with virtual ranks: kernels whose peer was never launched give up in time, and say whom they missed."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from tpfuse.errors import PeerTimeoutError
from tpfuse.kernels.bench.virtual import VirtualRanks
from tpfuse.kernels.call import Call
from tpfuse.kernels.symmetric.barrier import barrier
from tpfuse.kernels.symmetric.one_shot import one_shot
from tpfuse.kernels.symmetric.timeout import GONE, gave_up, late_ranks, raise_if_late, set_timeout
from tpfuse.kernels.symmetric.two_shot import two_shot
from tpfuse.kernels.words import CHANNELS

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
KERNELS = {
    "one_shot": one_shot,
    "one_shot, split rows": lambda op, ws: one_shot(op, ws, 4),
    "one_shot, portable": lambda op, ws: one_shot(op, ws, spin=False),
    "two_shot": two_shot,
    "barrier": barrier,
}


def operands(rows: int = 4, hidden: int = 2048) -> Call:
    x = torch.randn(rows, hidden, device="cuda").to(BF16)
    return Call(x, x.clone(), None, x[0].clone(), norm="rms_norm", out_dtype=BF16, hidden_dtype=BF16, eps=1e-6)


def ranks_with(
    world: int, kernel: str, seconds: float, rows: int = 4, programs: int = CHANNELS
) -> tuple[VirtualRanks, list]:
    """Ranks that have made one good call of at most `programs` programs each, and their next launches."""
    ranks = VirtualRanks(world, slot_bytes=1 << 20)
    for ws in ranks.workspaces:
        set_timeout(ws.watch, seconds)
    op = operands(rows)
    launches = ranks.bind(lambda ws: KERNELS[kernel](op, replace(ws, max_blocks=min(ws.max_blocks, programs))))
    ranks.run(launches)
    torch.cuda.synchronize()
    assert not any(gave_up(ws.watch) for ws in ranks.workspaces)
    return ranks, launches


def run_some(ranks: VirtualRanks, launches: list) -> None:
    """As `VirtualRanks.run`, but the last ranks stay away."""
    for stream, launch in zip(ranks.streams, launches, strict=False):
        with torch.cuda.stream(stream):
            launch.run()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("world", [2, 3, 4, 7, 8])
def test_a_rank_that_is_not_launched(world: int, kernel: str) -> None:
    ranks, launches = ranks_with(world, kernel, 0.3)
    deserter = world - 1
    started = time.monotonic()
    run_some(ranks, launches[:deserter])
    torch.cuda.synchronize()
    waited = time.monotonic() - started
    assert 0.29 < waited < 1.5
    for ws, launch in zip(ranks.workspaces[:deserter], launches, strict=False):
        assert deserter in late_ranks(ws.watch)
        assert late_ranks(ws.watch)[deserter] == 1  # the second call
        assert launch.out.y.isnan().all() and launch.out.residual_out.isnan().any()
        with pytest.raises(PeerTimeoutError, match=rf"rank {ws.rank}: .*rank {deserter} \(call 1\)"):
            raise_if_late(ws, "tp")


def test_what_is_queued_behind_does_not_wait_once_more() -> None:
    """40 rows on few programs, and 20 more calls: all end soon after the first wait was given up."""
    ranks, launches = ranks_with(2, "one_shot", 0.5, rows=40, programs=8)
    started = time.monotonic()
    for _ in range(20):
        run_some(ranks, launches[:1])
    torch.cuda.synchronize()
    assert time.monotonic() - started < 3


def test_the_host_can_call_all_waits_off() -> None:
    ranks, launches = ranks_with(2, "one_shot", float("inf"))
    run_some(ranks, launches[:1])
    time.sleep(0.05)
    assert not ranks.streams[0].query()  # it waits, and would for ever
    ranks.workspaces[0].watch[GONE] = 1
    torch.cuda.synchronize()
    assert late_ranks(ranks.workspaces[0].watch) == {1: 1}


def test_a_limit_changed_later_holds_for_captured_graphs() -> None:
    ranks, launches = ranks_with(2, "two_shot", float("inf"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launches[0].run()
    set_timeout(ranks.workspaces[0].watch, 0.2)
    started = time.monotonic()
    graph.replay()
    torch.cuda.synchronize()
    assert 0.19 < time.monotonic() - started < 1.5 and gave_up(ranks.workspaces[0].watch)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_late_rank_makes_one_call_late_and_not_those_behind_it(kernel: str) -> None:
    """A rank that has waited for long must not be late itself because of that: its peer would wait for long, and so on
    with every call. Late by less than a look at the watch takes to come, and by several looks."""
    ranks = VirtualRanks(2, slot_bytes=4 << 20)
    op = operands(rows=32, hidden=8192)
    launches = ranks.bind(lambda ws: KERNELS[kernel](op, ws))
    ranks.run(launches)
    torch.cuda._sleep(1000)  # loads its kernel
    torch.cuda.synchronize()
    graphs = []
    for stream, launch in zip(ranks.streams, launches, strict=True):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=stream):
            for _ in range(100):
                launch.run()

    def replay(late: int, cycles: int) -> float:
        started = time.monotonic()
        for rank, (stream, graph) in enumerate(zip(ranks.streams, graphs, strict=True)):
            with torch.cuda.stream(stream):
                if rank == late:
                    torch.cuda._sleep(cycles)
                graph.replay()
        torch.cuda.synchronize()
        return time.monotonic() - started

    replay(0, 0)
    for cycles in (4_000_000, 60_000_000):  # some 2 and 30 ms
        started = time.monotonic()
        torch.cuda._sleep(cycles)
        torch.cuda.synchronize()
        slept = time.monotonic() - started
        for late in range(2):
            took = replay(late, cycles)
            assert took < slept + 0.015, (took, slept)
