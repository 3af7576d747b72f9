"""The kernels over real links: one process a GPU, as many as are visible, up to 8."""

from __future__ import annotations

import os
import random
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

if torch.cuda.device_count() < 2:
    pytest.skip("needs several CUDA devices", allow_module_level=True)

from tests.passes.test_quantised import recognised
from tests.quantisations import float8_per_row
from tests.ranks import run_processes
from tpfuse.kernels.add_norm import add_norm_reference
from tpfuse.kernels.bench.linked import LinkedRanks
from tpfuse.kernels.call import AddNormOut, Call
from tpfuse.kernels.norm_backward import NormBackwardCall, norm_backward_reference
from tpfuse.kernels.rendezvous import workspace_of
from tpfuse.kernels.symmetric.barrier import barrier
from tpfuse.kernels.symmetric.copied import copied
from tpfuse.kernels.symmetric.exchanged import ExchangedLaunch, exchanged
from tpfuse.kernels.symmetric.norm_backward_by_copies import norm_backward_by_copies
from tpfuse.kernels.symmetric.one_shot import fits as one_shot_fits
from tpfuse.kernels.symmetric.one_shot import one_shot
from tpfuse.kernels.symmetric.timeout import late_ranks
from tpfuse.kernels.symmetric.two_shot import fits as two_shot_fits
from tpfuse.kernels.symmetric.two_shot import two_shot
from tpfuse.kernels.words import MOST_RANKS

from .again_checks import calls_made_again

pytestmark = pytest.mark.gpu
WORLD = min(torch.cuda.device_count(), MOST_RANKS)
BF16, F32 = torch.bfloat16, torch.float32
KERNELS = ("one_shot", "one_shot/4", "two_shot", "barrier", *(["copied", "exchanged"] if WORLD == 2 else []))
#: The backward of a norm by copies, of all rows and of scattered ones.
BACKWARD = ("backward", "backward_scattered") if WORLD == 2 else ()


def _group(rank: int) -> dist.ProcessGroup:
    torch.cuda.set_device(rank)
    return dist.new_group(backend="nccl")


def _operands(seed: int, rank: int, rows: int, hidden: int, norm: str, dtype: torch.dtype) -> tuple[Call, Call]:
    """This rank's call, and the same call on the sum of all ranks' x."""
    g = torch.Generator(device="cuda").manual_seed(seed)
    xs = [torch.randn(rows, hidden, generator=g, device="cuda").to(dtype) for _ in range(WORLD)]
    residual = torch.randn(rows, hidden, generator=g, device="cuda").to(dtype)
    weight = torch.randn(hidden, generator=g, device="cuda").to(dtype)
    total = torch.stack(xs).float().sum(0)
    return tuple(
        Call(x, residual, None, weight, norm=norm, out_dtype=dtype, hidden_dtype=dtype, eps=1e-6)
        for x in (xs[rank], total)
    )


