"""The compiled model under every sharing policy: numbers, collectives around a dense layer, and each rewrite alone."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import tpfuse
from tpfuse.backend import tpfuse as tpfuse_backend
from tpfuse.parallel.parallelize import parallelize
from tpfuse.parallel.rows import rows
from tpfuse.passes.facts.groups import mesh_groups, resolve_group
from tpfuse.passes.pipeline import PassOptions, fuse
from tpfuse.passes.plan import layouts
from tpfuse.passes.plan.sites import REWRITES
from tpfuse.policy import SharingPolicy

from .graphs import executed_collectives, fake_world, fused, on_ranks, trace
from .policy_harness import (
    HIDDEN,
    MLP,
    Layer,
    Model,
    RMSNorm,
    build,
    compiles_in_threads,
    loss_of,
    relative,
    run_threads,
)
from .test_parallelize_models import POLICIES, batches_of, mesh_of, oracle, worst_error

#: Where `strict` is off because a sum over the whole group may stay at few rows, an internal error is still one.
pytestmark = pytest.mark.filterwarnings("error:tpfuse left a graph")

#: (tp, dp, dense): one policy on each of 2, 4 and 8 ranks; the rest of the matrix runs nightly.
SHORT = [(2, 2, 1), (4, 2, 2)]
MATRIX = [p if p in SHORT else pytest.param(*p, marks=pytest.mark.nightly) for p in POLICIES]


class Decoder(nn.Module):
    """Two dense layers and a final norm, over hidden states."""

    def __init__(self, layers: int = 2):
        super().__init__()
        self.layers = nn.ModuleList(Layer(MLP()) for _ in range(layers))
        self.norm = RMSNorm(HIDDEN)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def compile_for(model, policy, dynamic=None, **options):
    parallelize(model, mesh_of(policy), policy)
    options = {"inner": "aot_eager", "policy": policy, "strict": True, **options}
    # By function: threads that look a backend's name up for the first time at once race in Dynamo's registry.
    return torch.compile(model, backend=tpfuse_backend, options=options, fullgraph=True, dynamic=dynamic)


@pytest.fixture
def free_starts(monkeypatch):
    """Starting a collective costs nothing, so that bytes alone decide, as they do with many rows."""
    monkeypatch.setattr(layouts, "LATENCY_US", 0.0)


def run_inference(rank, model, policy, batches, want):
    replica = rank // policy.attn_tp_size
    with torch.no_grad(), rows([batch.numel() for batch in batches]):
        return relative(compile_for(model, policy, strict=False)(batches[replica]), want[replica])


@compiles_in_threads
@pytest.mark.parametrize(("tp", "dp", "dense"), MATRIX)
def test_compiled_equals_the_unsharded_model(tp, dp, dense):
    torch._dynamo.reset()
    plain = build(lambda: Model(routed=(tp, dp, dense) not in SHORT or tp < 8)).eval()
    policy = SharingPolicy(tp, dp, dense)
    batches = batches_of([2] * dp)
    want, _ = oracle(plain, batches)
    models = [copy.deepcopy(plain) for _ in range(tp)]
    assert max(run_threads(tp, lambda r: run_inference(r, models[r], policy, batches, want))) < 1e-11


@pytest.mark.nightly
@compiles_in_threads
@pytest.mark.parametrize("residual", ["scattered", "replicated"])
@pytest.mark.parametrize("dense", [1, 2, 4])
def test_either_layout_of_the_residual_gives_the_same_numbers(dense, residual):
    torch._dynamo.reset()
    plain = build(lambda: Model(routed=False)).eval()
    policy = SharingPolicy(4, 2, dense, residual=residual)
    # Five rows do not divide by two ranks: the padding lives inside the boundary.
    batches = [b[:, :5] for b in batches_of([1, 1], 5)]
    want, _ = oracle(plain, batches)
    models = [copy.deepcopy(plain) for _ in range(4)]
    assert max(run_threads(4, lambda r: run_inference(r, models[r], policy, batches, want))) < 1e-11


@compiles_in_threads
@pytest.mark.parametrize("counts", [(2, 1), *(pytest.param(c, marks=pytest.mark.nightly) for c in [(2, 2), (0, 2)])])
@pytest.mark.parametrize("residual", ["replicated", pytest.param("auto", marks=pytest.mark.nightly)])
def test_sums_paid_in_factors_give_the_same_numbers(counts, residual, free_starts):
    """Also where the replicas' rows differ, and the padding is cut off between the two factors."""
    torch._dynamo.reset()
    plain = build(lambda: Model(routed=False)).eval()
    policy, batches = SharingPolicy(4, 2, 4, residual=residual), batches_of(counts)
    want, _ = oracle(plain, batches)
    models = [copy.deepcopy(plain) for _ in range(4)]
    assert max(run_threads(4, lambda r: run_inference(r, models[r], policy, batches, want))) < 1e-11


