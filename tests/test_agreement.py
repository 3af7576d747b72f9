"""Policy, mesh, model, options and graph must agree: a disagreement raises on every rank, before any collective."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import tpfuse
from tpfuse import PolicyError, SharingPolicy, parallelize
from tpfuse.backend import tpfuse as tpfuse_backend
from tpfuse.parallel.recorded_policy import check_groups
from tpfuse.report import Boundary, Report

from .graphs import all_reduce, executed_collectives, fake_world, trace
from .policy_harness import HIDDEN, MLP, Layer, Model, build, compiles_in_threads, run_threads
from .test_parallelize_models import batches_of, mesh_of


def refused_on_every_rank(world, act, words):
    """`act(rank)` raises a PolicyError that says `words` on each rank, and no rank communicates."""

    def one(rank):
        with pytest.raises(PolicyError, match=words):
            act(rank)

    for rank in range(world):
        torch._dynamo.reset()
        with fake_world(world, rank):
            assert not executed_collectives(one, rank)


def mesh(dp, attn):
    return init_device_mesh("cpu", (dp, attn), mesh_dim_names=("dp", "attn_tp"))


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (lambda: SharingPolicy(8, 2, 2), r"moe_dense_tp_size=2 is not.*\(attn_tp_size=4\).*allowed: None, 1, 4"),
        (lambda: SharingPolicy(8, 2, 0), "moe_dense_tp_size=0; allowed: None or an integer from 1"),
        (lambda: SharingPolicy(8, 2, -1), "moe_dense_tp_size=-1; allowed: None or an integer from 1"),
        (lambda: SharingPolicy(8, 3), "dp_size=3 does not divide tp_size=8; allowed: a divisor"),
        (lambda: SharingPolicy(8, 4), r"mesh has shape \(2, 4\).*needs shape \(4, 2\)"),
        (lambda: SharingPolicy(8, 2, overrides={"blocks.*": 1}), r"overrides\['blocks.\*'\] matches no dense MLP"),
    ],
)
def test_a_policy_that_cannot_work_is_refused(policy, words):
    refused_on_every_rank(8, lambda rank: parallelize(build(Model), mesh(2, 4), policy()), words)


def compiled(policy, stated):
    model = parallelize(nn.Sequential(build(lambda: Layer(MLP()))), mesh_of(policy), policy)
    options = {"inner": "aot_eager", "policy": stated}
    return torch.compile(model, backend=tpfuse_backend, options=options), torch.randn(2, 3, HIDDEN).double()


@pytest.mark.parametrize(
    "stated",
    [
        SharingPolicy(4, 2, 2, overrides={"0.mlp": 1}),
        *(
            pytest.param(stated, marks=pytest.mark.nightly)
            for stated in (
                SharingPolicy(4, 1, 4),
                SharingPolicy(4, 2, 2, residual="scattered"),
                SharingPolicy(4, 2, 2, max_rows=64),
            )
        ),
    ],
)
def test_options_may_only_repeat_the_policy_that_parallelize_recorded(stated):
    def act(rank):
        model, x = compiled(SharingPolicy(4, 2, 2), stated)
        model(x)

    words = r"options\['policy'\] is SharingPolicy.*but parallelize cut .*attn by SharingPolicy.*may only repeat"
    refused_on_every_rank(4, act, words)


def test_explain_refuses_what_the_backend_refuses():
    def act(rank):
        model, x = compiled(SharingPolicy(4, 2, 2), None)
        tpfuse.explain(model, (x,), options={"policy": SharingPolicy(4, 2, 1)})

    refused_on_every_rank(4, act, "may only repeat")


@pytest.mark.parametrize("stated", [None, SharingPolicy(4, 2, 4), SharingPolicy(4, 2, None)])
def test_a_repeated_policy_is_accepted_and_the_recorded_one_is_used(stated):
    """The report's layouts are those of two replicas, whether or not the options say so."""
    with fake_world(4, 3):
        model, x = compiled(SharingPolicy(4, 2, None), stated)
        with torch.no_grad():
            report = tpfuse.explain(model, (x,), options={"policy": stated})
    assert ("all_gather", (1, 3), "TP_ATTN_FULL", "FULL") in [
        (b.collective, b.group, b.layout_in, b.layout_out) for b in report.boundaries
    ]


