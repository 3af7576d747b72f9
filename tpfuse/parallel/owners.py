"""Which modules of parallelized models hold which parameters, and how those are cut.

By module and name and not by parameter: FSDP2, `to_empty` and `load_state_dict(assign=True)` put other parameters in
the place of those that were cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from weakref import ref

import torch.nn as nn
from torch import Tensor

from tpfuse import _state as state
from tpfuse._torch_private import own_tensors
from tpfuse.parallel.cuts import Cut
from tpfuse.parallel.mesh import Group, Groups


@dataclass(frozen=True)
class Owned:
    """One parameter or buffer of a parallelized model.

    Args:
        cut, over: its cut and the ranks that it is cut over; None for one that every rank holds whole.
        whole: all ranks of the model.
        first: the tensor that was there when the model was cut.
    """

    cut: Cut | None
    over: Group | None
    whole: Group
    first: ref[Tensor] = field(compare=False)


def own(module: nn.Module, leaf: str, tensor: Tensor, cut: Cut | None, groups: Groups) -> Owned:
    """Remember a parameter or buffer of a parallelized model."""
    owned = Owned(cut, groups.of(cut.over) if cut else None, groups.whole, ref(tensor))
    with state.LOCK:
        state.OWNERS.setdefault(module, {})[leaf] = owned
    return owned


def owned_tensors() -> Iterator[tuple[Tensor, Owned]]:
    """Every parameter and buffer of a parallelized model that a module holds now."""
    for alive in state.OWNERS.keyrefs():  # a list: other threads may cut models meanwhile
        if (module := alive()) is None:
            continue
        for leaf, owned in state.OWNERS.get(module, {}).items():
            for table in own_tensors(module):
                if isinstance(tensor := table.get(leaf), Tensor):
                    yield tensor, owned
