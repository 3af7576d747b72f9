"""Virtual ranks of a soak: random kernels, shapes and delays on one GPU, every result of every rank compared."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from soak_schedule import Answer, Call, Setting, Stretch
from soak_workers import device_mb, host_mb, thread_count
from torch import Tensor

from tpfuse.errors import PeerTimeoutError
from tpfuse.kernels.add_norm import add_norm_reference
from tpfuse.kernels.bench.virtual import VirtualRanks
from tpfuse.kernels.call import Call as Operation
from tpfuse.kernels.symmetric.barrier import barrier
from tpfuse.kernels.symmetric.one_shot import one_shot
from tpfuse.kernels.symmetric.operands import Launch
from tpfuse.kernels.symmetric.timeout import TIMEOUT_VARIABLE, raise_if_late
from tpfuse.kernels.symmetric.two_shot import two_shot
from tpfuse.kernels.symmetric.workspace import Workspace
from tpfuse.kernels.words import MOST_RANKS

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
WORLDS = tuple(range(2, MOST_RANKS + 1))
SLOT_BYTES = 1 << 20
#: Programs of one rank's call. Eight ranks of eight programs are resident at once on any GPU the kernels run on.
PROGRAMS = 8
POOL, MOST_ROWS = 64, 20
LONGEST_DELAY_CYCLES = 30_000
#: Seconds after which a kernel gives up on a rank: what would hang becomes an error that names the rank.
PEER_TIMEOUT_S = "20"


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: `bind` as `tpfuse.kernels.dispatch` would call it."""

    bind: Callable[[Operation, Workspace], Launch]
    hidden: int
    dtype: torch.dtype
    norm: str
    most_rows: int = MOST_ROWS


KERNELS = (
    Kernel(one_shot, 1024, BF16, "rms_norm"),
    Kernel(lambda op, ws: one_shot(op, ws, 2), 1024, BF16, "layer_norm", PROGRAMS // 2),
    Kernel(lambda op, ws: one_shot(op, ws, 4), 2048, BF16, "rms_norm", PROGRAMS // 4),
    Kernel(one_shot, 520, F32, "layer_norm"),
    Kernel(two_shot, 1024, F16, "rms_norm"),
    Kernel(barrier, 1024, BF16, "rms_norm"),
    Kernel(barrier, 520, F32, "rms_norm"),
)


class Calls:
    """Calls of one kernel on all ranks: operands are slices of random pools, so that a call allocates only results."""

    def __init__(self, kernel: Kernel, ranks: VirtualRanks) -> None:
        def rows() -> Tensor:
            return torch.randn(POOL, kernel.hidden, device="cuda").to(kernel.dtype)

        self.kernel = kernel
        self.workspaces = [replace(ws, max_blocks=PROGRAMS) for ws in ranks.workspaces]
        self.inputs, self.residual = [rows() for _ in self.workspaces], rows()
        self.weight = torch.randn(kernel.hidden, device="cuda").to(kernel.dtype)
        for count in (1, min(PROGRAMS, kernel.most_rows), kernel.most_rows):
            for launch in self.launches(0, count):
                launch.load()

    def launches(self, start: int, rows: int) -> list[Launch]:
        return [self.kernel.bind(self.operands(ws.rank, start, rows), ws) for ws in self.workspaces]

    def operands(self, rank: int, start: int, rows: int) -> Operation:
        x, residual = self.inputs[rank][start : start + rows], self.residual[start : start + rows]
        norm, dtype = self.kernel.norm, self.kernel.dtype
        return Operation(x, residual, None, self.weight, norm=norm, out_dtype=dtype, hidden_dtype=dtype, eps=1e-6)

    def wrong(self, launches: list[Launch], start: int, rows: int) -> Tensor:
        """On the device: whether a rank's result differs from the first's by a bit, or that one from float32's."""
        total = torch.stack([x[start : start + rows] for x in self.inputs]).float().sum(0)
        truth: Any = add_norm_reference(
            Operation(
                total,
                self.residual[start : start + rows].float(),
                None,
                self.weight.float(),
                eps=1e-6,
                norm=self.kernel.norm,
                out_dtype=F32,
                hidden_dtype=F32,
            )
        )
        tolerance = 1e-4 if self.kernel.dtype == F32 else 2e-2
        bad = torch.zeros((), device="cuda", dtype=torch.bool)
        for name in ("y", "residual_out"):
            mine, right = getattr(launches[0].out, name), getattr(truth, name)
            bad |= ~((mine.float() - right).abs().amax() <= tolerance * right.abs().amax())
            for launch in launches[1:]:
                bad |= (getattr(launch.out, name) != mine).any()
        return bad


def run_stretches(index: int, setting: Setting, stretches: list[Stretch], scratch: str) -> Iterator[Answer]:
    """One answer a stretch. The worlds take turns, each with one set of workspaces for the whole soak."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"  # one hardware queue a stream; read when CUDA starts
    os.environ.setdefault(TIMEOUT_VARIABLE, PEER_TIMEOUT_S)
    torch.manual_seed(0)
    calls: dict[int, tuple[VirtualRanks, list[Calls]]] = {}
    for world in WORLDS:  # every kernel of every world is loaded before the first call spins
        ranks = VirtualRanks(world, slot_bytes=SLOT_BYTES)
        calls[world] = ranks, [Calls(kernel, ranks) for kernel in KERNELS]
    torch.cuda._sleep(1)  # and so is what delays a rank, or loading it waits for a peer that waits for that rank
    torch.cuda.synchronize()
    for stretch in stretches:
        yield run_stretch(stretch, *calls[WORLDS[stretch.number % len(WORLDS)]])


def run_stretch(stretch: Stretch, ranks: VirtualRanks, kernels: list[Calls]) -> Answer:
    wrong = torch.zeros((), device="cuda", dtype=torch.int64)
    for call in stretch.each():
        pick = random.Random(call.seed)
        chosen = pick.choice(kernels)
        rows = min(call.rows, chosen.kernel.most_rows)
        start = pick.randrange(POOL - rows)
        launches = chosen.launches(start, rows)
        for launch in launches:
            launch.out.y.fill_(float("nan"))  # or the result of the last call in the same memory would do
        ranks.run(launches, delay_of(call))
        if rows:
            wrong += chosen.wrong(launches, start, rows)
    count, error = int(wrong), ""  # waits for the device
    try:
        for ws in ranks.workspaces:
            raise_if_late(ws, f"{ranks.world} virtual ranks")
    except PeerTimeoutError as raised:
        error = f"PeerTimeoutError: {raised}"
    return Answer(stretch.calls, count, error, 0.0, host_mb(), device_mb(), thread_count())


def delay_of(call: Call) -> Callable[[int], None]:
    """Keeps a rank's stream busy for as many cycles as its delay stands for."""
    pick = random.Random(call.seed)
    cycles = [pick.randrange(100, LONGEST_DELAY_CYCLES) if pick.random() < 0.3 else 0 for _ in call.delays]

    def delay(rank: int) -> None:
        if cycles[rank]:
            torch.cuda._sleep(cycles[rank])

    return delay
