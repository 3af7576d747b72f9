"""`generate` with a static cache, compiled by Hugging Face itself: the decode step is fused, the tokens are eager's."""

from __future__ import annotations

import pytest
import torch

from .families import BY_NAME, cut_model, token_ids, whole_model
from .ranks import run_processes

WORLD, NEW_TOKENS = 2, 4


def generate_on_rank(rank: int, name: str) -> dict:
    from transformers import CompileConfig

    import tpfuse

    family = BY_NAME[name]
    model = cut_model(family, whole_model(family, torch.float32), rank, WORLD)
    ways = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, cache_implementation="static")
    compiled = CompileConfig(fullgraph=True, backend="tpfuse", mode=None, options={"inner": "aot_eager"})
    ids = token_ids()
    with torch.no_grad():
        eager = model.generate(ids, disable_compile=True, **ways)
        compiled._compile_all_devices = True  # on CPUs, generate compiles only when told to
        got = model.generate(ids, compile_config=compiled, **ways)
    return {
        "eager": eager.tolist(),
        "tpfuse": got.tolist(),
        "fused": [report.fused_forward for report in tpfuse.reports()],
    }


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "mixtral"])
def test_generate_with_a_static_cache(name):
    for result in run_processes(WORLD, generate_on_rank, name):
        assert result["tpfuse"] == result["eager"]
        assert result["fused"] and set(result["fused"]) == {BY_NAME[name].feeding}
