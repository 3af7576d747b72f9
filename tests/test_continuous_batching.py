"""Continuous batching: paged attention as one operator, one graph a step, every boundary fused, the tokens eager's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from .families import BY_NAME, cut_model, whole_model
from .ranks import run_processes

ROOT = Path(__file__).parents[1]
WORLD, NEW_TOKENS = 2, 4
PROMPTS = [[1, 2, 3, 4], [5, 6, 7]]


def tokens_on_rank(rank: int) -> dict:
    from transformers import CompileConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig, GenerationConfig

    import tpfuse
    from tpfuse.integrations.transformers import keep_paged_attention_whole

    keep_paged_attention_whole()
    keep_paged_attention_whole()
    model = cut_model(BY_NAME["llama"], whole_model(BY_NAME["llama"], torch.float32), rank, WORLD)
    known = {field.name for field in fields(ContinuousBatchingConfig)}
    older = "page_size" not in known  # 5.17: paged attention has names of its own
    model.set_attn_implementation("paged|sdpa" if older else "sdpa")
    ways = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)
    compiled = CompileConfig(
        backend="tpfuse", fullgraph=True, dynamic=True, mode=None, options={"inner": "aot_eager", "strict": True}
    )

    def tokens(**how):
        how["block_size" if older else "page_size"] = 16
        sizes = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32, **how)
        with torch.no_grad():
            answers = model.generate_batch(
                PROMPTS, generation_config=ways, continuous_batching_config=sizes, warmup=False
            )
        return sorted(list(answer.generated_tokens) for answer in answers.values())

    eager = tokens()
    return {
        "eager": eager,
        "tpfuse": tokens(varlen_compile_config=compiled, decode_compile_config=compiled),
        "fused": [report.fused_forward for report in tpfuse.reports()],
    }


@pytest.mark.nightly
def test_every_boundary_of_a_step_is_fused_and_the_tokens_are_those_of_eager_mode():
    pytest.importorskip("transformers.generation.continuous_batching.model_runner")
    for result in run_processes(WORLD, tokens_on_rank):
        assert result["tpfuse"] == result["eager"] and len(result["eager"]) == len(PROMPTS)
        assert result["fused"] and set(result["fused"]) == {BY_NAME["llama"].feeding}


def test_outside_of_compiled_steps_attention_is_what_it_was(monkeypatch):
    pytest.importorskip("transformers.generation.continuous_batching.model_runner")
    from tpfuse.integrations import transformers as integration

    calls = []
    monkeypatch.setitem(integration._ORIGINAL, "sdpa", lambda *args, **kwargs: calls.append(kwargs) or (args[1], None))
    attention = integration._attention("sdpa")
    q = torch.randn(1, 2, 3, 4)
    assert attention(torch.nn.Identity(), q, q, q, None, cache=object(), scaling=0.5)[0] is q
    assert calls[0]["scaling"] == 0.5


def test_the_operator_calls_the_attention_of_its_layer_with_what_the_step_was_given(monkeypatch):
    pytest.importorskip("transformers.generation.continuous_batching.model_runner")
    from tpfuse.integrations import transformers as integration

    class Attention(torch.nn.Module):
        layer_idx = 3

    def original(module, query, key, value, mask, *, cache, scaling, **kwargs):
        cache.append((module, scaling))
        return (query * 2).transpose(1, 2), None

    monkeypatch.setitem(integration._ORIGINAL, "sdpa", original)
    model, q, cache = torch.nn.Sequential(Attention()), torch.randn(1, 2, 3, 4), []
    step = integration._around(
        lambda model, batch: torch.ops.tpfuse_transformers.paged_attention(q, q, q, None, "sdpa", 3, 0.5, 0.0, None)
    )
    torch.testing.assert_close(step(model, {"input_ids": q, "cache": cache}), (q * 2).transpose(1, 2))
    assert cache == [(model[0], 0.5)] and not integration._RUNNING


@pytest.mark.nightly
def test_the_benchmark_runs_every_way_and_puts_transformers_attention_back(tmp_path):
    """A rehearsal on CPUs."""
    pytest.importorskip("transformers.generation.continuous_batching.model_runner")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={WORLD}", "--standalone"]
    sizes = ["--tiny", "--layers", "1", "--sequences", "2", "--tokens", "4", "--rounds", "2", "--ways"]
    ways = ["plain", "inductor, whole attention", "tpfuse", "tpfuse, no integration"]
    out = tmp_path / "batching.json"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    subprocess.run(
        [*command, str(ROOT / "benchmarks/continuous_batching.py"), *sizes, *ways, "--out", str(out)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}, check=True, timeout=400,
    )  # fmt: skip
    records = {record["provider"]: record for record in json.loads(out.read_text("utf-8"))["records"]}
    assert list(records) == ways
    assert all(record["tokens_per_s"] > 0 for record in records.values())
    assert records["tpfuse"]["fused"] >= 2 and records["inductor, whole attention"]["fused"] == 0
    assert not any(records[name]["note"] for name in ways[:3])
