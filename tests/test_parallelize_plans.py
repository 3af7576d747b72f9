"""Plans in Hugging Face's style names: for any model, and what is refused in them."""

import copy
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.policy_harness import HEADS, Model, build, loss_of, relative, run_threads
from tests.test_parallelize_families import config_of, model_of
from tpfuse.errors import PlanError
from tpfuse.parallel.heads import Heads, heads_of
from tpfuse.parallel.hf_plan import read_plan
from tpfuse.parallel.parallelize import parallelize
from tpfuse.parallel.roles import Role
from tpfuse.policy import SharingPolicy

OPT_PLAN = {
    "model.decoder.layers.*.self_attn.q_proj": "colwise",
    "model.decoder.layers.*.self_attn.k_proj": "colwise",
    "model.decoder.layers.*.self_attn.v_proj": "colwise",
    "model.decoder.layers.*.self_attn.out_proj": "rowwise",
    "model.decoder.layers.*.fc1": "colwise",
    "model.decoder.layers.*.fc2": "rowwise",
}


class Feed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 16, padding_idx=3)
        self.blocks = nn.ModuleList([Feed(), Feed()])
        self.head = nn.Linear(16, 8)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


STACK_PLAN = {
    "embed": "embedding_rowwise",
    "blocks.*.up": "colwise",
    "blocks.*.down": "rowwise",
    "head": "colwise_gather_output",
}


def run_plan(rank, model, plan, policy, ids, want, grads):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "attn_tp"))
    parallelize(model, mesh, policy, plan=plan)
    out = model(ids[rank // 2])
    logits = getattr(out, "logits", out)
    loss_of(logits).backward()
    errors = [relative(logits.detach(), want[rank // 2])]
    for name, parameter in model.named_parameters():
        cut = model._tpfuse.cuts.get(name)
        whole = grads[name] if cut is None else cut.take(grads[name])
        errors.append((parameter.grad - whole).abs().max().item() / max(1e-3, whole.abs().max().item()))
    return max(errors), sorted(model._tpfuse.cuts)


def check_plan(plain, plan, policy, ids):
    models = [copy.deepcopy(plain) for _ in range(4)]
    out = plain(ids.flatten(0, 1))
    logits = getattr(out, "logits", out)
    loss_of(logits).backward()
    grads = {n: p.grad for n, p in plain.named_parameters()}
    want = logits.detach().unflatten(0, ids.shape[:2])
    results = run_threads(4, lambda r: run_plan(r, models[r], plan, policy, ids, want, grads))
    return max(error for error, _ in results), results[0][1]


def test_a_plan_with_names_of_its_own():
    worst, cuts = check_plan(build(Stack), STACK_PLAN, SharingPolicy(4, 2), torch.arange(8).view(2, 2, 2))
    assert worst < 1e-11
    assert {"embed.weight", "head.weight", "head.bias", "blocks.1.up.bias", "blocks.0.down.weight"} <= set(cuts)


def opt():
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=32, dropout=0.0, attn_implementation="eager",
    )  # fmt: skip
    return build(lambda: transformers.OPTForCausalLM(config).eval())


def test_a_model_that_reshapes_by_its_head_count_and_has_its_mlp_in_the_layer():
    worst, cuts = check_plan(opt(), OPT_PLAN, SharingPolicy(4, 2, 2), torch.randint(4, 64, (2, 2, 3)))
    assert worst < 1e-5
    assert {f"model.decoder.layers.1.{n}.weight" for n in ("fc1", "fc2", "self_attn.out_proj")} <= set(cuts)


@pytest.fixture
def mesh():
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "attn_tp"))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (
            {"blocks.*.up": "colwise", "blocks.*.down": "ep_dispatch_experts"},
            "'ep_dispatch_experts'.*expert parallelism",
        ),
        ({"blocks.*.up": "grouped_gemm"}, "'grouped_gemm'.*expert parallelism"),
        ({"blocks.*.up": "sequence_parallel"}, "unknown style 'sequence_parallel'.*allowed: .*colwise"),
        ({"block.*.up": "colwise"}, r"'block.\*.up' matches no module"),
        ({"blocks.*.up": "colwise"}, "column-wise weights .'up',. and no row-wise one"),
        ({"blocks.*.down": "rowwise"}, "row-wise weights .'down',. and no column-wise one"),
        ({"blocks.*.up": 1}, "mapping from module-name patterns to style names"),
        ({"blocks.*": "embedding_rowwise"}, "blocks.0 is a Feed; allowed: an nn.Linear, or an nn.Embedding"),
    ],
)
def test_bad_plans_are_refused(mesh, plan, words):
    model = build(Stack)
    with pytest.raises(PlanError, match=words):
        parallelize(model, mesh, SharingPolicy(4, 2), plan=plan)
    assert model.head.weight.shape == (8, 16) and not hasattr(model, "_tpfuse")


@pytest.mark.parametrize("dense", [1, 4])
def test_an_mlp_that_is_no_module_cannot_have_rows_of_its_own(mesh, dense):
    words = rf"layers.0 .OPTDecoderLayer. holds .'fc1', 'fc2'. beside other roles.*2 ranks; {dense} needs"
    with pytest.raises(PlanError, match=words):
        parallelize(opt(), mesh, SharingPolicy(4, 2, dense), plan=OPT_PLAN)


