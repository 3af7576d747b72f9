"""Decorators: what they record, and what they and `parallelize` refuse; nothing is changed or communicated before."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.policy_harness import HIDDEN, MLP, Attention, Layer, Model, MoE, build, relative, run_threads
from tpfuse.errors import PlanError, PolicyError
from tpfuse.parallel.parallelize import parallelize
from tpfuse.parallel.record import Site
from tpfuse.parallel.roles import attention, dense_mlp, moe, share_tp_group
from tpfuse.policy import SharingPolicy

DENSE = "layers.0.mlp, layers.1.mlp"


@pytest.fixture
def mesh():
    """Rank 5 of eight, as dp 2 x attn_tp 4, in a world where collectives do nothing."""
    dist.init_process_group("fake", rank=5, world_size=8, store=FakeStore())
    yield init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "attn_tp"))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("decorate", "words"),
    [
        (lambda c: attention(colwise="qkv", rowwise=("o",))(c), "colwise='qkv'"),
        (lambda c: attention(colwise=(), rowwise=("o",))(c), r"colwise=\(\)"),
        (lambda c: attention(colwise=("q", "q"), rowwise=("o",))(c), "twice"),
        (lambda c: attention(colwise=("q",), rowwise=("o",), heads=8)(c), "heads=8"),
        (lambda c: dense_mlp(colwise=("a",), rowwise=("b",), packed={"c": 2})(c), "'c' is not one of"),
        (lambda c: dense_mlp(colwise=("a",), rowwise=("b",), packed=["a"])(c), r"packed=\['a'\].*allowed: a mapping"),
        (lambda c: dense_mlp(colwise=("a",), rowwise=("b",), packed={"a": 0})(c), "equal parts"),
        (lambda c: dense_mlp(colwise=("a",), rowwise=("b",), packed={"a": (1, -1)})(c), "equal parts"),
        (lambda c: moe(experts=None)(c), "experts=None"),
        (lambda c: moe()(int), "subclass of torch.nn.Module"),
        (lambda c: share_tp_group("auto")(c), "'auto'.*SharingPolicy"),
    ],
)
def test_bad_decorators_are_refused(decorate, words):
    with pytest.raises((PlanError, PolicyError), match=words):
        decorate(type("Empty", (nn.Module,), {}))


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (SharingPolicy(8, 2, overrides={"layers.9.mlp": 1}), f"overrides\\['layers.9.mlp'\\].*dense MLPs: {DENSE}"),
        (SharingPolicy(8, 2, overrides={"*.attn": 1}), "matches no dense MLP"),
        (SharingPolicy(8, 2, overrides={"layers.2.mlp.experts.0": 1}), "matches no dense MLP"),
        (SharingPolicy(8, 4), r"mesh has shape \(2, 4\).*needs shape \(4, 2\)"),
        (SharingPolicy(4, 2), r"mesh has shape \(2, 4\).*needs shape \(2, 2\)"),
        (SharingPolicy(8, 1), r"needs shape \(1, 8\).*or a 1-D mesh"),
        ("all", "policy='all'"),
        (None, "share_tp_group"),
    ],
)
def test_policy_and_model_or_mesh_disagree(mesh, policy, words):
    model = build(Model)
    before = {n: p.shape for n, p in model.named_parameters()}
    with pytest.raises(PolicyError, match=words):
        parallelize(model, mesh, policy)
    assert before == {n: p.shape for n, p in model.named_parameters()} and not hasattr(model, "_tpfuse_policy")


def test_meshes_that_are_laid_out_otherwise(mesh):
    for bad, words in [
        (init_device_mesh("cpu", (8,)), "1-D mesh means dp 1"),
        (init_device_mesh("cpu", (2, 4), mesh_dim_names=("attn_tp", "dp")), "dp comes first"),
        (DeviceMesh("cpu", torch.arange(8).view(4, 2).T), "ascending order"),
        (init_device_mesh("cpu", (1, 2, 4)), r"shape \(1, 2, 4\)"),
        ("mesh", "mesh='mesh'"),
    ]:
        with pytest.raises(PolicyError, match=words):
            parallelize(build(Model), bad, SharingPolicy(8, 2))


def attention_class(**role):
    """An attention class with fresh attributes, decorated with `role`."""

    class Other(Attention):
        pass

    return attention(**{"colwise": ("q_proj", "k_proj", "v_proj"), "rowwise": ("o_proj",), **role})(Other)


class ViewsHidden(Attention):
    """Its last reshape spells the full width."""

    def forward(self, x):
        b, s, _ = x.shape
        q = self.q_proj(x).view(b, s, -1, self.head_dim)
        return self.o_proj(q.reshape(b, s, self.width))


class LocalCount(Attention):
    """Goes through a local variable and a tuple, and computes the head's width from what the cut changes."""

    def forward(self, x):
        b, s, _ = x.shape
        dim = self.width // self.num_heads
        shape = (b, s, self.num_heads, dim)
        return self.o_proj(self.q_proj(x).view(shape).flatten(-2))


