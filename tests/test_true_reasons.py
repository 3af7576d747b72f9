"""A reason is true of its program: programs that look like another one, and what must be said of each."""

from __future__ import annotations

import functools
import logging
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn

import tpfuse

from .graphs import fake_world

HIDDEN = 16

#: Another tool's operators, one with a norm's name.
others = torch.library.Library("tpfuse_others", "DEF")
for name in ("add_rms", "look"):
    others.define(f"{name}(Tensor x, Tensor r) -> Tensor")
    others.impl(name, lambda x, r: x + r, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tpfuse_others::{name}", lambda x, r: torch.empty_like(x), lib=others)


def all_reduce(x, op="sum"):
    return funcol.all_reduce(x, op, dist.group.WORLD)


class Block(nn.Module):
    def __init__(self, after):
        super().__init__()
        self.norm, self.down, self.after = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False), after
        self.groups, self.batch = nn.GroupNorm(4, HIDDEN), nn.BatchNorm1d(HIDDEN)

    def forward(self, x):
        return self.after(self, x, all_reduce(self.down(x)))


def reports_of(model, **options):
    torch._dynamo.reset()
    before = len(tpfuse.reports())
    with fake_world(2), torch.no_grad():
        torch.compile(model, backend="tpfuse", options={"inner": "aot_eager", **options})(torch.randn(2, 3, HIDDEN))
    return tpfuse.reports()[before:]


# -- what reads the sum in the same graph -----------------------------------------------------------------------------


def norm_by_product(self, x, z):
    h = x + z
    return h * torch.rsqrt((h * h) @ torch.ones(HIDDEN, 1) / HIDDEN + 1e-6)


def norm_of_groups(self, x, z):
    return self.groups((x + z).mT)


def norm_of_the_batch(self, x, z):
    return self.batch((x + z).mT)


def norm_by_a_part(self, x, z):
    h = x + z
    return h * torch.rsqrt(h[..., :4].square().mean(-1, keepdim=True) + 1e-6)


def norm_in_a_branch(self, x, z):
    return torch.cond(x.sum() > 0, lambda a, b: self.norm(a + b), lambda a, b: self.norm(a - b), (x, z))


def norm_by_a_learned_power(self, x, z):
    h = x + z
    return h * (h.square().mean(-1, keepdim=True) + 1e-6).pow(-self.norm.weight[0] / 2)


def norm_by_the_median(self, x, z):
    h = x + z
    return h / h.abs().median(dim=-1, keepdim=True).values


def norm_by_magnitudes(self, x, z):
    h = x + z
    return h / (h.abs().mean(-1, keepdim=True) + 1e-6)


def norm_by_standard_deviation_and_mean(self, x, z):
    deviation, mean = torch.std_mean(x + z, -1, keepdim=True)
    return (x + z - mean) / (deviation + 1e-6)


def norm_of_numbers_only(self, x, z):
    return self.norm(torch.nan_to_num(x + z))


def norm_behind_a_branch(self, x, z):
    return self.norm(x + torch.cond(x.sum() > 0, lambda y: all_reduce(y), lambda y: all_reduce(2 * y), (x,)))


def norm_in_an_operator(self, x, z):
    return torch.ops.tpfuse_others.add_rms(z, x)


def norm_of_integers(self, x, z):
    return self.norm(x + z.int().float())


def norm_of_one_sum_for_all(self, x, z):
    return self.norm(x + all_reduce(self.down(x[0])))


@pytest.mark.parametrize(
    "after, said",
    [
        (norm_by_product, "looks like a norm in a spelling that is not recognised: aten.mul.Tensor"),
        (norm_of_groups, "other units than those of each row: aten.mul.Tensor in groups"),
        (norm_of_the_batch, "what the program calls BatchNorm1d"),
        (norm_by_a_part, "other units than those of each row"),
        (norm_in_a_branch, "a region of its own, which cond"),
        (norm_by_a_learned_power, "scales each row by a measure of its units: aten.mul.Tensor"),
        (norm_by_the_median, "scales each row by a measure of its units: aten.div.Tensor"),
        (norm_by_magnitudes, "scales each row by a measure of its units: aten.div.Tensor"),
        (norm_by_standard_deviation_and_mean, "by a root of aten.var_mean.correction"),
        (norm_of_numbers_only, "stands between the all-reduce and the norm"),
        (norm_behind_a_branch, "the graph 'false_graph_0' of cond"),
        (norm_in_an_operator, "tpfuse_others.add_rms.default"),
        (norm_of_integers, "prims.convert_element_type.default"),
        (norm_of_one_sum_for_all, f"spreads the all-reduced value of shape [3, {HIDDEN}] to [2, 3, {HIDDEN}]"),
    ],
)
def test_a_norm_that_is_not_fused_is_named_and_strict_sees_it(after, said):
    (report,) = reports_of(Block(after).eval())
    boundary = report.unfused[-1]
    assert said in boundary.reason and "test_true_reasons.py:" in boundary.reason, boundary.reason
    assert boundary in report.missed


