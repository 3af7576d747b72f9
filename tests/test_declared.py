"""All-reduces of other tools: declared ones are fused like torch's, undeclared ones are named in a note."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import tpfuse
from tpfuse.backend import FusionPass
from tpfuse.options import Options
from tpfuse.runtime.plan_check import records

from .graphs import fake_world, fused, relative_error, trace
from .policy_harness import compiles_in_threads, run_threads
from .ranks import run_processes

H = 16
CALLS = {"all_reduce": 0}


@torch.library.custom_op("enginelike::all_reduce", mutates_args=())
def engine_all_reduce(x: Tensor, group_name: str) -> Tensor:
    """As vLLM's: the sum, finished, in a new tensor."""
    CALLS["all_reduce"] += 1
    out = x.clone()
    dist.all_reduce(out)
    return out


engine_all_reduce.register_fake(lambda x, group_name: torch.empty_like(x))
engine_all_reduce.register_autograd(lambda ctx, grad: (grad, None), setup_context=lambda ctx, inputs, output: None)

LIBRARY = torch.library.Library("enginelike", "FRAGMENT")
for schema in (
    "in_place(Tensor(a!) x, str group_name) -> ()",
    "two(Tensor x, Tensor y, str group_name) -> Tensor",
    "none(int x, str group_name) -> Tensor",
    "pair(Tensor x, str group_name) -> (Tensor, Tensor)",
    "numbered(Tensor x, int group_name) -> Tensor",
    "with_op(Tensor x, str group_name, str reduce_op='sum') -> Tensor",
    "halved(Tensor x, str group_name) -> Tensor",
):
    LIBRARY.define(schema)
