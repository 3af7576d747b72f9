"""Several of everything in one process: models, groups, threads, streams, compilations. Nothing leaks or crosses."""

from __future__ import annotations

import datetime
import gc
import logging
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import fx, nn

import tpfuse
from tpfuse.backend import tpfuse as backend
from tpfuse.kernels import rendezvous as groups
from tpfuse.kernels.rendezvous import WORKSPACE_REGISTRY, workspace_of
from tpfuse.kernels.symmetric.workspace import virtual_ranks

from .graphs import all_reduce, fake_world
from .models import HIDDEN, Stack, cut_from
from .policy_harness import COMPILES_IN_THREADS
from .ranks import run_processes

OPTIONS = {"inner": "aot_eager"}
WIDTH = 16


def compiled(fn: Callable, **more) -> Callable:
    return torch.compile(fn, backend=backend, options=OPTIONS, fullgraph=True, **more)


# -- on two real ranks ------------------------------------------------------------------------------------------------


def boundary_of(group: dist.ProcessGroup) -> Callable:
    """The sum over `group`, normed; compiled."""

    def boundary(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = all_reduce(x, name)
        return F.rms_norm(hidden, (WIDTH,)), hidden

    name = group.group_name
    return compiled(boundary)


def stacks(rank: int, seed: int) -> tuple[Callable, nn.Module]:
    """(this rank's part of a model, compiled; the whole model)"""
    torch.manual_seed(seed)
    whole = Stack(1, "none", layers=1).eval()
    return compiled(cut_from(whole, rank, 2, "funcol"), dynamic=True), whole


def error(pair: tuple[Callable, nn.Module], rows: int) -> float:
    x = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(rows))
    got, expected = pair[0](x), pair[1](x)
    return float((got - expected).norm() / expected.norm()) if rows else float(got.shape != expected.shape)


def two_models(rank: int) -> float:
    """Called in turn, with new shapes each time."""
    models = [stacks(rank, seed) for seed in (1, 2)]
    return max(error(model, rows) for rows in (3, 1, 7, 0, 5) for model in models)


def two_groups(rank: int) -> list[float]:
    """What a rank's ones sum to over both ranks, and over a group of its own."""
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    together, own = boundary_of(dist.group.WORLD), boundary_of(alone)
    ones = torch.ones(2, WIDTH)
    return [float(fn(ones)[1].mean()) for fn in (together, own, together, own)]


def two_threads(rank: int) -> list[float]:
    """Each compiles for a group of its own and calls twenty times; the sum over ranks of 2^rank * its own number."""
    fns = [boundary_of(dist.new_group([0, 1])) for _ in range(2)]
    sums: list[set[float]] = [set(), set()]

    def work(index: int) -> None:
        with torch.no_grad():  # grad mode belongs to a thread
            for rows in range(20):
                hidden = fns[index](torch.full((rows % 4 + 1, WIDTH), 2.0**rank * (index + 1)))[1]
                sums[index] |= set(hidden.flatten().tolist())

    if not COMPILES_IN_THREADS:  # there the README says: compile before the threads start
        for index in range(2):
            work(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return [sums[0] == {3.0}, sums[1] == {6.0}, any(thread.is_alive() for thread in threads)]


def groups_anew(rank: int, folder: str) -> dict:
    """The process group is destroyed and made again, under the same name, with and without a reset of the compiler."""
    model, errors = stacks(rank, 3), []
    for turn in range(3):
        errors.append(error(model, 4))
        dist.barrier()
        dist.destroy_process_group()
        if turn:
            torch.compiler.reset()
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store{turn}",
            rank=rank,
            world_size=2,
            timeout=datetime.timedelta(seconds=60),
        )
    errors.append(error(model, 4))
    return {"errors": errors, "registry": len(WORKSPACE_REGISTRY)}


@torch.no_grad()
def everything(rank: int, folder: str) -> dict:
    seen = {
        "two models": two_models(rank),
        "two groups": two_groups(rank),
        "two threads": two_threads(rank),
        "groups anew": groups_anew(rank, folder),
    }
    seen["reports"] = Counter(len(report.fused) for report in tpfuse.reports())
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    """What two ranks saw that did all of it, one after the other, in the same two processes."""
    return run_processes(2, everything, str(tmp_path_factory.mktemp("stores")))


def test_two_models_called_in_turn_with_new_shapes(seen):
    assert max(rank["two models"] for rank in seen) < 1e-5


def test_two_groups_of_one_process_keep_their_sums_apart(seen):
    assert [rank["two groups"] for rank in seen] == [[2.0, 1.0, 2.0, 1.0]] * 2


def test_two_threads_with_a_group_each_compile_and_run_at_once(seen):
    assert [rank["two threads"] for rank in seen] == [[True, True, False]] * 2


def test_a_compiled_model_goes_on_with_a_new_process_group(seen):
    for rank in seen:
        assert max(rank["groups anew"]["errors"]) < 1e-5
        assert rank["groups anew"]["registry"] == 0


