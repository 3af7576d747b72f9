"""`python -m tpfuse explain CONFIG`: what tpfuse would do to a Hugging Face model, from its configuration alone.

    configuration -> the model on the meta device -> one layer of each kind -> cut for rank 0 of N -> traced -> report

No weights, no GPU, no other process: sizes are real, tensors are not, and the process group is a fake one. Layers with
the same modules and sizes communicate alike, so one of them is traced and counted as often as it stands in the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .._torch_private import fake_store
from ..errors import OptionError
from ..policy import SharingPolicy
from ..report import Report, size_in_words
from .recommend import Candidate, ModelSizes, recommend

#: mode -> (sequences, tokens of each in one step)
MODES = {"decode": (32, 1), "prefill": (1, 2048), "training": (1, 2048)}


@dataclass(frozen=True)
class Explained:
    """What is known of one configuration. times, names: of the report's boundaries that stand for several layers."""

    title: str
    report: Report
    policy: SharingPolicy
    candidates: list[Candidate]
    memory: float
    times: dict[int, int] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    traced: str = ""

    def bytes(self, name: str) -> int:
        sent = [(getattr(b, name) or 0) * self.times.get(i, 1) for i, b in enumerate(self.report.boundaries)]
        return sum(sent)


def run(path: Path, ranks: int, policy: SharingPolicy | None, mode: str, memory: float) -> Explained:
    """Trace the model that the configuration describes, as rank 0 of `ranks`. memory: GiB that the weights may take."""
    import tpfuse

    if mode not in MODES:
        raise OptionError(f"--mode {mode}; allowed: {', '.join(MODES)}")
    policy = policy or SharingPolicy(tp_size=ranks)
    if policy.tp_size != ranks:
        raise OptionError(f"--policy has tp_size={policy.tp_size}, and --ranks is {ranks}; give both the same number")
    config = read_config(path)
    whole = _model(config)
    sizes = measured(whole, ranks, MODES[mode])
    kept, counts, spans = reduce_layers(whole, config)
    with _fake_world(ranks):
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (policy.dp_size, policy.attn_tp_size), mesh_dim_names=("dp", "attn_tp"))
        model = tpfuse.parallelize(whole, mesh, policy)
        ids = torch.zeros(MODES[mode], dtype=torch.long, device="meta")
        with torch.set_grad_enabled(mode == "training"):
            report = tpfuse.explain(model, (), {"input_ids": ids, "use_cache": False}, dynamic=False)
    times, names = _spread(report, kept, counts, spans)
    total = sum(counts.values())
    traced = f"traced {len(counts)} of {total} layers; layers with the same modules and sizes are counted, not traced: "
    traced += ", ".join(f"layer {spans[i]} as one" for i in sorted(counts) if counts[i] > 1)
    return Explained(
        f"{path.stem if path.is_file() else path.name}: {ranks} ranks, {mode}", report, policy,
        recommend(sizes, ranks, memory), memory, times, names, traced if len(counts) < total else "",
    )  # fmt: skip


def read_config(path: Path) -> Any:
    """The configuration in a folder or a JSON file."""
    from transformers import AutoConfig

    file = path / "config.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{path}: no configuration of Hugging Face's kind can be read there ({error})") from error
    if not isinstance(found, dict) or "model_type" not in found:
        raise OptionError(f"{file}: a configuration needs a model_type, as Hugging Face's config.json has one")
    known = {key: value for key, value in found.items() if key not in ("quantization_config", "auto_map")}
    try:
        return AutoConfig.for_model(**known)
    except (ValueError, TypeError) as error:
        raise OptionError(f"{file}: transformers makes no configuration of it: {error}") from error


