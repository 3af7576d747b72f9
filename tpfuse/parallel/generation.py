"""Generation by replicas that end at different times: those that are done go on until all of them are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
import torch.nn as nn

from tpfuse.parallel.mesh import Groups

#: `synced_gpus` among the positional arguments of Hugging Face's `generate`, self left out.
_POSITION = 5


@dataclass(frozen=True)
class SyncedGenerate:
    """Hugging Face's `generate`, with `synced_gpus=True` whatever the caller says: a replica that ends by itself would
    leave the others waiting in a collective. Callers say False without asking the model (`Seq2SeqTrainer` does)."""

    generate: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) > _POSITION:
            args = (*args[:_POSITION], True, *args[_POSITION + 1 :])
        else:
            kwargs["synced_gpus"] = True
        return self.generate(*args, **kwargs)


def sync_generation(model: nn.Module, groups: Groups) -> None:
    """Lets the replicas of a model that communicates over dp end together.

    Only where the mesh covers the world: Hugging Face asks all ranks of it, after every token, whether they are done.
    """
    generate = getattr(model, "generate", None)
    if callable(generate) and groups.whole.size == dist.get_world_size():
        model.generate = SyncedGenerate(generate)  # type: ignore[assignment]  # a module's attribute
