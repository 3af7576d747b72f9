"""Replicas that use different parameters in one step: the sums of gradients, and what cannot be summed. In float64."""

import copy

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh

from tests.policy_harness import HIDDEN, MLP, Attention, RMSNorm, run_threads
from tpfuse.errors import PolicyError
from tpfuse.parallel.parallelize import parallelize
from tpfuse.policy import SharingPolicy


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn, self.mlp = RMSNorm(HIDDEN), Attention(), MLP()
        self.adapters = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)])

    def forward(self, x, adapter):
        x = x + self.attn(self.norm(x))
        if adapter is not None:
            x = x + self.adapters[adapter](x)
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower, self.never = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.layers, self.norm = nn.ModuleList([Layer(), Layer(), Layer()]), RMSNorm(HIDDEN)

    def forward(self, x, adapter=None, skip=(), tower=False, order=(0, 1, 2)):
        x = self.tower(x) if tower else x
        for i in order:
            if i not in skip:
                x = self.layers[i](x, adapter)
        return self.norm(x)


def made():
    torch.manual_seed(3)
    model = Model().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def rows(replica):
    return torch.randn(2, 3, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(replica))


#: What each replica calls the model with, in two backward passes.
STEPS = {
    "another adapter": [({"adapter": 0}, {"adapter": 1}), ({"adapter": 1}, {"adapter": 1})],
    "an adapter on one": [({"adapter": 0}, {}), ({}, {"adapter": 0})],
    "a dropped layer": [({"skip": (1,)}, {}), ({}, {"skip": (0, 2)})],
    "a tower": [({}, {"tower": True}), ({}, {"tower": True})],
    "all of them": [({"adapter": 1, "skip": (2,)}, {"tower": True, "skip": (0,)}), ({}, {})],
}


def gradients(rank, models, policy, steps, prepare=None):
    model, replica = models[rank], rank // policy.attn_tp_size
    mesh = init_device_mesh("cpu", (policy.dp_size, policy.attn_tp_size), mesh_dim_names=("dp", "attn_tp"))
    parallelize(model, mesh, policy)
    if prepare:
        prepare(model)
    for step in steps:
        model(rows(replica), **step[replica]).square().sum().backward()
    return model


def check(policy, steps):
    plain = made()
    for step in steps:
        for replica, kwargs in enumerate(step):
            plain(rows(replica), **kwargs).square().sum().backward()
    models = [copy.deepcopy(made()) for _ in range(policy.tp_size)]
    run_threads(policy.tp_size, gradients, models, policy, steps)
    want = dict(plain.named_parameters())
    for model in models:
        for name, parameter in model.named_parameters():
            cut, full = model._tpfuse.cuts.get(name), want[name].grad
            assert (parameter.grad is None) == (full is None), name
            if full is not None:
                own = full if cut is None else cut.take(full)
                # Of a key's bias the gradient is zero, and what is left of it rounding.
                assert (parameter.grad - own).norm() < 1e-12 * own.norm().clamp_min(1), name


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_gradients_are_the_uncut_models(steps):
    check(SharingPolicy(2, 2, 1), steps)


def test_also_over_two_axes_and_with_mlps_that_cross_replicas():
    check(SharingPolicy(4, 2, 2), STEPS["all of them"])
    check(SharingPolicy(4, 2, None), STEPS["another adapter"])


def grad_of(rank, models):
    model = gradients(rank, models, SharingPolicy(2, 2, 1), [])
    loss = model(rows(rank), adapter=rank).sum()
    parameters = [p for layer in model.layers for p in layer.adapters[rank].parameters()]
    with pytest.raises(PolicyError, match=r"different parameters in this backward .*layers.0.adapters.0.weight on"):
        torch.autograd.grad(loss, parameters)


def test_what_autograd_grad_returns_cannot_be_put_off_and_is_refused_on_all_ranks():
    run_threads(2, grad_of, [made(), made()])


def with_hook(rank, models):
    def prepare(model):
        model.tower.weight.register_post_accumulate_grad_hook(lambda p: None)

    with pytest.raises(PolicyError, match="a hook that runs after accumulation"):
        gradients(rank, models, SharingPolicy(2, 2, 1), STEPS["a tower"], prepare)


def test_an_optimizer_in_backward_is_refused_on_all_ranks():
    run_threads(2, with_hook, [made(), made()])
