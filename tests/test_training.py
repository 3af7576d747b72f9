"""Training: gradients, what backward communicates, what is saved for it, and activation checkpointing.

Counted on one rank of a fake process group: executed collectives by the profiler, and the bytes that the compiled
forward keeps for backward by hooks on saved tensors. Inductor without the pass is the measure of all of it.
"""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from torch import fx, nn
from torch._inductor.utils import fresh_cache
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import tpfuse
import tpfuse.backend
from tpfuse.passes.facts.graph import depends_on
from tpfuse.passes.plan.sites import DEFAULT_REWRITES, REWRITES

from .graphs import executed_collectives, fake_world, relative_error, sent_bytes
from .models import HIDDEN, hugging_face_config, load_with_tp_plan, loss, split_stack
from .ranks import run_processes

WORLD, LAYERS, ROWS = 2, 2, 3
#: The pass without its work: what Inductor's partitioner decides by itself, without Inductor's compile time.
NOTHING = {"inner": "aot_eager", "rewrites": ()}
EVERYTHING = {"inner": "aot_eager"}
#: Gradients' sums become fewer, and are fused with nothing else.
MERGED = {"inner": "aot_eager", "rewrites": tuple(name for name in DEFAULT_REWRITES if name != "norm_backward")}
NAMED = {"inner": "aot_eager", "rewrites": REWRITES}
FORWARD_ONLY = {"inner": "aot_eager", "rewrites": ("all_reduce_norm", "all_reduce_post_norm")}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with fresh_cache():
        yield
    torch._dynamo.reset()


# -- what is communicated and saved -----------------------------------------------------------------------------------


def save_products(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE


def save_sums(ctx, op, *args, **kwargs):
    communicates = getattr(op, "namespace", "") == "_c10d_functional"
    return CheckpointPolicy.MUST_SAVE if communicates else CheckpointPolicy.PREFER_RECOMPUTE


def save_unfinished(ctx, op, *args, **kwargs):
    """As lists of operators to save have it: the sums, and not the waits for them."""
    saved = op is torch.ops._c10d_functional.all_reduce.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(policy):
    """A way to run a block: under activation checkpointing, whole or selective."""
    more = {} if policy is None else {"context_fn": functools.partial(create_selective_checkpoint_contexts, policy)}

    def run(block, x):
        return checkpoint(block, x, use_reentrant=False, **more)

    return run


WRAPS = {
    "plain": None,
    "checkpoint": checkpointed(None),
    "save_products": checkpointed(save_products),
    "save_sums": checkpointed(save_sums),
    "save_unfinished": checkpointed(save_unfinished),
}


class Cost:
    """What one training step of a compiled model costs.

    forward, backward: executed collectives. sent: bytes that a rank gives to those of both. saved: bytes kept for
    backward beyond parameters and inputs. products: how many matrix products and attentions run, again or not.
    """

    def __init__(self, model: nn.Module, x: torch.Tensor, **compile_options):
        fn = torch.compile(model, fullgraph=True, **compile_options)
        fn(x).square().sum().backward()
        self.forward = executed_collectives(lambda: fn(x)).total()
        y = fn(x).square().sum()
        self.backward = executed_collectives(y.backward).total()
        self.sent, self.products = sent_bytes(lambda: fn(x).square().sum().backward())
        self.saved = saved_bytes(fn, model, x)


def saved_bytes(fn, model: nn.Module, x: torch.Tensor) -> int:
    def local(tensor):
        return getattr(tensor, "_local_tensor", tensor)

    kept = {local(tensor).untyped_storage()._cdata: 0 for tensor in (*model.parameters(), x)}
    alive = []

    def pack(tensor):
        storage = local(tensor).untyped_storage()
        kept.setdefault(storage._cdata, storage.nbytes())
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fn(x)
    return sum(kept.values())


def cost(wrap: str, norm: type[nn.Module], dtype: torch.dtype, how: str = "dtensor", **compile_options) -> Cost:
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (WORLD,))
    model = split_stack(0, mesh, how, dtype, layers=LAYERS, norm=norm, wrap=WRAPS[wrap])
    x = torch.randn(ROWS, HIDDEN, dtype=dtype, requires_grad=True)
    return Cost(model, x, **compile_options)