class SplitsWidth(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = 64
        self.gate_up, self.down = nn.Linear(HIDDEN, 128), nn.Linear(64, HIDDEN)

    def forward(self, x):
        gate, up = self.gate_up(x).split(self.inner, dim=-1)
        return self.down(F.silu(gate) * up)


class Odd(MLP):
    def __init__(self):
        super().__init__(inner=6)


class Blocked(nn.Linear):
    block_size = (32, 32)


class Quantised(MLP):
    def __init__(self, inner):
        super().__init__(bias=False)
        self.gate_proj, self.up_proj = Blocked(HIDDEN, inner, bias=False), Blocked(HIDDEN, inner, bias=False)
        self.down_proj = Blocked(inner, HIDDEN, bias=False)
        for child, shape in ((self.gate_proj, (inner // 32, 1)), (self.down_proj, (1, inner // 32))):
            child.weight_scale_inv = nn.Parameter(torch.ones(shape))


class WrongExperts(MoE):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN)])


class FusedBias(nn.Module):
    """Fused experts with a bias on the row-wise weight."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 128, HIDDEN))
        self.down_proj = nn.Parameter(torch.zeros(4, HIDDEN, 64))
        self.down_proj_bias = nn.Parameter(torch.zeros(4, HIDDEN))


def with_attribute(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def with_weight_norm(module, normed):
    normed(module.gate_proj)
    return module


def with_forward(module, leaf):
    child = module.get_submodule(leaf)
    child.forward = functools.partial(type(child).forward, child)
    return module


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: attention_class()(), r"reshapes by self.num_heads.*no role names"),
        (lambda: attention_class(heads="num_heads")(), r"reshapes by self.num_kv_heads"),
        (lambda: attention_class(heads="n_heads")(), "heads='n_heads' is None"),
        (lambda: attention_class(colwise=("q_proj", "missing"))(), "'missing' is missing"),
        (lambda: attention_class(colwise=("q_norm",))(), "'q_norm' is RMSNorm"),
        (lambda: with_attribute(ViewsHidden(), width=HIDDEN), "reshapes by self.width"),
        (lambda: with_attribute(LocalCount(), width=HIDDEN), "reshapes by self.width"),
        (lambda: Attention(kv_heads=3), "3 key/value heads neither divide by the 4 ranks"),
        (
            lambda: dense_mlp(colwise=("gate_up",), rowwise=("down",), packed={"gate_up": 2})(SplitsWidth)(),
            "reshapes by self.inner",
        ),
        (
            lambda: dense_mlp(colwise=("gate_up",), rowwise=("down",), packed={"gate_up": (64, 32)})(SplitsWidth)(),
            r"packed sizes \(64, 32\) add up to 96, the weight has 128",
        ),
        (Odd, r"6 features over the 8 ranks.*multiple of 8"),
        (lambda: Quantised(192), "24 per rank is not a multiple of the weight's quantization block of 32"),
        (WrongExperts, "layer.experts.0 .Linear. is in a routed block"),
        (lambda: with_attribute(MoE(), experts=FusedBias()), "down_proj_bias"),
        (lambda: moe(experts="none")(type("Wrong", (MoE,), {}))(), "experts='none' is no submodule"),
        (
            lambda: with_weight_norm(MLP(), parametrizations.weight_norm),
            "layer.gate_proj.weight is parametrized.*remove_parametrizations",
        ),
        (
            lambda: with_weight_norm(MLP(), nn.utils.weight_norm),
            "layer.gate_proj.weight is neither parameter nor buffer.*weight_g, weight_v.*remove_weight_norm",
        ),
        (lambda: with_forward(MLP(), "down_proj"), "layer.down_proj has a bias.*forward put on the instance"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_anything_changes(mesh, make, words):
    model = nn.ModuleDict({"other": MLP(), "layer": make()})
    before = {n: p.shape for n, p in model.named_parameters()}
    groups = dist.distributed_c10d._world.group_count
    with pytest.raises(PlanError, match=words):
        parallelize(model, mesh, SharingPolicy(8, 2))
    assert before == {n: p.shape for n, p in model.named_parameters()}
    assert groups == dist.distributed_c10d._world.group_count and not model["other"]._forward_hooks


def test_roles_inside_roles_and_two_calls_are_refused(mesh):
    outer = dense_mlp(colwise=("a",), rowwise=("b",))(type("Outer", (Layer,), {}))
    with pytest.raises(PlanError, match=r"attn \(attention\) lies inside the model"):
        parallelize(outer(MLP()), mesh, SharingPolicy(8, 2))
    model = parallelize(build(Model), mesh, SharingPolicy(8, 2))
    with pytest.raises(PolicyError, match="parallelized already"):
        parallelize(model, mesh, SharingPolicy(8, 2))
    with pytest.raises(PlanError, match="no module with a role"):
        parallelize(nn.Linear(8, 8), mesh, SharingPolicy(8, 2))


def test_a_model_that_is_distributed_already_is_refused(mesh):
    model = build(Model)
    weight = DTensor.from_local(model.norm.weight.detach(), mesh["attn_tp"])
    model.norm.weight = nn.Parameter(weight)
    with pytest.raises(PlanError, match=r"norm\.weight is a DTensor"):
        parallelize(model, mesh, SharingPolicy(8, 2))


def test_models_on_one_mesh_share_its_groups(mesh):
    first, second = (parallelize(build(Model), mesh, SharingPolicy(8, 2))._tpfuse.groups for _ in range(2))
    assert first == second
    assert (first.attention.ranks, first.attention.index) == ((4, 5, 6, 7), 1)
    assert (first.dp.ranks, first.dp.index) == ((1, 5), 1)
    assert (first.whole.ranks, first.whole.index) == (tuple(range(8)), 5)


def test_blocks_of_a_quantised_weight_are_cut_with_it(mesh):
    model = nn.ModuleDict({"mlp": Quantised(256)})
    parallelize(model, mesh, SharingPolicy(8, 2))
    assert model["mlp"].gate_proj.weight.shape == (32, HIDDEN)
    assert model["mlp"].gate_proj.weight_scale_inv.shape == (1, 1)
    assert model["mlp"].down_proj.weight_scale_inv.shape == (1, 1)


def test_the_innermost_decorated_policy_wins(mesh):
    class Inner(Layer):
        pass

    outer, inner = SharingPolicy(8, 2, 8, {"layers.1.mlp": 4}), SharingPolicy(8, 2, 1)

    class Outer(Model):
        def __init__(self):
            super().__init__()
            self.layers[0] = share_tp_group(inner)(Inner)(MLP())

    model = parallelize(share_tp_group(outer)(Outer)(), mesh)
    assert {site.name: site.size for site in model._tpfuse.sites if site.kind == "dense_mlp"} == {
        "layers.0.mlp": 1,
        "layers.1.mlp": 4,
    }
    assert model._tpfuse_policy.dense_tp_size_of("layers.0.mlp") == 1
    with pytest.raises(PolicyError, match="disagree: dp_size=4"):
        inner = SharingPolicy(8, 4)
        parallelize(Outer(), mesh)


def test_policy_and_sites_are_recorded_for_the_backend(mesh):
    policy = SharingPolicy(8, 2, 4, {"layers.1.*": 1})
    model = parallelize(build(Model), mesh, policy)
    assert model._tpfuse_policy == policy
    assert Site("layers.2.mlp", "moe", 8) in model._tpfuse.sites and len(model._tpfuse.sites) == 6
    for site in model._tpfuse.sites:
        module = model.get_submodule(site.name)
        assert module._tpfuse_policy == policy and module._tpfuse_site == site
    assert isinstance(copy.deepcopy(model).layers[1].mlp, type(model.layers[1].mlp))


class FusedExperts(nn.Module):
    """Experts as [expert, in, out] parameters, gate and up side by side; which layout it is, the shapes say."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, HIDDEN, 2 * 16) * 0.2)
        self.gate_up_proj_bias = nn.Parameter(torch.randn(4, 2 * 16))
        self.down_proj = nn.Parameter(torch.randn(4, 16, HIDDEN) * 0.2)

    def forward(self, x, weights):
        gate, up = (torch.einsum("rh,ehi->rei", x, self.gate_up_proj) + self.gate_up_proj_bias).chunk(2, dim=-1)
        return torch.einsum("rei,eih,re->rh", F.silu(gate) * up, self.down_proj, weights)


@moe(experts="experts")
class FusedMoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(HIDDEN, 4), FusedExperts()

    def forward(self, x):
        rows = x.reshape(-1, HIDDEN)
        return self.experts(rows, self.gate(rows).softmax(-1)).view(x.shape)


@attention(colwise=("qkv",), rowwise=("o",), heads="heads", kv_heads="kv", packed={"qkv": (32, 8, 8)})
class PackedAttention(nn.Module):
    """Queries, keys and values in one weight, with fewer key/value heads than queries."""

    def __init__(self):
        super().__init__()
        self.heads, self.kv, self.dim = 8, 2, 4
        self.qkv, self.o = nn.Linear(HIDDEN, 48), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        sizes = [self.heads * self.dim, self.kv * self.dim, self.kv * self.dim]
        q, k, v = (t.unflatten(-1, (-1, self.dim)).transpose(-2, -3) for t in self.qkv(x).split(sizes, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(y.transpose(-2, -3).flatten(-2))


def run_cut(rank, model, x, grads):
    parallelize(model, init_device_mesh("cpu", (4,)), SharingPolicy(4))
    y = model["it"](x)
    y.square().sum().backward()
    errors = {"y": y.detach()}
    for name, parameter in model.named_parameters():
        cut = model._tpfuse.cuts.get(name)
        whole = grads[name] if cut is None else cut.take(grads[name])
        errors[name] = relative(parameter.grad, whole)
    return errors.pop("y"), max(errors.values()), len(model._tpfuse.cuts)


@pytest.mark.parametrize(("cls", "cuts"), [(FusedMoE, 3), (PackedAttention, 3)])
def test_fused_and_packed_weights_are_cut_part_by_part(cls, cuts):
    plain = build(lambda: nn.ModuleDict({"it": cls()}))
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    models = [copy.deepcopy(plain) for _ in range(4)]
    want = plain["it"](x)
    want.square().sum().backward()
    grads = {n: p.grad for n, p in plain.named_parameters()}
    for y, error, count in run_threads(4, lambda r: run_cut(r, models[r], x, grads)):
        assert relative(y, want.detach()) < 1e-11 and error < 1e-11 and count == cuts
