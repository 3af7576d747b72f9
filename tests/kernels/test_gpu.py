"""The kernels on a GPU: virtual ranks in one process, and real processes that share one device."""

from __future__ import annotations

import os
import random
import time
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from tests.ranks import run_processes
from tpfuse.kernels.add_norm import BANDS, add_norm, add_norm_reference
from tpfuse.kernels.bench.measure import draw_operands, what_is_wrong
from tpfuse.kernels.bench.virtual import VirtualRanks
from tpfuse.kernels.call import Call
from tpfuse.kernels.symmetric.barrier import barrier
from tpfuse.kernels.symmetric.dispatch import bind
from tpfuse.kernels.symmetric.entries import Entry
from tpfuse.kernels.symmetric.one_shot import one_shot
from tpfuse.kernels.symmetric.registry import KERNELS
from tpfuse.kernels.symmetric.tables import SHIPPED
from tpfuse.kernels.symmetric.two_shot import two_shot

pytestmark = pytest.mark.gpu
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def reference(xs: list[torch.Tensor], op: Call, dtype: torch.dtype = torch.float64):
    total = torch.stack(xs).double().sum(0).to(dtype)
    vectors = [None if t is None else t.to(dtype) for t in (op.residual, op.pre_bias, op.weight, op.bias)]
    return add_norm_reference(
        Call(
            total,
            *vectors,
            eps=op.eps,
            norm=op.norm,
            weight_offset=op.weight_offset,
            alpha=op.alpha,
            post=op.post,
            out_dtype=dtype,
            hidden_dtype=dtype,
        )
    )


@pytest.mark.parametrize("H", [8, 100, 2048, 4096, 7168, 16384])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_add_norm(H: int, dtype: torch.dtype, norm: str) -> None:
    s, residual = (torch.randn(7, 3, H, device="cuda").to(dtype) for _ in range(2))
    weight, bias = (torch.randn(H, device="cuda").to(dtype) for _ in range(2))
    for post in (False, True):
        options = {"norm": norm, "post": post, "weight_offset": 1.0, "alpha": 0.5}
        out = add_norm(
            Call(
                s,
                residual,
                weight,
                weight,
                bias,
                eps_tensor=torch.tensor(1e-5, device="cuda"),
                out_dtype=dtype,
                hidden_dtype=dtype,
                stats=True,
                **options,
            )
        )
        wide = [t.double() for t in (s, residual, weight, weight, bias)]
        truth = add_norm_reference(
            Call(*wide, eps=1e-5, out_dtype=torch.float64, hidden_dtype=torch.float64, **options)
        )
        rounding = torch.finfo(dtype).eps
        assert ((out.y.double() - truth.y).norm() / truth.y.norm()) < 0.6 * rounding + 1e-6
        assert ((out.residual_out.double() - truth.residual_out).norm() / truth.residual_out.norm()) < 0.6 * rounding