def _own(op: Call, rank: int) -> slice:
    """The rows of an exchange that this rank finishes."""
    return slice(rank * op.rows // WORLD, (rank + 1) * op.rows // WORLD)


def _launch(kernel: str, op: Call, ws) -> object:
    if kernel == "exchanged":
        return exchanged(replace(op, residual=op.residual[_own(op, ws.rank)]), ws)
    if kernel == "copied":
        return copied(op, ws)
    if kernel == "two_shot" and two_shot_fits(op, ws):
        return two_shot(op, ws)
    if kernel == "one_shot/4" and one_shot_fits(op, ws, 4):
        return one_shot(op, ws, 4)
    if "shot" in kernel and one_shot_fits(op, ws, 1):
        return one_shot(op, ws)
    return barrier(op, ws)  # of 4 ranks, 280 rows of float32 are more than a slot holds


def _result(launch) -> AddNormOut:
    """What the launch fills: of an exchange y of all rows, the rest of the own ones."""
    return replace(launch.out, y=launch.gathered) if isinstance(launch, ExchangedLaunch) else launch.out


def _off(out: AddNormOut, truth: Call) -> float:
    """The relative error of y, or of h where that is larger; infinite where there is a NaN."""
    wide = [t.float() for t in (truth.x, truth.residual)]
    right = add_norm_reference(
        Call(*wide, None, truth.weight.float(), eps=truth.eps, norm=truth.norm, out_dtype=F32, hidden_dtype=F32)
    )
    own = slice(None) if len(out.residual_out) == len(out.y) else _own(truth, dist.get_rank())
    return _worst([(out.y, right.y), (out.residual_out, right.residual_out[own])])


def _worst(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    errors = torch.stack([(a.float() - b).norm() / b.norm().clamp_min(1e-9) for a, b in pairs])
    return errors.nan_to_num(float("inf")).max().item()  # max() of Python's numbers passes over a NaN


class _Backward:
    """One call of BACKWARD: the ranks' x are the parts of a gradient; the residual is what was normalised, and what is
    added. `in_place`: x is a product, in the memory of dx."""

    def __init__(self, kernel: str, op: Call, truth: Call, ws, in_place: bool) -> None:
        self.ws, self.scattered, self.truth = ws, kernel == "backward_scattered", truth
        self.own = _own(op, ws.rank) if self.scattered else slice(None)
        self.dx, self.total = torch.empty_like(op.x), torch.empty_like(op.x[self.own])
        self.x, self.product = (self.dx, self._multiply) if in_place else (op.x, None)
        self.factor = op.x
        self.call = self._call(replace(op, x=self.x), self.own)

    def _multiply(self, first: int, stop: int) -> None:
        torch.mul(self.factor[first:stop], 1, out=self.dx[first:stop])

    @staticmethod
    def _call(op: Call, rows: slice) -> NormBackwardCall:
        h = op.residual[rows]
        return NormBackwardCall(op.x[rows], h, weight=op.weight, residual=h, norm=op.norm, eps=op.eps,
                                out_dtype=op.x.dtype, want_weight=True, want_bias=op.norm == "layer_norm")  # fmt: skip

    def run(self) -> None:
        self.out = norm_backward_by_copies(
            self.x, self.dx, self.call, self.ws, self.product, self.total, self.scattered
        )  # fmt: skip

    def off(self) -> float:
        """As `_off`, of dx, the sum, and the gradients of weight and bias."""
        truth = replace(self.truth, residual=self.truth.residual.float(), weight=self.truth.weight.float())
        right, own = (norm_backward_reference(self._call(truth, rows)) for rows in (slice(None), self.own))
        pairs = [(self.dx, right.dx), (self.total, truth.x[self.own]), (self.out.dweight, own.dweight)]
        return _worst(pairs if own.dbias is None else [*pairs, (self.out.dbias, own.dbias)])


def _stress(rank: int, calls: int) -> tuple[list[str], list[int], dict[int, int]]:
    """Random kernels, shapes, numbers of programs (with up to 32 rows each), dtypes and delays: the calls that were
    wrong, a fingerprint of each result, and the peers that a kernel gave up."""
    group = _group(rank)
    ws = workspace_of(group.group_name, torch.device("cuda", rank), copies=WORLD == 2)
    assert ws is not None
    spaces = [ws, replace(ws, max_blocks=9)]
    same, mine = random.Random(0), random.Random(rank + 1)
    wrong, marks = [], []
    for call in range(calls):
        kernel, rows = same.choice(KERNELS + BACKWARD), same.choice([0, 1, 2, 5, 8, 33, 150, 280])
        hidden, norm = same.choice([1024, 4096, 7168]), same.choice(["rms_norm", "layer_norm"])
        dtype = same.choice([BF16, F32])
        rows *= 2 if kernel in ("exchanged", "backward_scattered") else 1
        (op, truth), space = _operands(call, rank, rows, hidden, norm, dtype), same.choice(spaces)
        if kernel in BACKWARD:
            launch = _Backward(kernel, op, truth, space, in_place=mine.random() < 0.5)
            y = launch.dx
        else:
            launch = _launch(kernel, op, space)
            y = _result(launch).y
        y.fill_(float("nan"))
        if mine.random() < 0.4:
            torch.cuda._sleep(mine.randrange(1000, 200_000))
        launch.run()
        if rows:
            off = launch.off() if kernel in BACKWARD else _off(_result(launch), truth)
            if not off < (1e-5 if dtype == F32 else 6e-3):
                bad = int(y.isnan().any(-1).sum())
                wrong.append(f"call {call}: {kernel}, {rows} x {hidden}, {dtype}, {norm}: off {off:.1e}, {bad} NaN")
        marks.append(int(y.view(torch.int16).to(torch.int64).sum()) if rows else 0)
    torch.cuda.synchronize()
    return wrong, marks, late_ranks(ws.watch)


def test_random_kernels_shapes_and_delays() -> None:
    """TPFUSE_STRESS_CALLS sets how many calls."""
    calls = int(os.environ.get("TPFUSE_STRESS_CALLS", "600"))
    answers = run_processes(WORLD, _stress, calls, timeout=200)
    print(f"stress: {WORLD} linked GPUs, {calls} calls, {[len(wrong) for wrong, _, _ in answers]} wrong")
    for rank, (wrong, _, given_up) in enumerate(answers):
        assert not given_up, f"rank {rank} gave up (rank: call) {given_up}"
        assert not wrong, f"rank {rank}: " + "; ".join(wrong[:20])
    assert all(marks == answers[0][1] for _, marks, _ in answers), "ranks differ"


def _graphs(rank: int) -> float:
    """Graphs of different kernels and shapes replayed in turn, with calls outside between them; the worst error."""
    group = _group(rank)
    ws = workspace_of(group.group_name, torch.device("cuda", rank), copies=WORLD == 2)
    captured = []
    shapes = [("one_shot", 3, 4096), ("two_shot", 40, 2048), ("barrier", 280, 4096)]
    if WORLD == 2:
        shapes[2:] = ("copied", 280, 4096), ("exchanged", 350, 4096), ("exchanged", 2, 7168)
    for kernel, rows, hidden in shapes:
        op, truth = _operands(rows, rank, rows, hidden, "rms_norm", BF16)
        launch = _launch(kernel, op, ws)
        launch.load()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(3):
                launch.run()
        captured.append((graph, launch, op, truth))
    same, worst = random.Random(0), 0.0
    for seed in range(300):
        graph, launch, op, truth = same.choice(captured)
        fresh, fresh_truth = _operands(seed, rank, op.rows, op.hidden, "rms_norm", BF16)
        for old, new in ((op, fresh), (truth, fresh_truth)):
            for name in ("x", "residual"):
                getattr(old, name).copy_(getattr(new, name))
        op.weight.copy_(fresh.weight)
        truth.weight.copy_(fresh.weight)
        graph.replay()
        worst = max(worst, _off(_result(launch), truth))
        between, between_truth = _operands(seed + 1000, rank, 5, 1024, "layer_norm", BF16)
        worst = max(worst, _off(_launch("barrier", between, ws).run()[0], between_truth))
    return worst


def test_graphs_of_different_kernels_and_shapes_replayed_in_turn() -> None:
    assert max(run_processes(WORLD, _graphs, timeout=150)) < 6e-3


def _behind_product(op: Call) -> Call:
    """With an x that is filled when it is asked for, and is NaN before."""
    factor = op.x.clone()

    def multiply(first: int, stop: int) -> None:
        torch.mul(factor[first:stop], 1, out=op.x[first:stop])

    op.x.fill_(float("nan"))
    return replace(op, product=multiply)


def _cut(rank: int) -> list[float]:
    """Exchanges of more rows than the copy slot holds, x a product on one rank, each rank late in turn; then replayed.
    The error of each."""
    group = _group(rank)
    ws = workspace_of(group.group_name, torch.device("cuda", rank), copies=True)
    errors = []
    for seed, rows in enumerate((10_002, 25_000)):
        op, truth = _operands(seed, rank, rows, 4096, "rms_norm", BF16)
        assert op.rows * op.row_words > ws.copy_words
        launch = _launch("exchanged", _behind_product(op) if (seed + rank) % 2 else op, ws)
        graph = torch.cuda.CUDAGraph()
        for again in range(6):
            _result(launch).y.fill_(float("nan"))
            if rank == again % 2:
                torch.cuda._sleep(10_000_000)
            if again == 3:
                torch.cuda.synchronize()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    launch.run()
            if again < 3:
                launch.run()
            else:
                graph.replay()
            errors.append(_off(_result(launch), truth))
    return errors


@pytest.mark.skipif(WORLD != 2, reason="needs two CUDA devices")
def test_an_exchange_of_more_rows_than_the_slot_holds() -> None:
    assert all(max(errors) < 6e-3 for errors in run_processes(2, _cut, timeout=150))


def _late(rank: int) -> dict[str, list[float]]:
    """By how many milliseconds 100 calls in a graph take longer than the lateness of one rank, for each rank in turn:
    late by less than a look at the watch takes to come, and by several looks."""
    group = _group(rank)
    ranks = LinkedRanks(group, copies=True)
    torch.cuda._sleep(1000)  # loads its kernel
    more: dict[str, list[float]] = {}
    for kernel in KERNELS:
        launch = _launch(kernel, _operands(0, rank, 32, 8192, "rms_norm", BF16)[0], ranks.workspaces[0])
        launch.run()
        graph = ranks.capture([launch], 100)
        graph.replay()
        for cycles in (4_000_000, 60_000_000):  # some 2 and 30 ms
            for late in range(WORLD):
                times = []
                for waited_for in (False, True):
                    torch.cuda.synchronize()
                    dist.barrier(group)
                    torch.cuda.synchronize()
                    started = time.monotonic()
                    if rank == late or not waited_for:
                        torch.cuda._sleep(cycles)
                    if waited_for:
                        graph.replay()
                    torch.cuda.synchronize()
                    times.append((time.monotonic() - started) * 1000)
                more.setdefault(kernel, []).append(times[1] - times[0])
    return more


def test_a_late_rank_makes_one_call_late_and_not_those_behind_it() -> None:
    """A rank that has waited for long must not be late itself because of that: its peer would wait for long, and so on
    with every call."""
    for more in run_processes(WORLD, _late, timeout=100):
        print({kernel: [round(ms, 1) for ms in each] for kernel, each in more.items()})
        assert max(ms for each in more.values() for ms in each) < 15, more


@pytest.mark.skipif(WORLD != 2, reason="needs two CUDA devices")
def test_calls_by_copies_made_again_from_records() -> None:
    """Of every product, in pieces, quantised, in graphs, several in flight: only the first call of a kind is one."""
    answers = run_processes(2, calls_made_again, 600, recognised(float8_per_row).text(), timeout=150)
    for rank, (wrong, firsts, alike, _) in enumerate(answers):
        assert not wrong, f"rank {rank}: {len(wrong)} wrong: " + "; ".join(wrong[:10])
        assert firsts == alike, f"rank {rank}: {firsts} first calls of {alike} kinds"
    assert answers[0][3] == answers[1][3], "ranks differ"


@pytest.mark.skipif(WORLD != 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("planted", ["copies", "caller"])
def test_a_call_made_again_of_which_a_stream_does_not_wait_is_found_out(planted: str) -> None:
    answers = run_processes(2, calls_made_again, 150, recognised(float8_per_row).text(), planted, timeout=150)
    assert any(wrong for wrong, *_ in answers)
