"""Reasons and notes say what stands there: the operator, the line, the graph break, and the names of named_modules."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import tpfuse
from tpfuse.passes.verdict.names import clean_path

from .graphs import fake_world

HIDDEN = 16


def all_reduce(x):
    return funcol.all_reduce(x, "sum", dist.group.WORLD)


class Block(nn.Module):
    def __init__(self, after=lambda self, x: self.norm(x + all_reduce(self.down(x)))):
        super().__init__()
        self.norm, self.down, self.after = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False), after

    def forward(self, x):
        return self.after(self, x)


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.base_model = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["base_model"], name)

    def forward(self, x):
        return self.base_model(x)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(lambda self, x: x + all_reduce(self.down(self.norm(x)))) for _ in range(2))

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x))


def reports_of(model, **options):
    torch._dynamo.reset()
    before = len(tpfuse.reports())
    with fake_world(2), torch.no_grad():
        torch.compile(model, backend="tpfuse", options={"inner": "aot_eager", **options})(torch.randn(2, 3, HIDDEN))
    return tpfuse.reports()[before:]


def by_deviation(self, x):
    h = x + all_reduce(self.down(x))
    return (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 1e-6)


def by_the_largest(self, x):
    h = x + all_reduce(self.down(x))
    return h / h.abs().amax(-1, keepdim=True)


def test_an_unrecognised_norm_is_named_with_its_line():
    (report,) = reports_of(Block(by_deviation))
    (boundary,) = report.unfused
    assert "looks like a norm" in boundary.reason and "test_reasons.py:" in boundary.reason
    assert boundary.feeds_norm and boundary.norm is None


def test_strict_sees_an_unrecognised_norm():
    with pytest.raises(tpfuse.FusionError, match="looks like a norm"):
        reports_of(Block(by_deviation), strict=True)


def test_a_scale_without_a_root_is_no_norm():
    (report,) = reports_of(Block(by_the_largest), strict=True)
    assert not report.unfused[0].feeds_norm


def broken(self, x):
    z = all_reduce(self.down(x))
    torch._dynamo.graph_break()
    return self.norm(x + z)


def waited_for_by_hand(self, x):
    y = self.down(x)
    work = dist.all_reduce(y, async_op=True)
    work.wait()
    return self.norm(x + y)


def warned(self, x):
    import warnings

    z = all_reduce(self.down(x))
    warnings.warn("slow", stacklevel=1)
    return self.norm(x + z)


@pytest.mark.parametrize(
    "after, said",
    [
        (broken, "graph_break()"),
        (waited_for_by_hand, "call the collective without async_op=True"),
        (warned, "reorderable_logging_functions.add(warnings.warn)"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_graph_break_is_noted_with_its_place(after, said):
    first = reports_of(Block(after))[0]
    (note,) = first.notes
    assert "test_reasons.py:" in note and f"in {after.__name__}" in note and said in note
    assert all("a graph break ends the graph at test_reasons.py:" in boundary.reason for boundary in first.unfused)


class Routed(Block):
    """Loops over experts, whose rows only the data tell."""

    def forward(self, x):
        z = torch.zeros_like(x)
        for expert in range(2):
            (rows,) = torch.where(x[0, :, expert] > 0)
            z = z.index_add(1, rows, self.down(x[:, rows]))
        return self.norm(x + all_reduce(z))


class Deprecated(Block):
    def forward(self, x):
        return super().forward(torch.distributed.nn.functional.all_reduce(x))


TRACED = not hasattr(torch.distributed.nn.functional, "_not_supported_under_compile")


@pytest.mark.parametrize(
    "model, place, said",
    [
        (Routed, "for what stands at ", "capture_dynamic_output_shape_ops = True"),
        pytest.param(
            Deprecated,
            "an exception: RuntimeError(",
            "call torch.distributed._functional_collectives.all_reduce",
            marks=pytest.mark.skipif(TRACED, reason="this torch traces it"),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_function_that_dynamo_gave_up_is_noted_with_the_reason(model, place, said):
    """The parts of it that are compiled are graphs of their own."""
    note = reports_of(model())[0].notes[0]
    assert f"{model.__name__}.forward (test_reasons.py:" in note and "Dynamo could not compile it" in note
    assert place in note and said in note


def test_a_hook_that_is_not_traced_is_noted():
    model = Two()
    for block in model.blocks:
        block.register_forward_pre_hook(torch.compiler.disable(lambda module, args: None))
    report = reports_of(model)[0]
    assert any("torch.compiler.disable" in note for note in report.notes)
    assert "compile the whole model" not in str(report)


@pytest.mark.parametrize("wrapped", [lambda m: Wrapper(Wrapper(m)), lambda m: checkpoint_wrapper(m)])
def test_modules_have_the_names_of_named_modules(wrapped):
    model = wrapped(nn.Sequential(Block()))
    (report,) = reports_of(model)
    assert [b.module for b in report.boundaries] == [n for n, m in model.named_modules() if isinstance(m, Block)]


@pytest.mark.parametrize(
    "path, name",
    [
        ("L['self'].__dict__['_modules']['base_model'].layers[0].mlp", "base_model.layers.0.mlp"),
        ("G['model'].layers.0", "layers.0"),
        ("L['fn'].__closure__[0].cell_contents.layers.0", "layers.0"),
        ("G['compiled']._orig_mod.layers.0", "layers.0"),
        ("L['self'].d['a-b'].layers.0", "d.a-b.layers.0"),
        ("selfattn.q", "selfattn.q"),
        ("L['self']", ""),
    ],
)
def test_a_path_of_dynamo_is_a_name(path, name):
    assert clean_path(path) == name


def test_a_product_behind_the_sum_is_named():
    (report,) = reports_of(Block(lambda self, x: F.relu(all_reduce(x)) @ self.down.weight))
    assert "no norm reads the all-reduced value: it goes into aten.mm.default" in report.unfused[0].reason


def in_two_steps(self, x):
    own = funcol.reduce_scatter_tensor(self.down(x), "sum", 0, dist.group.WORLD)
    return self.norm(x + funcol.all_gather_tensor(own, 0, dist.group.WORLD))


def gathered_and_added(self, x):
    return self.norm(x + funcol.all_gather_tensor(self.down(x)[None], 0, dist.group.WORLD).sum(0))


def exchanged(self, x):
    own = funcol.all_to_all_single(self.down(x), None, None, dist.group.WORLD)
    return self.down(torch.relu(own))


def coalesced(self, x):
    y = self.down(x)
    one, other = funcol.all_reduce_coalesced([y, y * y], "sum", dist.group.WORLD)
    return self.norm(x + one + other)


@pytest.mark.parametrize(
    "after, said",
    [
        (in_two_steps, ["all_gather_into_tensor.default (test_reasons.py:", "reduce_scatter_tensor.default (test_rea"]),
        (gathered_and_added, ["an all_reduce in its place is fused"]),
        (exchanged, ["applies to this all_to_all: it goes into aten.mm.default in down (test_reasons.py:"]),
        (coalesced, ["each of its tensors by an all_reduce of its own can be"]),
    ],
)
def test_a_collective_that_is_no_all_reduce_is_told_what_it_is_a_part_of(after, said):
    (report,) = reports_of(Block(after))
    assert len(report.unfused) == len(said)
    assert all(word in boundary.reason for word, boundary in zip(said, report.unfused, strict=True)), report


def test_of_two_steps_of_an_all_reduce_each_says_so():
    (report,) = reports_of(Block(in_two_steps))
    assert all("the two are an all-reduce in two steps" in boundary.reason for boundary in report.unfused)


def turned(self, x):
    pairs = torch.view_as_complex((x + all_reduce(self.down(x))).unflatten(-1, (-1, 2)))
    return self.norm(torch.view_as_real(pairs * 1j).flatten(-2))


def attended(self, x):
    z = all_reduce(self.down(x))[:, None]
    return self.norm(F.scaled_dot_product_attention(z, z, z)[:, 0])


def mixed_by_frequency(self, x):
    return self.norm(torch.fft.fft(all_reduce(self.down(x)), dim=1).real)


@pytest.mark.parametrize(
    "after, said, feeds",
    [
        (turned, "aten.view_as_complex.default (test_reasons.py:", True),
        (attended, "it goes into aten._scaled_dot_product", False),
        (mixed_by_frequency, "it goes into aten._fft_r2c.default", False),
    ],
)
def test_rows_are_followed_over_complex_numbers_and_not_over_what_mixes_them(after, said, feeds):
    (report,) = reports_of(Block(after))
    assert said in report.unfused[0].reason and report.unfused[0].feeds_norm is feeds, report


def more_by_a_number(self, x):
    return self.norm(x + all_reduce(self.down(x)) + 0.5)


def more_by_one_element(self, x):
    return self.norm(x + all_reduce(self.down(x)) + self.down.weight[0, 0])


def more_by_one_a_unit(self, x):
    return self.norm(x + all_reduce(self.down(x)) + torch.full((HIDDEN,), 0.5))


def test_a_number_that_is_added_is_told_apart_from_a_tensor():
    (report,) = reports_of(Block(more_by_a_number))
    assert "aten.add.Tensor (test_reasons.py:" in report.unfused[0].reason
    assert "adds a number between the all-reduce and the norm" in report.unfused[0].reason


@pytest.mark.parametrize("after", [more_by_one_element, more_by_one_a_unit])
def test_a_tensor_of_one_element_or_one_a_unit_that_is_added_is_looked_through(after):
    (report,) = reports_of(Block(after))
    assert report.fused_forward == 1, report


def round_after_round(self, x):
    from torch._higher_order_ops.while_loop import while_loop

    def body(n, h):
        return n + 1, h + all_reduce(self.down(self.norm(h)))

    return self.norm(while_loop(lambda n, h: n < 2, body, (torch.zeros((), dtype=torch.int64), x))[1])


def test_a_sum_that_a_loop_carries_on_cannot_be_taken_behind_the_loop():
    (report,) = reports_of(Block(round_after_round))
    assert "while_loop" in report.unfused[0].reason and "called as plain code" in report.unfused[0].reason