def assert_no_dearer(wrap: str, norm: type[nn.Module], dtype: torch.dtype, alone: dict, fused: dict) -> None:
    with fake_world(WORLD):
        before = cost(wrap, norm, dtype, **alone)
        # Five linears a layer read a replicated value, and the first norm's input needs a gradient as well.
        assert before.backward >= 5 * LAYERS
        after = cost(wrap, norm, dtype, **fused)
        forward = [b for b in tpfuse.reports()[-1].boundaries if b.direction == "forward"]
        assert [b.fused for b in forward] == [True] * 2 * LAYERS, tpfuse.reports()[-1]
        assert after.forward == before.forward == 2 * LAYERS
        assert after.backward == before.backward - 3 * LAYERS, "qkv and gate/up, each merged into one"
        assert after.sent == before.sent - 3 * LAYERS * ROWS * HIDDEN * dtype.itemsize
        assert after.products <= before.products
        allowed = 0 if "norm_backward" in names(fused) else means_that_inductor_folds(wrap, norm, dtype)
        assert after.saved <= before.saved + allowed
        backward = Counter(b.rewrite for b in tpfuse.reports()[-1].boundaries if b.direction == "backward")
        if "norm_backward" in names(fused):
            assert backward == {"merge_all_reduces": 3 * LAYERS, "norm_backward": 2 * LAYERS}


def names(compile_options: dict) -> tuple[str, ...]:
    return compile_options.get("options", {}).get("rewrites", DEFAULT_REWRITES)


def means_that_inductor_folds(wrap: str, norm: type[nn.Module], dtype: torch.dtype) -> int:
    """Without checkpointing, Inductor may save a float32 LayerNorm's normed values in place of its input and mean. The
    fused operation hands its input on as the residual stream, so the mean is saved beside it: a number a row. The
    operation norm_backward takes the mean again."""
    return 2 * LAYERS * ROWS * dtype.itemsize if (wrap, norm, dtype) == ("plain", nn.LayerNorm, torch.float32) else 0


