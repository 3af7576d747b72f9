"""`verify` finds planted faults by name and leaves the model as it was; `cut_report` says what was cut."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import tpfuse
from tests.policy_harness import run_threads
from tests.ranks import run_processes

FAULTS = ("none", "skip a sum", "sum twice", "gradient not summed")


def _tiny():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, pad_token_id=0, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model


def _every_fault(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "attn_tp"))
    said = {}
    for fault in FAULTS:
        model = tpfuse.parallelize(_tiny(), mesh, tpfuse.SharingPolicy(4, 2, 2), verify=fault == "none")
        layer = model.model.layers[1]
        hooks = layer.self_attn.o_proj._forward_hooks
        if fault == "skip a sum":
            hooks.clear()
        elif fault == "sum twice":
            layer.self_attn.o_proj.register_forward_hook(next(iter(hooks.values())))
        elif fault == "gradient not summed":
            # The module that owns the parameter would put the sum back.
            layer.input_layernorm._forward_pre_hooks.clear()
            layer.input_layernorm.weight._backward_hooks.clear()
        state = torch.get_rng_state()
        try:
            said[fault] = str(tpfuse.verify(model))
        except tpfuse.VerifyError as error:
            said[fault] = str(error)
        assert torch.equal(state, torch.get_rng_state())
        assert model.training and layer.training and all(p.grad is None for p in model.parameters())
    report = tpfuse.cut_report(model)
    return said, json.loads(report.to_json()), report.share, report.summary()


def test_planted_faults_are_found_by_name_on_every_rank_and_the_report_adds_up():
    answers = run_processes(4, _every_fault)
    for said, report, share, summary in answers:
        assert said == answers[0][0]
        assert "equal the uncut computation" in said["none"]
        assert "model.layers.1.self_attn" in said["skip a sum"] and "never paid" in said["skip a sum"]
        assert "model.layers.1.self_attn" in said["sum twice"] and "2 times" in said["sum twice"]
        assert "model.layers.1 " in said["gradient not summed"]
        assert "gradient of input_layernorm.weight" in said["gradient not summed"]
        own = sum(part["own_bytes"] for part in report["cut"] + report["whole"])
        whole = sum(part["whole_bytes"] for part in report["cut"] + report["whole"])
        assert whole == 4 * sum(p.numel() for p in _tiny().parameters()) and share == own / whole < 0.6
        assert {p["pattern"] for p in report["cut"]} >= {"model.layers.*.mlp.down_proj", "lm_head"}
        assert "stay whole" not in summary


def test_a_model_that_was_not_cut_is_refused():
    for function in (tpfuse.verify, tpfuse.cut_report):
        with pytest.raises(tpfuse.PolicyError, match="was not parallelized"):
            function(torch.nn.Linear(2, 2))


@tpfuse.attention(colwise=["q", "k", "v"], rowwise=["o"], heads="heads")
class Attention(nn.Module):
    heads = 4

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


def verified(rank, models, x):
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "attn_tp"))
    return tpfuse.verify(tpfuse.parallelize(models[rank], mesh, tpfuse.SharingPolicy(2)), x.to(models[rank][0].o.bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_gradient_that_is_nothing_but_rounding_is_no_difference(dtype):
    """Softmax does not see a bias of its keys, whose gradient is zero but for rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), nn.LayerNorm(32)).to(dtype)
    for found in run_threads(2, verified, [copy.deepcopy(model) for _ in range(2)], torch.randn(4, 64, 32)):
        assert found.compared > 15 and found.worst < 0.06
