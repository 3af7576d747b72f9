"""Hugging Face families under their own plans and every policy, with a static cache: prefill, decode and `generate`.

Collectives that are performed are those that the planner announced; tokens are the uncut model's.
"""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch

import tpfuse
from tpfuse.backend import tpfuse as tpfuse_backend
from tpfuse.parallel.generation import SyncedGenerate
from tpfuse.parallel.parallelize import parallelize
from tpfuse.policy import SharingPolicy

from .graphs import collectives_of, executed_collectives, fake_world
from .policy_harness import compiles_in_threads, run_threads
from .test_parallelize_families import model_of
from .test_parallelize_models import mesh_of

pytestmark = pytest.mark.filterwarnings("error:tpfuse left a graph")

FAMILIES = ["llama", "qwen3_moe", "deepseek_v3", "glm4_moe"]
MODES = ["prefill", "decode", "generate"]
#: (tp, dp, moe_dense_tp_size): the whole group, own rows, and the attention group, on each mesh.
POLICIES = [(tp, dp, dense) for tp, dp in [(4, 2), (8, 2), (8, 4)] for dense in (None, 1, tp // dp)]
#: What runs with every change; everything else is nightly.
SHORT = {
    "collectives": {("llama", 8, 2, None, "decode")},
    "tokens": {("llama", 4, 2, None, "prefill")},
}
PROMPT, STEPS = 3, 3
WHOLE_GROUP, OWN_ROWS, ATTENTION_GROUP = "gather_full_tp", "scatter_dense", "all_reduce_norm"


def cells(kind: str):
    """Every family, policy and mode."""
    for family in FAMILIES:
        for policy in POLICIES:
            for mode in MODES:
                cell = (family, *policy, mode)
                yield pytest.param(*cell, marks=() if cell in SHORT[kind] else pytest.mark.nightly)


def policy_of(tp: int, dp: int, dense: int | None) -> SharingPolicy:
    """Tiny models are cheapest with the fewest collectives, so layouts are asked for where the policy has a choice."""
    return SharingPolicy(tp, dp, dense, residual="auto" if dense == tp // dp else "scattered")


def cut(model, policy):
    parallelize(model, mesh_of(policy), policy)
    model.config._experts_implementation = "grouped_mm"  # the eager one loops over data and breaks the graph
    return model


def cache_of(model):
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=16)


def step_of(model):
    """Logits of tokens at their positions, which go into the cache."""

    def step(ids, cache, position):
        return model(ids, past_key_values=cache, position_ids=position, use_cache=True).logits

    return step


def compiled(model):
    return torch.compile(step_of(model), backend=tpfuse_backend, options={"inner": "aot_eager"}, fullgraph=True)


def positions(ids, start: int = 0):
    return torch.arange(start, start + ids.shape[1]).expand(ids.shape)


def greedy(model, prefill, decode, ids):
    """Tokens of a prefill and of some steps behind it. The cache is there before: lazy caches compile no prefill."""
    cache = cache_of(model)
    step_of(model)(ids, cache, positions(ids))
    cache.reset()
    tokens = [prefill(ids, cache, positions(ids))[:, -1:].argmax(-1)]
    for at in range(STEPS):
        tokens.append(decode(tokens[-1], cache, positions(tokens[-1], PROMPT + at))[:, -1:].argmax(-1))
    return torch.cat(tokens, 1)


def generated(model, ids, new_tokens: int = 1 + STEPS, **ways):
    """The new tokens of Hugging Face's `generate`, which compiles its decode step where `ways` say how."""
    ways = {"do_sample": False, "cache_implementation": "static", "pad_token_id": 0, **ways}
    return model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **ways)[:, ids.shape[1] :]


def our_way():
    from transformers import CompileConfig

    way = CompileConfig(fullgraph=True, backend=tpfuse_backend, mode=None, options={"inner": "aot_eager"})
    way._compile_all_devices = True  # on CPUs, generate compiles only when told to
    return {"compile_config": way}


# -- what is communicated ---------------------------------------------------------------------------------------------


def dense_layers(model) -> list[int]:
    """The layers whose MLP is a dense one."""
    layers = enumerate(model.model.layers)
    return [at for at, layer in layers if not any("expert" in name for name, _ in layer.mlp.named_modules())]


def rewrites_at(report, *modules: str) -> list[str | None]:
    return [b.rewrite for b in report.boundaries if b.module in modules]


def check_rewrites(model, report, dense, attn):
    """Each dense layer has its policy's rewrite: in front of its MLP, and behind it."""
    assert dense_layers(model)
    for at in dense_layers(model):
        layer = f"model.layers.{at}"
        into = rewrites_at(report, f"{layer}.self_attn.o_proj")
        gather, out = rewrites_at(report, f"{layer}.mlp"), rewrites_at(report, f"{layer}.mlp.down_proj")
        found = {None: (into, gather, out), 1: (into, gather + out), attn: (into, out)}[dense]
        want = {
            None: ([WHOLE_GROUP], [WHOLE_GROUP], [WHOLE_GROUP]),
            1: ([OWN_ROWS], [OWN_ROWS]),
            attn: ([ATTENTION_GROUP], [ATTENTION_GROUP]),
        }[dense]
        assert found == want, f"layer {at}\n{report}"


def performed_by(model, mode: str, rows: int) -> Counter:
    """What one prefill, one decode step, or one more token of `generate` performs."""
    ids = torch.ones(rows, PROMPT, dtype=torch.long)
    if mode == "generate":
        return performed_for_the_last_token(lambda mark: generated(model, ids, 3, **our_way(), logits_processor=[mark]))
    cache = cache_of(model)
    step_of(model)(ids, cache, positions(ids))
    ids = ids if mode == "prefill" else ids[:, :1]
    cache.reset()
    step, given = compiled(model), (ids, cache, positions(ids, 0 if mode == "prefill" else PROMPT))
    step(*given)
    return executed_collectives(step, *given)


def performed_for_the_last_token(generate) -> Counter:
    """What stands between the last two calls of `mark`, which `generate` makes once for each token."""

    def mark(ids, scores):
        with torch.profiler.record_function("token"):
            return scores

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        generate(mark)
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    *_, before, last = (at for at, event in enumerate(events) if event.name == "token")
    return collectives_of(events[before:last])


@pytest.mark.parametrize(("family", "tp", "dp", "dense", "mode"), cells("collectives"))
def test_what_is_performed_is_what_was_announced(family, tp, dp, dense, mode):
    torch._dynamo.reset()
    with fake_world(tp, tp - 1), torch.no_grad():
        model = cut(model_of(family).float().eval(), policy_of(tp, dp, dense))
        performed = performed_by(model, mode, rows=tp // dp)
    report = tpfuse.reports()[-1]
    announced = Counter(t.collective for b in report.boundaries for t in b.after)
    if mode == "generate" and isinstance(model.generate, SyncedGenerate):
        announced["all_reduce"] += 1  # whether all replicas are done, asked after each token
    assert performed == announced, f"{performed} {announced}\n{report}"
    assert report.collectives_after == sum(len(b.after) for b in report.boundaries)
    check_rewrites(model, report, dense, tp // dp)


# -- tokens -----------------------------------------------------------------------------------------------------------


def tokens_on_rank(rank: int, model, policy: SharingPolicy, ids, mode: str):
    with torch.no_grad():
        model, own = cut(model, policy), ids[rank // policy.attn_tp_size]
        if mode == "generate":
            return generated(model, own, **our_way())
        prefill, decode = (compiled(model) if mode == it else step_of(model) for it in ("prefill", "decode"))
        return greedy(model, prefill, decode, own)


def check_tokens(family: str, policy: SharingPolicy, mode: str, rows: int):
    torch._dynamo.reset()
    plain = model_of(family).float().eval()
    ids = torch.randint(3, 64, (policy.dp_size, rows, PROMPT), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = [greedy(plain, step_of(plain), step_of(plain), own).tolist() for own in ids]
    models = [copy.deepcopy(plain) for _ in range(policy.tp_size)]
    before = len(tpfuse.reports())
    got = run_threads(policy.tp_size, lambda r: tokens_on_rank(r, models[r], policy, ids, mode))
    assert len(tpfuse.reports()) >= before + policy.tp_size, "some rank compiled nothing"
    for rank, tokens in enumerate(got):
        assert tokens.tolist() == want[rank // policy.attn_tp_size], f"rank {rank}"


@compiles_in_threads
@pytest.mark.parametrize(("family", "tp", "dp", "dense", "mode"), cells("tokens"))
def test_tokens_are_the_uncut_models(family, tp, dp, dense, mode):
    check_tokens(family, policy_of(tp, dp, dense), mode, rows=4)


@compiles_in_threads
@pytest.mark.nightly
@pytest.mark.parametrize("dense", [None, 1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_where_rows_do_not_divide_by_the_ranks(family, dense):
    check_tokens(family, policy_of(8, 2, dense), "decode", rows=3)