def _model(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def layer_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The longest list of modules: the layers."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and "expert" not in name]
    if not lists:
        raise OptionError("the model has no list of layers, so there is nothing to explain layer by layer")
    return max(lists, key=lambda item: len(item[1]))


def reduce_layers(model: nn.Module, config: Any) -> tuple[str, dict[int, int], dict[int, str]]:
    """Leave one layer of each run of equal ones in the model, and the last one.

    Returns the name of the list; of each layer left, for how many it stands, and which ("3–59").
    """
    name, layers = layer_list(model)
    kinds = [_kind(layer) for layer in layers]
    runs: list[list[int]] = []
    for i, kind in enumerate(kinds):
        if runs and kinds[runs[-1][0]] == kind and i != len(kinds) - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    firsts = [run[0] for run in runs]
    layers_left = nn.ModuleList(layers[i] for i in firsts)
    owner: Any = model.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], layers_left)
    for config_of in {id(c): c for c in (config, getattr(config, "text_config", config), owner.config)}.values():
        types = getattr(config_of, "layer_types", None)
        config_of.num_hidden_layers = len(firsts)
        if types:
            config_of.layer_types = [types[i] for i in firsts]
    for index, layer in enumerate(layers_left):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010  (a number, which a module's own types do not have)
    spans = {k: f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for k, run in enumerate(runs)}
    return name, {k: len(run) for k, run in enumerate(runs)}, spans


def _kind(layer: nn.Module) -> tuple:
    modules = tuple((name, type(m).__name__) for name, m in layer.named_modules())
    return modules, tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())


def measured(model: nn.Module, ranks: int, rows: tuple[int, int]) -> ModelSizes:
    """What the cost model reads: weights of each sort in bytes, and what follows what."""
    from ..passes.verdict.names import role_of_name

    weights = {"attention": 0, "dense_mlp": 0, "moe": 0, "embedding": 0, "": 0}
    for name, parameter in model.named_parameters():
        role = next((r for part in name.split(".") if (r := role_of_name(part)) is not None), "")
        role = "moe" if role == "dense_mlp" and ("expert" in name or "gate." in name) else role
        weights[role] += parameter.numel() * 2
    _, layers = layer_list(model)
    moe = [any("expert" in name for name, _ in layer.named_modules()) for layer in layers]
    config: Any = model.config
    hidden = getattr(config, "text_config", config).hidden_size
    return ModelSizes(weights, tuple(moe), hidden, rows[0] * rows[1])


def _spread(
    report: Report, layers: str, counts: dict[int, int], spans: dict[int, str]
) -> tuple[dict[int, int], dict[int, str]]:
    times, names = {}, {}
    for index, boundary in enumerate(report.boundaries):
        for k, count in counts.items():
            if f"{boundary.module}.".startswith(f"{layers}.{k}."):
                times[index] = count
                names[index] = boundary.module.replace(f"{layers}.{k}", f"{layers}.{spans[k]}", 1)
    return times, names


class _fake_world:
    """A process group of `ranks` ranks that sends nothing, for as long as the block runs."""

    def __init__(self, ranks: int):
        self.ranks = ranks

    def __enter__(self) -> None:
        if dist.is_initialized():
            raise OptionError("this process has a process group already; explain starts a fake one of its own")
        dist.init_process_group("fake", rank=0, world_size=self.ranks, store=fake_store())

    def __exit__(self, *_: Any) -> None:
        dist.destroy_process_group()


def lines(explained: Explained) -> Iterator[str]:
    """The text under the table."""
    before, after = explained.bytes("bytes_before"), explained.bytes("bytes_after")
    if explained.traced:
        yield explained.traced
    yield (
        f"a rank sends {size_in_words(before)} in a step as the model is written, and {size_in_words(after)} now "
        f"(all layers, policy {explained.policy.to_json()}; attention without a cache, which changes no boundary)"
    )
    yield "policies by the cost model (communication only: latency and bytes of each boundary; cheapest first):"
    for candidate in explained.candidates[:8]:
        yield "  " + candidate.line(explained.memory)
    best = next((c for c in explained.candidates if c.gib <= explained.memory), None)
    if best is None:
        yield f"recommended: none; no policy's weights fit into {explained.memory:.0f} GiB a rank, so use more ranks"
    else:
        yield f"recommended: {best.name}: {best.why(explained.candidates, explained.memory)}"
