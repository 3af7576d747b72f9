"""A Hugging Face model that is cut by its plan and quantised by torchao: where torchao is installed."""

from __future__ import annotations

import importlib
import os

import numpy as np
import pytest
import torch

import tpfuse
from tpfuse.passes.plan.sites import DEFAULT_REWRITES

from .ranks import run_processes
from .small_sizes import LAYERS, SIZES, VOCAB, WORLD


def quantised(folder: str, rank: int, kind: str):
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
    )
    from transformers import LlamaForCausalLM, TorchAoConfig

    # torchao asks for a GPU; the product that it calls is there on CPUs as well.
    importlib.import_module("torchao.quantization.quant_api")._check_hardware_support = lambda granularity: None
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    config = (
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
        if kind == "FP8"
        else Int8DynamicActivationInt8WeightConfig()
    )
    return LlamaForCausalLM.from_pretrained(
        folder, tp_plan="auto", dtype=torch.bfloat16, quantization_config=TorchAoConfig(config)
    ).eval()


def decoded(call, config, ids, steps: int = 3) -> list[torch.Tensor]:
    """Logits of a prompt and of tokens behind it, with a static cache."""
    from transformers import StaticCache

    cache = StaticCache(config=config, max_cache_len=16)
    found, position = [], 0
    for step in range(steps):
        chunk = ids if step == 0 else ids[:, step : step + 1]
        places = torch.arange(position, position + chunk.shape[1])
        found.append(call(chunk, past_key_values=cache, position_ids=places[None], use_cache=True).logits)
        position += chunk.shape[1]
    return found


REWRITES = {"plain": DEFAULT_REWRITES, "quantised": (*DEFAULT_REWRITES, "quantised_outputs")}


def run(rank: int, folder: str, kind: str, dynamic: bool) -> dict:
    """(logits, what each boundary of each graph hands out) without and with the rewrite: of prompts without a cache, of
    several lengths where rows are `dynamic`, and of tokens behind a prompt with a static cache."""
    model = quantised(folder, rank, kind)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, VOCAB, (1, length), generator=generator) for length in (8, 5, 11)[: 1 + 2 * dynamic]]
    embed = model.get_input_embeddings()
    answers = {}
    for how, rewrites in REWRITES.items():
        torch._dynamo.reset()
        before = len(tpfuse.reports())
        options = {"inner": "aot_eager", "rewrites": rewrites}
        compiled = torch.compile(model, backend="tpfuse", dynamic=dynamic, options=options)

        def with_cache(ids: torch.Tensor, compiled=compiled, **more):
            # DTensor takes no symbolic sizes in an embedding that is cut by its vocabulary, beside a static cache.
            return compiled(inputs_embeds=embed(ids), **more) if dynamic else compiled(ids, **more)

        with torch.no_grad():
            logits = [compiled(ids, use_cache=False).logits for ids in prompts]
            logits += decoded(with_cache, model.config, prompts[0])
        boundaries = [[(b.fused, b.quantised) for b in r.boundaries] for r in tpfuse.reports()[before:]]
        answers[how] = ([t.float().numpy() for t in logits], boundaries)
    return answers


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["FP8", "INT8"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_every_boundary_of_a_llama_hands_out_its_rows_quantised(tmp_path, kind, dynamic):
    pytest.importorskip("torchao.quantization", exc_type=ImportError)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(tmp_path)
    for answers in run_processes(WORLD, run, str(tmp_path), kind, dynamic):
        (plain, unquantised), (got, graphs) = answers["plain"], answers["quantised"]
        assert all(map(np.array_equal, got, plain)), graphs
        assert len(graphs) == len(unquantised) == 3, "of no cache, the prompt, a token behind it"
        for number, graph in enumerate(graphs):
            *boundaries, final, gather = graph
            embedded_outside = dynamic and number > 0  # whose sum is in no graph then
            assert len(boundaries) == 2 * LAYERS - embedded_outside, graph
            for fused, text in boundaries:
                assert fused and text.startswith(kind) and text.endswith("per row"), graph
            assert final == (True, "") and gather == (False, ""), "the logits' product is not quantised"
        assert not any(text for graph in unquantised for _, text in graph)
