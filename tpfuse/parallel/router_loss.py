"""A loss on the routers' outputs, where routers see the rows of all replicas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from torch import Tensor

from tpfuse.errors import PlanError
from tpfuse.parallel.collectives import scale_gradient


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


@dataclass(frozen=True)
class ShareRouterLogits:
    """After the module that holds the layers: each rank of a routed block has the whole gradient of what its routers
    gave away, and the sum over the ranks would count it once for each."""

    size: int

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, (Tensor, tuple)):  # Dynamo breaks a graph where a tensor is asked for what it may lack
            return output
        logits = getattr(output, "router_logits", None)
        if isinstance(logits, tuple) and any(isinstance(one, Tensor) for one in logits):
            output.router_logits = tuple(
                scale_gradient(one, 1 / self.size) if isinstance(one, Tensor) and one.requires_grad else one
                for one in logits
            )
        return output


def holder_of_layers(model: nn.Module, site: str) -> nn.Module:
    """The module that holds the list of layers in which a block stands; it collects what routers give away."""
    path = site.split(".")
    for at in range(len(path)):
        if isinstance(model.get_submodule(".".join(path[: at + 1])), nn.ModuleList):
            return model.get_submodule(".".join(path[:at]))
    return model
