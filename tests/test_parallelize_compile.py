"""Boundaries under torch.compile: the collectives that are traced, in order, and the numbers."""

import copy

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.policy_harness import (
    HIDDEN,
    MLP,
    Layer,
    Model,
    MoE,
    RMSNorm,
    build,
    compiles_in_threads,
    loss_of,
    run_threads,
)
from tests.ranks import run_processes
from tests.test_parallelize_families import model_of
from tests.test_parallelize_models import batches_of, mesh_of, oracle, worst_error
from tpfuse.parallel.parallelize import parallelize
from tpfuse.parallel.rows import rows
from tpfuse.policy import SharingPolicy


@pytest.fixture
def fake_ranks():
    """Makes the process one rank of a world in which collectives do nothing."""

    def start(world, rank):
        torch._dynamo.reset()
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()
    torch._dynamo.reset()


class Block(torch.nn.Module):
    """A layer and the norm that follows it."""

    def __init__(self, mlp):
        super().__init__()
        self.layer, self.norm = Layer(mlp), RMSNorm(HIDDEN)

    def forward(self, x):
        return self.norm(self.layer(x))


def recorder():
    """A backend that keeps the forward and backward graphs and runs them."""
    graphs = {"forward": [], "backward": []}

    def keep(key):
        def compiler(graph, inputs):
            graphs[key].append(graph)
            return make_boxed_func(graph.forward)

        return compiler

    return graphs, aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))


SHORT = {
    "_c10d_functional.all_reduce.default": "all_reduce",
    "_c10d_functional.all_gather_into_tensor.default": "all_gather",
    "tpfuse.cut_rows.default": "cut",
    "tpfuse.trim_rows.default": "trim",
    "aten.constant_pad_nd.default": "pad",
}


def collectives(graph, groups):
    """The boundary's nodes in order, e.g. "all_reduce(A)", groups by their members."""
    names = {groups.attention.name: "A", groups.dp.name: "D", groups.whole.name: "T"}
    out = []
    for node in graph.graph.nodes:
        short = SHORT.get(str(node.target))
        if short and node.target.namespace == "_c10d_functional":
            users = [str(user.target) for user in node.users if str(user.target) != "aten.sym_size.int"]
            assert users == ["_c10d_functional.wait_tensor.default"]
            short += f"({names[node.args[-1]]})"
        if short:
            out.append(short)
    return out


