"""DistributedDataParallel makes the parameters of its ranks the same, once and by rank 0's. Ranks that hold different
slices of a weight are no replicas: whoever wraps the model over them has lost the slices, and is told so."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tpfuse._torch_private import ranks_of_ddp

from ..errors import PolicyError


def refuse_ddp(cut_over: tuple[int, ...]) -> None:
    """Refuse a forward inside a DistributedDataParallel over more than one of `cut_over`, the ranks of one replica.

    Raises:
        PolicyError: naming both.
    """
    ranks = ranks_of_ddp()
    if len(set(ranks) & set(cut_over)) > 1:
        raise PolicyError(
            f"DistributedDataParallel runs over ranks {list(ranks)}, and ranks {list(cut_over)} hold different slices "
            "of this model's weights: when it was made it sent one rank's slices to the others. Make the model anew, "
            "and give DistributedDataParallel the group of the replicas (process_group=mesh['dp'].get_group()), or "
            "leave it out where there are none. Hugging Face's Trainer puts it around a model unless "
            "model.config.distributed_config says that it is cut"
        )


@dataclass(frozen=True)
class RefuseDDP:
    """Before a model's forward in eager mode; the backend asks while it compiles."""

    cut_over: tuple[int, ...]

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if not torch.compiler.is_compiling():
            refuse_ddp(self.cut_over)


__all__ = ["RefuseDDP", "refuse_ddp"]
