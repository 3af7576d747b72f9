"""Models of other packages, cut by their own tensor parallelism, in real processes: where the package is installed."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tpfuse

from .graphs import relative_error
from .ranks import run_processes
from .small_sizes import HIDDEN, LAYERS, SIZES, VOCAB, WORLD

pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore")]


def drawn(model: nn.Module, rank: int) -> nn.Module:
    """Matrices are the rank's own, vectors alike: a sum that is lost or counted twice shows."""
    own, alike = torch.Generator().manual_seed(rank + 1), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        generator = own if parameter.dim() > 1 else alike
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1 + float("norm" in name)
    return model


# -- ibm-fms: its TensorParallelStrategy ------------------------------------------------------------------------------

FMS = {
    "llama": ("LLaMA", {"emb_dim": HIDDEN, "kvheads": 2, "multiple_of": 16}),
    "granite": ("Granite", {"emb_dim": HIDDEN, "head_dim": 8, "kvheads": 2, "multiple_of": 16}),
    "qwen3": ("Qwen3", {"emb_dim": HIDDEN, "kvheads": 2, "multiple_of": 16}),
    "mistral": ("Mistral", {"emb_dim": HIDDEN, "kvheads": 2}),
    "gpt_bigcode": ("GPTBigCode", {"emb_dim": HIDDEN, "max_expected_seq_len": 64}),
    "roberta": ("RoBERTa", {"emb_dim": HIDDEN, "max_pos": 64, "p_dropout": 0.0}),
}


def fms(rank: int, name: str) -> Callable[[Tensor], Tensor]:
    from fms.distributed.strategy import TensorParallelStrategy

    kind, sizes = FMS[name]
    module = importlib.import_module(f"fms.models.{name}")
    config = getattr(module, kind + "Config")(nlayers=LAYERS, src_vocab_size=VOCAB, nheads=4, **sizes)
    model = drawn(getattr(module, kind)(config, distributed_strategy=TensorParallelStrategy()), rank)
    if hasattr(model, "post_init"):
        model.post_init()
    return model.eval()


# -- litgpt: litgpt.generate.tp.tensor_parallel -----------------------------------------------------------------------

LITGPT = {
    "Llama-3-8B": {"n_query_groups": 2},
    "pythia-160m": {},
    "Gemma-2-2b": {"n_query_groups": 2, "head_size": 8},
    "Gemma-3-1b-it": {"n_query_groups": 2, "head_size": 8},
    "phi-2": {},
}


def litgpt(rank: int, name: str) -> Callable[[Tensor], Tensor]:
    from litgpt.generate.tp import tensor_parallel
    from litgpt.model import GPT, Config

    class Fabric:  # what it reads of lightning's
        world_size, global_rank = WORLD, rank

    sizes = {"n_layer": LAYERS, "n_embd": HIDDEN, "n_head": 4, "padded_vocab_size": VOCAB, "block_size": 64}
    torch.manual_seed(0)
    model = GPT(Config.from_name(name, intermediate_size=2 * HIDDEN, **sizes, **LITGPT[name]))
    tensor_parallel(Fabric, model)
    model.max_seq_length = 32
    return model.eval()


# -- DeepSpeed: AutoTP of a Hugging Face model ------------------------------------------------------------------------


def deepspeed(rank: int, name: str) -> Callable[[Tensor], Tensor]:
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    os.environ.update(LOCAL_WORLD_SIZE=str(WORLD))
    import deepspeed as package
    from transformers import LlamaConfig, LlamaForCausalLM

    # On CPUs it would compile an operator of its own; on GPUs it sums with torch's, as here.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    package.init_distributed("gloo")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    engine = package.init_inference(
        model, tensor_parallel={"tp_size": WORLD}, dtype=torch.float32, replace_with_kernel_inject=False
    )
    return engine.module


# -- what all are asked -----------------------------------------------------------------------------------------------


def output(result) -> Tensor:
    result = getattr(result, "logits", result)
    return result[0] if isinstance(result, tuple) else result


def run(rank: int, build: Callable, name: str, train: bool) -> dict:
    """One call, eager and compiled: the greatest error, and what became of each boundary."""
    model = build(rank, name)
    ids = torch.randint(0, VOCAB, (1, 8), generator=torch.Generator().manual_seed(1))

    def results(call) -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(train):
            found = output(call(ids))
        if train:
            found.square().mean().backward()
        return [found.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = results(model)
    got = results(torch.compile(model, backend="tpfuse", options={"inner": "aot_eager"}))
    boundaries = [b for report in tpfuse.reports() for b in report.boundaries]
    errors = relative_error(got, [t.double() for t in expected])
    return {
        "error": max(errors),
        "tensors": (len(got), len(expected)),
        "fused": Counter(b.direction for b in boundaries if b.fused),
        "left": [(b.direction, b.reason) for b in boundaries if not b.fused],
    }


def check(build: Callable, name: str, fused: int, left: int, train: bool = False) -> None:
    for result in run_processes(WORLD, run, build, name, train):
        assert result["error"] < 1e-5 and len(set(result["tensors"])) == 1, result
        assert (result["fused"].total(), len(result["left"])) == (fused, left), result
        assert all(reason for _, reason in result["left"])


@pytest.mark.parametrize(("name", "left"), [(name, 2 * (name == "roberta")) for name in FMS])
def test_ibm_fms(name, left):
    """What is left of roberta: two gathers."""
    pytest.importorskip("fms.models", exc_type=ImportError)
    check(fms, name, 2 * LAYERS, left)


@pytest.mark.parametrize("name", LITGPT)
def test_litgpt(name):
    pytest.importorskip("litgpt.generate.tp", exc_type=ImportError)
    check(litgpt, name, 2 * LAYERS, 0)


def test_litgpt_in_training():
    pytest.importorskip("litgpt.generate.tp", exc_type=ImportError)
    check(litgpt, "Llama-3-8B", 4, 4, train=True)


def test_deepspeeds_autotp():
    """What is left is the sum of the logits, which no norm reads."""
    pytest.importorskip("deepspeed", exc_type=ImportError)
    check(deepspeed, "llama", 2 * LAYERS, 1)
