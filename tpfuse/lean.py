"""The operators of ops.py as compiled graphs call them: outputs are given, options are one string, nothing comes back.

    tpfuse::all_reduce_norm.lean(x, y, spec, residual, weight, hidden)              what most boundaries need
    tpfuse::all_reduce_norm.with_rstd(..., rstd)                                    most of training
    tpfuse::all_reduce_norm.with_bias(..., rstd, bias)
    tpfuse::all_reduce_norm.full(..., rstd, bias, mean, pre_bias, total, eps_tensor)
    tpfuse::all_reduce_norm.quantised(x, y, spec, residual, weight, hidden, q, scale)
    tpfuse::all_reduce_norm.quantised_full(..., q, scale, rstd, bias, mean, pre_bias, total, eps_tensor)

and the same for the two others. Every argument of a schema costs the host, an autograd wrapper as much as thirty of
them, and an allocation in here more than one in the graph's own code, so this is what a compiled graph is lowered to
once it is split (passes/rewrite/lower.py). Formulas, shapes and dtypes are those of ops.py; `spec` says what is filled.

A call first looks for the record of one like it (kernels/records.py) and launches that again; without one, the call is
made as the functional operator makes it, and leaves a record where its launches were on the tensors given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _state as state
from ._torch_private import group_size
from .boundary_spec import FORMS, OPERANDS, OUTPUTS, SELDOM, BoundarySpec, read_spec
from .errors import OpError
from .kernels.add_norm import add_norm_reference
from .kernels.call import AddNormOut, Call
from .kernels.replay import Site, addresses, quantised_addresses, with_records


def declared(names: tuple[str, ...]) -> str:
    """The arguments as a schema has them: x, y and the spec are always given."""
    letters = dict(zip(OUTPUTS, "abcdefg", strict=True))
    required = {"x": "Tensor x", "y": "Tensor(a!) y", "spec": "str spec"}
    return ", ".join(
        required.get(name) or f"Tensor{f'({letters[name]}!)' if name in letters else ''}? {name}=None" for name in names
    )


class Boundary(Site):
    """One spec in this process. `run`: the call as the functional operator makes it, into outputs where it can."""

    __slots__ = ("options", "run", "spec")

    def __init__(self, run: Callable[..., list[Tensor]], spec: BoundarySpec) -> None:
        super().__init__(spec.group_name)
        self.run, self.spec, self.options = run, spec, spec.arguments

    def first(self, operands: tuple, outputs: dict[str, Tensor | None], product: Callable | None = None) -> None:
        """The call, without a record of one like it. `outputs`: in the order of OUTPUTS; product: as `Call.product`."""
        dtypes = tuple(None if t is None else t.dtype for t in operands)
        wanted = [t for name in self.spec.outputs if (t := outputs[name]) is not None]
        if dtypes != self.spec.operands or len(wanted) < len(self.spec.outputs):
            names = [name for name, t in outputs.items() if t is not None]
            raise OpError(f"operands of {dtypes} and outputs {names} are not those of {self.spec}")
        out = total = None
        # Of an output off a 16-byte boundary Triton compiles a kernel that sums a row in another order; a peer may not
        # have it there, and then its bits would be others.
        if all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in wanted):
            y, hidden, total, mean, rstd, q, scale = (
                outputs[name] if name in self.spec.outputs else None for name in OUTPUTS
            )
            assert y is not None, "it is always wanted"
            out = AddNormOut(y, hidden, mean, rstd, q, scale)
        made = self.run(Call(*operands, **self.options, out=out, sum_out=total, product=product), self)
        for given, got in zip(wanted, made, strict=True):
            if got is not given:
                given.copy_(got)


def kernels_of(run: Callable[..., list[Tensor]]) -> dict[str, Callable[..., None]]:
    """The kernel of each form of an operator, which also takes `product=...`, as `Call.product`. `run`: the call,
    given a `Call` and the site that keeps a record of it."""
    known: dict[str, Site] = {}  # by spec; an entry is made once and never changes

    def first(
        x: Tensor, y: Tensor, spec: str, residual: Tensor | None, weight: Tensor | None, hidden: Tensor | None,
        rstd: Tensor | None = None, bias: Tensor | None = None, mean: Tensor | None = None,
        pre_bias: Tensor | None = None, total: Tensor | None = None, eps_tensor: Tensor | None = None,
        q: Tensor | None = None, scale: Tensor | None = None, product: Callable | None = None,
    ) -> None:  # fmt: skip
        boundary = known.get(spec)
        if boundary is None:
            boundary = known.setdefault(spec, Boundary(run, read_spec(spec)))
        assert isinstance(boundary, Boundary)
        boundary.first(
            (x, residual, pre_bias, weight, bias, eps_tensor),
            {"y": y, "hidden": hidden, "total": total, "mean": mean, "rstd": rstd, "q": q, "scale": scale},
            product,
        )

    def first_quantised(
        x: Tensor, y: Tensor, spec: str, residual: Tensor | None, weight: Tensor | None, hidden: Tensor | None,
        q: Tensor | None = None, scale: Tensor | None = None, *seldom: Tensor | None, **product: Callable,
    ) -> None:  # fmt: skip
        named: dict[str, Any] = dict(zip(SELDOM, seldom, strict=False)) | product
        first(x, y, spec, residual, weight, hidden, q=q, scale=scale, **named)

    plain, quantising = (
        with_records(known, first, addresses), with_records(known, first_quantised, quantised_addresses)
    )  # fmt: skip
    return {form: quantising if "q" in names else plain for form, names in FORMS.items()}


def define(library: torch.library.Library, name: str, run: Callable[..., list[Tensor]]) -> None:
    """Define the lean forms of the operator `name`. `run`: as `kernels_of` takes it."""
    kernels = kernels_of(run)

    def nothing(*_: Any, **__: Any) -> None:
        return None

    for form, names in FORMS.items():
        full_name = f"{name}.{form}"
        library.define(f"{full_name}({declared(names)}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(full_name, kernels[form], "CompositeExplicitAutograd")
        # Compiled graphs hold no gradients any more; the usual look for them would cost a microsecond.
        for key in ("Autograd", "ADInplaceOrView"):
            library.impl(full_name, torch.library.fallthrough_kernel, key)
        torch.library.register_fake(f"tpfuse::{full_name}", nothing, lib=library)


def call_leanly(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, group_name: str,
    norm: str, weight_offset: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, the hidden states) of an eager all-reduce and norm that nobody differentiates."""
    operands = tuple(None if t is None else t.dtype for t in (x, residual, None, weight, bias, None))
    told = (norm, eps, weight_offset, group_name, operands)
    text = state.SPEC_TEXTS.get(told)
    if text is None:
        text = BoundarySpec(
            norm=norm, eps=eps, weight_offset=float(weight_offset), out_dtype=x.dtype, hidden_dtype=x.dtype,
            group_name=group_name, operands=operands,
        ).text()  # fmt: skip
        with state.LOCK:
            state.SPEC_TEXTS[told] = text
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    hidden = torch.empty_like(y)
    if bias is None:
        torch.ops.tpfuse.all_reduce_norm.lean(x, y, text, residual, weight, hidden)
    else:
        torch.ops.tpfuse.all_reduce_norm.with_bias(x, y, text, residual, weight, hidden, None, bias)
    return y, hidden


def plain_outputs(name: str, tensors: dict[str, Tensor], spec: BoundarySpec) -> list[Tensor]:
    """What `tpfuse::<name>` returns, in plain operations that can be traced. `tensors`: by the names of its operands;
    rows to be scattered divide by the ranks of the group."""
    x, *others = (tensors.get(operand) for operand in OPERANDS)
    assert x is not None, "every operation has one"
    collectives = torch.ops._c10d_functional
    total = x
    if name == "all_reduce_norm":
        total = collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", spec.group_name))
    elif name == "reduce_scatter_norm":
        rows, ranks = x.reshape(-1, x.shape[-1]).contiguous(), group_size(spec.group_name)
        total = collectives.wait_tensor(collectives.reduce_scatter_tensor(rows, "sum", ranks, spec.group_name))
    out = add_norm_reference(Call(total, *others, **spec.arguments))
    made = (out.y, out.residual_out, total, out.mean, out.rstd, out.q, out.scale)
    found = dict(zip(OUTPUTS, made, strict=True))
    return [t for name in spec.outputs if (t := found[name]) is not None]
