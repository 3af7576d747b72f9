"""Stands for the one-shot kernel where there is no GPU: the same launches, and results as if all peers sent zeros.

Replayed launches come with addresses in place of tensors, so that is what it computes on.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tpfuse.kernels import entry
from tpfuse.kernels import rendezvous as groups
from tpfuse.kernels.add_norm import add_norm_reference
from tpfuse.kernels.call import NORMS, Call
from tpfuse.kernels.symmetric import dispatch, one_shot, operands
from tpfuse.kernels.symmetric.entries import Entry, Table
from tpfuse.kernels.symmetric.workspace import virtual_ranks

NAMES = {value: name for name, value in NORMS.items()}


class Compiled:
    """What the stub compiles to, for one specialisation: the dtypes of its pointers are those of the first call."""

    def __init__(self, kernel: StubKernel, args: tuple, constants: dict[str, Any]) -> None:
        self.kernel, self.constants = kernel, constants
        self.dtypes = [a.dtype if isinstance(a, Tensor) else None for a in args]

    def __getitem__(self, grid: tuple) -> Callable[..., None]:
        def run(*args: Any, stream: Any = None) -> None:
            self.kernel.launched(self, grid, args)

        return run


class StubKernel:
    """`launches`: every launch's arguments, tensors as addresses. `compiled`: what was compiled. `computes`: whether
    results are, which takes time."""

    def __init__(self, arg_names: list[str], computes: bool) -> None:
        self.arg_names, self.computes = arg_names, computes
        self.launches: list[tuple] = []
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple) -> Callable[..., Compiled]:
        def launch(*args: Any, **constants: Any) -> Compiled:
            self.compiled.append(Compiled(self, args, constants))
            self.compiled[-1][grid](*args, *(constants.get(name) for name in self.arg_names[len(args) :]))
            return self.compiled[-1]

        return launch

    def launched(self, compiled: Compiled, grid: tuple, args: tuple) -> None:
        if not self.computes:
            return
        addresses = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in args)
        self.launches.append(addresses)
        hidden, rows = compiled.constants["H"], args[18]

        def at(index: int, *shape: int) -> Tensor | None:
            dtype = compiled.dtypes[index]
            if addresses[index] is None or dtype is None:
                return None
            size = dtype.itemsize * torch.Size(shape).numel()
            return torch.frombuffer((ctypes.c_char * size).from_address(addresses[index]), dtype=dtype).view(shape)

        x, residual = at(0, rows, hidden), at(1, rows, hidden)
        assert x is not None
        vectors = [at(index, hidden) for index in (2, 3, 4)]
        y, into_hidden, total, mean, rstd = (at(index, rows, hidden if index < 8 else 1) for index in range(5, 10))
        eps = at(10) if addresses[10] is not None else args[11]
        out = add_norm_reference(
            Call(
                x,
                residual,
                *vectors,
                eps=eps,
                norm=NAMES[compiled.constants["NORM"]],
                weight_offset=args[12] or 0.0,
                alpha=1.0 if args[13] is None else args[13],
                post=compiled.constants["POST"],
                out_dtype=y.dtype,
                hidden_dtype=into_hidden.dtype if into_hidden is not None else None,
                stats=rstd is not None,
            )
        )
        for to, got in ((y, out.y), (into_hidden, out.residual_out), (total, x), (mean, out.mean), (rstd, out.rstd)):
            if to is not None:
                to.copy_(got)


def in_place_of_gpus(monkeypatch: Any, slot_bytes: int = 1 << 16, computes: bool = True) -> StubKernel:
    """Let groups of a fake world use the stub on CPU tensors; what is launched."""
    kernel = StubKernel(list(one_shot._one_shot_kernel.arg_names), computes)

    def meet(group: Any, group_name: str, device: torch.device, slots: int, copies: bool) -> tuple:
        return virtual_ranks(2, "cpu", 64, slots)[0], ""

    table = Table([Entry("*", 2, 64, 1 << 20, "one_shot")])
    monkeypatch.setattr(one_shot, "_one_shot_kernel", kernel)
    monkeypatch.setattr(operands, "COMPILED_REGISTRY", {})
    monkeypatch.setattr(dispatch, "SHIPPED", table)
    monkeypatch.setattr(groups, "_meet", meet)
    monkeypatch.setattr(groups, "_static_refusal", lambda group: "")
    monkeypatch.setattr(groups, "DEFAULT_SLOT_BYTES", slot_bytes)
    monkeypatch.setattr(entry, "on_gpu", lambda x: True)
    monkeypatch.setattr(Call, "supported", lambda op: op.hidden % 8 == 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "stub")
    dispatch.default_table.cache_clear()
    dispatch.choose.cache_clear()
    return kernel
