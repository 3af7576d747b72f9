"""peft's adapters on a model that is cut: put on before, after, merged and taken off again."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from tests.policy_harness import loss_of, relative, run_threads
from tests.test_parallelize_families import model_of
from tpfuse.errors import PlanError, PolicyError
from tpfuse.parallel.parallelize import parallelize
from tpfuse.parallel.state_dict import full_state_dict
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


def with_two(targets=ALL):
    model = adapted(targets)
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=16, target_modules=list(targets)))
    for name, parameter in model.named_parameters():
        if "second" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def run_switched(rank, models, policy, want, grads):
    model, replica = parallelize(models[rank], mesh_of(policy), policy), rank // policy.attn_tp_size
    errors = []
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        model.zero_grad()
        logits = model(ids_of(replica), use_cache=False).logits
        loss_of(logits).backward()
        errors.append(relative(logits.detach(), want[adapter][replica]))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                cut, full = model._tpfuse.cuts.get(name), grads[adapter][name]
                errors.append(relative(parameter.grad, full if cut is None else cut.take(full)))
    return max(errors)


def test_an_adapter_that_was_frozen_at_the_cut_is_trained_after_a_switch():
    policy, plain = SharingPolicy(4, 2, 4), with_two()
    models = [copy.deepcopy(plain) for _ in range(4)]
    want, grads = {}, {}
    for adapter in ("default", "second"):
        plain.set_adapter(adapter)
        plain.zero_grad()
        outputs = [plain(ids_of(r), use_cache=False).logits for r in range(2)]
        sum(loss_of(one) for one in outputs).backward()
        want[adapter] = [one.detach() for one in outputs]
        grads[adapter] = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    assert all(error < 1e-9 for error in run_threads(4, run_switched, models, policy, want, grads))


def run_different(rank, models, dense):
    policy = SharingPolicy(2, 2, dense)
    model = parallelize(models[rank], mesh_of(policy), policy)
    model.set_adapter(("default", "second")[rank])
    model(ids_of(rank), use_cache=False)


def test_replicas_that_share_an_mlp_cannot_use_different_adapters_in_it():
    def run(rank, models):
        with pytest.raises(PolicyError, match=r"different adapters \(default on 0, second on 1\).*moe_dense_tp_size"):
            run_different(rank, models, 2)

    run_threads(2, run, [with_two() for _ in range(2)])
    run_threads(2, run_different, [with_two() for _ in range(2)], 1)


def save_adapter(rank, models, folder):
    model = parallelize(models[rank], mesh_of(SharingPolicy(2)), SharingPolicy(2))
    with pytest.raises(PlanError, match=r"save_pretrained\(folder, state_dict=tpfuse.full_state_dict\(model\)\)"):
        model.save_pretrained(folder / "none")
    model.save_pretrained(folder / str(rank), state_dict=full_state_dict(model))


def test_an_adapter_is_saved_whole(tmp_path):
    plain = adapted()
    run_threads(2, save_adapter, [copy.deepcopy(plain) for _ in range(2)], tmp_path)
    want = peft.get_peft_model_state_dict(plain)
    for rank in range(2):
        saved = load_file(tmp_path / str(rank) / "adapter_model.safetensors")
        assert saved.keys() == want.keys() and all(torch.equal(saved[name], want[name]) for name in want)


def test_a_projection_to_save_beside_an_adapter_is_refused_by_name():
    models = [adapted(["q_proj"], modules_to_save=["o_proj"]) for _ in range(2)]
    run_threads(2, cut_refused, models, r"o_proj is a ModulesToSaveWrapper .*without this module in modules_to_save")