@pytest.mark.parametrize(
    "wrap",
    [pytest.param(w, marks=pytest.mark.nightly) for w in WRAPS],
)
@pytest.mark.parametrize("options", [EVERYTHING, NAMED], ids=["default", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_no_more_communication_and_no_more_saved_than_without_the_pass(norm, dtype, options, wrap):
    alone = {"backend": "tpfuse", "options": NOTHING}
    assert_no_dearer(wrap, norm, dtype, alone, {"backend": "tpfuse", "options": options})


def test_a_sum_that_a_checkpoint_saves_without_its_wait_is_fused():
    """The forward half returns it unfinished."""
    alone = {"backend": "tpfuse", "options": NOTHING}
    assert_no_dearer("save_unfinished", nn.RMSNorm, torch.float32, alone, {"backend": "tpfuse", "options": EVERYTHING})


def test_a_mean_is_not_kept_for_the_operation_of_the_backward_pass():
    """LayerNorm, on one rank alone; the night asks the same of every norm, dtype and way of checkpointing."""
    alone = {"backend": "tpfuse", "options": NOTHING}
    assert_no_dearer("plain", nn.LayerNorm, torch.bfloat16, alone, {"backend": "tpfuse", "options": NAMED})


@pytest.mark.nightly
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rewrites", [DEFAULT_REWRITES, REWRITES], ids=["default", "all"])
def test_no_more_communication_and_no_more_saved_than_inductor_alone(rewrites, wrap, norm, dtype):
    fused = {"backend": "tpfuse", "options": {"rewrites": rewrites}}
    assert_no_dearer(wrap, norm, dtype, {"backend": "inductor"}, fused)


@pytest.mark.parametrize("wrap", ["checkpoint", "save_products"])
def test_fusing_the_forward_pass_recomputes_no_more_collectives(wrap):
    """By itself, without the merges that hide it."""
    with fake_world(WORLD):
        before = cost(wrap, nn.RMSNorm, torch.float32, backend="tpfuse", options=NOTHING)
        after = cost(wrap, nn.RMSNorm, torch.float32, backend="tpfuse", options=FORWARD_ONLY)
    assert (after.forward, after.backward) == (before.forward, before.backward)


def test_a_boundary_astride_two_checkpoints_is_fused_in_the_forward_half():
    """Under Inductor too, and a warm cache knows of it."""
    with fake_world(WORLD):
        options = {"expect_fused": 2 * LAYERS}
        cold = cost("checkpoint", nn.RMSNorm, torch.float32, backend="tpfuse", options=options)
        report = tpfuse.reports()[-1]
        assert report.collectives_after == 2 * LAYERS + 2 * LAYERS
        warm = cost("checkpoint", nn.RMSNorm, torch.float32, backend="tpfuse", options=options)
        assert str(tpfuse.reports()[-1]) == str(report)
    assert vars(cold) == vars(warm)


def test_a_memory_budget_recomputes_no_collective():
    """Below a budget of one, the partitioner recomputes what it can, but no collective of its own accord."""
    from torch._functorch import config

    with fake_world(WORLD), config.patch(activation_memory_budget=0.3):
        before = cost("plain", nn.RMSNorm, torch.float32, "pairs", backend="tpfuse", options=NOTHING)
        after = cost("plain", nn.RMSNorm, torch.float32, "pairs", backend="tpfuse", options=FORWARD_ONLY)
    assert (after.forward, after.backward) == (before.forward, before.backward)


# -- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("how", ["dtensor", "pairs"])
def test_backward_reads_the_statistics_that_the_operation_returns(how, norm, monkeypatch):
    graphs: list[fx.Graph] = []

    def keeping(*args, **kwargs):
        outcome = fuse(*args, **kwargs)
        graphs.append(outcome.graph)
        return outcome

    fuse = tpfuse.backend.fuse
    monkeypatch.setattr("tpfuse.backend.fuse", keeping)
    with fake_world(WORLD):
        model = split_stack(0, init_device_mesh("cpu", (WORLD,)), how, norm=norm)
        fn = torch.compile(model, backend="tpfuse", options={**EVERYTHING, "expect_fused": 2 * LAYERS})
        fn(torch.randn(ROWS, HIDDEN)).square().sum().backward()
    joint = graphs[0]
    operations = {node for node in joint.nodes if str(node.target) == "tpfuse.all_reduce_norm.default"}
    assert len(operations) == 2 * LAYERS
    assert all(node.kwargs["stats"] for node in operations)
    statistics = ("rsqrt", "var_mean", "aten.mean", "aten.var")
    again = [n for n in joint.nodes if any(word in str(n.target) for word in statistics) and depends_on(n, operations)]
    assert again == [], "statistics of a fused norm are computed a second time"


# -- gradients --------------------------------------------------------------------------------------------------------


def gradients_of(model, fn, x):
    model.zero_grad(set_to_none=True)
    loss(fn(x)).backward()
    return [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in model.parameters()]


def gradient_errors(rank: int, how: str, norm: type[nn.Module], seeds: int = 20) -> dict:
    """Mean relative error of every gradient against float64, in bfloat16: in eager mode, compiled without the pass, and
    compiled with it."""
    mesh = init_device_mesh("cpu", (WORLD,))
    model = split_stack(rank, mesh, how, torch.bfloat16, norm=norm)
    exact = split_stack(rank, mesh, how, torch.float64, norm=norm)
    with torch.no_grad():
        for a, b in zip(exact.parameters(), model.parameters(), strict=True):
            a.copy_(b)
    fn = torch.compile(model, backend="tpfuse", options={**EVERYTHING, "expect_fused": 2 * LAYERS}, fullgraph=True)
    unfused_fn = torch.compile(model, backend="tpfuse", options=NOTHING, fullgraph=True)
    eager, unfused, compiled = [], [], []
    for seed in range(seeds):
        x = torch.randn(16, HIDDEN, generator=torch.Generator().manual_seed(seed)).bfloat16()
        reference = gradients_of(exact, exact, x.double())
        eager.append(relative_error(gradients_of(model, model, x), reference))
        unfused.append(relative_error(gradients_of(model, unfused_fn, x), reference))
        compiled.append(relative_error(gradients_of(model, fn, x), reference))
    y = loss(fn(x))
    return {
        "eager": torch.tensor(eager).mean(0).tolist(),
        "unfused": torch.tensor(unfused).mean(0).tolist(),
        "compiled": torch.tensor(compiled).mean(0).tolist(),
        "backward": executed_collectives(y.backward).total(),
        "rewrites": Counter(b.rewrite for b in tpfuse.reports()[-1].boundaries if b.direction == "backward"),
    }


@pytest.mark.parametrize(
    ("how", "norm"),
    [
        ("pairs", nn.RMSNorm),
        pytest.param("dtensor", nn.RMSNorm, marks=pytest.mark.nightly),
        pytest.param("dtensor", nn.LayerNorm, marks=pytest.mark.nightly),
    ],
)
def test_gradients_are_those_of_eager_within_the_error_rule(how, norm):
    """On two real ranks: DTensor, and conjugate pairs of collectives written by hand."""
    rounding = torch.finfo(torch.bfloat16).eps / 2
    for found in run_processes(WORLD, gradient_errors, how, norm):
        # The gradient of the first norm's weight needs the sum of q, k and v as well.
        assert found["backward"] == 2 * LAYERS
        # Either of eager mode and the replaced graph may be the more exact one, gradient by gradient.
        for compiled, *others in zip(found["compiled"], found["unfused"], found["eager"], strict=True):
            assert compiled <= 1.1 * max(others) + rounding, f"{compiled} against {others}"


def hugging_face_gradients(rank: int) -> dict:
    model, _ = load_with_tp_plan(hugging_face_config("llama"), rank, WORLD, torch.float32)
    ids = torch.randint(0, 128, (2, 8), generator=torch.Generator().manual_seed(1))

    def step(forward):
        model.zero_grad(set_to_none=True)
        loss(forward(input_ids=ids, use_cache=False).logits).backward()
        return [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in model.parameters()]

    expected = [grad.clone() for grad in step(model)]
    got = step(torch.compile(model, backend="tpfuse", options=MERGED, fullgraph=True))
    y = loss(torch.compile(model, backend="tpfuse", options=MERGED)(input_ids=ids, use_cache=False).logits)
    report = tpfuse.reports()[0]
    return {
        "errors": relative_error(got, [t.double() for t in expected]),
        "forward": [b.fused for b in report.boundaries if b.direction == "forward" and b.collective == "all_reduce"],
        "backward": Counter((b.collective, b.rewrite) for b in report.boundaries if b.direction == "backward"),
        "executed": executed_collectives(y.backward)["all_reduce"],
    }


def test_gradients_of_a_hugging_face_model_cut_by_its_own_plan():
    for found in run_processes(WORLD, hugging_face_gradients):
        assert max(found["errors"]) < 1e-4
        assert all(found["forward"]) and len(found["forward"]) == 2 * LAYERS + 1
        # Query, key and value, gate and up of each layer.
        assert found["backward"]["all_reduce", "merge_all_reduces"] == 5 * LAYERS
        left = found["backward"]["all_reduce", None]
        assert found["executed"] == 2 * LAYERS + left
