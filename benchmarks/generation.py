"""What the benchmarks of generation share: a model that every rank loads, and tokens a second of the slowest rank."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import Run, hugging_face_config


def loaded_models(names: Iterable[str], layers: int, tiny: bool, device: torch.device) -> dict[str, Any]:
    """A model for each name, of Llama-3-8B's sizes with random weights and cut by tp_plan="auto". Collective: rank 0
    saves the model once."""
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder, src=0)
        if dist.get_rank() == 0:
            _save(hugging_face_config(Run("llama", "decode", 1, layers), tiny), Path(own), device)
        dist.barrier()
        models = {name: _load(Path(folder[0])) for name in names}
        dist.barrier()
    return models


def _save(config: Any, folder: Path, device: torch.device) -> None:
    import transformers

    torch.manual_seed(0)
    with device:  # a GPU draws the weights in a moment
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def _load(folder: Path) -> Any:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def rates_of(seconds: dict[str, list[float]], tokens: int) -> dict[str, tuple[float, float]]:
    """Name -> (tokens a second, median of the rounds; between their quartiles), each round that of its slowest rank.
    Collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, seconds)
    out = {}
    for name in seconds:
        slowest = [max(each) for each in zip(*(rank[name] for rank in everyone), strict=True)]
        rates = [tokens / each for each in slowest]
        quarters = statistics.quantiles(rates, n=4)
        out[name] = round(statistics.median(rates), 1), round(quarters[2] - quarters[0], 1)
    return out