LIBRARY.impl("in_place", lambda x, group_name: None, "CompositeExplicitAutograd")
torch.library.register_fake("enginelike::in_place", lambda x, group_name: None)
torch.library.register_fake("enginelike::with_op", lambda x, group_name, reduce_op="sum": torch.empty_like(x))
torch.library.register_fake("enginelike::halved", lambda x, group_name: x.new_empty(x.shape[0] // 2, *x.shape[1:]))


@pytest.fixture(autouse=True)
def nothing_declared(monkeypatch):
    monkeypatch.setattr("tpfuse._state.DECLARED", {})
    torch._dynamo.reset()


def boundary(x, r, weight):
    h = r + torch.ops.enginelike.all_reduce(x, "0")
    return F.rms_norm(h, (H,), weight), h


def given(rank: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    own, alike = torch.Generator().manual_seed(rank + 1), torch.Generator().manual_seed(0)
    draw = torch.randn
    return draw(3, 5, H, generator=own), draw(3, 5, H, generator=alike), draw(H, generator=alike) + 1


def targets(gm) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


def step(fn, tensors) -> list[Tensor]:
    tensors = [t.detach().requires_grad_() for t in tensors]
    outs = fn(*tensors)
    return [*outs, *torch.autograd.grad(sum((o * o.detach().cos()).sum() for o in outs), tensors)]


def outputs_and_gradients(rank: int) -> tuple[list[float], int, tpfuse.Report]:
    compiled = torch.compile(boundary, backend="tpfuse", options={"inner": "aot_eager", "expect_fused": 1})
    before = len(tpfuse.reports())
    expected = step(boundary, given(rank))
    dist.barrier()
    ran = CALLS["all_reduce"]
    got = step(compiled, given(rank))
    errors = relative_error([t.detach() for t in got], [t.detach() for t in expected])
    return errors, CALLS["all_reduce"] - ran, tpfuse.reports()[before]


@compiles_in_threads
def test_a_declared_operator_is_fused_forward_and_backward_on_two_ranks():
    tpfuse.register_all_reduce("enginelike::all_reduce", group="group_name")
    for errors, ran, report in run_threads(2, outputs_and_gradients):
        assert max(errors) < 1e-6 and not ran
        assert [(b.collective, b.group, b.norm) for b in report.boundaries] == [("all_reduce", (0, 1), "rms_norm")]


@pytest.mark.parametrize(
    "op",
    ["enginelike::all_reduce", "enginelike::all_reduce.default", torch.ops.enginelike.all_reduce,
     torch.ops.enginelike.all_reduce.default, engine_all_reduce],
    ids=["name", "overload's name", "packet", "overload", "custom_op"],
)  # fmt: skip
def test_every_way_to_name_an_operator(four_ranks, op):
    tpfuse.register_all_reduce(op, "group_name")
    after, report = fused(trace(boundary, *given()), strict=True)
    assert report.fused_forward == 1 and "enginelike.all_reduce.default" not in targets(after)


def test_an_operator_that_is_declared_before_it_is_defined(four_ranks):
    tpfuse.register_all_reduce("enginelike::late", group="group_name")
    LIBRARY.define("late(Tensor x, str group_name) -> Tensor")
    torch.library.register_fake("enginelike::late", lambda x, group_name: torch.empty_like(x))
    run = trace(lambda x, r, w: F.rms_norm(torch.ops.enginelike.late(x, "0") + r, (H,), w), *given())
    assert fused(run)[1].fused_forward == 1


def test_where_it_is_not_fused_it_stays_as_the_program_wrote_it(four_ranks):
    def run(x, r, weight):
        y, h = boundary(x, r, weight)
        return y, torch.ops.enginelike.all_reduce(h @ h.mT, group_name="0").relu()

    tpfuse.register_all_reduce("enginelike::all_reduce", group="group_name")
    before = trace(run, *given())
    after, report = fused(before, strict=True)
    assert [b.fused for b in report.boundaries] == [True, False]
    assert targets(after).count("enginelike.all_reduce.default") == 1
    assert not any("_c10d_functional" in name for name in targets(after))
    (kept,) = [node for node in after.graph.nodes if "enginelike" in str(node.target)]
    twin = next(node for node in before.graph.nodes if node.name == kept.name)
    assert (kept.args[1:], kept.kwargs, kept.meta["val"].shape) == (twin.args[1:], twin.kwargs, twin.meta["val"].shape)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x: torch.ops.enginelike.all_reduce(x, "tp:0"), "resolve=..."),
        (lambda x: torch.ops.enginelike.with_op(x, "0", "max"), "'max'"),
    ],
    ids=["unknown group", "another reduce op"],
)
def test_what_cannot_be_fused_stays_and_the_reason_says_why(four_ranks, call, reason):
    for name in ("all_reduce", "with_op"):
        tpfuse.register_all_reduce(f"enginelike::{name}", group="group_name")
    before = trace(lambda x, r, w: F.rms_norm(call(x) + r, (H,), w), *given())
    after, report = fused(before)
    assert targets(after) == targets(before)
    assert [b.fused for b in report.boundaries] == [False] and reason in report.boundaries[0].reason


def test_a_name_that_only_the_engine_knows_is_resolved(four_ranks):
    tpfuse.register_all_reduce("enginelike::all_reduce", group="group_name", resolve={"tp:0": dist.group.WORLD}.get)
    run = trace(lambda x, r, w: F.rms_norm(torch.ops.enginelike.all_reduce(x, "tp:0") + r, (H,), w), *given())
    _, report = fused(run)
    assert report.fused_forward == 1 and report.boundaries[0].group == (0, 1, 2, 3)
    assert FusionPass(Options()).uuid() is None  # no cache can know what it answers next time


def test_where_resolving_a_name_fails_the_graph_stays_and_a_warning_says_why(four_ranks):
    def resolve(name):
        raise RuntimeError(f"the engine has no group {name}")

    tpfuse.register_all_reduce("enginelike::all_reduce", group="group_name", resolve=resolve)
    before = trace(lambda x, r, w: F.rms_norm(torch.ops.enginelike.all_reduce(x, "tp:0") + r, (H,), w), *given())
    with pytest.warns(UserWarning, match="the engine has no group tp:0"):
        after, _ = fused(before)
    assert targets(after) == targets(before)


def test_what_is_no_sum_of_its_argument_is_left_with_a_note(four_ranks):
    tpfuse.register_all_reduce("enginelike::halved", group="group_name")
    gm = trace(lambda x, r, w: F.rms_norm(torch.ops.enginelike.halved(x[:2], "0") + r[:1], (H,), w), *given())
    _, report = fused(gm)
    assert not report.boundaries and "enginelike::halved is declared" in report.notes[0]


