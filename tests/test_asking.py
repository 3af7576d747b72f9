"""The tools to ask: explain on a configuration, doctor, pages, reports that are empty, torch's structured trace."""

import json
import re

import pytest
import torch
from torch import nn

import tpfuse
from tpfuse import _torch_private as private
from tpfuse.cli import doctor, explain
from tpfuse.cli.recommend import ModelSizes, recommend
from tpfuse.page import page

SMALL = {
    "model_type": "deepseek_v3", "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 2,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "vocab_size": 64, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    (folder / "config.json").write_text(json.dumps(SMALL))
    return explain.run(folder, 4, None, "decode", 64.0)


def test_a_configuration_is_explained_by_one_layer_of_each_kind(explained):
    """Two dense layers, three routed ones and the last one, which alone is followed by the final norm."""
    named = {explained.names.get(i, b.module).split(".self_attn")[0]: explained.times.get(i, 1)
             for i, b in enumerate(explained.report.boundaries) if "self_attn" in b.module}  # fmt: skip
    assert named == {"model.layers.0–1": 2, "model.layers.2–4": 3, "model.layers.5": 1}
    assert explained.report.fused and not torch.distributed.is_initialized()


def test_the_bytes_of_all_layers_are_counted(explained):
    once = sum(b.bytes_before or 0 for b in explained.report.boundaries)
    assert explained.bytes("bytes_before") > once
    text = "\n".join(explain.lines(explained))
    assert "traced 3 of 6 layers" in text and "recommended: dp_size=" in text


@pytest.mark.parametrize("written", ["{}", "[1]", "no json", '{"model_type": "nothing_of_the_kind"}'])
def test_what_is_no_configuration_is_refused(written, tmp_path):
    (tmp_path / "c.json").write_text(written)
    with pytest.raises(tpfuse.OptionError, match=r"c\.json"):
        explain.read_config(tmp_path / "c.json")


def test_the_recommended_policy_fits_and_says_what_would_be_cheaper():
    gib = 2**30
    weights = {"attention": 20 * gib, "dense_mlp": 80 * gib, "moe": 0, "embedding": 0, "": 0}
    model = ModelSizes(weights, (False,) * 4, 512, 64)
    found = recommend(model, 8, memory=40.0)
    assert [c.us for c in found] == sorted(c.us for c in found)
    assert found[0].name == "dp_size=8, moe_dense_tp_size=1" and found[0].us == 0.0 and found[0].gib == 100
    best = next(c for c in found if c.gib <= 40)
    assert "its weights take 100 GiB" in best.why(found, 40.0)


def test_a_report_is_a_page(tmp_path):
    boundary = tpfuse.Boundary("attention→dense_mlp", "m.<o>", "all_reduce", (0, 1), norm="rms_norm", fused=True)
    left = tpfuse.Boundary("unknown", "m.head", "all_gather", (0, 1), reason="it is no <sum>")
    report = tpfuse.Report([boundary, left], norms=1, notes=["a note & more"])
    text = report.to_html(tmp_path / "r.html").read_text(encoding="utf-8")
    for part in ("<svg", "m.&lt;o&gt;", "it is no &lt;sum&gt;", "a note &amp; more"):
        assert part in text
    assert "×7" in page(report, times={0: 7})


def test_doctor_names_what_is_missing_and_how_to_get_it():
    findings = doctor.examine()
    assert {"torch", "Triton", "GPUs"} <= {finding.what for finding in findings}
    assert all(finding.remedy for finding in findings if finding.state == doctor.MISSING)
    fatal = [doctor.Finding("GPUs", doctor.MISSING, "none", "get one", True)]
    assert "cannot run here: GPUs" in doctor.shown(fatal) and "cannot" not in doctor.shown([])


@pytest.mark.parametrize("device", ["NVIDIA H200", "a GPU of another kind"])
def test_doctor_says_that_the_entries_for_numbers_of_ranks_nobody_measured_are_derived(device):
    found = doctor._dispatch(device, 7).found
    for world in (3, 5, 6, 7):
        assert re.search(rf"\b{world} ranks: \d+ derived(;|$)", found), found


def test_empty_reports_explain_themselves(monkeypatch):
    monkeypatch.setattr("tpfuse._state.REPORTS", [])
    wrapper = torch.compile(type("NeverCalled", (nn.Linear,), {})(2, 2), backend="tpfuse")
    with pytest.raises(IndexError, match=r"NeverCalled.* was never called.*model\.compile\(backend=\"tpfuse\"\)"):
        tpfuse.reports()[-1]
    assert wrapper is not None and tpfuse.reports() == [] and "model.compile" in repr(tpfuse.reports())



def test_what_dynamo_gave_up_elsewhere_says_nothing_of_a_model_that_was_never_called(monkeypatch):
    monkeypatch.setattr("tpfuse._state.REPORTS", [])
    forward = nn.Linear.forward.__code__
    own = (forward.co_filename, forward.co_firstlineno, forward.co_name)
    wrapper = torch.compile(type("NeverCalled", (nn.Linear,), {})(2, 2), backend="tpfuse")
    for code, said in ((("elsewhere.py", 1, "forward"), "was never called"), (own, "a loop")):
        monkeypatch.setattr(private, "given_up", lambda code=code: [(code, private.GraphBreak("a loop", ""))])
        assert said in repr(tpfuse.reports())
    assert wrapper is not None