def softmaxed(self, x, z):
    return torch.softmax(x + z, -1)


def seen_by_an_operator(self, x, z):
    return torch.ops.tpfuse_others.look(z, x)


@pytest.mark.parametrize(
    "after, said", [(softmaxed, "aten.div.Tensor"), (seen_by_an_operator, "tpfuse cannot see what that computes")]
)
def test_what_is_no_norm_is_not_missed(after, said):
    (report,) = reports_of(Block(after), strict=True)
    assert said in report.unfused[0].reason and not report.missed


def squashed(self, x, z):
    return torch.tanh(x + z) * self.norm.weight


def test_where_no_norm_follows_what_is_returned_is_named():
    (report,) = reports_of(Block(squashed), strict=True)
    assert "aten.mul.Tensor (test_true_reasons.py:" in report.unfused[0].reason
    assert "is returned" in report.unfused[0].reason and not report.notes


def test_a_sum_that_is_written_to_an_input_is_said_to_leave_the_graph():
    (report,) = reports_of(dist.all_reduce)
    assert "leaves the graph" in report.unfused[0].reason


def summed_again(self, x, z):
    return self.norm(x + z + all_reduce(torch.tanh(z)))


def test_a_collective_is_named_with_the_line_of_the_program():
    (report,) = reports_of(Block(summed_again))
    assert "all_reduce.default (test_true_reasons.py:" in report.unfused[0].reason


def cut_short(self, x, z):
    return self.norm(x + z.clamp(-9, 9)) + z


def first_behind_a_number(self, x, z):
    h = x + z
    return self.norm(h + 0.5) + self.norm(h + all_reduce(self.down(h)))


def kept_and_scaled(self, x, z):
    scale = self.norm.weight[0]
    return self.norm(x + z + scale * z)


def added_up_twice(self, x, z):
    both = z + all_reduce(torch.tanh(x))
    return self.norm(x + both), torch.relu(both)


def the_largest(self, x, z):
    return z.max()


@pytest.mark.parametrize(
    "after, place, said",
    [
        (first_behind_a_number, 0, "aten.add.Tensor (test_true_reasons.py:"),
        (kept_and_scaled, 0, "on two ways, and an operator changes it on one of them alone: aten.mul.Tensor"),
        (added_up_twice, 0, "so the two cannot be one: aten.relu.default"),
        (the_largest, 0, "no norm reads the all-reduced value: of it the graph returns aten.max.default"),
        (cut_short, 0, "aten.clamp_min.default (test_true_reasons.py:"),
    ],
)
def test_a_sum_that_is_read_in_two_ways_is_told_of_the_one_that_counts(after, place, said):
    (report,) = reports_of(Block(after))
    assert said in report.boundaries[place].reason, report


# -- in training ------------------------------------------------------------------------------------------------------


def trained(after, frozen=False):
    """The report of a training graph."""
    torch._dynamo.reset()
    before = len(tpfuse.reports())
    with fake_world(2):
        model = Block(after)
        model.norm.requires_grad_(not frozen)
        torch.compile(model, backend="tpfuse", options={"inner": "aot_eager"})(torch.randn(2, 3, HIDDEN))
    (report,) = tpfuse.reports()[before:]
    return report


def projected(self, x, z):
    return self.down(torch.tanh(self.norm.weight.sum() * z))


def scaled_by_units(self, x, z):
    return torch.rms_norm(x + self.norm.weight * z, (HIDDEN,))


def divided_by_their_length(self, x, z):
    return torch.nn.functional.normalize(x + z, dim=-1) * HIDDEN**0.5 * (self.norm.weight + 1)


def test_in_training_a_norm_is_where_the_forward_pass_scales():
    """Backward divides the same rows by the same length."""
    assert trained(divided_by_their_length).boundaries[0].fused


def test_what_is_returned_as_a_gradient_does_not_leave_the_graph():
    reason = trained(projected).boundaries[0].reason
    assert reason.startswith("no norm reads the all-reduced value: it goes into aten.mm.default in down"), reason
    assert "and" not in reason.split("goes into")[1]


