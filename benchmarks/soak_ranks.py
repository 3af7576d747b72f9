"""One rank of a soak through the backend: a two-layer model, compiled, called, compared, and broken on purpose."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from soak_schedule import Answer, Call, Setting, Stretch
from soak_workers import device_mb, host_mb, thread_count
from torch import Tensor, nn

from tpfuse.backend import tpfuse as backend

LAYERS = 2
#: Seconds within which all processes must have started.
START_S = 120
#: The name of the default process group. Dynamo guards on a group that code names as an object, and compiles again for
#: the next one; code that has the name goes on with whichever group bears it.
DEFAULT_GROUP = "0"


class Injected(Exception):
    """The error that the "raise" fault raises."""


class Layer(nn.Module):
    """x + sum over ranks of tanh(norm(x) A) B, with A cut by columns and B by rows; `pay` is the sum over ranks."""

    def __init__(self, hidden: int, ranks: int, pay: Callable[[Tensor], Tensor]):
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.into = nn.Linear(hidden, hidden // ranks, bias=False)
        self.out = nn.Linear(hidden // ranks, hidden, bias=False)
        self.pay = pay

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pay(self.out(torch.tanh(self.into(self.norm(x)))))


def model_of(hidden: int, ranks: int, pay: Callable[[Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(*[Layer(hidden, ranks, pay) for _ in range(LAYERS)], nn.RMSNorm(hidden))


def all_reduced(partial: Tensor) -> Tensor:
    return funcol.all_reduce(partial, "sum", DEFAULT_GROUP)


def build(rank: int, setting: Setting) -> tuple[nn.Module, nn.Module]:
    """(this rank's part, the whole model in float64), on the device; random weights, equal on all ranks."""
    torch.manual_seed(0)
    whole = model_of(setting.hidden, 1, lambda x: x)
    part = model_of(setting.hidden, setting.ranks, all_reduced)
    state = {}
    for name, tensor in whole.state_dict().items():
        dim = 0 if name.endswith("into.weight") else 1 if name.endswith("out.weight") else None
        state[name] = tensor if dim is None else tensor.chunk(setting.ranks, dim)[rank].contiguous()
    part.load_state_dict(state)
    dtype = torch.float32 if setting.device == "cpu" else torch.bfloat16
    return part.to(setting.device, dtype).eval(), whole.to(setting.device, torch.float64).eval()


def run_stretches(rank: int, setting: Setting, stretches: list[Stretch], scratch: str) -> Iterator[Answer]:
    """One answer a stretch. Each has a process group of its own; every third one compiles anew, the others take over
    what was compiled for groups that are gone."""
    torch.set_num_threads(1)
    if setting.mode == "overlap":
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        torch.cuda.set_device(0)
    part, whole = build(rank, setting)
    options = {"inner": "aot_eager", "expect_fused": LAYERS}
    compiled = torch.compile(part, backend=backend, options=options, dynamic=True, fullgraph=True)
    for stretch in stretches:
        store = meet(f"{scratch}/store{stretch.number}", rank, setting.ranks)
        timeout = datetime.timedelta(seconds=setting.timeout_s)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=setting.ranks, timeout=timeout)
        answer = run_stretch(rank, setting, stretch, compiled, whole)
        dist.destroy_process_group()
        if stretch.number % 3 == 2:
            torch.compiler.reset()
        yield answer


def meet(path: str, rank: int, ranks: int) -> dist.Store:
    """A store for a new group. Waits for the others first: a process takes longer to start than the group's timeout."""
    store = dist.FileStore(path, ranks)
    store.set(f"here{rank}", "")
    store.wait([f"here{other}" for other in range(ranks)], datetime.timedelta(seconds=START_S))
    return store


@torch.no_grad()
def run_stretch(
    rank: int, setting: Setting, stretch: Stretch, compiled: Callable[[Tensor], Tensor], whole: nn.Module
) -> Answer:
    """The stretch's calls; the last one is where its fault is."""
    done = wrong = 0
    error, seconds = "", 0.0
    began = time.monotonic()
    try:
        for index, call in enumerate(stretch.each()):
            last = index == stretch.calls - 1
            fault = stretch.fault if last else None
            time.sleep(call.delays[rank])
            began = time.monotonic()
            if fault is not None and fault.rank == rank:
                call = misbehave(fault.kind, call)
            if call is not None:
                x = hidden_states(call, setting)
                got = compiled(x)
                wrong += fault is None and is_wrong(got, whole(x.double()))
            done += 1
        # A rank leaves its group only when the others are done with it.
        if setting.device == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
    except Exception as raised:
        error, seconds = f"{type(raised).__name__}: {raised}", time.monotonic() - began
    return Answer(done, wrong, error, round(seconds, 3), host_mb(), device_mb(), thread_count())


def misbehave(kind: str, call: Call) -> Call | None:
    """What the rank at fault does instead of `call`: another call, or none."""
    if kind == "raise":
        raise Injected("raised on purpose")
    if kind == "exit":
        os._exit(1)
    return Call(call.rows + 1, call.seed, call.delays) if kind == "rows" else None


def hidden_states(call: Call, setting: Setting) -> Tensor:
    generator = torch.Generator().manual_seed(call.seed)
    dtype = torch.float32 if setting.device == "cpu" else torch.bfloat16
    return torch.randn(call.rows, setting.hidden, generator=generator).to(setting.device, dtype)


def is_wrong(got: Tensor, exact: Tensor) -> bool:
    """Whether any row is further from the whole model than roundings take it: another call's rows would be."""
    if got.shape != exact.shape:
        return True
    error = (got.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    return not bool((error < 8 * torch.finfo(got.dtype).eps).all())
