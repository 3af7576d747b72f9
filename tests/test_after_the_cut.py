"""What programs do with a model after it was cut, or did before: it is right, or says what to do in its place."""

import copy
import io
import pickle

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from tests.policy_harness import loss_of, relative, run_threads
from tests.test_parallelize_families import model_of
from tpfuse.errors import PlanError
from tpfuse.parallel.parallelize import parallelize
from tpfuse.parallel.state_dict import full_state_dict
from tpfuse.policy import SharingPolicy

POLICY = SharingPolicy(2)
OWN_ROWS = SharingPolicy(2, moe_dense_tp_size=1)
IDS = torch.arange(3, 9).view(2, 3)


def cut(model):
    return parallelize(model, init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "attn_tp")), POLICY)


def logits(model):
    return model(IDS, use_cache=False).logits


def refused(rank, models, use, words):
    model = cut(models[rank])
    with pytest.raises(PlanError, match=words):
        use(model)


def differentiate_twice(model):
    loss_of(logits(model).square()).backward(create_graph=True)


def transformed(model):
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    torch.func.grad(lambda given: loss_of(torch.func.functional_call(model, given, (IDS,)).logits))(parameters)


def forward_mode(model):
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    name = next(iter(parameters))
    parameters[name] = torch.autograd.forward_ad.make_dual(parameters[name], torch.ones_like(parameters[name]))
    torch.func.functional_call(model, parameters, (IDS,))


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (pickle.dumps, r"LlamaForCausalLM.*cannot be pickled.*torch.save\(tpfuse.full_state_dict\(model\), path\)"),
        (lambda model: torch.save(model.model.layers[0], io.BytesIO()), "LlamaDecoderLayer.*cannot be pickled"),
        (lambda model: model.resize_token_embeddings(80), r"resize_token_embeddings\(80\).*parallelize it then"),
        (differentiate_twice, "create_graph=True.*leave create_graph out"),
        (transformed, r"torch.func.*loss.backward\(\)"),
    ],
    ids=["pickle", "save a part", "resize", "create_graph", "torch.func"],
)
def test_what_a_cut_model_cannot_do_says_what_to_do(use, words):
    run_threads(2, refused, [model_of("llama") for _ in range(2)], use, words)


def parametrized(model):
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.down_proj)


def refused_with_own_rows(rank, models):
    model = parallelize(models[rank], init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "attn_tp")), OWN_ROWS)
    with pytest.raises(PlanError, match=r"down_proj.parametrizations.weight was cut by parallelize.*in first"):
        parametrized(model)


def test_a_parametrization_of_a_cut_module_or_of_one_with_own_rows_is_refused():
    words = r"down_proj.parametrizations.weight was cut by parallelize.*parametrizations.*in first"
    run_threads(2, refused, [model_of("llama") for _ in range(2)], parametrized, words)
    run_threads(2, refused_with_own_rows, [model_of("llama") for _ in range(2)])


def test_forward_mode_is_refused():
    with torch.autograd.forward_ad.dual_level():  # one for all threads
        torch.autograd.forward_ad.make_dual(torch.zeros(()), torch.ones(()))  # torch's first imports, by one thread
        run_threads(2, refused, [model_of("llama") for _ in range(2)], forward_mode, "forward-mode differentiation")


def copied(rank, models):
    model = cut(models[rank])
    with torch.no_grad():
        return relative(logits(copy.deepcopy(model)), logits(model))


def test_a_copy_computes_the_same():
    assert run_threads(2, copied, [model_of("llama") for _ in range(2)]) == [0, 0]


def step(model, optimizer):
    loss_of(logits(model)).backward()
    optimizer.step()


def trained(rank, models, optimizers):
    model, optimizer = cut(models[rank]), optimizers[rank]
    moment = optimizer.state_dict()["state"][1]["exp_avg"].full_tensor()
    step(model, optimizer)
    return full_state_dict(model), moment


def test_training_goes_on_with_an_optimizer_and_gradients_from_before_the_cut():
    models = [model_of("llama") for _ in range(3)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer)  # the gradients stay, and the next ones are added
    moment = optimizers[2].state_dict()["state"][1]["exp_avg"].clone()
    step(models[2], optimizers[2])
    want = models[2].state_dict()
    for state, kept in run_threads(2, trained, models, optimizers):
        assert max(relative(state[name], want[name]) for name in want) < 1e-9
        assert torch.equal(kept, moment)


def router_loss(rank, models):
    model = cut(models[rank])
    model(IDS, labels=IDS, output_router_logits=True, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if name not in model._tpfuse.cuts}


def test_a_loss_on_the_routers_outputs_is_counted_once():
    models = [model_of("qwen3_moe") for _ in range(3)]
    for model in models:
        model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.5
    models[2](IDS, labels=IDS, output_router_logits=True, use_cache=False).loss.backward()
    want = {name: p.grad for name, p in models[2].named_parameters()}
    for grads in run_threads(2, router_loss, models[:2]):
        assert any(name.endswith("mlp.gate.weight") for name in grads)
        assert max(relative(grad, want[name]) for name, grad in grads.items() if grad is not None) < 1e-4
