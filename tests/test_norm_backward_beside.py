"""norm_backward beside what else training has: gradient accumulation, FSDP2 over another mesh dimension, and losses of
logits that stay cut. Gradients are eager mode's within its rounding, no collective is executed more often, and every
boundary of the backward pass is fused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel

import tpfuse
from tpfuse.passes.plan.sites import REWRITES

from . import sequence_models as models
from .graphs import executed_collectives, relative_error
from .ranks import run_processes

#: None is eager mode, () the same compiler without rewrites.
RUNS: dict[str, tuple[str, ...] | None] = {"eager": None, "unfused": (), "fused": REWRITES}


def compared(build: Callable[[tuple[str, ...] | None], tuple[nn.Module, Callable[[], object]]]) -> dict:
    """build: (model, a step that leaves gradients) for the rewrites, None for eager mode. By run: the executed
    collectives, the largest error of a gradient beside eager mode's, and what became of the backward collectives."""
    found, exact = {}, list[Tensor]()
    for name, rewrites in RUNS.items():
        torch._dynamo.reset()
        before = len(tpfuse.reports())
        model, step = build(rewrites)
        step()
        for parameter in model.parameters():
            parameter.grad = None
        executed = executed_collectives(step)
        grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
        exact = exact or [grad.double() for grad in grads]
        boundaries = [b for report in tpfuse.reports()[before:] for b in report.boundaries]
        backward = Counter((b.collective, b.rewrite) for b in boundaries if b.direction == "backward")
        found[name] = {"executed": executed, "error": max(relative_error(grads, exact)), "backward": backward}
    return found


def check(found: dict, backward: dict) -> None:
    assert found["unfused"]["executed"] == found["eager"]["executed"]
    assert found["fused"]["executed"] <= found["eager"]["executed"]
    assert found["fused"]["error"] < 1e-5 and found["unfused"]["error"] < 1e-5
    assert found["fused"]["backward"] == backward


def ids(seed: int) -> Tensor:
    return torch.randint(models.TOKENS, (2, 8), generator=torch.Generator().manual_seed(seed))


# -- losses of logits that stay cut -----------------------------------------------------------------------------------


def with_a_cut_loss(rank: int, form: str) -> dict:
    rows = Shard(1) if form == "dtensor" else Replicate()
    tokens = ids(0)

    def build(rewrites):
        cut = models.cut_plainly if form == "plain" else models.cut_by_dtensor
        output = ColwiseParallel(input_layouts=rows, output_layouts=Shard(-1), use_local_output=False)
        model = cut(models.whole(), init_device_mesh("cpu", (2,)), output=output)

        def whole_step(given: Tensor, wanted: Tensor) -> Tensor:
            return F.cross_entropy(model(given).flatten(0, 1), wanted.flatten())

        options = {"inner": "aot_eager", "rewrites": rewrites}
        run = whole_step if rewrites is None else torch.compile(whole_step, backend="tpfuse", options=options)

        def step() -> None:
            with loss_parallel():
                run(tokens, tokens.roll(1, 1)).backward()

        return model, step

    return compared(build)


@pytest.mark.parametrize("form", [pytest.param("plain", marks=pytest.mark.nightly), "dtensor"])
def test_a_loss_of_logits_that_stay_cut(form):
    norms = 2 * models.LAYERS + 1
    plain = {("all_reduce", "norm_backward"): norms, ("all_reduce", "merge_all_reduces"): 3 * models.LAYERS}
    sequence = {(kind, "norm_backward"): norms for kind in ("reduce_scatter", "all_gather")}
    for found in run_processes(2, with_a_cut_loss, form):
        check(found, plain if form == "plain" else sequence)


# -- FSDP2 and accumulation -------------------------------------------------------------------------------------------


class OwnRows(nn.Module):
    """The embedding, whole on every rank, and of its rows those of a rank: PyTorch 2.13 loses the gradient of one that
    DTensor cut in front of a block that is compiled by itself."""

    def __init__(self, embed: nn.Embedding, rank: int) -> None:
        super().__init__()
        self.embed, self.rank = embed, rank

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens).chunk(2, 1)[self.rank].contiguous()


def with_fsdp(rank: int, form: str, micro_batches: int) -> dict:
    """Each block is compiled by itself, as torchtitan does it: FSDP's hooks stand between them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def build(rewrites):
        model = models.whole()
        if form == "plain":
            models.cut_plainly(model, mesh["tp"], embed=None)
        else:
            models.cut_by_dtensor(model, mesh["tp"], embed=None)
            model.embed = OwnRows(model.embed, mesh["tp"].get_local_rank())
        for layer in model.layers:
            if rewrites is not None:
                layer.compile(backend="tpfuse", options={"inner": "aot_eager", "rewrites": rewrites}, fullgraph=True)
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])

        def step() -> None:
            for batch in range(micro_batches):
                model.set_requires_gradient_sync(batch == micro_batches - 1)
                own = ids(10 * batch + mesh["dp"].get_local_rank())
                (model(own).square().mean() / micro_batches).backward()

        return model, step

    return compared(build)


#: Of one block, whose graph all share. In front of the gather of what comes into its backward pass stands no norm.
OF_BLOCKS = {
    "plain": {("all_reduce", "norm_backward"): 2, ("all_reduce", "merge_all_reduces"): 3},
    "dtensor": {("reduce_scatter", "norm_backward"): 2, ("all_gather", "norm_backward"): 1, ("all_gather", None): 1},
}


@pytest.mark.nightly
@pytest.mark.parametrize("form", ["plain", "dtensor"])
def test_fsdp2_over_another_mesh_dimension_and_two_micro_batches(form):
    for found in run_processes(4, with_fsdp, form, 2):
        check(found, OF_BLOCKS[form])
