"""Parameters and values of cut modules that are read outside of them: refused, or counted as in the uncut model."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import tpfuse
from tests.graphs import fake_world
from tests.policy_harness import loss_of, relative, run_threads
from tpfuse.errors import PlanError
from tpfuse.parallel import outside
from tpfuse.parallel.generation import SyncedGenerate
from tpfuse.parallel.parallelize import parallelize

H, INNER, HEAD = 8, 16, 2
ONE, TWO, WHOLE, OWN_ROWS = (
    tpfuse.SharingPolicy(4),
    tpfuse.SharingPolicy(4, 2, 2),
    tpfuse.SharingPolicy(4, 2),
    tpfuse.SharingPolicy(4, 2, 1),
)


@tpfuse.attention(colwise=("q", "k", "v"), rowwise=("o",))
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(H, H, bias=False) for _ in range(4))
        self.norm = nn.RMSNorm(HEAD)

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(self.norm(q), k, v).transpose(1, 2).flatten(-2))


@tpfuse.dense_mlp(colwise=("up",), rowwise=("down",))
class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.aside = nn.Linear(H, INNER), nn.Linear(INNER, H), nn.Linear(H, 1)

    def forward(self, x):
        self.given, self.inner, self.score = x * 1, F.relu(self.up(x)), self.aside(x.detach())
        return self.down(self.inner)


@tpfuse.dense_mlp(colwise=("up",), rowwise=("down",))
class GivesMore(MLP):
    def forward(self, x):
        return super().forward(x), self.inner.square()


@tpfuse.dense_mlp(colwise=("up",), rowwise=("down",))
class PastProjection(MLP):
    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.up.weight), self.down.weight)


class Net(nn.Module):
    def __init__(self, mlp=MLP, use=lambda self, x: 0):
        super().__init__()
        self.attn, self.mlp, self.norm, self.use = Attention(), mlp(), nn.RMSNorm(H), use

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        y = self.mlp(x)
        return x + (y if isinstance(y, torch.Tensor) else y[0] + y[1].mean()) + self.use(self, x)


def weight_outside(self, x):
    up = dict(self.named_parameters())["mlp.up.weight"]  # by whatever name
    return F.linear(x, up).sum(-1, keepdim=True)


def models(make=Net):
    torch.manual_seed(1)
    model = make().double()
    return [copy.deepcopy(model) for _ in range(5)]


def mesh_of(policy):
    return init_device_mesh("cpu", (policy.dp_size, policy.attn_tp_size), mesh_dim_names=("dp", "attn_tp"))


def rows(dp):
    return torch.randn(dp, 2, 3, H, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def calls(rank, models, policy, grad):
    model = parallelize(models[rank], mesh_of(policy), policy)
    with torch.set_grad_enabled(grad), pytest.raises(PlanError) as error:
        model(rows(policy.dp_size)[rank // policy.attn_tp_size])
    return str(error.value)


@pytest.mark.parametrize("grad", [False, True], ids=["without gradients", "with gradients"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Net(use=weight_outside), r"the model \(Net\) reads mlp.up.weight outside of mlp \(MLP\).*slice 0"),
        (lambda: Net(use=lambda m, x: x @ m.attn.o.weight), r"reads attn.o.weight outside of attn \(Attention\)"),
        (lambda: Net(use=lambda m, x: m.mlp.down(m.mlp.up(x))), r"\(Net\) calls mlp.up outside of mlp \(MLP\)"),
        (lambda: Net(use=lambda m, x: m.mlp.forward(x)), r"outside of mlp \(MLP\).*the module, not its forward"),
        (lambda: Net(PastProjection), r"mlp \(PastProjection\) reads mlp.down.weight without calling mlp.down, where"),
        (lambda: Net(GivesMore), r"Net returned what this rank's slice of mlp.up.bias gave.*gives away more"),
    ],
    ids=["weight", "row-wise weight", "projection", "forward", "past its projection", "more than its output"],
)  # fmt: skip
def test_a_slice_that_is_read_elsewhere_is_refused_on_every_rank(make, words, grad):
    said = run_threads(4, calls, models(make), ONE, grad)
    assert re.search(words, said[0])
    assert len({text.replace(f"slice {r} of", "slice 0 of") for r, text in enumerate(said)}) == 1


@pytest.mark.parametrize("policy", [WHOLE, OWN_ROWS], ids=["all replicas", "own rows"])
def test_a_projection_called_past_an_mlp_with_other_rows_is_refused(policy):
    make = lambda: Net(use=lambda m, x: m.mlp.down(m.mlp.up(x)))  # noqa: E731
    assert all(
        "calls mlp.up outside of mlp (MLP)" in text for text in run_threads(4, calls, models(make), policy, True)
    )


def called_by_forward(rank, models):
    """The boundary of an MLP that crosses replicas stands around its forward itself."""
    model = parallelize(models[rank], mesh_of(WHOLE), WHOLE)
    with torch.no_grad():
        model(rows(2)[rank // 2])


def test_a_forward_that_has_its_boundary_around_it_may_be_called_itself():
    run_threads(4, called_by_forward, models(lambda: Net(use=lambda m, x: m.mlp.forward(x))))


def only_looked_at(rank, models):
    model = parallelize(models[rank], mesh_of(ONE), ONE)
    x = rows(1)[0].requires_grad_()
    hooks = [len(part._forward_hooks) for part in model.modules()]
    model(x)
    assert [len(part._forward_hooks) for part in model.modules()] == hooks
    seen = []
    model.mlp.up.register_forward_hook(lambda *_: seen.append(torch.utils._python_dispatch._len_torch_dispatch_stack()))
    model(x)
    assert seen == [0]


def test_reading_shapes_and_types_is_no_reading_and_later_calls_are_not_looked_at():
    def use(m, x):
        w = m.mlp.up.weight
        return x.new_zeros(x.shape).type_as(w) * w.shape[0] + torch.zeros_like(w).shape[0] * w.detach().dim()

    run_threads(4, only_looked_at, models(lambda: Net(use=use)))


# -- losses -----------------------------------------------------------------------------------------------------------


def every_parameter(m):
    return sum(p.pow(2).sum() for p in m.parameters())


ALLOWED = {
    "a cut parameter": lambda m: 3 * m.mlp.up.weight.pow(2).sum(),
    "a whole one in a cut module": lambda m: m.attn.norm.weight.pow(4).sum() * 30,
    "every parameter": every_parameter,
    "a vector of all": lambda m: torch.nn.utils.parameters_to_vector(m.parameters()).abs().sum() / 7,
    "towards zero": lambda m: F.mse_loss(m.attn.q.weight, torch.zeros_like(m.attn.q.weight), reduction="sum"),
    "only a norm outside": lambda m: m.norm.weight.norm(),
}
REFUSED = {
    "norm": (lambda m: m.mlp.up.weight.norm(), "mlp.up.weight outside of mlp.*a norm, a mean, a product.*weight_decay"),
    "mean": (lambda m: m.attn.o.weight.pow(2).mean(), "attn.o.weight outside of attn"),
    "orthogonality": (lambda m: (m.mlp.up.weight @ m.mlp.up.weight.T).pow(2).sum(), "mlp.up.weight outside of mlp"),
    "vector norm": (lambda m: torch.nn.utils.parameters_to_vector(m.parameters()).norm(), "outside of"),
    "input kept": (lambda m: m.mlp.given.pow(2).sum(), r"a value from inside.*\.detach\(\)"),
    "mean of slices": (lambda m: m.mlp.inner.mean(), "from inside mlp.*a mean or a norm of a slice"),
    "whole value kept": (lambda m: m.mlp.score.sum(), "from inside|mlp.aside"),
}


def gradients(rank, models, want, policy, penalty):
    model = parallelize(models[rank], mesh_of(policy), policy)
    found = []
    for _ in range(2):
        model.zero_grad()
        loss = loss_of(model(rows(policy.dp_size)[rank // policy.attn_tp_size])) + penalty(model)
        loss.backward(retain_graph=True)
        model.zero_grad()
        loss.backward()  # a graph that was kept
        for name, parameter in model.named_parameters():
            cut = model._tpfuse.cuts.get(name)
            found.append(relative(parameter.grad, want[name] if cut is None else cut.take(want[name])))
    return max(found)


@pytest.mark.parametrize("policy", [ONE, TWO, WHOLE, OWN_ROWS], ids=["dp 1", "attention group", "whole", "own rows"])
@pytest.mark.parametrize("what", ALLOWED)
def test_penalties_count_once_for_each_replicas_loss(what, policy):
    def used(m):  # every parameter has a gradient
        return ALLOWED[what](m) + 0 * sum(p.sum() for p in m.parameters())

    *copies, ref = models()
    sum(loss_of(ref(x)) + used(ref) for x in rows(policy.dp_size)).backward()
    want = {name: p.grad for name, p in ref.named_parameters()}
    assert max(run_threads(4, gradients, copies, want, policy, used)) < 1e-12


def losses(rank, models, policy, penalty, words):
    model = parallelize(models[rank], mesh_of(policy), policy)
    loss = loss_of(model(rows(policy.dp_size)[rank // policy.attn_tp_size])) + penalty(model)
    with pytest.raises(PlanError, match=words):
        loss.backward()


@pytest.mark.parametrize("policy", [ONE, WHOLE], ids=["dp 1", "whole"])
@pytest.mark.parametrize("what", [w for w in REFUSED if w != "whole value kept"])
def test_what_a_slice_cannot_tell_is_refused_before_backward(what, policy):
    run_threads(4, losses, models(), policy, *REFUSED[what])


# -- routed blocks ----------------------------------------------------------------------------------------------------


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(H, INNER), nn.Linear(INNER, H, bias=False)

    def forward(self, x):
        return self.down_proj(F.gelu(self.up_proj(x)))


@tpfuse.moe(experts="experts")
class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(H, 2), nn.ModuleList([tpfuse.dense_mlp(
            colwise=("up_proj",), rowwise=("down_proj",))(Expert)() for _ in range(2)])  # fmt: skip

    def forward(self, x):
        scores = self.gate(x).softmax(-1)
        return sum(scores[..., i, None] * expert(x) for i, expert in enumerate(self.experts)), scores


class RoutedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.block, self.norm = Attention(), Routed(), nn.RMSNorm(H)

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        y, self.scores = self.block(self.norm(x))
        return x + y


def balance(m):
    return m.scores.pow(2).sum()


def test_a_backward_pass_that_is_too_long_to_be_looked_at_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(outside, "_MOST", 5)
    outside._say_how_far.cache_clear()
    x = torch.ones(3, requires_grad=True)
    for steps in (2, 9, 9):
        y = x
        for _ in range(steps):
            y = y * 2
        outside._look([y.sum()])
        assert caplog.text.count("a backward pass has more than 5 steps") == (steps > 2)
    outside._say_how_far.cache_clear()


def test_a_loss_on_scores_that_a_block_returns_is_counted_once():
    *copies, ref = models(RoutedNet)
    loss_of(ref(rows(1)[0])).add(balance(ref)).backward()
    want = {name: p.grad for name, p in ref.named_parameters()}
    assert max(run_threads(4, gradients, copies, want, ONE, balance)) < 1e-12


def test_a_loss_on_scores_of_all_replicas_rows_is_refused():
    run_threads(4, losses, models(RoutedNet), WHOLE, balance, "dp_size=1")


# -- stand-ins --------------------------------------------------------------------------------------------------------


def stand_ins(rank, models, want):
    model = parallelize(models[rank], mesh_of(TWO), TWO)
    x = rows(2)[rank // 2]
    scaled = {name: p * 2 for name, p in model.named_parameters()}
    loss_of(torch.func.functional_call(model, scaled, (x,))).backward()
    found = max(
        relative(p.grad, want[name] if (cut := model._tpfuse.cuts.get(name)) is None else cut.take(want[name]))
        for name, p in model.named_parameters()
        if name in want
    )
    delta = torch.zeros_like(model.norm.weight).requires_grad_()
    with pytest.raises(PlanError, match="weight was replaced for one call"):
        torch.func.functional_call(model, {"norm.weight": model.norm.weight + delta}, (x,))
    torch.func.functional_call(model, {"norm.weight": model.norm.weight.detach() + delta}, (x,)).sum().backward()
    return found, float(delta.grad.sum())


def test_parameters_that_others_are_computed_from_are_summed_once():
    *copies, ref = models()
    scaled = {name: p * 2 for name, p in ref.named_parameters()}
    sum(loss_of(torch.func.functional_call(ref, scaled, (x,))) for x in rows(2)).backward()
    want = {name: p.grad for name, p in ref.named_parameters() if p.grad is not None}
    found = run_threads(4, stand_ins, copies, want)
    assert max(error for error, _ in found) < 1e-12
    assert len({round(total, 9) for _, total in found}) == 1


# -- words, and generation --------------------------------------------------------------------------------------------


@tpfuse.attention(colwise=("q", "k", "v"), rowwise=("o",), heads="count")
class Slopes(Attention):
    """ALiBi: one number a head."""

    def __init__(self):
        super().__init__()
        self.count = H // HEAD
        self.register_buffer("slopes", torch.rand(self.count))

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) - self.slopes[:, None, None] * torch.arange(x.shape[1])
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))


def refused(rank, models):
    with pytest.raises(PlanError) as error:
        parallelize(models[rank], mesh_of(ONE), ONE)
    return str(error.value)


def test_what_a_module_holds_for_each_head_beside_its_projections_is_named():
    def make():
        net = Net()
        net.attn = Slopes()
        return net

    said = run_threads(4, refused, models(make))
    assert all("Beside them it holds norm.weight [2], slopes [4]" in text for text in said)


def test_replicas_end_together_whatever_the_caller_says():
    generate = SyncedGenerate(lambda *args, **kwargs: (args, kwargs))
    assert generate(1) == generate(1, synced_gpus=False) == ((1,), {"synced_gpus": True})
    assert generate(0, 1, 2, 3, 4, False, 6) == ((0, 1, 2, 3, 4, True, 6), {})


doubled = torch.compile(lambda x: F.gelu(x) * 2, backend="eager", fullgraph=True)


@tpfuse.dense_mlp(colwise=("up",), rowwise=("down",))
class PartlyCompiled(MLP):
    def forward(self, x):
        return self.down(doubled(self.up(x)))


def test_a_function_that_is_compiled_by_itself_may_run_in_a_call_that_is_looked_at():
    with fake_world(2, 0):
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "attn_tp"))
        model = parallelize(Net(PartlyCompiled), mesh, tpfuse.SharingPolicy(2))
        assert model(torch.randn(2, 3, H)).shape == (2, 3, H)