# -- undeclared -------------------------------------------------------------------------------------------------------


def test_an_undeclared_operator_that_feeds_a_norm_is_named_with_the_line_to_write(four_ranks):
    (note,) = fused(trace(boundary, *given()))[1].notes
    assert 'tpfuse.register_all_reduce("enginelike::all_reduce", group="group_name")' in note
    exec(note[note.index("tpfuse.register") :], {"tpfuse": tpfuse})
    assert fused(trace(boundary, *given()))[1].fused_forward == 1


def test_an_undeclared_operator_that_writes_in_place_is_named_as_well(four_ranks):
    def run(x, r, weight):
        x = x * 2
        torch.ops.enginelike.in_place(x, "0")
        return F.rms_norm(x + r, (H,), weight)

    (report,) = reports_of(run)
    assert "enginelike::in_place" in report.notes[0] and "it writes to its arguments" in report.notes[0]


def reports_of(run) -> list[tpfuse.Report]:
    before = len(tpfuse.reports())
    with torch.no_grad():
        torch.compile(run, backend="tpfuse", options={"inner": "aot_eager"})(*given())
    return tpfuse.reports()[before:]


def test_there_is_no_note_on_operators_that_feed_no_norm_or_name_no_group(four_ranks):
    def run(x, r, weight):
        return torch.ops.enginelike.all_reduce(x, "0").relu() @ weight, F.rms_norm(r, (H,), weight)

    assert not fused(trace(run, *given()))[1].notes


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "group", "word"),
    [
        ("all_reduce", "group_name", "allowed: a name like"),
        (7, "group_name", "allowed: a name like"),
        ("aten::add", "alpha", "without it"),
        ("enginelike::all_reduce", "group", "no argument 'group', but x, group_name"),
        ("enginelike::all_reduce", "x", "of type Tensor"),
        ("enginelike::all_reduce", "", "the name of an argument"),
        ("enginelike::numbered", "group_name", "of type int"),
        ("enginelike::in_place", "group_name", "writes to its arguments"),
        ("enginelike::two", "group_name", "several tensors (x,y)"),
        ("enginelike::none", "group_name", "no tensor"),
        ("enginelike::pair", "group_name", "one new tensor"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused_by_name(op, group, word):
    with pytest.raises(tpfuse.DeclarationError, match="register_all_reduce") as raised:
        tpfuse.register_all_reduce(op, group)
    assert word in str(raised.value) and str(op) in str(raised.value)


def test_a_second_declaration_may_only_repeat_the_first():
    tpfuse.register_all_reduce("enginelike::with_op", "group_name")
    tpfuse.register_all_reduce("enginelike::with_op", "group_name")
    with pytest.raises(tpfuse.DeclarationError, match="already"):
        tpfuse.register_all_reduce("enginelike::with_op", "reduce_op")


# -- caches and peers -------------------------------------------------------------------------------------------------


def test_a_cache_of_a_process_that_did_not_declare_it_is_another_one():
    with fake_world(2):
        before = FusionPass(Options()).uuid()
        tpfuse.register_all_reduce("enginelike::all_reduce", group="group_name")
        assert FusionPass(Options()).uuid() != before


def test_fused_in_its_place_is_a_changed_plan_and_left_alone_is_not(four_ranks):
    tpfuse.register_all_reduce("enginelike::all_reduce", group="group_name")
    gm = trace(boundary, *given())
    assert not records(fused(gm)[1])[0, 1, 2, 3].as_written
    after, report = fused(gm, alike=False)
    assert records(report)[0, 1, 2, 3].as_written and targets(after) == targets(gm)


def one_rank_declares(rank: int) -> tuple[float, int]:
    if rank == 0:
        tpfuse.register_all_reduce("enginelike::all_reduce", group="group_name")
    options = {"inner": "aot_eager", "plan_timeout": 2.0}
    with torch.no_grad():
        got = torch.compile(boundary, backend="tpfuse", options=options)(*given(rank))
        ran = CALLS["all_reduce"]
        return max(relative_error(got, boundary(*given(rank)))), ran


def test_where_one_rank_declares_it_all_run_what_the_program_wrote():
    for error, ran in run_processes(2, one_rank_declares):
        assert error < 1e-6 and ran == 1
