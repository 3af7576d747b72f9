"""Losses of a small model's training steps: eager mode, compiled, and eager mode that adds up in another order.

The compiled model's curve is held to what eager mode's own rounding does to it. A control is the same eager run with
the channels of the hidden states in another order: every product and every norm adds the same numbers in another order.
How far controls get from eager mode is how far a curve may get (`BOUND` times), at every step of the run.

Small Llama-like layers (sequence_models.py) learn a random chain of tokens by SGD with float32 master weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tpfuse.backend import tpfuse as backend
from tpfuse.passes.plan.sites import REWRITES

from . import sequence_models as models
from .training_faults import OF_BACKWARD, planted

FORMS = ("plain", "dtensor", "megatron")
BATCH, LENGTH, RATE = 4, 16, 0.3
#: How many times as far from eager mode's curve as the furthest control a compiled run may get.
BOUND = 2.0


# -- models and data --------------------------------------------------------------------------------------------------


def cut(form: str, dtype: torch.dtype, order: int = 0) -> nn.Module:
    """This rank's model. order: which order the channels have; 0 is the first one."""
    model = models.whole(dtype=dtype)
    if order:
        reorder(model, torch.randperm(models.HIDDEN, generator=torch.Generator().manual_seed(order)))
    if form == "megatron":
        return models.cut_by_hand(model, 0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return (models.cut_plainly if form == "plain" else models.cut_by_dtensor)(model, mesh)


@torch.no_grad()
def reorder(model: nn.Module, order: Tensor) -> None:
    """Put the channels of the hidden states into another order; the model computes the same."""
    for name, parameter in model.named_parameters():
        rows = name.endswith(tuple(f"{part}.weight" for part in models.ROWS))
        parameter.copy_(parameter.index_select(0 if rows else -1, order))


def batches(steps: int) -> Iterator[Tensor]:
    """[BATCH, LENGTH + 1] tokens of each step: mostly one follows from the one before."""
    g = torch.Generator().manual_seed(1)
    follows = torch.randperm(models.TOKENS, generator=g)
    for _ in range(steps):
        tokens = [torch.randint(models.TOKENS, (BATCH,), generator=g)]
        for _ in range(LENGTH):
            anything = torch.randint(models.TOKENS, (BATCH,), generator=g)
            tokens.append(torch.where(torch.rand(BATCH, generator=g) < 0.9, follows[tokens[-1]], anything))
        yield torch.stack(tokens, 1)


# -- training ---------------------------------------------------------------------------------------------------------


class Descent:
    """SGD. A model that was cut by hand leaves two things to the loop: its ranks' losses are parts of one, and
    gradients of whole weights are sums over the group."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.masters = [_local(p).detach().float() for p in self.parameters]
        slices = [f"{part}.weight" for part in (*models.COLUMNS, *models.ROWS)]
        names = [name for name, _ in model.named_parameters()]
        by_hand = not any(isinstance(p, DTensor) for p in self.parameters)
        self.owed = [by_hand and not name.endswith(tuple(slices)) for name in names]
        self.parts = dist.get_world_size() if by_hand else 1

    @torch.no_grad()
    def step(self) -> None:
        for parameter, master, owed in zip(self.parameters, self.masters, self.owed, strict=True):
            grad = parameter.grad
            if isinstance(grad, DTensor):
                grad = grad.redistribute(placements=parameter.placements).to_local()
            grad = grad.float()
            if owed:
                dist.all_reduce(grad)
            master.sub_(grad, alpha=RATE)
            _local(parameter).copy_(master)
            parameter.grad = None


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def losses(form: str, dtype: torch.dtype, steps: int, order: int = 0, **compiled) -> list[float]:
    """The loss of each step. compiled: options of the backend; without any the model runs in eager mode."""
    torch._dynamo.reset()
    model = cut(form, dtype, order)
    run: Callable = torch.compile(model, backend=backend, options=compiled, fullgraph=True) if compiled else model
    descent, found = Descent(model), []
    for tokens in batches(steps):
        tokens = tokens.t() if form == "megatron" else tokens
        given, wanted = (tokens.narrow(int(form != "megatron"), at, LENGTH).contiguous() for at in (0, 1))
        loss = F.cross_entropy(run(given).float().flatten(0, 1), wanted.flatten())
        (loss / descent.parts).backward()
        descent.step()
        found.append(float(loss.detach()))
    return found


# -- comparing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Apart:
    """A curve beside eager mode's: the furthest relative difference, the last one, the largest share of what controls
    allow, and the first step at which that is more than BOUND, or None."""

    furthest: float
    last: float
    share: float
    found_at: int | None

    @property
    def within(self) -> bool:
        return self.found_at is None


def apart(curve: Sequence[float], eager: Sequence[float], controls: Sequence[Sequence[float]], least: float) -> Apart:
    """How far `curve` is from `eager`. A step allows what controls have reached up to it, and at least `least`."""

    def differences(other: Sequence[float]) -> Tensor:
        exact = torch.tensor(eager, dtype=torch.float64)
        return (torch.tensor(other, dtype=torch.float64) - exact).abs() / exact

    allowed = torch.stack([differences(control) for control in controls]).amax(0).cummax(0).values.clamp_min(least)
    found = differences(curve)
    shares = found / allowed
    beyond = (shares > BOUND).nonzero()
    first = int(beyond[0]) if len(beyond) else None
    return Apart(float(found.max()), float(found[-1]), float(shares.max()), first)


def least_apart(dtype: torch.dtype) -> float:
    """What controls count for at the least, as they may agree by chance: a quarter of the distance between two numbers
    of `dtype`, since a loss is a mean over many tokens, and two roundings of float32, which the loss is in."""
    return max(torch.finfo(dtype).eps / 4, 2 * torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class Found:
    """Of one form and dtype: eager mode's losses, and every other run beside them; a control by the other controls."""

    eager: list[float]
    controls: list[Apart]
    unfused: Apart
    fused: Apart
    faults: dict[str, Apart]


def compared(rank: int, form: str, dtype: torch.dtype, steps: int, inner: str, controls: int) -> Found:
    """All runs on a rank. inner: what compiles the graphs of all but the faulty runs, which need no compiler."""
    eager, *others = (losses(form, dtype, steps, order) for order in range(1 + controls))
    least = least_apart(dtype)
    unfused = losses(form, dtype, steps, inner=inner, rewrites=())
    fused = losses(form, dtype, steps, inner=inner, rewrites=REWRITES)
    wrong = {}
    for name in OF_BACKWARD:
        with planted(name):
            wrong[name] = losses(form, dtype, steps, inner="aot_eager", rewrites=REWRITES)
    return Found(
        eager,
        [apart(each, eager, [o for o in others if o is not each], least) for each in others],
        *(apart(each, eager, others, least) for each in (unfused, fused)),
        {name: apart(each, eager, others, least) for name, each in wrong.items()},
    )
