"""Where each parameter of a cut module may be read: what lies on the right side of its sums, and nothing else.

A module that is cut brings its inputs in and pays its sums around its own forward. A parameter that is read elsewhere
(`F.linear(x, self.mlp.up.weight)`, a projection that is called past its MLP) meets neither: a slice gives a slice of
the result, and the gradient of a parameter that every rank holds whole is counted once for each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch.nn as nn

from tpfuse.parallel.cut_modules import ModuleCut
from tpfuse.parallel.cuts import Cut
from tpfuse.parallel.hf_plan import join, routed_block_of
from tpfuse.parallel.mesh import Groups
from tpfuse.parallel.record import Done


@dataclass(frozen=True)
class Place:
    """One parameter.

    Args:
        name: its qualified name.
        site: the module that was cut, in which it lies.
        inside: the module that must be running when it is read: the site, or a row-wise projection, which pays the sum.
        cut: its cut; None for one that every rank holds whole, which only its gradient ties to that place.
        ranks: over how many ranks the site communicates.
    """

    name: str
    site: str
    inside: str
    cut: Cut | None
    ranks: int


def places(
    model: nn.Module, done: Iterable[Done], edges: Iterable[ModuleCut], owed: Mapping[str, str], groups: Groups
) -> tuple[Place, ...]:
    """The place of every parameter (or buffer) of a cut module, by its names in the model."""
    done = list(done)
    roles = {name: role for name, role, _ in done}
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, Place] = {}
    for name, role, cut in done:
        block = routed_block_of(name, roles)
        site = name if block is None else block
        if role.spread:
            inner = [join(name, leaf) for leaf in (*role.colwise, *role.rowwise)]
        elif block is None and role.kind != "moe":
            inner = [names[child] for child in cut.rowwise_modules]
        else:
            inner = []  # a routed block pays once, at its output
        for parameter in _tensors(model, name, cut):
            inside = next((i for i in inner if parameter.startswith(f"{i}.")), None)
            if role.spread and inside is None:
                continue
            own = cut.cuts.get(parameter)
            if own is not None or owed.get(parameter, "dp") != "dp":
                size = groups.of(cut.over or "attention").size  # a module that is whole works on a share of the rows
                found.setdefault(parameter, Place(parameter, site, inside or site, own, size))
    for edge in edges:
        found |= {name: Place(name, edge.name, edge.name, cut, cut.size) for name, cut in edge.cuts.items()}
    return tuple(found.values())


def _tensors(model: nn.Module, name: str, cut: ModuleCut) -> Iterator[str]:
    yield from cut.cuts
    for leaf, _ in model.get_submodule(name).named_parameters(prefix=name):
        if leaf not in cut.cuts:
            yield leaf
