"""Gradients inside a cut module, before and behind its sum; and the norm that clipping finds. All in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import tpfuse
from tpfuse.parallel.after_sum import ends_with_sum
from tpfuse.parallel.roles import role_of

from .ranks import run_processes

H, WIDE, WORLD = 8, 16, 2


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(H, WIDE), nn.Linear(WIDE, H)
        self.scale, self.norm, self.gate = nn.Parameter(torch.rand(H)), nn.RMSNorm(H), nn.Linear(H, H)

    def mlp(self, x):
        return self.down(F.gelu(self.up(x)))


mlp = tpfuse.dense_mlp(colwise=("up",), rowwise=("down",))


@mlp
class Plain(Base):
    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


@mlp
class Tanh(Base):
    def forward(self, x):
        return torch.tanh(self.mlp(x))


@mlp
class Scaled(Base):
    def forward(self, x):
        return self.scale * self.mlp(x)


@mlp
class ResidualAndNorm(Base):
    def forward(self, x):
        return self.norm(x + self.mlp(x))


@mlp
class Gated(Base):
    def forward(self, x):
        gate = torch.sigmoid(self.gate(x))
        return gate * self.mlp(x)


@mlp
class BothSides(Base):
    def forward(self, x):
        return self.scale * self.mlp(self.scale * self.norm(x))


class Hooked(Plain):
    """Hooks that others registered before the cut: on a projection, on the module, on a gradient."""

    def __init__(self):
        super().__init__()
        self.down.register_forward_hook(lambda module, args, y: torch.tanh(y) + 1)
        self.register_forward_hook(lambda module, args, y: y + self.scale * args[0])
        self.scale.register_hook(lambda grad: grad.clamp(-0.1, 0.1))


class SharedDown(nn.Module):
    """Two modules with one row-wise projection."""

    def __init__(self):
        super().__init__()
        self.one, self.two = Plain(), Tanh()
        self.two.down = self.one.down

    def forward(self, x):
        return x + self.two(self.one(x))


class Net(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.first, self.block = nn.Linear(H, H), block()

    def forward(self, x):
        return self.block(self.first(x))


FORMS = (Plain, Tanh, Scaled, ResidualAndNorm, Gated, BothSides)


def errors(rank: int, dp: int, dense: int | None) -> dict:
    policy = tpfuse.SharingPolicy(WORLD, dp, dense)
    mesh = init_device_mesh("cpu", (dp, WORLD // dp), mesh_dim_names=("dp", "attn_tp"))
    replica, found = rank // (WORLD // dp), {}
    for form in (*FORMS, Hooked, SharedDown):
        torch.manual_seed(1)
        ref = Net(form).double()
        torch.manual_seed(1)
        cut = tpfuse.parallelize(Net(form).double(), mesh, policy)
        xs = torch.randn(dp, 3, H, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        sum(ref(x).pow(3).sum() for x in xs).backward()
        cut(xs[replica]).pow(3).sum().backward()
        worst = 0.0
        for (name, p), q in zip(cut.named_parameters(), ref.parameters(), strict=True):
            if q.grad is not None:
                own = cut._tpfuse.cuts.get(name)
                want = q.grad if own is None else own.take(q.grad)
                worst = max(worst, float((p.grad - want).norm() / want.norm()))
        norms = [torch.nn.utils.clip_grad_norm_(ref.parameters(), 0.5), tpfuse.clip_grad_norm_(cut.parameters(), 0.5)]
        weight = cut.first.weight.grad.clone()
        dist.broadcast(weight, 0)
        found[form.__name__] = (
            worst,
            float((norms[1] - norms[0]).abs() / norms[0]),
            float((cut.first.weight.grad - weight).abs().max()),
        )
    return found


@pytest.mark.parametrize(("dp", "dense"), [(1, None), (2, None)])
def test_what_stands_behind_the_sum_is_counted_once_and_clipped_by_the_whole_norm(dp, dense):
    for found in run_processes(WORLD, errors, dp, dense):
        for form, (gradient, norm, drift) in found.items():
            assert gradient < 1e-12 and norm < 1e-12 and drift == 0, (form, gradient, norm, drift)


def test_only_a_module_that_returns_its_sum_is_known_to_end_with_it():
    proved = {form.__name__ for form in FORMS if ends_with_sum(form(), role_of(form()))}
    assert proved == {"Plain"}
