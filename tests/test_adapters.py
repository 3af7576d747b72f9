"""peft's adapters on a model that is cut: put on before, after, merged and taken off again."""

import copy

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from tests.policy_harness import loss_of, relative, run_threads
from tests.test_parallelize_families import model_of
from tpfuse.errors import PlanError
from tpfuse.parallel.parallelize import parallelize
from tpfuse.policy import SharingPolicy

peft = pytest.importorskip("peft")
ALL = ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")


def adapted(targets=ALL, family="llama", **kwargs):
    torch.manual_seed(4)
    config = peft.LoraConfig(r=4, target_modules=list(targets), **kwargs)
    model = peft.get_peft_model(model_of(family), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def ids_of(replica):
    return torch.randint(3, 64, (2, 3), generator=torch.Generator().manual_seed(replica))


def mesh_of(policy):
    return init_device_mesh("cpu", (policy.dp_size, policy.attn_tp_size), mesh_dim_names=("dp", "attn_tp"))


def run(rank, models, policy, want, grads):
    model, replica = parallelize(models[rank], mesh_of(policy), policy), rank // policy.attn_tp_size
    logits = model(ids_of(replica), use_cache=False).logits
    loss_of(logits).backward()
    errors = [relative(logits.detach(), want[replica])]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            cut = model._tpfuse.cuts.get(name)
            errors.append(relative(parameter.grad, grads[name] if cut is None else cut.take(grads[name])))
    with torch.no_grad(), model.disable_adapter():
        errors.append(relative(model(ids_of(replica), use_cache=False).logits, want[2 + replica]))
    if model.peft_config["default"].lora_bias:  # peft cannot merge those here
        return max(errors), set(model._tpfuse.cuts)
    merged = model.merge_and_unload()
    with torch.no_grad():
        errors.append(relative(merged(ids_of(replica), use_cache=False).logits, want[replica]))
    return max(errors), set(model._tpfuse.cuts)


@pytest.mark.parametrize(
    ("policy", "kwargs"),
    [(SharingPolicy(2), {}), (SharingPolicy(4, 2, 4), {}), (SharingPolicy(2), {"lora_bias": True})],
    ids=["attention", "two axes", "biases"],
)
def test_lora_that_is_there_before_the_cut(policy, kwargs):
    plain = adapted(**kwargs)
    models = [copy.deepcopy(plain) for _ in range(policy.tp_size)]
    want = [plain(ids_of(r), use_cache=False).logits for r in range(policy.dp_size)]
    sum(loss_of(one) for one in want).backward()
    grads = {name: p.grad for name, p in plain.named_parameters()}
    want = [one.detach() for one in want] + [None] * (2 - len(want))
    with torch.no_grad(), plain.disable_adapter():
        want += [plain(ids_of(r), use_cache=False).logits for r in range(policy.dp_size)]
    for error, cuts in run_threads(policy.tp_size, run, models, policy, want, grads):
        assert error < 1e-9
        assert any("up_proj" in name for name in cuts)


def cut_and_adapt(rank, models, targets):
    model = parallelize(models[rank], mesh_of(SharingPolicy(2)), SharingPolicy(2))
    with pytest.raises(PlanError, match=r"layers.0.*was cut by parallelize.*get_peft_model\(model, config\); parallel"):
        peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))


@pytest.mark.parametrize("targets", [["o_proj"], ["q_proj"], ["down_proj"]])
def test_adapters_on_a_cut_module_are_refused_after_the_cut(targets):
    run_threads(2, cut_and_adapt, [model_of("llama") for _ in range(2)], targets)


def cut_refused(rank, models, words):
    with pytest.raises(PlanError, match=words):
        parallelize(models[rank], mesh_of(SharingPolicy(2)), SharingPolicy(2))


@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_other_adapters_are_refused_by_name(kind):
    def made():
        if kind == "dora":
            return adapted(use_dora=True)
        config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
        return peft.get_peft_model(model_of("llama"), config)

    run_threads(2, cut_refused, [made(), made()], r"_proj is an adapter that cannot be cut .*merge_and_unload\(\)")