# -- the collectives around a dense layer -----------------------------------------------------------------------------


def explained(policy, rank=0, length=5, **options):
    """(report, executed collectives of the compiled model) for one rank of 8."""
    torch._dynamo.reset()
    with fake_world(policy.tp_size, rank):
        model = compile_for(build(Decoder).eval(), policy, **options)
        x = torch.randn(2, length, HIDDEN, dtype=torch.float64)
        with torch.no_grad():
            model(x)
            executed = executed_collectives(model, x)
        return tpfuse.reports()[-1], executed


@pytest.mark.parametrize("rank", [0, 3, 6])
def test_sharing_the_attention_group_costs_two_fused_all_reduces_a_layer(rank):
    report, executed = explained(SharingPolicy(8, 2, 4), rank)
    members = tuple(range(4)) if rank < 4 else tuple(range(4, 8))
    assert [(b.rewrite, b.group) for b in report.boundaries] == [("all_reduce_norm", members)] * 4
    assert executed == {"all_reduce": 4}, "two layers: no gather, no scatter, nothing over the whole group"


@pytest.mark.parametrize("rank", [3, *(pytest.param(r, marks=pytest.mark.nightly) for r in (0, 6))])
@pytest.mark.parametrize(
    ("length", "dynamic"), [(4, None), (5, None), pytest.param(5, True, marks=pytest.mark.nightly)]
)
def test_whole_weights_cost_one_reduce_scatter_and_one_all_gather_a_layer(rank, length, dynamic):
    report, executed = explained(SharingPolicy(8, 2, 1), rank, length, dynamic=dynamic)
    assert [b.rewrite for b in report.boundaries] == ["scatter_dense"] * 4
    assert [b.collective for b in report.fused] == ["all_reduce"] * 2
    assert executed == {"reduce_scatter": 2, "all_gather": 2}


@pytest.mark.parametrize("residual", ["replicated", "auto"])
def test_at_few_rows_one_collective_over_the_whole_group_is_kept(residual):
    """Two collectives would cost more than the bytes they save; the choice is no missed fusion."""
    report, executed = explained(SharingPolicy(8, 2, None, residual=residual, max_rows=16))
    kept = [b for b in report.boundaries if len(b.group) == 8]
    assert [(b.collective, b.rewrite, b.before == b.after) for b in kept] == [("all_reduce", None, True)] * 2
    assert all("16 rows, which the policy states as max_rows" in b.reason for b in kept) and not report.missed
    assert all(b.feeds_norm and b.demanded for b in kept)
    assert executed == {"all_reduce": 4, "all_gather": 2}


def test_a_sum_that_stays_for_the_sake_of_assumed_rows_is_a_missed_fusion():
    policy = SharingPolicy(8, 2, None)
    report, _ = explained(policy, strict=False)
    assert [b.group for b in report.missed] == [tuple(range(8))] * 2
    assert all("assumed because the policy states no max_rows" in b.reason for b in report.missed)
    with pytest.raises(tpfuse.FusionError, match="state max_rows, or residual='scattered'"):
        explained(policy, strict=True)


def test_at_many_rows_the_whole_group_is_left_for_cheaper_factors():
    """Ten rows padded to many: the second factor works on the ten, and is fused with its norm."""
    report, executed = explained(SharingPolicy(8, 2, None, residual="replicated", max_rows=16384))
    assert [b.rewrite for b in report.boundaries if b.collective == "all_reduce"] == [
        "all_reduce_norm",
        "gather_full_tp",
    ] * 2
    assert executed == {"all_reduce": 4, "all_gather": 2, "reduce_scatter": 2}


def test_the_whole_group_with_a_scattered_residual():
    """In: reduce-scatter over attention, gather over everyone. Out: reduce-scatter over everyone, gather."""
    report, executed = explained(SharingPolicy(8, 2, None, residual="scattered"), length=4)
    assert executed == {"reduce_scatter": 4, "all_gather": 4}
    assert len(report.fused) == 4


@pytest.mark.parametrize(
    ("rewrite", "policy", "executed"),
    [
        ("scatter_dense", SharingPolicy(8, 2, 1), {"all_reduce": 2, "all_gather": 2}),
        ("gather_full_tp", SharingPolicy(8, 2, None, residual="replicated"), {"all_reduce": 4, "all_gather": 2}),
    ],
)
def test_without_its_rewrite_the_straightforward_collectives_stay(rewrite, policy, executed, free_starts):
    report, seen = explained(policy)
    assert seen != executed and rewrite in {b.rewrite for b in report.boundaries}
    others = [name for name in REWRITES if name != rewrite]
    report, seen = explained(policy, rewrites=others, strict=False)
    assert seen == executed and rewrite not in {b.rewrite for b in report.boundaries}


