"""Inductor's own way to symmetric memory, as a backend: small sums become one-shot all-reduces, and the kernel before
such a sum writes into symmetric memory. It fails when a second size follows in the same process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def auto_select(gm: torch.fx.GraphModule, inputs: list, **_: Any) -> Callable:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, inputs, config_patches={"_collective.auto_select": True})
