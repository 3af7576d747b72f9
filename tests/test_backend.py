"""The backend as a user meets it: options, modes, errors, caches, reports. One process, a fake process group."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache

import tpfuse
from tpfuse import _torch_private as private

from .graphs import all_reduce, executed_collectives, fake_world
from .models import HIDDEN, Stack, loss

INNER = ("inductor", "aot_eager")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with fresh_cache(), fake_world(2):
        yield
    torch._dynamo.reset()


def compiled(options=None, **more):
    torch.manual_seed(0)
    model = Stack(2).eval()
    x = torch.randn(3, HIDDEN)
    with torch.no_grad():
        fn = torch.compile(model, backend="tpfuse", options=options, **more)
        return fn, model, x


def last() -> tpfuse.Report:
    return tpfuse.reports()[-1]


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("dynamic", [None, True])
def test_every_boundary_of_a_stack_is_fused(inner, dynamic):
    fn, model, x = compiled({"inner": inner}, dynamic=dynamic)
    with torch.no_grad():
        torch.testing.assert_close(fn(x), model(x), rtol=1e-5, atol=1e-5)
    assert [b.kind for b in last().boundaries][-1].endswith("→final_norm")
    assert [b.fused for b in last().boundaries] == [True] * 4
    assert last().boundaries[0].module == "layers.0"
    with torch.no_grad():
        assert executed_collectives(fn, x) == {"all_reduce": 4}


@pytest.mark.parametrize("mode", ["default", "max-autotune", "max-autotune-no-cudagraphs", "reduce-overhead"])
def test_inductor_modes(mode):
    fn, model, x = compiled(mode=mode)
    with torch.no_grad():
        torch.testing.assert_close(fn(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(last().fused) == 4


def test_the_mode_may_stand_in_the_options():
    fn, _, x = compiled({"mode": "reduce-overhead", "inductor": {"max_autotune": False}})
    with torch.no_grad():
        fn(x)
    assert len(last().fused) == 4


def test_without_collectives_it_is_inductor():
    model = nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8)).eval()
    x = torch.randn(4, 8)
    with torch.no_grad():
        got = torch.compile(model, backend="tpfuse")(x)
        torch._dynamo.reset()
        expected = torch.compile(model, backend="inductor")(x)
    assert torch.equal(got, expected)
    assert last().boundaries == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"polcy": None}, "did you mean 'policy'"),
        ({"inner": "inductr"}, "'inductor'"),
        ({"expect_fused": "5"}, "allowed: int or None"),
        ({"expect_fused": True}, "allowed: int or None"),
        ({"expect_fused": -1}, "allowed: 0 or more"),
        ({"strict": 1}, "allowed: bool"),
        ({"mode": "reduce-overheads"}, "did you mean 'reduce-overhead'"),
        ({"inductor": {"max_autotun": True}}, "did you mean 'max_autotune'"),
        ({"policy": {"tp_size": 2}}, "allowed: SharingPolicy"),
        ({"rewrites": ["all_reduce_nrm"]}, "did you mean 'all_reduce_norm'"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    fn, _, x = compiled(options)
    with torch.no_grad(), pytest.raises(tpfuse.OptionError, match=message) as caught:
        fn(x)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, tpfuse.TPFuseError)


def test_expect_fused_is_met_or_raises_with_the_report():
    fn, _, x = compiled({"expect_fused": 4})
    with torch.no_grad():
        fn(x)
    torch._dynamo.reset()
    fn, _, x = compiled({"expect_fused": 5})
    with torch.no_grad(), pytest.raises(tpfuse.FusionError, match="4 forward collectives") as caught:
        fn(x)
    assert "all_reduce_norm" in str(caught.value)


def test_expect_fused_ignores_graphs_without_collectives():
    with torch.no_grad():
        torch.compile(lambda x: x * 2, backend="tpfuse", options={"expect_fused": 3})(torch.ones(2))


def test_strict_raises_for_a_missed_norm():
    def fn(x):
        return F.rms_norm(torch.relu(all_reduce(x)), (HIDDEN,))

    with torch.no_grad(), pytest.raises(tpfuse.FusionError, match="relu"):
        torch.compile(fn, backend="tpfuse", options={"strict": True})(torch.randn(3, HIDDEN))


def test_a_rewrite_can_be_switched_off():
    fn, model, x = compiled({"rewrites": ("merge_all_reduces",)})
    with torch.no_grad():
        torch.testing.assert_close(fn(x), model(x), rtol=1e-5, atol=1e-5)
    assert not last().fused and "switched off" in last().boundaries[0].reason


class CountingPass(CustomGraphPass):
    def __init__(self):
        self.calls = 0

    def __call__(self, graph):
        self.calls += 1

    def uuid(self):
        return b"counting"


def test_a_users_own_pass_still_runs():
    mine = CountingPass()
    fn, _, x = compiled({"inductor": {"joint_custom_post_pass": mine}})
    with torch.no_grad():
        fn(x)
    assert mine.calls == 1 and len(last().fused) == 4


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_training_gives_the_gradients_of_eager(inner):
    """Gradients of plain funcol collectives, right or wrong as they may be for training, are kept as they are."""
    torch.manual_seed(0)
    model, x = Stack(2), torch.randn(3, HIDDEN)
    loss(model(x)).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss(torch.compile(model, backend="tpfuse", options={"inner": inner})(x)).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    forward = [b for b in last().boundaries if b.direction == "forward"]
    assert [b.fused for b in forward] == [True] * 4


def test_reports_only_grow_and_survive_a_reset():
    before = len(tpfuse.reports())
    fn, _, x = compiled()
    with torch.no_grad():
        fn(x)
    torch.compiler.reset()
    assert len(tpfuse.reports()) == before + 1
    tpfuse.reports().clear()
    assert len(tpfuse.reports()) == before + 1


def test_a_report_round_trips_through_json():
    fn, _, x = compiled()
    with torch.no_grad():
        fn(x)
    again = tpfuse.Report.from_json(last().to_json())
    assert [b.kind for b in again.boundaries] == [b.kind for b in last().boundaries]
    assert [tuple(b.group) for b in again.boundaries] == [b.group for b in last().boundaries]


def test_a_warm_cache_still_reports_and_still_checks():
    fn, _, x = compiled()
    with torch.no_grad():
        fn(x)
    cold = last()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fn, model, x = compiled({"expect_fused": 4})
    with torch.no_grad():
        torch.testing.assert_close(fn(x), model(x), rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"] == 1
    assert str(last()) == str(cold)
    torch._dynamo.reset()
    fn, _, x = compiled({"expect_fused": 5})
    with torch.no_grad(), pytest.raises(tpfuse.FusionError):
        fn(x)


def test_a_warm_cache_whose_report_was_lost_traces_again(monkeypatch):
    fn, _, x = compiled()
    with torch.no_grad():
        fn(x)
    cold = last()
    torch._dynamo.reset()
    monkeypatch.setattr("tpfuse.runtime.report_store.load", lambda name: None)
    fn, _, x = compiled()
    with torch.no_grad():
        fn(x)
    assert str(last()) == str(cold)


@pytest.mark.parametrize("wanted", [True, False])
def test_batch_invariance_reaches_every_fused_operation(monkeypatch, wanted):
    """The fused kernel, and the local one where there is none."""
    told, own = [], tpfuse.ops.add_norm
    monkeypatch.setattr("tpfuse.ops.all_reduce_add_norm", lambda call, _: told.append(call.batch_invariant))
    monkeypatch.setattr("tpfuse.ops.add_norm", lambda call: told.append(call.batch_invariant) or own(call))
    fn, model, x = compiled({"inner": "aot_eager", "batch_invariant": wanted})
    with torch.no_grad():
        torch.testing.assert_close(fn(x), model(x), rtol=1e-5, atol=1e-5)
    assert told == [wanted] * 8


def test_the_cache_key_follows_what_the_graph_depends_on(monkeypatch, tmp_path):
    from tpfuse.options import parse_options
    from tpfuse.runtime import cache_key

    plain = cache_key.cache_key(parse_options({}))
    assert plain == cache_key.cache_key(parse_options({"expect_fused": 3}))
    assert plain != cache_key.cache_key(parse_options({"strict": True}))
    assert plain != cache_key.cache_key(parse_options({"batch_invariant": True}))
    assert plain != cache_key.cache_key(parse_options({"rewrites": ["all_reduce_norm"]}))
    policies = [tpfuse.SharingPolicy(tp_size=2), tpfuse.SharingPolicy(tp_size=2, moe_dense_tp_size=1)]
    keys = {cache_key.cache_key(parse_options({"policy": policy})) for policy in policies}
    assert len(keys | {plain}) == 3
    with monkeypatch.context() as other_rank:
        other_rank.setattr(dist, "get_rank", lambda: 1)
        assert plain != cache_key.cache_key(parse_options({}))
    dist.new_group([0])
    assert plain != cache_key.cache_key(parse_options({}))
    monkeypatch.setattr(torch, "__version__", "0.0")
    versioned = cache_key.cache_key(parse_options({}))
    monkeypatch.setattr(cache_key, "_SOURCES", "changed")
    assert versioned != cache_key.cache_key(parse_options({}))


def test_the_backend_is_found_by_name_without_an_import():
    code = """
        import torch
        assert "tpfuse" in torch.compiler.list_backends()
        import sys
        assert "tpfuse" not in sys.modules
        compiled = torch.compile(lambda x: x + 1, backend="tpfuse", options={"inner": "aot_eager"})
        assert compiled(torch.ones(1)).item() == 2
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.nightly
def test_debug_dumps_work_under_torch_logs():
    code = """
        import torch, tpfuse
        torch.compile(lambda x: x + 1, backend="tpfuse", options={"inner": "aot_eager"})(torch.ones(1))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**__import__("os").environ, "TORCH_LOGS": "+tpfuse"},
    )
    assert done.returncode == 0 and "collectives fused" in done.stderr, done.stderr


def test_keywords_that_are_torch_compiles_own_are_taken_and_others_are_refused():
    from tpfuse.backend import tpfuse as backend

    gm = torch.fx.symbolic_trace(lambda x: (x + 1,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend(copy.deepcopy(gm), [torch.ones(2)], options={"inner": "aot_eager"}, dynamic=None, fullgraph=True)
    with pytest.raises(tpfuse.OptionError, match="polcy=3"):
        backend(gm, [torch.ones(2)], options={"inner": "aot_eager"}, polcy=3)


@pytest.fixture
def written(monkeypatch):
    """`written(fn, x)`: the graph of fn(x) as its ranks compile it once they find out, at its first run, that they do
    not agree, its inputs and its report."""
    backend, kept = importlib.import_module("tpfuse.backend"), {}
    guarded = backend.guard

    def watched(compiled, report, options, again, place):
        run = guarded(compiled, report, options, again, place)
        kept["again"] = again
        return lambda *args: kept.update(args=args) or run(*args)

    def call(fn, x, before=lambda: None):
        fn(x)
        before()
        call, report = kept["again"]()
        return call(*kept["args"])[0], report

    monkeypatch.setattr(backend, "guard", watched)
    return call


def restarts(*_):
    raise private.restarts_tracing()


def test_a_graph_that_torch_wants_to_trace_again_runs_as_written_without_a_compiler(written, monkeypatch):
    """Nobody traces the program again at its first run."""
    backend = importlib.import_module("tpfuse.backend")
    fn, model, x = compiled({"inner": "aot_eager"})
    with torch.no_grad(), pytest.warns(UserWarning, match="without a compiler"):
        got, report = written(fn, x, lambda: monkeypatch.setitem(backend._INNER, "aot_eager", restarts))
        torch.testing.assert_close(got, model(x))
    assert report.fused_forward == 0 and {b.code for b in report.boundaries} == {"as_written"}


def test_a_graph_to_be_trained_never_runs_without_a_compiler(written, monkeypatch):
    """There torch 2.11 would lose gradients, without a word."""
    backend = importlib.import_module("tpfuse.backend")
    fn, _, x = compiled({"inner": "aot_eager"})
    with pytest.raises(tpfuse.PlanMismatchError, match="cannot compile this one as it was written"):
        written(fn, x, lambda: monkeypatch.setitem(backend._INNER, "aot_eager", restarts))


@pytest.mark.parametrize("inner", INNER)
def test_numbers_that_were_made_constants_are_so_when_the_graph_is_compiled_as_written(inner, written):
    """Dynamo forgets them once a compilation is over."""
    torch.manual_seed(0)
    model = Stack(2)
    model.scale = 1.5
    fn = torch.compile(lambda x: model(x * model.scale), backend="tpfuse", dynamic=True, options={"inner": inner})
    x = torch.randn(3, HIDDEN)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*without a compiler.*")
        got, report = written(fn, x)
    torch.testing.assert_close(got, model(x * 1.5), rtol=1e-5, atol=1e-5)
    assert report.fused_forward == 4  # what a fused boundary sends is what was written
