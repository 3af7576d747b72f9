"""bitsandbytes' own operator behind a boundary: where bitsandbytes is installed. On CPUs it runs its plain PyTorch."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

import tpfuse
from tpfuse.passes.plan.sites import DEFAULT_REWRITES

from .ranks import run_processes

H = 512


def run(rank: int, dtype: torch.dtype) -> tuple[bool, list[list[str]]]:
    """Whether the rows and scales that the boundary hands out are those that the operator gives in the same graph, and
    what the boundary says, without and with the rewrite."""
    import bitsandbytes

    def program(x, residual, weight):
        hidden = residual + funcol.all_reduce(x, "sum", dist.group.WORLD)
        y = torch.nn.functional.rms_norm(hidden, (H,), weight, 1e-6)
        # As its linear layers call it, in float16 whatever the model has.
        return bitsandbytes.functional.int8_vectorwise_quant(y.to(torch.float16))[:2]

    generator = torch.Generator().manual_seed(rank)
    x, weight = torch.randn(200, H, generator=generator).to(dtype), torch.linspace(0.5, 2, H).to(dtype)
    made = []
    for rewrites in (DEFAULT_REWRITES, (*DEFAULT_REWRITES, "quantised_outputs")):
        torch._dynamo.reset()
        options = {"inner": "aot_eager", "rewrites": rewrites}
        with torch.no_grad():
            compiled = torch.compile(program, backend="tpfuse", fullgraph=True, options=options)
            made.append(compiled(x, torch.zeros_like(x), weight))
    said = [[b.quantised for b in report.boundaries] for report in tpfuse.reports()]
    return all(map(torch.equal, *made)), said


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_bit_for_bit_those_of_the_operator(dtype):
    assert run_processes(2, run, dtype) == [(True, [[""], ["INT8 per row"]])] * 2