# -- share_attention_group: hand-written gather form ------------------------------------------------------------------


def gather_form(rank: int, scattered_entry: bool):
    """Two boundaries with a scattered residual, as SGLang's gather form has them, written for one rank."""
    world = dist.group.WORLD.group_name
    c10d = torch.ops._c10d_functional

    def reduce_scatter(x):
        return c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "sum", 4, world))

    def all_gather(x):
        return c10d.wait_tensor(c10d.all_gather_into_tensor(x, 4, world))

    def run(partial, residual, weight, own):
        """The own rows of the residual are handed in, or cut from the whole one."""
        own = own if scattered_entry else residual.chunk(4)[rank]
        for _ in range(2):
            own = own + reduce_scatter(partial)
            y = all_gather(weight * (own * torch.rsqrt(own.pow(2).mean(-1, keepdim=True) + 1e-6)))
            partial = torch.tanh(y) * partial
        return y, own

    return run


def gather_form_inputs():
    """(a partial sum per rank, the whole residual, the norm's weight, each rank's own rows of the residual)."""
    torch.manual_seed(0)
    residual, weight = torch.randn(8, 16, dtype=torch.float64), torch.rand(16, dtype=torch.float64)
    partials = [torch.randn(8, 16, dtype=torch.float64) for _ in range(4)]
    return partials, residual, weight, list(residual.chunk(4))


def shared_on(rank: int, scattered_entry: bool):
    """(report, executed collectives, result of `rank`) of the rewritten gather form, compiled as that rank would."""
    arguments = gather_form_inputs()
    first = [a[0] if isinstance(a, list) else a for a in arguments]
    with fake_world(4, rank):
        after, report = fused(trace(gather_form(rank, scattered_entry), *first))
        return report, executed_collectives(after, *first), on_ranks(after, 4, *arguments)[rank], after


def gather_form_exactly(rank: int):
    partials, residual, weight, _ = gather_form_inputs()
    hidden = residual
    for _ in range(2):
        hidden = hidden + sum(partials)
        y = weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6))
        partials = [torch.tanh(y) * partial for partial in partials]
    return [y, hidden.chunk(4)[rank]]


@pytest.mark.parametrize("rank", range(4))
def test_gather_form_becomes_all_reduces_with_the_residual_replicated(rank):
    report, executed, result, _ = shared_on(rank, scattered_entry=True)
    assert [b.rewrite for b in report.boundaries] == ["share_attention_group"] * 4
    assert [b.fused for b in report.boundaries if b.collective == "reduce_scatter"] == [True, True]
    # The scattered residual is gathered once, at the entry of the chain, and never again.
    assert executed == {"all_reduce": 2, "all_gather": 1}
    torch.testing.assert_close(result, gather_form_exactly(rank))


@pytest.mark.parametrize("rank", range(4))
def test_a_residual_cut_in_the_graph_is_not_even_gathered(rank):
    _, executed, result, _ = shared_on(rank, scattered_entry=False)
    assert executed == {"all_reduce": 2}
    torch.testing.assert_close(result, gather_form_exactly(rank))


def test_a_scattered_residual_is_never_added_to_unscattered_rows():
    """An all-reduce inside the attention group with the residual left scattered adds rows of different layouts."""
    _, _, result, after = shared_on(2, scattered_entry=True)
    pairs = [n.args[:2] for n in after.graph.nodes if "all_reduce_norm" in str(n.target)]
    assert [(x.meta["val"].shape, r.meta["val"].shape) for x, r in pairs] == [((8, 16), (8, 16))] * 2
    torch.testing.assert_close(result, gather_form_exactly(2))


def test_without_its_rewrite_the_gather_form_stays_scattered():
    others = tuple(name for name in REWRITES if name != "share_attention_group")
    first = [a[0] if isinstance(a, list) else a for a in gather_form_inputs()]
    with fake_world(4):
        graph = trace(gather_form(0, True), *first)
        outcome = fuse(graph.graph, resolve_group, PassOptions(rewrites=others))
    kinds = {b.collective: b.rewrite for b in outcome.report.boundaries}
    assert kinds == {"reduce_scatter": "reduce_scatter_norm", "all_gather": None}


# -- training ---------------------------------------------------------------------------------------------------------