def test_the_models_own_expert_parallel_plan_is_refused_by_name(mesh):
    model = model_of("qwen3_moe")
    with pytest.raises(PlanError, match="expert parallelism"):
        parallelize(model, mesh, SharingPolicy(4, 2), plan=model.config.base_model_ep_plan)


def test_numbers_that_do_not_divide_are_named(mesh):
    model = transformers.AutoModelForCausalLM.from_config(config_of("llama", pad_token_id=None))
    model.config.num_attention_heads = 3
    with pytest.raises(PlanError, match="3 heads do not divide by the 2 ranks of the attention group"):
        parallelize(model, mesh, SharingPolicy(4, 2))


class OfLayers:
    """A configuration whose layers differ: it does not answer for all of them."""

    is_heterogeneous = True
    per_layer_config = tuple(SimpleNamespace(num_attention_heads=8, num_key_value_heads=count) for count in (4, 2))

    def __getattr__(self, name):
        raise RuntimeError(f"{name} differs by layer")


def test_a_configuration_whose_layers_differ_is_asked_for_the_modules_own():
    module = nn.Module()
    module.config, module.layer_idx = OfLayers(), 1
    assert heads_of("attn", module, Role("attention")) == Heads(8, 2, None)
    del module.layer_idx
    assert heads_of("attn", module, Role("attention")) == Heads(None, None, None)


class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HEADS))


def test_one_number_a_head_in_a_module_of_the_attention_is_seen(mesh):
    model = build(Model)
    model.layers[0].attn.temperature = Temperature()
    with pytest.raises(PlanError, match=r"temperature.scale .Attention. may hold one number a head"):
        parallelize(model, mesh, SharingPolicy(4, 2))


class Flattened(Feed):
    def forward(self, x):
        return super().forward(x).flatten()


def test_a_module_of_all_rows_that_returns_others_is_refused(mesh):
    model = nn.Sequential(OrderedDict(mlp=Flattened()))
    parallelize(model, mesh, SharingPolicy(4, 2, 4), plan={"mlp.up": "colwise", "mlp.down": "rowwise"})
    with pytest.raises(PlanError, match=r"mlp returned a tensor of shape \[96\] for 6 rows.*one row for each"):
        model(torch.ones(3, 16))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp, self.experts, self.router = Feed(), Feed(), nn.Module(), nn.Linear(16, 2)
        self.experts.up, self.experts.down = (nn.Parameter(torch.ones(2, 16, 16)) for _ in range(2))


def test_experts_that_stand_in_a_layer_beside_its_attention_stay_whole():
    """As Gemma 4 has them: the layer around them is no routed block, so its other parts keep roles of their own."""
    model = nn.Sequential(OrderedDict(layer=Layer()))
    plan = {f"layer.{part}.{leaf}": style for part in ("self_attn", "mlp", "experts")
            for leaf, style in (("up", "colwise"), ("down", "rowwise"))}  # fmt: skip
    plan["layer.experts"] = "moe_tp_experts"
    roles = read_plan(model, plan, "its plan", trusted=True).roles
    assert {name: role.kind for name, role in roles.items()} == {
        "layer.self_attn": "attention",
        "layer.mlp": "dense_mlp",
    }
    with pytest.raises(PlanError, match=r"layer .Layer. holds its experts beside its attention"):
        read_plan(model, plan, "parallelize(plan=...)", trusted=False)


def test_a_vocabulary_that_does_not_divide_stays_whole_unless_asked_for(mesh):
    config = transformers.LlamaConfig(
        vocab_size=33, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    model = parallelize(transformers.LlamaForCausalLM(config), mesh, SharingPolicy(4, 2))
    assert model.lm_head.weight.shape == (33, 32) and model.model.layers[0].mlp.up_proj.weight.shape == (16, 32)
    with pytest.raises(PlanError, match="33 features over the 2 ranks"):
        parallelize(transformers.LlamaForCausalLM(config), mesh, SharingPolicy(4, 2), plan={"lm_head": "colwise_rep"})


def run_generate(rank, model, ids):
    parallelize(model, init_device_mesh("cpu", (2,)), SharingPolicy(2))
    with torch.inference_mode():
        return model.generate(ids, max_new_tokens=4, do_sample=False)


def test_generation_with_a_cache():
    plain = model_of("qwen3_moe")
    ids = torch.randint(3, 64, (2, 3), generator=torch.Generator().manual_seed(2))
    models = [copy.deepcopy(plain) for _ in range(2)]
    want = plain.generate(ids, max_new_tokens=4, do_sample=False)
    for got in run_threads(2, lambda r: run_generate(r, models[r], ids)):
        assert torch.equal(got, want)


def test_a_compiled_model_is_refused_with_what_to_do(mesh):
    with pytest.raises(PlanError, match=r"OptimizedModule around Stack.*torch.compile\(tpfuse.parallelize.*_orig_mod"):
        parallelize(torch.compile(build(Stack)), mesh, SharingPolicy(4, 2), plan=STACK_PLAN)


def test_an_empty_plan_for_a_decorated_model_is_refused(mesh):
    with pytest.raises(PlanError, match=r"names nothing, but layers.0.attn has a role by its decorator"):
        parallelize(build(Model), mesh, SharingPolicy(4, 2), plan={})


def test_an_auxiliary_loss_on_all_replicas_rows_is_refused(mesh):
    model, ids = parallelize(model_of("qwen3_moe"), mesh, SharingPolicy(4, 2)), torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(PlanError, match=r"routers see the rows of all dp replicas.*output_router_logits=False"):
        model(ids, labels=ids, output_router_logits=True)
