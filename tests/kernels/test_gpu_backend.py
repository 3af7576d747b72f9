"""Through the operator and `torch.compile(backend="tpfuse")` on GPUs: real processes, symmetric memory, CUDA graphs.

"shared": gloo processes that share one GPU, as TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 allows. "linked": NCCL
processes with a GPU each.
"""

from __future__ import annotations

import gc
import os
import queue
import random
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from tests.graphs import executed_collectives
from tests.models import HIDDEN, Stack, cut_from, loss
from tests.ranks import run_processes
from tpfuse.kernels.rendezvous import WORKSPACE_REGISTRY, check_peers

pytestmark = pytest.mark.gpu
WORLD, BF16 = 2, torch.bfloat16


@pytest.fixture(params=["shared", "linked"])
def ranks(request, monkeypatch):
    """Runs a function on WORLD processes of one kind."""
    monkeypatch.delenv("TPFUSE_PEER_TIMEOUT", raising=False)
    if request.param == "shared":
        monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0])
    elif torch.cuda.device_count() < WORLD:
        pytest.skip(f"needs {WORLD} GPUs")
    backend = "gloo" if request.param == "shared" else "nccl"
    return lambda fn, *args: run_processes(WORLD, fn, *args, timeout=150, backend=backend)


def here(rank: int) -> torch.device:
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))


# -- a model through the backend --------------------------------------------------------------------------------------


def run_inference(rank: int, norm: type[nn.Module], options: dict, rows: list[int]) -> dict:
    """Each number of rows in turn, against eager code and float64."""
    import tpfuse
    from tpfuse import backend

    device = here(rank)
    torch.manual_seed(0)
    whole = Stack(1, "none", norm=norm).to(BF16)
    exact = Stack(1, "none", norm=norm).double()
    exact.load_state_dict(whole.state_dict())
    exact.to(device)
    model = cut_from(whole, rank, WORLD, "funcol").to(device)
    options = {"expect_fused": 4, **options}
    fn = torch.compile(model, backend=backend.tpfuse, options=options, fullgraph=True, dynamic=False)
    errors, outputs = [], []
    with torch.no_grad():
        for n, count in enumerate(rows):
            x = torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(n)).to(device, BF16)
            torch.compiler.cudagraph_mark_step_begin()
            got = fn(x).clone()
            if count:
                errors.append((relative(got, exact(x.double())), relative(model(x), exact(x.double()))))
            outputs.append(got.float().cpu().numpy())
        collectives = dict(executed_collectives(fn, x))
    from torch._dynamo.utils import counters

    runs = {boundary.runs for report in tpfuse.reports() for boundary in report.boundaries}
    return {"errors": errors, "outputs": outputs, "collectives": collectives, "runs": runs,
            "skips": counters["inductor"]["cudagraph_skips"], "workspaces": len(WORKSPACE_REGISTRY)}  # fmt: skip


def right(results: list[dict]) -> None:
    for result in results:
        assert result["runs"] == {"symmetric memory"} and result["collectives"] == {} and result["workspaces"] == 1
        for fused, eager in result["errors"]:
            assert fused <= 1.1 * eager + torch.finfo(BF16).eps
        for mine, first in zip(result["outputs"], results[0]["outputs"], strict=True):
            assert (mine == first).all(), "ranks hold different results"


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_a_decoder_stack_runs_in_the_kernels(ranks, norm) -> None:
    right(ranks(run_inference, norm, {}, [5, 1, 5, 0, 64]))


def test_reduce_overhead_with_many_replays_and_shapes_in_turn(ranks) -> None:
    """Each number of rows is a CUDA graph of its own, captured between replays of the others."""
    pick = random.Random(0)
    rows = [5, 5, 5, 1, 1, 1, 33, 33, 33] + [pick.choice([5, 1, 33]) for _ in range(60)]
    results = ranks(run_inference, nn.RMSNorm, {"mode": "reduce-overhead"}, rows)
    right(results)
    assert all(result["skips"] == 0 for result in results)