def test_every_compilation_was_reported_as_fused(seen):
    """Whatever was compiled: 2 boundaries of a stack, 1 of a single boundary."""
    for rank in seen:
        assert set(rank["reports"]) == {1, 2}


# -- what stays behind, in one process --------------------------------------------------------------------------------


def boundary(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = residual + all_reduce(x, "0")
    return F.rms_norm(hidden, (WIDTH,)), hidden


def census() -> Counter[str]:
    """How many objects there are of every class of tpfuse but the reports, which are kept, of what a compilation makes,
    and of threads."""
    gc.collect()
    counts = Counter()
    for found in gc.get_objects():
        kind = type(found)
        if str(kind.__module__).startswith("tpfuse") and kind.__module__ != tpfuse.Report.__module__:
            counts[kind.__qualname__] += 1
        elif issubclass(kind, (fx.GraphModule, dist.ProcessGroup)):
            counts[kind.__mro__[1].__qualname__] += 1
    tasks = Path("/proc/self/task")
    counts["threads"] = len(list(tasks.iterdir())) if tasks.exists() else threading.active_count()
    return counts


def test_a_graph_compiled_at_its_first_run_waits_for_another_threads_compilation():
    """Both trace by patching torch, and a second patch inside the first one's time would take it off too early."""
    from torch._dynamo.convert_frame import compile_lock

    from tpfuse._torch_private import tracing_again

    entered = threading.Event()

    def again() -> None:
        with tracing_again([])():
            entered.set()

    thread = threading.Thread(target=again)
    with compile_lock:
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(10)
    thread.join()


@pytest.fixture
def unlogged():
    """pytest keeps the log records of a running test, and torch's trace records hold graph modules."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def live_once(rows: tuple[int, ...] = (3, 5)) -> None:
    """A process group, a compilation, recompilations for new shapes, and the end of all of them."""
    with fake_world(2), torch.no_grad():
        fn = compiled(boundary)
        for count in rows:
            fn(torch.ones(count, WIDTH), torch.ones(count, WIDTH))
    torch.compiler.reset()


def test_groups_compilations_and_resets_leave_nothing_behind(unlogged):
    for _ in range(2):
        live_once()
    before, reports = census(), len(tpfuse.reports())
    for _ in range(4):
        live_once()
    assert not census() - before, "more of these than before"
    assert len(tpfuse.reports()) == reports + 4 * 2, "reports are what may grow: one for each compilation"


def test_calls_leave_nothing_behind(unlogged):
    with fake_world(2), torch.no_grad():
        fn = compiled(boundary, dynamic=True)
        arguments = [[torch.ones(rows, WIDTH)] * 2 for rows in range(2, 9)]

        def call_all() -> None:
            for given in arguments:
                fn(*given)

        call_all()
        before, objects = census(), len(gc.get_objects())
        for _ in range(50):
            call_all()
        grown = len(gc.get_objects()) - objects
        assert not census() - before, "more of these than before"
    assert grown < len(arguments) * 50 / 10, f"{grown} more objects after {50 * len(arguments)} calls"


def test_workspaces_live_as_long_as_their_group(monkeypatch):
    """Here all ranks agree on a workspace at once; on a GPU they ask each other."""
    monkeypatch.setattr(groups, "_meet", lambda *_: (virtual_ranks(2, "cpu", 4, 4096)[0], ""))
    monkeypatch.setattr(groups, "_static_refusal", lambda group: "")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    device, before = torch.device("cpu"), census()["Workspace"]
    for _ in range(3):
        with fake_world(2):
            pair = dist.new_group([0, 1]).group_name
            made = {workspace_of(name, device) for name in ("0", pair, "0", pair)}
            assert len(made) == 2 and set(WORKSPACE_REGISTRY) == {"0", pair}
            del made
        gc.collect()
        assert not WORKSPACE_REGISTRY and census()["Workspace"] == before


# -- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a CUDA device")
def test_one_group_called_from_two_streams_in_turn():
    """Calls of one group are in one order on the device, whatever streams they come from: an event joins each to the
    one before. Then epochs and slots follow from call to call as on a single stream."""
    from tests.kernels.test_gpu import BF16, Variant, VirtualRanks

    ranks = VirtualRanks(2, slot_bytes=1 << 20)
    variants = [Variant(ranks, "one_shot", 1024, BF16, "rms_norm"), Variant(ranks, "two_shot", 1024, BF16, "rms_norm")]
    for variant in variants:
        variant.load()
    streams = [torch.cuda.Stream() for _ in range(2)]
    wrong = torch.zeros((), device="cuda", dtype=torch.int64)
    for call in range(200):
        stream, before = streams[call % 2], streams[(call + 1) % 2]
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            variant, rows = variants[call % 3 % 2], (1, 13, 8)[call % 3]
            launches = variant.launches(rows)
            ranks.run(launches)
            wrong += variant.wrong(launches, rows, 0)
    torch.cuda.synchronize()
    assert int(wrong) == 0
