"""A loss on the routers' outputs, where routers see the rows of all replicas."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn as nn

from tpfuse.errors import PlanError


@dataclass(frozen=True)
class RefuseRouterLoss:
    """Before a model's forward: refuses Hugging Face's auxiliary loss, which takes its routers' rows for its own."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        asked = kwargs.get("output_router_logits")
        if asked is None:
            asked = getattr(getattr(module, "config", None), "output_router_logits", False)
        if asked and kwargs.get("labels") is not None:
            raise PlanError(
                "output_router_logits=True: this model's routers see the rows of all dp replicas, so that no auxiliary "
                "loss of one replica's rows can be made of them. Leave it out (output_router_logits=False), or "
                "use dp_size=1"
            )