@pytest.mark.parametrize("H", [2048, 4096, 7168])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_add_norm_of_every_size(H: int, norm: str) -> None:
    """The kernel's options change with the number of bytes; 7168 is no power of two, so its second piece is shorter."""
    weight, bias = (torch.randn(H, device="cuda").to(BF16) for _ in range(2))
    for below in (1 << 20, *(band.below - H for band in BANDS[:-1]), 130 << 20):
        s, residual = (torch.randn(below // (2 * H), H, device="cuda").to(BF16) for _ in range(2))
        options = {"norm": norm, "stats": True}
        out = add_norm(Call(s, residual, None, weight, bias, eps=1e-5, out_dtype=BF16, hidden_dtype=BF16, **options))
        wide = [t.double() for t in (s, residual, weight, bias)]
        truth = add_norm_reference(
            Call(
                wide[0],
                wide[1],
                None,
                *wide[2:],
                eps=1e-5,
                out_dtype=torch.float64,
                hidden_dtype=torch.float64,
                **options,
            )
        )
        for got, right in ((out.y, truth.y), (out.residual_out, truth.residual_out)):
            assert ((got.double() - right).norm(dim=-1) / right.norm(dim=-1)).max() < 0.6 * torch.finfo(BF16).eps
        torch.testing.assert_close(out.rstd.double(), truth.rstd, rtol=1e-5, atol=0)
        if norm == "layer_norm":
            torch.testing.assert_close(out.mean.double(), truth.mean, rtol=1e-4, atol=1e-6)


class Variant:
    """One compiled kernel of the stress test and random calls of it."""

    def __init__(self, ranks: VirtualRanks, kernel: str, hidden: int, dtype: torch.dtype, norm: str, split: int = 1):
        self.ranks, self.kernel, self.split = ranks, kernel, split
        self.pool = [torch.randn(64, hidden, device="cuda").to(dtype) for _ in range(ranks.world)]
        self.residual = torch.randn(64, hidden, device="cuda").to(dtype)
        self.weight = torch.randn(hidden, device="cuda").to(dtype)
        self.norm, self.dtype = norm, dtype
        self.workspaces = [replace(ws, max_blocks=8) for ws in ranks.workspaces]

    def call(self, x: torch.Tensor, rows: int, start: int) -> Call:
        return Call(
            x, self.residual[start : start + rows], None, self.weight, norm=self.norm, out_dtype=self.dtype,
            hidden_dtype=self.dtype, eps=1e-6,
        )  # fmt: skip

    def launches(self, rows: int, start: int = 0) -> list:
        out = []
        for ws in self.workspaces:
            op = self.call(self.pool[ws.rank][start : start + rows], rows, start)
            if self.kernel == "one_shot":
                out.append(one_shot(op, ws, self.split))
            elif self.kernel == "two_shot":
                out.append(two_shot(op, ws))
            else:
                out.append(barrier(op, ws))
        return out

    def load(self) -> None:
        for rows in (1, 8, 20, 60) if self.split == 1 else (1, 8 // self.split):
            for launch in self.launches(rows):
                launch.load()

    def wrong(self, launches: list, rows: int, start: int) -> torch.Tensor:
        """0 or 1 on the device: any rank's result unequal to the first's, or far from float32."""
        op = self.call(self.pool[0], rows, start)
        truth = reference([p[start : start + rows] for p in self.pool], op, F32)
        first = launches[0].out
        tolerance = 1e-4 if self.dtype == F32 else 2e-2
        bad = torch.zeros((), device="cuda", dtype=torch.bool)
        for name in ("y", "residual_out"):
            mine, right = getattr(first, name), getattr(truth, name)
            scale = right.abs().amax().clamp_min(1e-6)
            bad |= ~((mine.float() - right).abs().amax() <= tolerance * scale)
            for launch in launches[1:]:
                bad |= (getattr(launch.out, name) != mine).any()
        return bad


@pytest.mark.parametrize("world", range(2, 9))
def test_stress_random_shapes_and_delays(world: int) -> None:
    """Every call's every result is checked; a program has up to eight rows. TPFUSE_STRESS_CALLS sets how many calls in
    all."""
    calls = int(os.environ.get("TPFUSE_STRESS_CALLS", "600")) // 3
    pick = random.Random(world)
    torch.manual_seed(world)
    ranks = VirtualRanks(world, slot_bytes=1 << 21)
    variants = [
        Variant(ranks, "one_shot", 1024, BF16, "rms_norm"),
        Variant(ranks, "one_shot", 1024, BF16, "layer_norm", split=2),
        Variant(ranks, "one_shot", 2048, BF16, "rms_norm", split=4),
        Variant(ranks, "one_shot", 520, F32, "layer_norm"),
        Variant(ranks, "two_shot", 1024, F16, "rms_norm"),
        Variant(ranks, "barrier", 1024, BF16, "rms_norm"),
        Variant(ranks, "barrier", 520, F32, "rms_norm"),
    ]
    for variant in variants:
        variant.load()
    torch.cuda._sleep(1)  # loaded too: the first launch waits for running kernels, and those for the rank to be delayed
    wrong = torch.zeros((), device="cuda", dtype=torch.int64)

    def delay(_: int) -> None:
        if pick.random() < 0.3:
            torch.cuda._sleep(pick.randrange(100, 30000))

    started = time.monotonic()
    for _ in range(calls):
        variant = pick.choice(variants)
        rows = pick.choice([0, 1, 1, 2, 3, 8, 13, 20, 60])
        if variant.split > 1:
            rows = min(rows, 8 // variant.split)
        start = pick.randrange(0, 64 - rows)
        launches = variant.launches(rows, start)
        for launch in launches:
            launch.out.y.fill_(float("nan"))
        ranks.run(launches, delay)
        if rows:
            wrong += variant.wrong(launches, rows, start)
    torch.cuda.synchronize()
    print(f"stress: world {world}: {calls} calls, {int(wrong)} wrong, {time.monotonic() - started:.1f} s")
    assert int(wrong) == 0


@pytest.mark.parametrize("hidden", [4096, 7168])
@pytest.mark.parametrize("world", [3, 5, 6, 7])
def test_ranks_among_whom_rows_do_not_divide(world: int, hidden: int) -> None:
    """Each kernel, and what the shipped table picks, with one row and with several rows a program."""
    ranks = VirtualRanks(world, slot_bytes=40 << 20)
    for rows in (1, 300):
        calls, truth = draw_operands(world, ranks.local, hidden, rows)
        picked = SHIPPED.choose("NVIDIA H200", world, hidden, 2, rows)
        assert picked.world == world and picked.kernel != "functional"
        for entry in (picked, *(Entry("H", world, hidden, rows, kernel) for kernel in KERNELS)):
            launches = ranks.bind(lambda ws, entry=entry, calls=calls: bind(entry, calls[ws.rank], ws))
            assert launches[0].constants["WORLD"] == world
            for _ in range(4):  # every slot and stage
                for launch in launches:
                    launch.out.y.fill_(float("nan"))
                torch.cuda.synchronize()
                ranks.run(launches)
                torch.cuda.synchronize()
                assert not what_is_wrong(ranks, launches, truth), (entry.kernel, rows)


def test_two_graphs_of_different_shapes_replayed_in_turn() -> None:
    ranks = VirtualRanks(2, slot_bytes=1 << 20)
    variants = [Variant(ranks, "one_shot", 1024, BF16, "rms_norm"), Variant(ranks, "two_shot", 2048, BF16, "rms_norm")]
    captured = []
    for variant, rows in zip(variants, (3, 13), strict=True):
        variant.load()
        launches = variant.launches(rows)
        captured.append((variant, launches, rows, ranks.capture(launches, calls=3)))
    pick = random.Random(0)
    for _ in range(200):
        variant, launches, rows, graph = pick.choice(captured)
        for pool in variant.pool:
            pool[:rows] = torch.randn_like(pool[:rows])
        graph.replay()
        assert not variant.wrong(launches, rows, 0)
        eager = variants[0].launches(5, 7)  # calls outside the graphs move the same epochs
        ranks.run(eager)
        assert not variants[0].wrong(eager, 5, 7)


def _on_one_device(rank: int) -> dict:
    import torch.distributed as dist

    from tpfuse.kernels.entry import all_reduce_add_norm, init_workspace, why_not

    torch.cuda.set_device(0)
    name = dist.group.WORLD.group_name
    report: dict = {"before": why_not(name, "cuda", 1024), "ready": init_workspace(name, 64, 1024, BF16)}
    report["after"] = why_not(name, "cuda", 1024)
    report["results"] = []
    for n, (rows, hidden) in enumerate([(1, 1024), (5, 2048), (0, 1024), (40, 1024), (3, 1024), (9, 4096)]):
        g = torch.Generator().manual_seed(n)
        xs = [torch.randn(rows, hidden, generator=g).to(BF16).cuda() for _ in range(dist.get_world_size())]
        residual, weight = torch.randn(rows, hidden, generator=g).to(BF16).cuda(), torch.ones(hidden).to(BF16).cuda()
        got = all_reduce_add_norm(
            Call(
                xs[rank],
                residual,
                None,
                weight,
                eps=1e-6,
                group_name=name,
                norm="rms_norm",
                out_dtype=BF16,
                hidden_dtype=BF16,
                want_sum=True,
                stats=True,
            )
        )
        assert got is not None
        out, total = got
        truth = add_norm_reference(
            Call(
                torch.stack(xs).double().sum(0),
                residual.double(),
                None,
                weight.double(),
                eps=1e-6,
                norm="rms_norm",
                out_dtype=F32,
                hidden_dtype=F32,
            )
        )
        torch.testing.assert_close(out.y.float(), truth.y, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(out.residual_out.float(), truth.residual_out, rtol=2e-2, atol=3e-2)
        torch.testing.assert_close(total.float(), torch.stack(xs).float().sum(0), rtol=2e-2, atol=3e-2)
        report["results"].append(out.y.view(torch.int16).cpu().numpy())
    return report


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_that_share_a_device(world: int, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    reports = run_processes(world, _on_one_device, timeout=120)
    for report in reports:
        assert report["before"] == report["after"] == "" and report["ready"]
        for mine, first in zip(report["results"], reports[0]["results"], strict=True):
            assert (mine == first).all()


def test_no_allocation_and_no_synchronisation_per_call() -> None:
    """What the eager call costs the host, and that it neither asks the driver for memory nor waits for the device."""
    from torch.profiler import ProfilerActivity, profile

    ranks = VirtualRanks(2)
    variant = Variant(ranks, "one_shot", 4096, BF16, "rms_norm")
    variant.load()
    for _ in range(20):
        ranks.run(variant.launches(4))
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(20):
            ranks.run(variant.launches(4))
    names = {event.key for event in recorded.key_averages()}
    forbidden = [n for n in names if any(w in n for w in ("cudaMalloc", "cudaFree", "Synchronize", "cudaMemcpy"))]
    # the profiler itself synchronises the device once when it stops
    assert not [n for n in forbidden if n != "cudaDeviceSynchronize"], forbidden
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(200):
        variant.launches(4)[0].kernel  # noqa: B018
    bind = (time.perf_counter() - started) / 400
    print(f"host: {bind * 1e6:.1f} us to bind one rank's call")
