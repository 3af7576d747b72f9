"""Cuts a tiny model of every Hugging Face causal LM that has a tp plan, and compares it with the uncut model.

    python benchmarks/parallelize_survey.py [--families Llama,GptOss] [--policy whole] [--out FILE] [--jobs N] [--again]

Four gloo ranks on the CPU, dp 2, three policies. `--jobs N` surveys N configurations at once, with four
ranks each. Compared: logits, the gradient of every parameter, greedy tokens.
One JSON line for each family and policy: outcome "right", "refused" (by a TPFuseError on every rank), "wrong" (other
numbers than the uncut model's), "dies" (any other error, an error on some ranks only, or no answer in time) or
"unbuilt" (transformers itself cannot build or run the tiny model); the share of the weights on a rank; what was cut.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
if Path("/sys/class/net/lo").exists():  # ranks of one machine need no name for it that others know
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch.distributed.device_mesh import init_device_mesh
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import tpfuse
from benchmarks.survey_jobs import Records, serve, surveyed_apart

RANKS, DP, TOLERANCE = 4, 2, 1e-4
POLICIES = {"whole": None, "attention": RANKS // DP, "own rows": 1}
RESULTS = Path(__file__).parent / "results" / "parallelize_survey.jsonl"
TINY = dict(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, head_dim=8, max_position_embeddings=64, pad_token_id=0, num_experts_per_tok=2,
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_intermediate_size=64, tie_word_embeddings=False,
    attn_implementation="eager", use_cache=False,
)  # fmt: skip
FULL = dict(layer_types=["full_attention"] * 2)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1)
LATENT = dict(
    num_key_value_heads=8, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8
)  # fmt: skip
LINEAR = dict(
    layer_types=["linear_attention", "full_attention"], linear_num_key_heads=4, linear_num_value_heads=8,
    linear_key_head_dim=8, linear_value_head_dim=8, shared_expert_intermediate_size=64,
)  # fmt: skip
#: What a tiny model of a family needs beside TINY.
FIELDS = {
    "AXK1Config": dict(LATENT, n_group=1, topk_group=1),
    "AXK2Config": dict(LATENT, qk_rope_head_dim=8),
    "BailingHybridConfig": dict(LATENT, layer_types=["linear_attention", "full_attention"], num_expert_group=1),
    "BambaConfig": dict(MAMBA, attn_layer_indices=[1]),
    "CohereCompassTextConfig": dict(
        FULL, rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=1e4)),
    ),
    "DeepseekV2Config": LATENT,
    "DeepseekV32Config": dict(LATENT, n_group=1, topk_group=1, index_n_heads=4, index_head_dim=16, index_topk=4),
    "DeepseekV3Config": LATENT,
    "Dots1Config": dict(n_shared_experts=1, first_k_dense_replace=1, norm_topk_prob=True, routed_scaling_factor=1.0),
    "Dots3NoteTextConfig": LATENT,
    "FalconH1Config": dict(mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8),
    "Gemma3nTextConfig": dict(
        layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0, vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8, laurel_rank=8, activation_sparsity_pattern=[0.95, 0.0],
    ),
    "Gemma4TextConfig": dict(
        layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0, vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8, global_head_dim=8,
    ),
    "Glm4MoeLiteConfig": LATENT,
    "GlmMoeDsaConfig": dict(LATENT, index_n_heads=4, index_head_dim=16, index_topk=4),
    "GptOssConfig": FULL,
    "GraniteMoeHybridConfig": dict(
        layer_types=["linear_attention", "full_attention"], mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8,
        shared_intermediate_size=64,
    ),
    "JambaConfig": dict(
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False,
        mamba_d_state=8, mamba_dt_rank=8,
    ),
    "KimiLinearConfig": dict(
        LATENT, layer_types=["linear_attention", "full_attention"], linear_head_dim=8, linear_num_heads=8,
        bos_token_id=1, eos_token_id=2,
    ),
    "Lfm2Config": dict(layer_types=["conv", "full_attention"]),
    "Lfm2MoeConfig": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "Llama4Config": dict(text_config=dict(TINY, intermediate_size_mlp=128), vision_config=dict(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vision_output_dim=64,
        projector_input_dim=64, projector_output_dim=64)),
    "LongcatFlashConfig": dict(
        LATENT, num_layers=1, ffn_hidden_size=128, expert_ffn_hidden_size=64, moe_topk=2, zero_expert_num=2,
    ),
    "MiniCPM3Config": LATENT,
    "Phi4MultimodalConfig": dict(
        vision_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                           image_size=28, patch_size=14, crop_size=28),
        audio_config=dict(hidden_size=32, intermediate_size=32, num_blocks=1, num_attention_heads=2,
                          ext_pw_out_channel=32, nemo_conv_channels=32),
    ),
    "Qwen3NextConfig": LINEAR,
    "Qwen3_5MoeTextConfig": LINEAR,
    "Qwen3_5TextConfig": LINEAR,
    "Qwen4ExpTextConfig": dict(
        LINEAR, layer_types=["linear_attention", "indexed_attention"], hc_count=2, hc_lowrank=8,
        ngram_vocab_size_base=64, split_ngram_parts=2, heads_per_ngram=2, indexer_n_heads=4, indexer_kv_heads=1,
        indexer_head_dim=8, indexer_budget=4, indexer_compress_ratio=2,
    ),
    "YoutuConfig": LATENT,
}  # fmt: skip

#: Their plans name lm_head alone, in the model's class and not in its configuration.
LM_HEAD_ONLY = {
    "BambaConfig", "DiffLlamaConfig", "FalconH1Config", "GptOssConfig", "HunYuanDenseV1Config", "Lfm2Config",
}  # fmt: skip


def families() -> list[str]:
    """The configuration classes of the installed transformers whose causal LM has a tp plan, theirs or its own."""
    from transformers import CONFIG_MAPPING

    names = {CONFIG_MAPPING[t].__name__ for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if _planned(t, CONFIG_MAPPING)}
    return sorted(names | LM_HEAD_ONLY)


def _planned(model_type, mapping) -> bool:
    try:
        return bool(getattr(mapping[model_type], "base_model_tp_plan", None))
    except (KeyError, ImportError, AttributeError):
        return False


def build(family: str) -> torch.nn.Module:
    """The tiny model, the same on every rank."""
    config = getattr(transformers, family)(**{**TINY, **FIELDS.get(family, {})})
    config._experts_implementation = "eager"
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
    return model.float().eval()


def loss_of(logits: torch.Tensor, first_row: int) -> torch.Tensor:
    """A weighted sum of the logits, whose weights depend on the row of the whole batch alone."""
    at = first_row * logits[0].numel() + torch.arange(logits.numel(), dtype=torch.float64)
    return (logits * at.cos().view_as(logits).to(logits.dtype)).sum()


def tokens(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3, do_sample=False,
                          use_cache=True)  # fmt: skip


def difference(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    """|a - b| / |b|; infinite for other shapes, for what is not finite, and for a gradient that is missing."""
    if a is None or b is None:
        other = b if a is None else a
        return 0.0 if other is None or not other.any() else float("inf")
    a, b = a.detach().double(), b.detach().double()
    if a.shape != b.shape or not a.isfinite().all():
        return float("inf")
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


def survey_one(family: str, policy_name: str, mesh, rank: int) -> dict:
    """One record of one rank."""
    record = dict(family=family, policy=policy_name, outcome="unbuilt", share=None, cut="", reason="")
    policy = tpfuse.SharingPolicy(RANKS, DP, POLICIES[policy_name])
    ids = torch.randint(3, 64, (2 * DP, 5), generator=torch.Generator().manual_seed(1))
    try:
        whole = build(family)
        cut_model = copy.deepcopy(whole)
        want = whole(ids, use_cache=False).logits
        loss_of(want, 0).backward()
        with torch.no_grad():
            want_tokens = tokens(whole, ids)
        size = sum(p.numel() for p in whole.parameters())
    except Exception as error:
        return {**record, "reason": _short(error)}
    try:
        tpfuse.parallelize(cut_model, mesh, policy)
    except tpfuse.TPFuseError as error:
        return {**record, "outcome": "refused", "reason": _short(error)}
    except Exception as error:
        return {**record, "outcome": "dies", "reason": "parallelize: " + _short(error)}
    record["share"] = round(sum(p.numel() for p in cut_model.parameters()) / size, 4)
    kinds: dict[str, int] = {}
    for site in cut_model._tpfuse.sites:
        if site.size > 1:
            kinds[f"{site.kind}/{site.size}"] = kinds.get(f"{site.kind}/{site.size}", 0) + 1
    record["cut"] = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())) or "no attention and no MLP"
    mine = slice(2 * (rank // (RANKS // DP)), 2 * (rank // (RANKS // DP)) + 2)
    try:
        got = cut_model(ids[mine], use_cache=False).logits
        loss_of(got, mine.start).backward()
        with torch.no_grad():
            got_tokens = tokens(cut_model, ids[mine])
    except Exception as error:
        return {**record, "outcome": "dies", "reason": _short(error)}
    wrong = []
    if (error := difference(got, want[mine])) > TOLERANCE:
        wrong.append(f"logits off by {error:.2g}")
    of = dict(whole.named_parameters())
    worst = (0.0, "")
    for name, parameter in cut_model.named_parameters():
        full, cut = of[name].grad, cut_model._tpfuse.cuts.get(name)
        expected = full if full is None or cut is None else cut.take(full)
        grad = parameter.grad
        worst = max(worst, (difference(grad.to_local() if hasattr(grad, "to_local") else grad, expected), name))
    if worst[0] > 10 * TOLERANCE:
        wrong.append(f"gradient of {worst[1]} off by {worst[0]:.2g}")
    if not torch.equal(got_tokens, want_tokens[mine]):
        wrong.append("other greedy tokens")
    return {**record, "outcome": "wrong" if wrong else "right", "reason": "; ".join(wrong)}


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _rank(rank: int, folder: str, work, answers) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    transformers.logging.set_verbosity_error()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=20),
    )
    mesh = init_device_mesh("cpu", (DP, RANKS // DP), mesh_dim_names=("dp", "attn_tp"))
    while (job := work.get()) is not None:
        try:
            answers.put((rank, survey_one(*job, mesh, rank)))
        except Exception as error:
            answers.put((rank, dict(family=job[0], policy=job[1], outcome="dies", share=None, cut="",
                                    reason=_short(error))))  # fmt: skip
    os._exit(0)


class Ranks:
    """Four forked ranks that survey one family after another; killed and forked anew after a death."""

    def __init__(self) -> None:
        context = mp.get_context("fork")
        self.folder = tempfile.TemporaryDirectory()
        self.work = [context.Queue() for _ in range(RANKS)]
        self.answers = context.Queue()
        self.processes = [
            context.Process(target=_rank, args=(r, self.folder.name, self.work[r], self.answers), daemon=True)
            for r in range(RANKS)
        ]
        for process in self.processes:
            process.start()

    def survey(self, family: str, policy: str, timeout: float) -> dict:
        for queue in self.work:
            queue.put((family, policy))
        found: dict[int, dict] = {}
        end = time.monotonic() + timeout
        while len(found) < RANKS and time.monotonic() < end:
            try:
                rank, record = self.answers.get(timeout=0.5)
            except Exception:
                if not all(p.is_alive() for p in self.processes):
                    break
                continue
            found[rank] = record
        return together(family, policy, found)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def together(family: str, policy: str, found: dict[int, dict]) -> dict:
    """One record from those of the ranks: the worst outcome; ranks that disagree whether to refuse, die."""
    if len(found) < RANKS:
        have = "; ".join(sorted({r["reason"] for r in found.values() if r["reason"]}))
        reason = f"no answer from {RANKS - len(found)} of {RANKS} ranks" + (f"; {have}" if have else "")
        return dict(family=family, policy=policy, outcome="dies", share=None, cut="", reason=reason)
    outcomes = {record["outcome"] for record in found.values()}
    for outcome in ("dies", "wrong", "unbuilt", "refused", "right"):
        record = next((found[r] for r in sorted(found) if found[r]["outcome"] == outcome), None)
        if record is not None:
            if outcome in ("refused", "unbuilt") and len(outcomes) > 1:
                return {**record, "outcome": "dies", "reason": "on some ranks only: " + record["reason"]}
            return record
    raise AssertionError(found)


def survey(names: list[str], policies: list[str], timeout: float = 60.0):
    """The records, one after another."""
    return surveyed([(name, policy) for name in names for policy in policies], timeout)


def surveyed(configurations: Iterable[tuple[str, str]], timeout: float):
    """A record for each (family, policy), one after another."""
    ranks = Ranks()
    try:
        for name, policy in configurations:
            record = ranks.survey(name, policy, timeout)
            if record["outcome"] == "dies":
                ranks.stop()
                ranks = Ranks()
            yield record
    finally:
        ranks.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", help="comma-separated, with or without 'Config'; all when left out")
    parser.add_argument("--policy", choices=list(POLICIES), action="append")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one family and policy")
    parser.add_argument("--out", type=Path, help=f"JSON lines; {RESULTS.name} when all is surveyed")
    parser.add_argument("--jobs", type=int, default=1, help="configurations at once, each with four ranks")
    parser.add_argument("--again", action="store_true", help="not to go on where a stopped run with the same --out was")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return serve(surveyed, args.timeout)
    names = families()
    if args.families:
        chosen = {n if n.endswith("Config") else n + "Config" for n in args.families.split(",")}
        if unknown := chosen - set(names):
            parser.error(f"{', '.join(sorted(unknown))}: not among the families with a plan: {', '.join(names)}")
        names = sorted(chosen)
    asked = [(name, policy) for name in names for policy in args.policy or list(POLICIES)]
    out = args.out or (None if args.families or args.policy else RESULTS)
    records = Records(out, args.again)
    todo = [one for one in asked if one not in records.found]
    one_by_one = args.jobs == 1
    script = Path(__file__).resolve()
    for record in (surveyed(todo, args.timeout) if one_by_one
                   else surveyed_apart(todo, args.timeout, args.jobs, script)):  # fmt: skip
        records.add({**record, "transformers": transformers.__version__, "torch": torch.__version__})
        print(f"{record['outcome']:8} {record['family']:28} {record['policy']:10} {record['share'] or '':<7} "
              f"{record['cut']:40} {record['reason'][:200]}", flush=True)  # fmt: skip
    records.finish()
    counts = Counter(records.found[one]["outcome"] for one in asked)
    print(dict(counts))
    sys.exit(int(bool(counts["wrong"] or counts["dies"])))


if __name__ == "__main__":
    main()
