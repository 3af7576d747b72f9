"""Whole training loops of cut models against the uncut model: DDP and FSDP2 beside the cut, clipping, accumulation,
activation checkpointing, a checkpoint in the middle. All in float64, parameters compared after several AdamW steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import tpfuse

from .policy_harness import VOCAB, Model, build, loss_of
from .ranks import run_processes

STEPS, PIECES, CLIP = 2, 2, 0.5


class Checkpointed(nn.Module):
    """A layer under activation checkpointing."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


def make() -> nn.Module:
    """Packed and routed MLPs, two key/value heads, layers that are checkpointed."""
    model = Model(True, 2)
    model.layers = nn.ModuleList(Checkpointed(layer) for layer in model.layers)
    return model


def data(step: int, replica: int, piece: int) -> Tensor:
    return torch.randint(0, VOCAB, (2, 3), generator=torch.Generator().manual_seed(100 * step + 10 * replica + piece))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def uncut(scale: float, steps: int = STEPS) -> tuple[dict[str, Tensor], list[float]]:
    """Parameters and gradient norms of the uncut model, whose loss is the sum over replicas, times `scale`."""
    model = build(make)
    optimizer, norms = adamw(model), []
    for step in range(steps):
        for piece in range(PIECES):
            sum(loss_of(model(data(step, replica, piece))) * scale for replica in range(2)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), norms


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, replica: int, steps: range,
    early: Callable[[bool], contextlib.AbstractContextManager] = lambda last: contextlib.nullcontext(),
) -> list[float]:  # fmt: skip
    """Steps of a training loop; `early(last)` surrounds each accumulated piece."""
    norms = []
    for step in steps:
        for piece in range(PIECES):
            with early(piece == PIECES - 1):
                loss_of(model(data(step, replica, piece))).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def worst(found: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert {n.removeprefix("module.") for n in found} == set(want)
    return max(float((t - want[n.removeprefix("module.")]).abs().max()) for n, t in found.items())


# -- ways to train -----------------------------------------------------------------------------------------------------


def with_ddp(mesh):
    cut = tpfuse.parallelize(build(make), mesh["tp"], tpfuse.SharingPolicy(2))
    model = DistributedDataParallel(cut, process_group=mesh["dp"].get_group())
    return model, lambda last: contextlib.nullcontext() if last else model.no_sync()


def with_fsdp(mesh):
    model = tpfuse.parallelize(build(make), mesh["tp"], tpfuse.SharingPolicy(2))
    for layer in (*model.layers, model):
        fully_shard(layer, mesh=mesh["dp"])

    @contextlib.contextmanager
    def early(last):
        model.set_requires_gradient_sync(last)
        yield

    return model, early


def with_policy(dense):
    def make_cut(mesh):
        policy = tpfuse.SharingPolicy(4, 2, dense)
        return tpfuse.parallelize(build(make), mesh, policy), lambda last: contextlib.nullcontext()

    return make_cut


#: How the model is made, and the share of a replica's loss in what is trained on: DDP and FSDP2 average.
WAYS = {
    "ddp": (with_ddp, 0.5),
    "fsdp": (with_fsdp, 0.5),
    "whole": (with_policy(None), 1.0),
    "attention": (with_policy(2), 1.0),
    "own": (with_policy(1), 1.0),
}


def loops(rank: int, ways: list[str], folder: str) -> dict:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    found = {}
    for name in ways:
        build_way, scale = WAYS[name]
        want, norms = uncut(scale)
        model, early = build_way(mesh)
        optimizer = adamw(model)
        got = train(model, optimizer, rank // 2, range(1), early)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/{name}")
        got += train(model, optimizer, rank // 2, range(1, STEPS), early)
        found[name] = {
            "uninterrupted": worst(tpfuse.full_state_dict(model), want),
            "norms": max(abs(a - b) / b for a, b in zip(got, norms, strict=True)),
            "resumed": resumed(mesh, name, rank // 2, folder, want),
        }
    return found


def resumed(mesh, name: str, replica: int, folder: str, want: dict[str, Tensor]) -> float:
    """How far a run that was saved after its first step, and goes on in a fresh model, ends from the uncut one."""
    model, early = WAYS[name][0](mesh)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer = adamw(model)
    weights, state = get_state_dict(model, optimizer)
    both = {"model": weights, "optimizer": state}
    dcp.load(both, checkpoint_id=f"{folder}/{name}")
    set_state_dict(model, optimizer, model_state_dict=both["model"], optim_state_dict=both["optimizer"])
    train(model, optimizer, replica, range(1, STEPS), early)
    return worst(tpfuse.full_state_dict(model), want)


@pytest.mark.parametrize(
    "ways", [["ddp", "fsdp"], pytest.param(["whole", "attention", "own"], marks=pytest.mark.nightly)], ids="+".join
)
def test_training_equals_that_of_the_uncut_model_also_when_resumed(ways, tmp_path):
    for found in run_processes(4, loops, ways, str(tmp_path)):
        for way, errors in found.items():
            assert max(errors.values()) < 1e-9, (way, errors)


def replicated_over_the_cut(rank: int) -> list[str]:
    said = []
    for compiled in (lambda model: model, lambda model: torch.compile(model, backend="tpfuse")):
        cut = tpfuse.parallelize(build(make), init_device_mesh("cpu", (2,)), tpfuse.SharingPolicy(2))
        model = compiled(DistributedDataParallel(cut))
        with pytest.raises(tpfuse.PolicyError) as refused:
            model(data(0, 0, 0))
        said.append(str(refused.value))
    cut = tpfuse.parallelize(build(make), init_device_mesh("cpu", (2,)), tpfuse.SharingPolicy(2))
    cut.compile(backend="tpfuse")
    with pytest.raises(tpfuse.PolicyError) as refused:
        DistributedDataParallel(cut)(data(0, 0, 0))
    return [*said, str(refused.value)]


def test_ddp_over_ranks_that_hold_different_slices_is_refused():
    """DDP makes their slices one when it is made; Hugging Face's Trainer puts it around every model."""
    for said in run_processes(2, replicated_over_the_cut):
        assert all("ranks [0, 1] hold different slices" in each and "process_group=" in each for each in said)
