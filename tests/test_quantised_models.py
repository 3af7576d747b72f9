"""Models whose layers quantise the rows that they gathered: DTensor's sequence parallelism, and `parallelize` under
policies that gather. Every rank quantises its own rows first; no bit of what the model gives changes."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import tpfuse
from tpfuse import SharingPolicy, parallelize
from tpfuse.backend import tpfuse as tpfuse_backend
from tpfuse.passes.plan.sites import DEFAULT_REWRITES

from . import policy_harness as harness
from .models import HIDDEN
from .policy_harness import compiles_in_threads, run_threads
from .quantisations import SPELLINGS
from .ranks import run_processes
from .test_parallelize_models import mesh_of
from .test_sequence_parallel import LAYERS, TOKENS, Pair, model

BF16 = torch.bfloat16
REWRITES = {"plain": DEFAULT_REWRITES, "first": (*DEFAULT_REWRITES, "quantised_outputs")}


def quantised(x: Tensor) -> Tensor:
    """What a product of quantised rows reads."""
    q, scale = SPELLINGS["float8_per_row"](x)
    return (q.float() * scale).to(x.dtype)


def compiled(module: nn.Module, rewrites: tuple[str, ...], **more):
    options = {"inner": "aot_eager", "rewrites": rewrites, **more.pop("options", {})}
    return torch.compile(module, backend=tpfuse_backend, options=options, **more)


def gathers(report: tpfuse.Report) -> list[tuple[str, int, int]]:
    """(how rows are gathered, bytes as written, bytes now) of every gather of the program."""
    found = [b for b in report.boundaries if b.collective == "all_gather"]
    return [(b.quantised, b.bytes_before, b.bytes_after) for b in found]


# -- sequence parallelism ---------------------------------------------------------------------------------------------


class QuantisedPair(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(quantised(x))


def run(rank: int, dynamic: bool) -> tuple[bool, list]:
    """Whether no bit changes, and how rows are gathered."""
    cut = model(init_device_mesh("cpu", (2,)), QuantisedPair).to(BF16)
    policy = {"policy": SharingPolicy(2, residual="scattered")}
    outputs = []
    for rewrites in REWRITES.values():
        torch._dynamo.reset()
        call = compiled(cut, rewrites, dynamic=dynamic, options=policy)
        with torch.no_grad():
            lengths = (6, 8, 4) if dynamic else (6,)
            outputs.append([call(torch.arange(2 * n).reshape(2, n) % TOKENS).float().numpy() for n in lengths])
    return all(map(np.array_equal, *outputs)), gathers(tpfuse.reports()[-1])


@pytest.mark.nightly
@pytest.mark.parametrize("dynamic", [False, True])
def test_sequence_parallel_layers_gather_quantised_rows(dynamic):
    for equal, found in run_processes(2, run, dynamic):
        assert equal
        *blocks, final, logits = found
        own = 2 * 6 // 2  # rows, as the first call has them
        assert blocks == [("FP8 (e4m3) per row", own * HIDDEN * 2, own * (HIDDEN + 4))] * 2 * LAYERS
        assert final[0] == logits[0] == ""


# -- parallelize ------------------------------------------------------------------------------------------------------


class MLP(harness.MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(quantised(x))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(harness.Layer(MLP()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def under_a_policy(
    rank: int, whole: nn.Module, policy: SharingPolicy, rows: tuple[int, ...], dynamic: bool
) -> tuple[bool, list]:
    """As `run`. Ranks are threads, and each way of compiling has a model of its own."""
    replica = rank // policy.attn_tp_size
    x = torch.randn(1, rows[replica], harness.HIDDEN, generator=torch.Generator().manual_seed(replica)).to(BF16)
    outputs = []
    for rewrites in REWRITES.values():
        cut = parallelize(copy.deepcopy(whole), mesh_of(policy), policy)
        announced = len(set(rows)) > 1 and policy.max_rows is None
        with torch.no_grad(), tpfuse.rows(rows) if announced else contextlib.nullcontext():
            outputs.append(compiled(cut, rewrites, dynamic=dynamic)(x))
    return torch.equal(*outputs), gathers(tpfuse.reports()[-1])


@pytest.mark.nightly
@compiles_in_threads
@pytest.mark.parametrize(
    ("residual", "rows", "max_rows", "dynamic"),
    [
        ("replicated", (6, 6), None, True),
        ("replicated", (6, 3), None, False),  # announced: one replica pads, and the other has nothing to pad
        ("replicated", (6, 3), 8, False),
        ("scattered", (6, 6), None, False),
        ("scattered", (6, 3), 8, True),
    ],
)
def test_rows_of_every_replica_are_gathered_quantised(residual, rows, max_rows, dynamic):
    """An MLP cut over both replicas. Padding, where it is put in front of the gather, is quantised with the rows."""
    torch._dynamo.reset()
    policy, whole = SharingPolicy(4, 2, None, residual=residual, max_rows=max_rows), harness.build(Layers, dtype=BF16)
    for equal, found in run_threads(4, under_a_policy, whole, policy, rows, dynamic):
        assert equal
        assert found and all(how == "FP8 (e4m3) per row" and after < before for how, before, after in found)