def test_a_part_of_the_model_and_a_copy_know_the_policy():
    with fake_world(4):
        model, x = compiled(SharingPolicy(4, 2, 2), None)
        for part in (model._orig_mod[0].mlp, copy.deepcopy(model._orig_mod)):
            with pytest.raises(PolicyError, match="may only repeat"):
                tpfuse.explain(part, (x,), options={"policy": SharingPolicy(4, 2, 1)})


@pytest.mark.parametrize(("dense", "name"), [(1, "TPMLP"), (2, "MLP"), (4, "TPMLP")])
def test_layers_of_one_model_share_their_classes(dense, name):
    """A class for each layer would compile each layer anew."""
    with fake_world(4):
        policy = SharingPolicy(4, 2, dense)
        model = parallelize(nn.Sequential(*(Layer(MLP()) for _ in range(3))), mesh_of(policy), policy)
        assert len({type(layer.attn) for layer in model}) == len({type(layer.mlp) for layer in model}) == 1
        assert type(model[0].mlp).__name__ == name and isinstance(model[0].mlp, MLP)


# -- models that others have cut --------------------------------------------------------------------------------------


class HandCut(nn.Module):
    """Its sum runs over the ranks (0, 1) or (2, 3)."""

    def __init__(self, group):
        super().__init__()
        self.group, self.norm = group, nn.RMSNorm(HIDDEN, elementwise_affine=False)

    def forward(self, x):
        return self.norm(x + all_reduce(x, self.group))


