"""What an optimizer's step must be on a cut model: element by element, on equal gradients, on all ranks or on none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.policy_harness import HIDDEN, MLP, Attention, PackedMLP, loss_of, relative, run_threads
from tests.test_outside import mesh_of
from tpfuse.errors import PlanError, PolicyError, VerifyError
from tpfuse.parallel.elementwise import by_element
from tpfuse.parallel.parallelize import parallelize
from tpfuse.parallel.verify import verify, verify_against
from tpfuse.policy import SharingPolicy

ONE, TWO, OWN_ROWS = SharingPolicy(2), SharingPolicy(2, 2), SharingPolicy(2, 1, 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.norm, self.mlp = Attention(), nn.RMSNorm(HIDDEN), MLP()

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(self.norm(x))


def copies(number=3):
    torch.manual_seed(3)
    model = Net().double()
    return [copy.deepcopy(model) for _ in range(number)]


def rows(rank):
    return torch.randn(2, 3, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


class Trust(torch.optim.Optimizer):
    """A step as long as the weight."""

    def __init__(self, parameters):
        super().__init__(parameters, {"rate": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in (p for group in self.param_groups for p in group["params"]):
            parameter.sub_(parameter.grad * parameter.norm() / parameter.grad.norm(), alpha=0.1)


class FactorsLarge(torch.optim.Optimizer):
    """Means of rows and columns of large matrices alone; its settings are its own attributes."""

    def __init__(self, parameters):
        self.rates = (0.1, 16)
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        rate, least = self.rates
        for parameter in (p for group in self.param_groups for p in group["params"]):
            moment = parameter.grad.square()
            if min(moment.shape) >= least:
                moment = moment.mean(0, True) * moment.mean(1, True) / moment.mean()
            parameter.sub_(parameter.grad / (moment.sqrt() + 1e-6), alpha=rate)


BY_ELEMENT = {
    "AdamW": lambda p: torch.optim.AdamW(p),
    "fused": lambda p: torch.optim.Adam(p, fused=True),
    "no rate yet": lambda p: torch.optim.SGD(p, 0.0, momentum=0.9),
    "rate as a tensor": lambda p: torch.optim.AdamW(p, torch.tensor(1e-3)),
    "Rprop": lambda p: torch.optim.Rprop(p),
}
NOT = {
    "Adafactor": lambda p: torch.optim.Adafactor(p, 0.0),
    "L-BFGS": lambda p: torch.optim.LBFGS(p),
    "own": lambda p: Trust(p),
    "large ones": lambda p: FactorsLarge(p),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*BY_ELEMENT, *NOT])
def test_optimizers_that_work_element_by_element_are_told_from_others_and_left_as_they_were(name, dtype):
    parameter = nn.Parameter(torch.randn(4, 4).to(dtype))
    before, optimizer = parameter.detach().clone(), {**BY_ELEMENT, **NOT}[name]([parameter])
    assert by_element(optimizer, parameter) == (name in BY_ELEMENT)
    assert torch.equal(before, parameter) and not optimizer.state.get(parameter) and parameter.grad is None


class Scheduled(torch.optim.SGD):
    """Its step asks what no small matrix can answer."""

    def step(self, closure=None):
        raise RuntimeError("no schedule was given")


def test_an_optimizer_that_cannot_be_tried_is_named(caplog):
    parameter = nn.Parameter(torch.randn(4, 4))
    assert by_element(Scheduled([parameter]), parameter)
    assert "Scheduled could not be tried on a small matrix (RuntimeError: no schedule was given)" in caplog.text


def trained(rank, models, policy, make=torch.optim.SGD, seeds=(0, 0), before_step=lambda model: None):
    model = parallelize(models[rank], mesh_of(policy), policy)
    optimizer = make(model.parameters())
    loss_of(model(rows(seeds[rank]))).backward()
    before_step(model)
    optimizer.step()
    return model


def refused(rank, models, error, words, *args):
    with pytest.raises(error, match=words):
        trained(rank, models, *args)


def test_an_optimizer_that_needs_whole_weights_is_refused():
    run_threads(2, refused, copies(), PlanError, r"Trust .*element by element.* attn\.\S+ is cut", ONE, Trust)


def test_ranks_of_one_group_with_other_rows_are_refused_before_they_drift_apart():
    words = "before step 1 of SGD the ranks have different gradients.*norm 1.*dp rank"
    run_threads(2, refused, copies(), PolicyError, words, ONE, torch.optim.SGD, (0, 1))
    run_threads(2, trained, copies(), TWO, torch.optim.SGD, (0, 1))  # replicas


def by_own_norm(model):
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    for parameter in model.parameters():
        parameter.grad /= norm


def test_clipping_by_a_norm_of_slices_is_refused():
    run_threads(2, refused, copies(), PolicyError, "clip_grad_norm_", ONE, torch.optim.SGD, (0, 0), by_own_norm)


def without_gradients(model):
    if torch.distributed.get_rank() == 1:
        for parameter in model.parameters():
            parameter.grad = None


def test_a_rank_without_any_gradient_is_refused_and_nobody_waits_for_it():
    words = "rank 0 has gradients of .* whole parameters, and rank 1 of 0"
    run_threads(2, refused, copies(), PolicyError, words, ONE, torch.optim.SGD, (0, 0), without_gradients)


def overflowing(rank, models):
    model = parallelize(models[rank], mesh_of(ONE), ONE)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    before = model.norm.weight.detach().clone()
    scaler.scale(loss_of(model(rows(0)))).backward()
    if rank == 1:
        model.mlp.up_proj.weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    return relative(model.norm.weight.detach(), before), scaler.get_scale()


def test_an_overflow_in_one_ranks_slice_leaves_out_the_step_on_all():
    assert run_threads(2, overflowing, copies()) == [(0.0, 2.0)] * 2


def replaced(rank, models):
    model = parallelize(models[rank], mesh_of(OWN_ROWS), OWN_ROWS)
    with pytest.raises(PlanError, match="brings parameters that were not"):
        model.mlp.down_proj = nn.Linear(model.mlp.down_proj.in_features, HIDDEN)


def test_parts_of_an_mlp_that_works_on_own_rows_cannot_be_replaced():
    run_threads(2, replaced, copies())


def swapped(rank, models):
    model = models[rank]
    before = copy.deepcopy(model)
    parallelize(model, mesh_of(ONE), ONE)
    verify_against(model, before, rows(0))
    with torch.no_grad():
        for tensor in model.mlp.gate_up.parameters():
            tensor.copy_(tensor.roll(tensor.shape[0] // 2, 0))
    verify(model, rows(0))  # another model's weights, and right for it
    with pytest.raises(VerifyError, match="mlp"):
        verify_against(model, before, rows(0))


def test_packed_halves_swapped_on_all_ranks_are_found_by_the_weights_from_before_the_cut():
    models = copies()
    for model in models:
        torch.manual_seed(4)
        model.attn, model.mlp = Attention(bias=False).double(), PackedMLP().double()  # a key bias has no gradient
    run_threads(2, swapped, models)
