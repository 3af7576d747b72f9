"""A decorated model under every policy: equal to the unsharded one, gradients included, on 2, 4 and 8 ranks."""

import contextlib
import copy
import functools

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from tests.policy_harness import HIDDEN, VOCAB, Model, build, loss_of, relative, run_threads
from tests.ranks import run_processes
from tpfuse.errors import PolicyError
from tpfuse.parallel.parallelize import parallelize
from tpfuse.parallel.rows import rows
from tpfuse.policy import SharingPolicy

MESHES = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 4)]
POLICIES = [(tp, dp, dense) for tp, dp in MESHES for dense in sorted({1, tp // dp, tp})]


def mesh_of(policy):
    if policy.dp_size == 1:
        return init_device_mesh("cpu", (policy.tp_size,))
    return init_device_mesh("cpu", (policy.dp_size, policy.attn_tp_size), mesh_dim_names=("dp", "attn_tp"))


def batches_of(counts, length=3):
    """For each dp replica, ids of `counts[d]` sequences."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (count, length), generator=generator) for count in counts]


def oracle(model, batches):
    """Logits for each replica, and the gradients of the sum of all replicas' losses."""
    model = copy.deepcopy(model)
    logits = model(torch.cat(batches))
    loss_of(logits).backward()
    return logits.detach().split([len(b) for b in batches]), {n: p.grad for n, p in model.named_parameters()}


def worst_error(model, logits, want, grads):
    """The largest error of outputs and gradients, each relative to its largest value, and where it is."""
    errors = {"logits": relative(logits.detach(), want)}
    floor = 1e-3 * max(g.abs().max().item() for g in grads.values())  # a key bias has no gradient but noise
    for name, parameter in model.named_parameters():
        cut = model._tpfuse.cuts.get(name)
        whole = grads[name] if cut is None else cut.take(grads[name])
        errors[name] = (parameter.grad - whole).abs().max().item() / max(floor, whole.abs().max().item())
    return max((value, name) for name, value in errors.items())


def run_eager(rank, model, policy, batches, want, grads):
    parallelize(model, mesh_of(policy), policy)
    replica = rank // policy.attn_tp_size
    announce = len({len(b) for b in batches}) > 1
    with rows([b.numel() for b in batches] if announce else [batches[0].numel()] * policy.dp_size):
        logits = model(batches[replica])
        loss_of(logits).backward()
    return worst_error(model, logits, want[replica], grads)


@pytest.mark.parametrize(("tp", "dp", "dense"), POLICIES)
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_equals_the_unsharded_model(tp, dp, dense, kv_heads):
    plain = build(lambda: Model(True, kv_heads))
    policy = SharingPolicy(tp, dp, dense)
    batches = batches_of([2] * dp)
    want, grads = oracle(plain, batches)
    models = [copy.deepcopy(plain) for _ in range(tp)]
    worst = max(run_threads(tp, lambda r: run_eager(r, models[r], policy, batches, want, grads)))
    assert worst[0] < 1e-11, worst


@pytest.mark.parametrize("dense", [1, 2, 4])
def test_float32_is_within_rounding(dense):
    plain = build(lambda: Model(True), dtype=torch.float32)
    policy = SharingPolicy(4, 2, dense)
    batches = batches_of([2, 2])
    want, grads = oracle(plain, batches)
    models = [copy.deepcopy(plain) for _ in range(4)]
    worst = max(run_threads(4, lambda r: run_eager(r, models[r], policy, batches, want, grads)))
    assert worst[0] < 1e-5, worst


@pytest.mark.parametrize("counts", [(5, 3), (0, 2), (1, 0), (2, 1)])
@pytest.mark.parametrize("dense", [1, 2, 4])
def test_uneven_and_empty_replicas(counts, dense):
    plain = build(lambda: Model(True))
    policy = SharingPolicy(4, 2, dense)
    batches = batches_of(counts)
    want, grads = oracle(plain, batches)
    models = [copy.deepcopy(plain) for _ in range(4)]
    worst = max(run_threads(4, lambda r: run_eager(r, models[r], policy, batches, want, grads)))
    assert worst[0] < 1e-11, worst


def run_shapes(rank, model, policy, inputs, want):
    parallelize(model, mesh_of(policy), policy)
    replica = rank // policy.attn_tp_size
    return [relative(model(x[replica]).detach(), w[replica]) for x, w in zip(inputs, want, strict=True)]


@pytest.mark.parametrize("dense", [1, 2, 4])
def test_any_leading_shape(dense):
    plain = build(lambda: Model(True)).layers[2].mlp
    dense_mlp = build(lambda: Model(True)).layers[0].mlp
    shapes = [(HIDDEN,), (5, HIDDEN), (2, 3, HIDDEN), (2, 1, 3, HIDDEN), (0, HIDDEN), (2, 0, HIDDEN)]
    inputs = [torch.randn(2, *shape, dtype=torch.float64) for shape in shapes]
    policy = SharingPolicy(4, 2, dense)

    def run(module):
        want = [module(x).detach() for x in inputs]
        models = [copy.deepcopy(module) for _ in range(4)]
        return run_threads(4, lambda r: run_shapes(r, models[r], policy, inputs, want))

    for module in (plain, dense_mlp):
        errors = run(module)
        assert max(map(max, errors)) < 1e-11, errors


def run_patched(rank, model, *args):
    for mlp in (model.layers[0].mlp, model.layers[1].mlp):
        mlp.forward = functools.partial(type(mlp).forward, mlp)  # as accelerate's hooks and Liger's patches do
    return run_eager(rank, model, *args)


@pytest.mark.parametrize("dense", [1, 4])
def test_a_forward_put_on_an_instance_runs_inside_the_boundary(dense):
    plain, policy, batches = build(lambda: Model(False)), SharingPolicy(4, 2, dense), batches_of((1, 2))
    want, grads = oracle(plain, batches)
    models = [copy.deepcopy(plain) for _ in range(4)]
    worst = max(run_threads(4, lambda r: run_patched(r, models[r], policy, batches, want, grads)))
    assert worst[0] < 1e-11, worst


def run_max_rows(rank, model, policy, batches, want, grads):
    parallelize(model, mesh_of(policy), policy)
    replica = rank // policy.attn_tp_size
    logits = model(batches[replica])
    loss_of(logits).backward()
    return worst_error(model, logits, want[replica], grads)


@pytest.mark.parametrize("counts", [(2, 1), (0, 2), (2, 2)])
def test_max_rows_in_the_policy_needs_no_announcement(counts):
    plain = build(lambda: Model(True))
    policy = SharingPolicy(4, 2, 4, max_rows=7)
    batches = batches_of(counts)
    want, grads = oracle(plain, batches)
    models = [copy.deepcopy(plain) for _ in range(4)]
    worst = max(run_threads(4, lambda r: run_max_rows(r, models[r], policy, batches, want, grads)))
    assert worst[0] < 1e-11, worst


def run_unequal(rank, model, policy, batches):
    parallelize(model, mesh_of(policy), policy)
    for _ in range(2):
        with pytest.raises(PolicyError, match=r"replicas hold \[6, 3\] rows.*tpfuse.rows\(\(6, 3\)\)"):
            model(batches[rank // policy.attn_tp_size])


def test_unannounced_unequal_rows_are_refused_at_every_call():
    models = [build(Model) for _ in range(4)]
    run_threads(4, lambda r: run_unequal(r, models[r], SharingPolicy(4, 2, 4), batches_of((2, 1))))


def run_wrong(rank, model, policy, calls, words):
    """Every call but the last is right; that one raises the same error on every rank."""
    parallelize(model, mesh_of(policy), policy)
    replica = rank // policy.attn_tp_size
    for sequences, counts in calls[:-1]:
        with rows(counts[replica]) if counts else contextlib.nullcontext():
            model(batches_of(sequences)[replica])
    sequences, counts = calls[-1]
    with rows(counts[replica]) if counts else contextlib.nullcontext(), pytest.raises(PolicyError, match=words) as seen:
        model(batches_of(sequences)[replica])
    return str(seen.value)


#: (policy's max_rows, what each replica calls the model with: sequences of 3 rows, and the rows it announces, words)
WRONG = {
    "too many rows on one replica": (7, [((2, 1), None), ((1, 3), None)], "replica 1 has 9 rows.*max_rows allows 7"),
    "unequal rows after equal ones": (None, [((2, 2), None), ((2, 1), None)], r"replicas hold \[6, 3\] rows"),
    "one replica announces other rows": (
        None, [((2, 1), [(6, 3)] * 2), ((2, 1), [(6, 3), (6, 5)])], "replica 1 has 3 rows.*announced 5 for dp replica 1"
    ),
    "the replicas the wrong way round": (None, [((2, 1), [(3, 6)] * 2)], "6 rows.*announced 3 for dp replica 0"),
    "other announcements that are right for each": (None, [((2, 1), [(6, 2), (7, 3)])], r"pad to \[6, 7\] rows"),
    "counts for other replicas on one": (None, [((2, 1), [(6, 3), (6, 3, 0)])], "announced 3 counts; allowed: one"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_rows_that_are_wrong_on_one_replica_are_one_error_on_all(case):
    max_rows, calls, words = case
    models = [build(Model) for _ in range(4)]
    policy = SharingPolicy(4, 2, 4, max_rows=max_rows)
    said = run_threads(4, lambda r: run_wrong(r, models[r], policy, calls, words))
    assert len(set(said)) == 1


def run_gloo(rank, dense):
    torch.set_default_dtype(torch.float64)
    policy = SharingPolicy(2, 1, dense) if dense != "dp" else SharingPolicy(2, 2, 2)
    batches = batches_of((2, 0) if dense == "dp" else (2,))
    plain = build(Model)
    want, grads = oracle(plain, batches)
    return run_eager(rank, plain, policy, batches, want, grads)


@pytest.mark.parametrize("dense", ["dp", *(pytest.param(dense, marks=pytest.mark.nightly) for dense in (1, 2))])
def test_real_processes(dense):
    assert max(run_processes(2, run_gloo, dense))[0] < 1e-11
