"""Beside other things users switch on: FSDP2, Inductor's async-TP, quantised linears, autocast. The result is that of
the model without the backend, fused or not. Real ranks, gloo."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import tpfuse

from .graphs import relative_error
from .models import HIDDEN, INTER, SplitStack, loss, split_stack
from .ranks import run_processes

WORLD = 2


def step(model: nn.Module, fn, x: Tensor) -> list[Tensor]:
    """The output and all gradients of one training step, whole."""
    model.zero_grad(set_to_none=True)
    y = fn(x)
    loss(y).backward()
    found = [y.detach(), *(p.grad for p in model.parameters())]
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in found]


def compared(model: nn.Module, x: Tensor, compile_options: dict, again: nn.Module | None = None) -> dict:
    """Errors of a compiled training step against eager, and the verdicts. `again`: the model to compile, if another."""
    expected = [t.clone() for t in step(model, model, x)]
    again = again or model
    got = step(again, torch.compile(again, backend="tpfuse", **compile_options), x)
    boundaries = [b for report in tpfuse.reports() for b in report.boundaries]
    return {
        "errors": relative_error(got, [t.double() for t in expected]),
        "verdicts": [(b.collective, b.direction, b.fused) for b in boundaries],
        "explained": all(b.reason or b.fused for b in boundaries),
    }


def forward_fused(result: dict) -> int:
    return sum(fused and direction == "forward" for _, direction, fused in result["verdicts"])


# -- FSDP2 ------------------------------------------------------------------------------------------------------------


def run_fsdp(rank: int) -> dict:
    from torch.distributed.fsdp import fully_shard

    def build() -> nn.Module:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        model = split_stack(rank % 2, mesh["tp"], "dtensor")
        for layer in model.layers:
            fully_shard(layer, mesh=mesh["dp"])
        return fully_shard(model, mesh=mesh["dp"])

    # The replicas of a tensor-parallel group get the same rows, the groups different ones.
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(rank // 2))
    return compared(build(), x, {}, build())


@pytest.mark.nightly
def test_fsdp2_and_tensor_parallelism_on_a_mesh():
    for result in run_processes(4, run_fsdp):
        assert max(result["errors"]) < 1e-4 and result["explained"]


# -- async-TP ---------------------------------------------------------------------------------------------------------


def run_async_tp(rank: int) -> dict:
    mesh = init_device_mesh("cpu", (WORLD,))

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = SplitStack(1, "dtensor")
        columns = {f"{n}_proj": ColwiseParallel() for n in ("q", "k", "v", "gate", "up")}
        for layer in model.layers:
            parallelize_module(layer, mesh, columns | {n: RowwiseParallel() for n in ("o_proj", "down_proj")})
        return model

    x = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(1))
    options = {"options": {"inductor": {"_micro_pipeline_tp": True}}}
    plain = compared(build(), x, options)
    torch._dynamo.reset()
    return {"plain": plain, "sequence": compared(sequence_parallel(mesh), x, options)}


class SequenceBlock(nn.Module):
    """A pair of cut linears whose input and output rows are scattered: all-gather, products, reduce-scatter, norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, INTER, bias=False), nn.Linear(INTER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


def sequence_parallel(mesh) -> nn.Module:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import PrepareModuleInput, PrepareModuleOutput

    torch.manual_seed(0)
    model = nn.Sequential(SequenceBlock(), SequenceBlock())
    for block in model:
        parallelize_module(
            block,
            mesh,
            {
                "norm": SequenceParallel(sequence_dim=0, use_local_output=False),
                "up": ColwiseParallel(input_layouts=Shard(0)),
                "down": RowwiseParallel(output_layouts=Shard(0), use_local_output=False),
            },
        )
    rows = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(0), use_local_output=False)
    whole = PrepareModuleOutput(output_layouts=Shard(0), desired_output_layouts=Replicate())
    parallelize_module(model, mesh, {"": whole})
    return parallelize_module(model, mesh, {"": rows})


@pytest.mark.nightly
def test_inductors_async_tp():
    for results in run_processes(WORLD, run_async_tp):
        for result in results.values():
            assert max(result["errors"]) < 1e-4 and result["explained"]
        assert forward_fused(results["plain"]) == 4


# -- quantised linears ------------------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """Weight-only int8 with one scale for each output, of the linear given; no gradients."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale.squeeze(1))
        self.register_buffer("int8", (weight / scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.int8.to(x.dtype)) * self.scale


def quantise_by_hand(model: nn.Module) -> None:
    for layer in model.layers:
        for name, child in list(layer.named_children()):
            if isinstance(child, nn.Linear):
                setattr(layer, name, Int8Linear(child))


def quantise_with_torchao(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def run_inference(rank: int, how: str) -> dict:
    """A model under inference whose partial producers are no plain matrix products."""
    model = split_stack(rank, init_device_mesh("cpu", (WORLD,)), "pairs", torch.bfloat16).eval()
    quantise = {"by_hand": quantise_by_hand, "torchao": quantise_with_torchao}.get(how, lambda model: None)
    quantise(model)
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(x)
        got = torch.compile(model, backend="tpfuse", options={"inner": "aot_eager"}, fullgraph=True)(x)
    (report,) = tpfuse.reports()
    return {"errors": relative_error([got], [expected.double()]), "fused": [b.fused for b in report.boundaries]}


@pytest.mark.nightly
@pytest.mark.parametrize("how", ["by_hand", "torchao"])
def test_quantised_linears(how):
    if how == "torchao":
        pytest.importorskip("torchao")
    for result in run_processes(WORLD, run_inference, how):
        assert result["fused"] == [True] * 4, "an all-reduce does not care what computed its partial sums"
        assert max(result["errors"]) < 4 * torch.finfo(torch.bfloat16).eps


# -- autocast ---------------------------------------------------------------------------------------------------------


def run_autocast(rank: int) -> dict:
    results = {}
    for how in ("dtensor", "pairs"):
        torch._dynamo.reset()
        model = split_stack(rank, init_device_mesh("cpu", (WORLD,)), how)
        exact = split_stack(rank, init_device_mesh("cpu", (WORLD,)), how, torch.float64)
        x = torch.randn(16, HIDDEN, generator=torch.Generator().manual_seed(1))
        reference = step(exact, exact, x.double())

        def cast(x, model=model):
            with torch.autocast("cpu", torch.bfloat16):
                return model(x)

        eager = [t.clone() for t in step(model, cast, x)]
        got = step(model, torch.compile(cast, backend="tpfuse", options={"inner": "aot_eager"}), x)
        forward = [b for b in tpfuse.reports()[-1].boundaries if b.direction == "forward"]
        results[how] = {
            "eager": relative_error(eager, reference),
            "compiled": relative_error(got, reference),
            "unexplained": [b for b in forward if not b.fused and not b.reason],
        }
    return results


@pytest.mark.nightly
def test_autocast():
    """A float32 residual stream under autocast adds bfloat16 sums: mixed additions stay as they are, with a reason."""
    rounding = torch.finfo(torch.bfloat16).eps
    for results in run_processes(WORLD, run_autocast):
        for how, found in results.items():
            assert found["unexplained"] == [], how
            for compiled, eager in zip(found["compiled"], found["eager"], strict=True):
                assert compiled <= 1.1 * eager + rounding / 2, how
