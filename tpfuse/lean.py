"""The operators of ops.py as compiled graphs call them: outputs are given, options are one string, nothing comes back.

    tpfuse::all_reduce_norm.lean(x, y, spec, residual, weight, hidden)              what most boundaries need
    tpfuse::all_reduce_norm.full(..., rstd, bias, mean, pre_bias, total, eps_tensor)

and the same for the two others. An argument costs the host a third of a microsecond, an autograd wrapper ten, and an
allocation in here more than one in the graph's own code, so this form is what a compiled graph is lowered to once it is
split (passes/rewrite/lower.py). Formulas, shapes and dtypes are those of ops.py; what is filled is in `spec`.

A call first looks for the record of one like it (kernels/records.py) and launches that again; without one, the call is
made as the functional operator makes it, and leaves a record where it was a single launch on the tensors given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .boundary_spec import BoundarySpec, read_spec
from .kernels.add_norm import AddNormOut
from .kernels.replay import Site
from .errors import OpError

_MOST = "(Tensor x, Tensor(a!) y, str spec, Tensor? residual=None, Tensor? weight=None, Tensor(b!)? hidden=None"
_ALL = (
    ", Tensor(c!)? rstd=None, Tensor? bias=None, Tensor(d!)? mean=None, Tensor? pre_bias=None, Tensor(e!)? total=None,"
    " Tensor? eps_tensor=None"
)


class Boundary:
    """One spec in this process. `run`: the call as the functional operator makes it, into outputs where it can."""

    __slots__ = ("into", "options", "run", "site", "spec")

    def __init__(self, run: Callable[..., list[Tensor]], spec: BoundarySpec) -> None:
        self.run, self.spec, self.options = run, spec, spec.options
        self.site = Site(spec.group_name)
        self.into = spec.outputs

    def first(self, operands: tuple, outputs: dict[str, Tensor | None]) -> None:
        """The call, without a record of one like it."""
        dtypes = tuple(None if t is None else t.dtype for t in operands)
        missing = [name for name in self.into if outputs[name] is None]
        if dtypes != self.spec.operands or missing:
            raise OpError(f"operands of {dtypes}, without {missing}; the spec says {self.spec}")
        wanted = [t for name in self.into if (t := outputs[name]) is not None]
        into = None
        if all(t.is_contiguous() for t in wanted):
            y, hidden, total, mean, rstd = (outputs[n] if n in self.into else None for n in outputs)
            assert y is not None
            into = AddNormOut(y, hidden, mean, rstd), total
        made = self.run(*operands, **self.options, into=into, site=self.site)
        for given, got in zip(wanted, made, strict=True):
            if got is not given:
                given.copy_(got)


def define(library: torch.library.Library, name: str, run: Callable[..., list[Tensor]]) -> None:
    """Define both overloads of the operator `name`. `run`: its kernel, which also takes `into` and `site`."""
    known: dict[str, Boundary] = {}  # spec -> what it means here; entries are made once and never change

    def call(
        x: Tensor, y: Tensor, spec: str, residual: Tensor | None = None, weight: Tensor | None = None,
        hidden: Tensor | None = None, rstd: Tensor | None = None, bias: Tensor | None = None,
        mean: Tensor | None = None, pre_bias: Tensor | None = None, total: Tensor | None = None,
        eps_tensor: Tensor | None = None,
    ) -> None:  # fmt: skip
        boundary = known.get(spec)
        if boundary is None:
            boundary = known.setdefault(spec, Boundary(run, read_spec(spec)))
        if not boundary.site.again(
            x, y, residual, weight, hidden, rstd, bias, mean, pre_bias, total, eps_tensor
        ):
            boundary.first(
                (x, residual, pre_bias, weight, bias, eps_tensor),
                {"y": y, "hidden": hidden, "total": total, "mean": mean, "rstd": rstd},
            )

    def nothing(*_: Any, **__: Any) -> None:
        return None

    for overload, arguments in (("lean", _MOST), ("full", _MOST + _ALL)):
        full_name = f"{name}.{overload}"
        library.define(f"{full_name}{arguments}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(full_name, call, "CompositeExplicitAutograd")
        # Compiled graphs hold no gradients any more; the usual look for them would cost a microsecond.
        for key in ("Autograd", "ADInplaceOrView"):
            library.impl(full_name, torch.library.fallthrough_kernel, key)
        torch.library.register_fake(f"tpfuse::{full_name}", nothing, lib=library)