def run_training(rank: int) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    import tpfuse
    from tpfuse import backend
    from tpfuse.cli import demo_models

    device = here(rank)
    if dist.get_backend() == "gloo":
        _repair = demo_models.repair_gloo_all_gather()  # full_tensor() gathers
    mesh = init_device_mesh("cuda", (WORLD,))
    torch.manual_seed(0)
    whole = Stack(1, "dtensor").to(device)

    def cut() -> nn.Module:
        model = Stack(1, "dtensor").to(device)
        model.load_state_dict(whole.state_dict())
        for layer in model.layers:
            plan = {"qkv": ColwiseParallel(), "o_proj": RowwiseParallel()}
            plan |= {"up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
            parallelize_module(layer, mesh, plan)
        return model

    def gradients(model: nn.Module, fn) -> list[torch.Tensor]:
        x = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(1)).to(device)
        loss(fn(x)).backward()
        return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]

    model, exact = cut(), Stack(1, "none").double().to(device)
    exact.load_state_dict(whole.state_dict())
    truth = gradients(exact, lambda x: exact(x.double()))
    fused = gradients(model, torch.compile(model, backend=backend.tpfuse, fullgraph=True))
    eager_model = cut()
    eager = gradients(eager_model, eager_model)
    forward = [b for b in tpfuse.reports()[0].boundaries if b.direction == "forward"]
    errors = [(relative(a, c), relative(b, c)) for a, b, c in zip(fused, eager, truth, strict=True)]
    return {"fused": [b.fused for b in forward], "runs": {b.runs for b in forward}, "errors": errors}


def test_gradients_of_training(ranks) -> None:
    for result in ranks(run_training):
        assert result["fused"] == [True] * 4 and result["runs"] == {"symmetric memory"}
        assert all(fused <= 1.1 * eager + 1e-5 for fused, eager in result["errors"])


# -- the operator by itself -------------------------------------------------------------------------------------------


