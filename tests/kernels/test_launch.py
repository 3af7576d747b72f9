"""A launch finds its compiled kernel again by what Triton compiles for, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tpfuse.kernels.add_norm import AddNormOut
from tpfuse.kernels.symmetric.operands import Launch

ARGS = {"x_ptr": torch.zeros(64), "rows": 3, "eps": 1e-6, "absent_ptr": None}


class Compiled:
    """What a kernel was compiled to: notes how it is launched."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []

    def __getitem__(self, grid: tuple) -> Any:
        return lambda *args: self.launches.append((grid, args))


class Kernel:
    """Stands for a Triton kernel: notes what it compiles."""

    arg_names = (*ARGS, "WIDTH")

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple) -> Any:
        def launch(*args: Any, **constants: Any) -> Compiled:
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return launch


def run(kernel: Kernel, width: int = 8, **changed: Any) -> None:
    args = tuple((ARGS | changed).values())
    out = AddNormOut(torch.zeros(1), None, None, None)
    Launch(kernel, 5, args, {"num_warps": 4, "WIDTH": width}, out, None).run()


def test_the_same_call_again_goes_straight_to_the_compiled_kernel() -> None:
    kernel = Kernel()
    run(kernel)
    other = torch.ones(64)
    run(kernel, x_ptr=other, eps=1e-5)
    assert len(kernel.compiled) == 1
    assert kernel.compiled[0].launches == [((5, 1, 1), (other, 3, 1e-5, None, 8))]  # constants behind the arguments


@pytest.mark.parametrize(
    "changed",
    [
        {"x_ptr": torch.zeros(64, dtype=torch.bfloat16)},
        {"x_ptr": torch.zeros(64)[1:]},  # not on a 16-byte boundary
        {"x_ptr": None},
        {"absent_ptr": torch.zeros(64)},
        {"rows": 16},
        {"rows": 1},
        {"width": 16},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_what_triton_compiles_for_is_told_apart(changed: dict) -> None:
    kernel = Kernel()
    run(kernel)
    run(kernel, **changed)
    assert len(kernel.compiled) == 2