def run_training(rank, model, policy, batches, want, grads):
    replica = rank // policy.attn_tp_size
    logits = compile_for(model, policy, strict=False)(batches[replica])
    loss_of(logits).backward()
    return worst_error(model, logits, want[replica], grads)


@compiles_in_threads
@pytest.mark.parametrize("dense", [2, *(pytest.param(d, marks=pytest.mark.nightly) for d in (1, 4))])
def test_compiled_gradients_equal_the_unsharded_models(dense, free_starts):
    torch._dynamo.reset()
    plain = build(lambda: Model(routed=False))
    policy = SharingPolicy(4, 2, dense)
    batches = batches_of([2, 2])
    want, grads = oracle(plain, batches)
    models = [copy.deepcopy(plain) for _ in range(4)]
    worst = max(run_threads(4, lambda r: run_training(r, models[r], policy, batches, want, grads)))
    assert worst[0] < 1e-11, worst


def test_a_training_graph_keeps_its_layouts_and_says_why():
    torch._dynamo.reset()
    with fake_world(8, 3):
        model = compile_for(build(Decoder), SharingPolicy(8, 2, 1))
        model(torch.randn(2, 4, HIDDEN, dtype=torch.float64))
    forward = [b for b in tpfuse.reports()[-1].boundaries if b.direction == "forward"]
    assert [(b.collective, b.rewrite) for b in forward] == [("all_reduce", "all_reduce_norm"), ("all_gather", None)] * 2
    assert "backward pass reads the rows that forward had" in forward[1].reason
    assert all(b.before == b.after for b in forward)


def test_a_one_dimensional_mesh_means_one_replica():
    torch._dynamo.reset()
    with fake_world(4, 1):
        model = parallelize(build(Decoder).eval(), init_device_mesh("cpu", (4,)), SharingPolicy(4))
        with torch.no_grad():
            report = tpfuse.explain(model, (torch.randn(2, 5, HIDDEN, dtype=torch.float64),), {})
    assert [b.rewrite for b in report.boundaries] == ["all_reduce_norm"] * 4


# -- what the report says of it ---------------------------------------------------------------------------------------


def lines_of(policy, rank=3, **options):
    """(layouts, collectives before, after) of every boundary of the first layer, groups by their names."""
    report, executed = explained(policy, rank, length=4, **options)
    mesh = mesh_groups(policy.tp_size, policy.dp_size, rank, [tuple(range(policy.tp_size))])

    def written(transfers):
        return " + ".join(f"{t.collective}({mesh.called(t.group)})" for t in transfers)

    # What the report counts is what runs.
    assert executed == Counter(t.collective for b in report.boundaries for t in b.after)
    first_layer = report.boundaries[: len(report.boundaries) // 2]
    return [(b.layout_in, b.layout_out, written(b.before), written(b.after)) for b in first_layer]


A_AR, A_RS, A_AG = "all_reduce(attention)", "reduce_scatter(attention)", "all_gather(attention)"


@pytest.mark.parametrize(
    ("policy", "lines"),
    [
        (SharingPolicy(8, 2, 4), [("TP_ATTN_FULL", "TP_ATTN_FULL", A_AR, A_AR)] * 2),
        (
            SharingPolicy(8, 2, 1),
            [("TP_ATTN_FULL", "SCATTERED", A_AR, A_RS), ("SCATTERED", "TP_ATTN_FULL", A_AG, A_AG)],
        ),
        (
            SharingPolicy(8, 2, None, residual="scattered"),
            [
                ("TP_ATTN_FULL", "SCATTERED", A_AR, A_RS),
                ("SCATTERED", "FULL", "all_gather(dp)", "all_gather(whole)"),
                ("FULL", "TP_ATTN_FULL", "all_reduce(whole)", f"reduce_scatter(whole) + {A_AG}"),
            ],
        ),
    ],
)
def test_the_report_shows_layouts_and_collectives_before_and_after(policy, lines):
    assert lines_of(policy) == lines


def test_the_report_counts_the_bytes_that_each_rank_sends():
    report, _ = explained(SharingPolicy(8, 2, 1), length=4)
    rows = 2 * 4 * HIDDEN * 8
    assert [(b.bytes_before, b.bytes_after) for b in report.boundaries[:2]] == [
        (2 * rows * 3 / 4, rows * 3 / 4),  # an all-reduce sends twice what a reduce-scatter sends
        (rows * 3 / 4, rows * 3 / 4),
    ]
    again = tpfuse.Report.from_json(report.to_json())
    assert again == report
    for shown in ("TP_ATTN_FULL →", "reduce_scatter", "3072 B → 1536 B"):
        assert shown in str(report)