class Op:
    """Calls of one shape of the operator, with inputs that every rank can compute."""

    def __init__(self, rank: int, rows: tuple[int, ...], hidden: int, device: torch.device) -> None:
        self.shape, self.rank, self.device = (*rows, hidden), rank, device
        self.x, self.residual = (torch.empty(self.shape, device=device, dtype=BF16) for _ in range(2))
        self.weight = torch.ones(hidden, device=device, dtype=BF16)
        self.outputs: list[torch.Tensor] = []

    def fill(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.xs = [torch.randn(self.shape, generator=g).to(self.device, BF16) for _ in range(WORLD)]
        self.x.copy_(self.xs[self.rank])
        self.residual.copy_(torch.randn(self.shape, generator=g))

    def call(self, x: torch.Tensor | None = None) -> None:
        self.outputs = torch.ops.tpfuse.all_reduce_norm(
            self.x if x is None else x, self.residual, None, self.weight, None, None, norm="rms_norm", eps=1e-6,
            weight_offset=0.0, alpha=1.0, post=False, out_dtype=BF16, hidden_dtype=BF16, want_sum=True, stats=True,
            group_name=dist.group.WORLD.group_name,
        )  # fmt: skip

    def check(self) -> None:
        total = torch.stack(self.xs).double().sum(0)
        h = total + self.residual.double()
        rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
        for got, exact in zip(self.outputs, (h * rstd, h, total, rstd), strict=True):
            assert got.shape == exact.shape and (not exact.numel() or relative(got, exact) < 6e-3)


def run_captured(rank: int) -> int:
    """Two graphs of different shapes and hidden sizes, replayed in a random order with eager calls between."""
    import tpfuse

    device = here(rank)
    assert tpfuse.init_workspace(dist.group.WORLD, 64, 1024, BF16)
    ops = [Op(rank, (2, 3), 512, device), Op(rank, (40,), 1024, device)]
    graphs = []
    for op in ops:
        op.fill(0)
        for _ in range(2):
            op.call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(3):
                op.call()
        graphs.append(graph)
    eager = Op(rank, (7,), 512, device)
    pick = random.Random(1)
    for n in range(60):
        op, graph = pick.choice(list(zip(ops, graphs, strict=True)))
        op.fill(n)
        graph.replay()
        op.check()
        if n % 5 == 0:
            eager.fill(n)
            eager.call()
            eager.check()
    check_peers()
    return n


def test_captured_graphs_replayed_in_turn(ranks) -> None:
    assert ranks(run_captured) == [59, 59]


def run_shapes(rank: int) -> dict:
    """Leading dimensions, strides, zero rows, growth."""
    import tpfuse

    device = here(rank)
    empty = Op(rank, (2, 0), 512, device)
    empty.fill(0)
    empty.call()
    empty.check()
    untouched = not WORKSPACE_REGISTRY
    for n, (rows, hidden) in enumerate([((1, 2, 3), 512), ((4,), 1024), ((5,), 7168), ((3, 0), 512), ((9,), 8)]):
        op = Op(rank, rows, hidden, device)
        op.fill(n)
        op.call()
        op.check()
    strided = Op(rank, (4, 6), 512, device)
    strided.fill(9)
    strided.call(strided.x.transpose(0, 1).contiguous().transpose(0, 1))
    strided.check()
    wide = torch.zeros(4, 6, 520, device=device, dtype=BF16)
    wide[..., 3:515] = strided.x  # rows apart, and not on a 16-byte boundary
    strided.call(wide[..., 3:515])
    strided.check()
    name = dist.group.WORLD.group_name
    first = WORKSPACE_REGISTRY[name].workspace
    grown = tpfuse.init_workspace(dist.group.WORLD, 2048, 4096, BF16)
    larger = WORKSPACE_REGISTRY[name].workspace
    op.call()
    op.check()
    return {"untouched": untouched, "grown": grown and larger.slot_words > first.slot_words,
            "epochs": int(first.state[0]) >> 2}  # fmt: skip


def test_shapes_strides_zero_rows_and_growth(ranks) -> None:
    for result in ranks(run_shapes):
        assert result == {"untouched": True, "grown": True, "epochs": 6}


def run_again(rank: int, scratch: str) -> list[int]:
    """The group is destroyed and created anew three times; free memory after each."""
    device = here(rank)
    backend = dist.get_backend()
    free = []
    for n in range(3):
        op = Op(rank, (4,), 512, device)
        op.fill(n)
        op.call()
        op.check()
        assert len(WORKSPACE_REGISTRY) == 1
        torch.cuda.synchronize()
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()
        assert not WORKSPACE_REGISTRY
        dist.init_process_group(backend, init_method=f"file://{scratch}/{n}", rank=rank, world_size=WORLD)
        dist.barrier()
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    return free


def test_workspaces_go_with_their_group(ranks, tmp_path) -> None:
    for free in ranks(run_again, str(tmp_path)):
        assert free[0] - free[-1] < 32 << 20, f"free memory after each group: {free}"  # a workspace has over 48 MB


def run_profiled(rank: int) -> list[str]:
    from torch.profiler import ProfilerActivity, profile

    device = here(rank)
    op = Op(rank, (4,), 4096, device)
    op.fill(0)
    for _ in range(20):
        op.call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(20):
            op.call()
    return sorted({event.key for event in recorded.key_averages()})


def test_the_eager_operator_neither_allocates_nor_synchronises(ranks) -> None:
    for names in ranks(run_profiled):
        assert any("_one_shot_kernel" in name for name in names)
        words = ("cudaMalloc", "cudaFree", "cuMem", "Synchronize", "Memcpy", "nccl", "gloo", "c10d::")
        # the profiler itself synchronises the device once, when it stops
        assert not [n for n in names if any(w in n for w in words) and n != "cudaDeviceSynchronize"]


# -- a peer that is gone ----------------------------------------------------------------------------------------------


def run_until_killed(rank: int, scratch: str, answers) -> None:
    """Rank 1 is killed after one good call; rank 0 goes on."""
    device = here(rank)
    dist.init_process_group("gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=WORLD)
    op = Op(rank, (4,), 512, device)
    op.fill(0)
    op.call()
    op.check()
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    started = time.monotonic()
    op.call()
    torch.cuda.synchronize()
    waited = time.monotonic() - started
    messages = []
    for attempt in (check_peers, op.call):
        try:
            attempt()
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    answers.put((waited, [bool(t.isnan().any()) for t in op.outputs], messages))
    answers.close()
    answers.join_thread()
    os._exit(0)


def test_a_killed_peer_becomes_an_error(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    monkeypatch.setenv("TPFUSE_PEER_TIMEOUT", "4")
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=run_until_killed, args=(r, str(tmp_path), answers)) for r in range(WORLD)]
    for process in processes:
        process.start()
    try:
        waited, poisoned, messages = answers.get(timeout=90)
    except queue.Empty:
        pytest.fail("rank 0 hangs")
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
    assert 3.9 < waited < 15 and all(poisoned)
    assert len(messages) == 2  # asked for, and at the next call
    for message in messages:
        assert message.startswith("PeerTimeoutError: group '0', rank 0: waited longer than 4 s for rank 1 (call 1)")