def test_a_factor_whose_gradient_reads_the_sum_is_named_and_without_a_gradient_it_is_fused():
    boundary = trained(scaled_by_units).boundaries[0]
    assert "with a factor that needs no gradient it can be fused" in boundary.reason and not boundary.fused
    assert boundary.reason.count("aten.mul.Tensor (test_true_reasons.py:") == 2
    assert trained(scaled_by_units, frozen=True).boundaries[0].fused


# -- what ends a graph ------------------------------------------------------------------------------------------------


def branching(self, x, z):
    return self.norm(x + z) if z.sum() > 0 else self.norm(x - z)


def printing(self, x, z):
    print(end="")
    return self.norm(x + z)


def sleeping(self, x, z):
    time.sleep(0)
    return self.norm(x + z)


def logging_by_name(self, x, z):
    logging.getLogger("model").debug("slow")
    return self.norm(x + z)


def broadcasting(self, x, z):
    dist.broadcast(z, 0)
    return self.norm(x + z)


@pytest.mark.parametrize(
    "after, said", [(sleeping, "ignore_logging_functions.add(...)"), (logging_by_name, "out of compiled code"),
                    (branching, "torch.where or torch.cond"), (printing, "reorderable_logging_functions.add(print)"),
                    (broadcasting, "its twin in torch.distributed._functional_collectives")],
)  # fmt: skip
def test_a_break_has_its_own_remedy(after, said):
    note = reports_of(Block(after))[0].notes[0]
    assert said in note and f"in {after.__name__}" in note and "test_true_reasons.py:" in note
    assert "warnings.warn" not in note


class Kept(logging.Handler):
    def __init__(self):
        super().__init__()
        self.artifacts = {}

    def emit(self, record):
        name = (getattr(record, "metadata", None) or {}).get("artifact", {}).get("name", "")
        if name.startswith("tpfuse_"):
            self.artifacts[name] = record.payload


def test_the_structured_trace_holds_the_graph_before_and_after_and_the_report():
    """What TORCH_TRACE writes and tlparse shows."""
    trace, kept = logging.getLogger("torch.__trace"), Kept()
    trace.addHandler(kept)
    try:
        reports_of(Block(summed_again))
    finally:
        trace.removeHandler(kept)
    assert set(kept.artifacts) == {"tpfuse_graph_before", "tpfuse_graph_after", "tpfuse_report"}
    before, after = kept.artifacts["tpfuse_graph_before"], kept.artifacts["tpfuse_graph_after"]
    assert "_c10d_functional.all_reduce" in before and "tpfuse.all_reduce_norm" not in before
    assert "tpfuse.all_reduce_norm" in after and "1 of 2 collectives fused" in kept.artifacts["tpfuse_report"]


# -- wrappers ---------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.down = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(this, x):
        return x + all_reduce(this.down(this.norm(x)))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.norm = nn.ModuleList([Layer(), Layer()]), nn.RMSNorm(HIDDEN)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def named(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Layer)]


def test_modules_inside_ddp_have_the_names_of_named_modules_and_no_break_is_told():
    with fake_world(2):
        model = nn.parallel.DistributedDataParallel(Two())
        torch._dynamo.reset()
        before = len(tpfuse.reports())
        with torch.no_grad():
            torch.compile(model, backend="tpfuse", options={"inner": "aot_eager"})(torch.randn(2, 3, HIDDEN))
    (report,) = tpfuse.reports()[before:]
    assert [b.module for b in report.fused] == named(model) and not report.notes


def test_modules_of_a_partial_have_the_names_of_named_modules():
    model = Two()
    (report,) = reports_of(functools.partial(Two.forward, model))
    assert [b.module for b in report.fused] == named(model)


def test_a_layer_behind_a_hook_has_its_name_in_the_whole_model():
    model = Two()
    for layer in model.layers:
        layer.register_forward_pre_hook(torch.compiler.disable(lambda module, args: None))
    report = reports_of(model)[0]
    assert report.boundaries[0].module == "layers.0"


@pytest.mark.parametrize("each, fused", [(True, 0), (False, 2)])
def test_fsdp2_around_each_layer_is_named_and_around_the_model_it_is_one_graph(each, fused):
    from torch.distributed.fsdp import fully_shard

    with fake_world(2), torch.no_grad():
        model = Two()
        for layer in model.layers if each else ():
            fully_shard(layer)
        fully_shard(model)
        torch._dynamo.reset()
        before = len(tpfuse.reports())
        torch.compile(model, backend="tpfuse", options={"inner": "aot_eager"})(torch.randn(2, 3, HIDDEN))
    report = tpfuse.reports()[before]
    assert len(report.fused) == fused
    assert any("FSDP2's hooks" in note for note in report.notes) is each