def hand_cut(rank):
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return HandCut(pairs[rank // 2].group_name), torch.randn(2, 3, HIDDEN)


def test_the_graphs_groups_are_checked_against_the_stated_policy():
    def act(rank):
        model, x = hand_cut(rank)
        torch.compile(model, backend=tpfuse_backend, options={"inner": "aot_eager", "policy": SharingPolicy(4)})(x)

    refused_on_every_rank(4, act, r"all_reduce of .* runs over the ranks \[\d, \d\], but SharingPolicy.*\[0, 1, 2, 3\]")


def test_fuse_graph_checks_them_before_it_changes_anything():
    with fake_world(4, 3):
        model, x = hand_cut(3)
        graph = trace(model, x)
        before = graph.code
        with pytest.raises(PolicyError, match=r"ranks \[2, 3\]"):
            tpfuse.fuse_graph(graph, policy=SharingPolicy(4))
        assert graph.code == before
        assert tpfuse.fuse_graph(graph, policy=SharingPolicy(4, 2)).fused


def report_of(*group, feeds_norm=False):
    return Report([Boundary("unknown", "", "all_reduce", group, feeds_norm=feeds_norm)])


def test_groups_of_another_kind_of_parallelism_are_left_alone():
    """Rank 5 of a TP group 4..7 inside a world of eight, beside a group that shards or replicates the model."""
    policy = SharingPolicy(4, 2)
    with fake_world(8, 5):
        for group in [(4, 5), (5, 7), (4, 5, 6, 7), (1, 5), tuple(range(8))]:
            check_groups(report_of(*group), policy)
        for group, feeds_norm in [((5, 6), False), ((4, 5, 6), False), (tuple(range(8)), True)]:
            with pytest.raises(PolicyError, match="disagree"):
                check_groups(report_of(*group, feeds_norm=feeds_norm), policy)


def explained_on(full, dims, policy):
    """The report on a model that `dims` of the mesh `full` cut; rank 0 of a fake world."""
    torch._dynamo.reset()
    model = parallelize(nn.Sequential(build(lambda: Layer(MLP()))), full[dims], policy)
    with torch.no_grad():
        return tpfuse.explain(model, (torch.randn(2, 3, HIDDEN).double(),))


def test_the_tp_group_is_the_one_that_parallelize_saw():
    """Whatever other groups of as many ranks there are: they were made for another kind of parallelism."""
    with fake_world(8):
        full = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("replica", "dp", "attn_tp"))
        dist.new_group([0, 1, 4, 5])
        report = explained_on(full, ("dp", "attn_tp"), SharingPolicy(4, 2, None))
        assert [b.group for b in report.boundaries] == [(0, 1), (0, 2), (0, 1, 2, 3)]
    with fake_world(4):
        full = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
        report = explained_on(full, "tp", SharingPolicy(2, 1, 2))
        assert [(b.group, b.layout_in) for b in report.boundaries] == [((0, 1), "TP_ATTN_FULL")] * 2


# -- equal rows -------------------------------------------------------------------------------------------------------


def run_rows(rank, model, policy, batches, backend, dynamic):
    parallelize(model, mesh_of(policy), policy)
    options = {"inner": "aot_eager"} if backend is tpfuse_backend else None
    run = torch.compile(model, backend=backend, options=options, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for batch in batches:
            run(batch[rank // policy.attn_tp_size])
    return executed_collectives(run, batches[-1][rank // policy.attn_tp_size])["all_gather"] if rank == 0 else None


@compiles_in_threads
@pytest.mark.parametrize(
    ("backend", "dynamic", "tp"),
    [(tpfuse_backend, False, 2)]
    + [
        pytest.param(*way, 4, marks=pytest.mark.nightly)
        for way in ((tpfuse_backend, False), (tpfuse_backend, True), ("aot_eager", True), ("aot_eager", False))
    ],
)
def test_unannounced_unequal_rows_are_refused_in_compiled_code(backend, dynamic, tp):
    torch._dynamo.reset()
    models, policy = [build(lambda: Model(routed=False)) for _ in range(tp)], SharingPolicy(tp, 2, None)
    with pytest.raises(RuntimeError, match=r"replicas hold \[6, 3\] rows.*tpfuse.rows\(\(6, 3\)\)"):
        run_threads(tp, lambda r: run_rows(r, models[r], policy, [batches_of((2, 1))], backend, dynamic))


def run_too_many(rank, model, policy, batches, backend):
    parallelize(model, mesh_of(policy), policy)
    options = {"inner": "aot_eager"} if backend is tpfuse_backend else None
    run = torch.compile(model, backend=backend, options=options, fullgraph=True, dynamic=False)
    replica = rank // policy.attn_tp_size
    with torch.no_grad():
        run(batches[0][replica])
        with pytest.raises(Exception, match=r"replica 1 has 9 rows; SharingPolicy.max_rows allows 7"):
            run(batches[1][replica])
        return run(batches[0][replica]).shape


@compiles_in_threads
@pytest.mark.parametrize(
    ("backend", "tp"),
    [(tpfuse_backend, 2), *(pytest.param(b, 4, marks=pytest.mark.nightly) for b in (tpfuse_backend, "aot_eager"))],
)
def test_too_many_rows_on_one_replica_are_one_error_in_compiled_code(backend, tp):
    torch._dynamo.reset()
    models = [build(lambda: Model(routed=False)) for _ in range(tp)]
    policy, batches = SharingPolicy(tp, 2, None, max_rows=7), [batches_of((2, 1)), batches_of((2, 3))]
    run_threads(tp, lambda r: run_too_many(r, models[r], policy, batches, backend))


def test_the_check_leaves_nothing_in_the_graph():
    """Equal rows on the first call; afterwards no collective but the boundaries' own, also in graphs compiled later."""
    policy = SharingPolicy(4, 2, 4, residual="replicated")
    torch._dynamo.reset()
    with fake_world(4):
        model = parallelize(build(lambda: Model(routed=False)).eval(), mesh_of(policy), policy)
        model = torch.compile(model, backend=tpfuse_backend, options={"inner": "aot_eager"}, dynamic=False)
        with torch.no_grad():
            seen = [executed_collectives(model, batches_of((n,))[0])["all_gather"] for n in (2, 2, 3)]
    # One gather over the replicas for each dense layer. (Fake collectives give zeros; four layers would not matter.)
    assert seen == [3, 2, 2]
