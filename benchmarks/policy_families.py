"""What each sharing policy makes of a decode step of real model families: collectives, and bytes a rank sends.

    python benchmarks/policy_table.py --families          writes benchmarks/results/policy_families.json

Counted, not measured: Hugging Face's Llama, Qwen3-MoE, DeepSeek-V3 and GLM-4-MoE, cut by their own plans, are traced
with a static cache in a fake process group, and the report says what the graph sends as it was written and as it was
rewritten. Hidden sizes are those of published models; heads, MLPs, experts, layers and vocabulary are few, since no
boundary's bytes depend on them. The gather behind the output projection, whose bytes do, is left out.
"""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from md import RESULTS, table
from records import write

#: Published models, and the hidden size of each.
FAMILIES = {
    "Llama-3.1-70B": ("llama", 8192),
    "Qwen3-235B-A22B": ("qwen3_moe", 4096),
    "DeepSeek-V3": ("deepseek_v3", 7168),
    "GLM-4.5": ("glm4_moe", 5120),
}
MESHES = [(4, 2), (8, 2), (8, 4)]
ROWS = 256  # of each replica: what the planner assumes where a policy states no maximum
FILE = "policy_families.json"


@dataclass(frozen=True)
class Row:
    """One family under one policy. before, after: collectives by kind; bytes are what one rank sends in a step.

    rewrites: how many of the graph's collectives have each rewrite.
    """

    family: str
    hidden: int
    tp: int
    dp: int
    moe_dense_tp_size: int
    before: dict[str, int]
    after: dict[str, int]
    bytes_before: int
    bytes_after: int
    rewrites: dict[str, int]


def model_of(family: str, hidden: int) -> torch.nn.Module:
    """A dense layer and one of the family's own kind (Llama: two dense ones), in bfloat16, all weights zero."""
    import transformers

    from tests.test_parallelize_families import config_of

    config = config_of(family)
    config.intermediate_size = config.moe_intermediate_size = 512
    config.hidden_size, config.tie_word_embeddings = hidden, False
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    model.config._experts_implementation = "grouped_mm"  # the eager one loops over data and breaks the graph
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    return model


def counted(name: str, whole: torch.nn.Module, tp: int, dp: int, dense: int) -> Row:
    """What the last rank of tp sends in a decode step, as written and as rewritten."""
    from transformers import StaticCache

    import tpfuse
    from tests.graphs import fake_world
    from tests.test_parallelize_models import mesh_of

    torch._dynamo.reset()
    with fake_world(tp, tp - 1), torch.no_grad():
        policy = tpfuse.SharingPolicy(tp, dp, dense)
        model = tpfuse.parallelize(copy.deepcopy(whole), mesh_of(policy), policy)
        cache = StaticCache(config=model.config, max_cache_len=8)
        ids = torch.ones(ROWS, 1, dtype=torch.long)
        model(ids, past_key_values=cache, use_cache=True)
        step = dict(past_key_values=cache, position_ids=torch.ones(ROWS, 1, dtype=torch.long), use_cache=True)
        report = tpfuse.explain(model, (ids,), step)
    boundaries = [b for b in report.boundaries if b.module != "lm_head"]
    before, after = ([t for b in boundaries for t in getattr(b, when)] for when in ("before", "after"))
    return Row(
        name, FAMILIES[name][1], tp, dp, dense,
        dict(Counter(t.collective for t in before)), dict(Counter(t.collective for t in after)),
        sum(t.bytes for t in before), sum(t.bytes for t in after),
        dict(Counter(b.rewrite for b in boundaries if b.rewrite)),
    )  # fmt: skip


def count_all() -> Iterator[Row]:
    for name, (family, hidden) in FAMILIES.items():
        whole = model_of(family, hidden)
        for tp, dp in MESHES:
            for dense in (1, tp // dp, tp):
                yield counted(name, whole, tp, dp, dense)


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for row in count_all():
        rows.append(asdict(row))
        print(row, flush=True)
        write(RESULTS / FILE, {"torch": torch.__version__, "rows": ROWS, "records": rows})


SHORT = {"all_reduce": "AR", "reduce_scatter": "RS", "all_gather": "AG"}


def markdown() -> str:
    """The results file as a table."""
    records = json.loads((RESULTS / FILE).read_text())["records"]

    def kinds(counts: dict[str, int]) -> str:
        return " + ".join(f"{counts[kind]} {short}" for kind, short in SHORT.items() if kind in counts)

    lines = []
    for r in records:
        means = {1: "own rows", r["tp"] // r["dp"]: "attention group", r["tp"]: "whole group"}[r["moe_dense_tp_size"]]
        sent = [f"{r[key] / 1e6:.1f}" for key in ("bytes_before", "bytes_after")]
        lines.append([f"{r['family']} ({r['hidden']})", f"{r['tp']}, {r['dp']}", f"{r['moe_dense_tp_size']} ({means})",
                      f"{kinds(r['before'])} → {kinds(r['after'])}", " → ".join(sent),
                      ", ".join(f"{count} {name}" for name, count in sorted(r["rewrites"].items()))])  # fmt: skip
    head = ["model (hidden)", "tp, dp", "moe_dense_tp_size", "collectives", "MB a rank sends", "rewrites"]
    return table(head, lines)


if __name__ == "__main__":
    main()
