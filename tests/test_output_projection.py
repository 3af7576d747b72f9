"""An output projection that a plan cuts, under data-parallel attention: over its replica's attention group, so that
logits are whole and right on every rank, and so are gradients and generated tokens, in eager mode and compiled."""

from __future__ import annotations

import copy

import pytest
import torch

import tpfuse
from tpfuse.backend import tpfuse as tpfuse_backend
from tpfuse.errors import PlanError
from tpfuse.parallel.parallelize import parallelize
from tpfuse.parallel.rows import rows
from tpfuse.policy import SharingPolicy

from .graphs import fake_world
from .policy_harness import VOCAB, Model, build, compiles_in_threads, loss_of, run_threads
from .test_parallelize_families import model_of
from .test_parallelize_models import batches_of, mesh_of, oracle, worst_error

PLANS = {
    "gather_output": {"head": "colwise_gather_output"},
    "rep": {"head": "colwise_rep"},
    "with the embedding": {"head": "colwise_rep", "embed": "embedding_rowwise"},
}


def error_on_rank(rank, model, policy, plan, batches, want, grads, compiled):
    parallelize(model, mesh_of(policy), policy, plan=plan)
    assert model.head.weight.shape[0] == model.head.bias.shape[0] == VOCAB // policy.attn_tp_size
    forward = torch.compile(model, backend=tpfuse_backend, options={"inner": "aot_eager"}) if compiled else model
    replica = rank // policy.attn_tp_size
    with rows([batch.numel() for batch in batches]):
        logits = forward(batches[replica])
        loss_of(logits).backward()
    return worst_error(model, logits, want[replica], grads)


def check(plan, dense, compiled):
    torch._dynamo.reset()
    plain, batches = build(lambda: Model(routed=False)), batches_of((2, 1))
    want, grads = oracle(plain, batches)
    models, policy = [copy.deepcopy(plain) for _ in range(4)], SharingPolicy(4, 2, dense)
    worst = max(run_threads(4, lambda r: error_on_rank(r, models[r], policy, plan, batches, want, grads, compiled)))
    assert worst[0] < 1e-11, worst


@pytest.mark.parametrize("dense", [1, 2, 4])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_logits_and_gradients_are_right_on_every_replica(plan, dense):
    check(plan, dense, compiled=False)


@compiles_in_threads
@pytest.mark.nightly
@pytest.mark.parametrize("dense", [1, 2, 4])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_compiled_logits_and_gradients_are_right_on_every_replica(plan, dense):
    check(plan, dense, compiled=True)


def tokens_on_rank(rank, model, policy, prompts):
    parallelize(model, mesh_of(policy), policy)
    with torch.inference_mode():
        return model.generate(
            prompts[rank // policy.attn_tp_size], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
        )


@pytest.mark.parametrize("dense", [1, 2, 4])
@pytest.mark.parametrize("family", ["qwen3", "llama"])  # of its own, and the embedding's
def test_every_replica_generates_for_its_own_prompts(family, dense):
    plain, policy = model_of(family).float().eval(), SharingPolicy(4, 2, dense)
    # Replicas that never meet may hold prompts of other sizes.
    sizes = [(2, 3), (2, 3)] if dense == 4 else [(2, 3), (1, 5)]
    prompts = [torch.randint(3, 64, size, generator=torch.Generator().manual_seed(at)) for at, size in enumerate(sizes)]
    ways = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    want = [plain.generate(own, **ways).tolist() for own in prompts]
    models = [copy.deepcopy(plain) for _ in range(4)]
    for rank, tokens in enumerate(run_threads(4, lambda r: tokens_on_rank(r, models[r], policy, prompts))):
        assert tokens.tolist() == want[rank // 2], f"rank {rank}"


@pytest.mark.parametrize("rank", [0, 3])
def test_columns_are_gathered_in_the_attention_group(rank):
    with fake_world(4, rank):
        model = parallelize(build(lambda: Model(routed=False)), mesh_of(policy := SharingPolicy(4, 2)), policy,
                            plan={"head": "colwise_rep"})  # fmt: skip
        with torch.no_grad():
            report = tpfuse.explain(model, (torch.ones(2, 3, dtype=torch.long),))
    (gather,) = (b for b in report.boundaries if b.module == "head")
    assert (gather.collective, gather.group) == ("all_gather", ((0, 1), (2, 3))[rank // 2])


def test_an_output_projection_whose_columns_are_not_gathered_is_refused_with_what_to_write():
    with fake_world(4):
        policy = SharingPolicy(4, 2)
        with pytest.raises(PlanError, match=r"'head',.* no row-wise one.*colwise_gather_output"):
            parallelize(build(Model), mesh_of(policy), policy, plan={"head": "colwise"})