A_AR, GATHER_A, GATHER_D, T_AR = "all_reduce(A)", "all_gather(A)", "all_gather(D)", "all_reduce(T)"
EXPECTED = {
    ("mlp", 2): ([A_AR, A_AR], [A_AR, A_AR]),
    ("mlp", 1): ([A_AR, "cut", GATHER_A, "trim"], ["pad", "cut", GATHER_A, "trim", A_AR]),
    ("mlp", 4): ([A_AR, GATHER_D, T_AR, "cut"], [GATHER_D, T_AR, "cut", A_AR]),
    ("moe", 2): ([A_AR, GATHER_D, T_AR, "cut"], [GATHER_D, T_AR, "cut", A_AR]),
}


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(("kind", "dense"), list(EXPECTED))
def test_traced_collectives(fake_ranks, kind, dense, dynamic):
    fake_ranks(4, 3)
    model = build(lambda: Block(MLP() if kind == "mlp" else MoE()))
    policy = SharingPolicy(4, 2, dense)
    parallelize(model, mesh_of(policy), policy)
    graphs, backend = recorder()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    for shape in [(2, 5), (3, 4)] if dynamic else [(2, 5)]:
        compiled(torch.randn(*shape, HIDDEN, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert len(graphs["forward"]) == 1
    forward, backward = EXPECTED[kind, dense]
    assert collectives(graphs["forward"][0], model._tpfuse.groups) == forward
    assert collectives(graphs["backward"][0], model._tpfuse.groups) == backward


def test_dp_1_is_one_group(fake_ranks):
    fake_ranks(4, 1)
    for mlp in (MLP, MoE):
        model = build(lambda mlp=mlp: Block(mlp()))
        parallelize(model, init_device_mesh("cpu", (4,)), SharingPolicy(4))
        graphs, backend = recorder()
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        compiled(torch.randn(2, 5, HIDDEN, dtype=torch.float64))
        assert collectives(graphs["forward"][0], model._tpfuse.groups) in ([T_AR, T_AR], [A_AR, A_AR])


def test_uneven_rows_are_padded_and_guarded(fake_ranks):
    fake_ranks(4, 3)
    model = build(lambda: Block(MLP()))
    parallelize(model, mesh_of(SharingPolicy(4, 2)), SharingPolicy(4, 2))
    graphs, backend = recorder()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(3, HIDDEN, dtype=torch.float64).view(1, 3, HIDDEN)
    for counts in ((5, 3), (7, 3), (5, 3)):
        with rows(counts):
            compiled(x)
    expected = [A_AR, "pad", GATHER_D, T_AR, "cut", "trim"]
    assert [collectives(g, model._tpfuse.groups) for g in graphs["forward"]] == [expected, expected]
    gathered = [n.meta["val"].shape[0] for g in graphs["forward"] for n in g.graph.nodes if "all_gather" in n.name]
    assert gathered == [10, 14]  # another announcement compiles again, a repeated one does not


@pytest.mark.parametrize(
    ("family", "forward"),
    [
        # vocabulary-parallel embedding, then two boundaries for the dense and two for the routed layer, then the head
        ("deepseek_v3", [A_AR, A_AR, A_AR, A_AR, GATHER_D, T_AR, "cut", GATHER_A]),
        pytest.param("qwen3_moe", [A_AR, A_AR, A_AR, A_AR, GATHER_D, T_AR, "cut", GATHER_A], marks=pytest.mark.nightly),
        pytest.param("glm4_moe", [A_AR, A_AR, A_AR, A_AR, GATHER_D, T_AR, "cut", GATHER_A], marks=pytest.mark.nightly),
        pytest.param("llama", [A_AR, A_AR, A_AR, A_AR, A_AR, GATHER_A], marks=pytest.mark.nightly),
    ],
)
def test_families_trace_without_a_break(fake_ranks, family, forward):
    fake_ranks(4, 2)
    model = model_of(family).float()
    model.config._experts_implementation = "grouped_mm"
    policy = SharingPolicy(4, 2, 2)
    parallelize(model, mesh_of(policy), policy)
    graphs, backend = recorder()
    ids = torch.randint(0, 64, (2, 3))
    torch.compile(model, backend=backend, fullgraph=True)(ids, use_cache=False).logits.sum().backward()
    assert collectives(graphs["forward"][0], model._tpfuse.groups) == forward
    assert len(graphs["backward"]) == 1


def run_compiled(rank, model, policy, batches, want, grads, backend):
    parallelize(model, mesh_of(policy), policy)
    replica = rank // policy.attn_tp_size
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with rows([b.numel() for b in batches]):
        logits = compiled(batches[replica])
        loss_of(logits).backward()
    return worst_error(model, logits, want[replica], grads)


@compiles_in_threads
@pytest.mark.parametrize(
    ("dense", "counts"),
    [pytest.param(*case, marks=pytest.mark.nightly) for case in [(4, (0, 2)), (1, (2, 1)), (2, (2, 2))]],
)
def test_compiled_equals_the_unsharded_model(dense, counts):
    torch._dynamo.reset()
    plain = build(Model)
    plain.layers = plain.layers[2:] if dense == 4 else plain.layers[:1]
    policy = SharingPolicy(4, 2, dense)
    batches = batches_of(counts)
    want, grads = oracle(plain, batches)
    models = [copy.deepcopy(plain) for _ in range(4)]
    worst = max(run_threads(4, lambda r: run_compiled(r, models[r], policy, batches, want, grads, "aot_eager")))
    assert worst[0] < 1e-11, worst


def run_inductor(rank):
    policy = SharingPolicy(2, 2, 2)
    batches = batches_of((2, 1))
    plain = build(lambda: Model(routed=False), dtype=torch.float32)
    want, grads = oracle(plain, batches)
    return run_compiled(rank, plain, policy, batches, want, grads, "inductor")


@pytest.mark.nightly
def test_inductor_in_real_processes():
    assert max(run_processes(2, run_inductor))[0] < 1e-5
