"""Compiled graphs call boundaries in their lean form: static and dynamic, inference and training, from a warm cache.

A stub stands for the kernel (kernels/stub_kernel.py), so that launches and their records are there without a GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache, run_and_get_code

import tpfuse
from tpfuse.kernels.rendezvous import WORKSPACE_REGISTRY
from tpfuse.kernels.symmetric import dispatch

from .graphs import executed_collectives, fake_world
from .kernels.stub_kernel import in_place_of_gpus
from .models import HIDDEN, Stack, loss


@pytest.fixture
def kernel(monkeypatch):
    torch._dynamo.reset()
    with fresh_cache(), fake_world(2):
        yield in_place_of_gpus(monkeypatch)
    dispatch.default_table.cache_clear()
    dispatch.choose.cache_clear()
    torch._dynamo.reset()


def counted(monkeypatch) -> list:
    """Calls that were made as first ones."""
    calls, own = [], tpfuse.ops.all_reduce_add_norm
    monkeypatch.setattr("tpfuse.ops.all_reduce_add_norm", lambda *a, **k: calls.append(k) or own(*a, **k))
    return calls


def forms(code: str) -> list[str]:
    return re.findall(r"torch\.ops\.tpfuse\.all_reduce_norm\.(\w+)\(", code)


def step(fn, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    out = fn(x)
    loss(out).backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


nightly = pytest.mark.nightly
CASES = [
    (nn.RMSNorm, True),
    *(pytest.param(*case, marks=nightly) for case in [(nn.RMSNorm, False), (nn.LayerNorm, True)]),
]


@pytest.mark.parametrize(("norm", "dynamic"), CASES)
def test_inference_calls_the_lean_form_and_launches_again(kernel, monkeypatch, norm, dynamic):
    torch.manual_seed(0)
    model = Stack(1, layers=1, norm=norm).eval()
    fn = torch.compile(model, backend="tpfuse", dynamic=dynamic, options={"expect_fused": 2})
    calls = counted(monkeypatch)
    with torch.no_grad():
        _, (code, *_) = run_and_get_code(fn, torch.randn(3, HIDDEN))
        for rows in (3, 5, 3, 5) if dynamic else (3, 3):
            x = torch.randn(rows, HIDDEN)
            torch.testing.assert_close(fn(x), model(x), rtol=1e-5, atol=1e-5)
        launched = len(kernel.launches)
        assert executed_collectives(fn, x) == {} and len(kernel.launches) == launched + 2
    expected = ["lean", "lean"] if norm is nn.RMSNorm else ["with_bias", "with_bias"]
    assert forms(code) == expected and "auto_functionalized" not in code and "clone" not in code
    assert len(calls) == (4 if dynamic else 2)  # two boundaries differ in what is read, each first at every size


@pytest.mark.parametrize(("norm", "dynamic"), [(nn.RMSNorm, True), pytest.param(nn.LayerNorm, False, marks=nightly)])
def test_training_calls_it_in_the_forward_half_and_gradients_are_the_same(kernel, monkeypatch, norm, dynamic):
    torch.manual_seed(0)
    model = Stack(1, layers=1, norm=norm)
    fn = torch.compile(model, backend="tpfuse", dynamic=dynamic)
    calls = counted(monkeypatch)
    _, codes = run_and_get_code(step, fn, model, torch.randn(3, HIDDEN))
    expected = {"with_rstd"} if norm is nn.RMSNorm else {"full"}
    assert set(forms(codes[0])) == expected and not any(forms(code) for code in codes[1:])
    for rows in (3, 7, 3, 7) if dynamic else (3, 3):
        x = torch.randn(rows, HIDDEN)
        for got, exact in zip(step(fn, model, x), step(model, model, x), strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
    assert 0 < len(calls) <= (4 if dynamic else 2) and len(WORKSPACE_REGISTRY["0"].records.known) == len(calls)


class UsersPass(CustomGraphPass):
    """Notes the operators it is given."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, graph) -> None:
        self.seen += [str(node.target) for node in graph.nodes]

    def uuid(self) -> str:
        return "the user's"


@pytest.mark.parametrize("keyed", [True, pytest.param(False, marks=nightly)])
def test_a_users_own_pass_at_that_stage_runs_first_on_functional_operators(kernel, keyed):
    own = UsersPass()
    model, x = Stack(1, layers=1).eval(), torch.randn(3, HIDDEN)
    given = own if keyed else own.__call__
    options = {"inductor": {"post_grad_custom_post_pass": given}}
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        with torch.no_grad():
            fn = torch.compile(model, backend="tpfuse", options=options)
            torch.testing.assert_close(fn(x), model(x), rtol=1e-5, atol=1e-5)
    assert own.seen.count("tpfuse.all_reduce_norm.default") == (2 if keyed else 4)
    assert (counters["aot_autograd"]["autograd_cache_hit"] == 1) == keyed


@nightly
@pytest.mark.parametrize("train", [False, True])
def test_a_group_without_a_kernel_leaves_its_boundaries_to_inductor(monkeypatch, train):
    """As on GPUs; a CPU keeps the operator, unless told otherwise."""
    monkeypatch.setattr("tpfuse.passes.rewrite.lower.STAY", ())
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Stack(1, layers=1), torch.randn(3, HIDDEN)
    with fresh_cache(), fake_world(2):
        fn = torch.compile(model, backend="tpfuse", dynamic=True, options={"expect_fused": 2})
        with torch.set_grad_enabled(train):
            run = (lambda call, x: step(call, model, x)) if train else (lambda call, x: [call(x)])
            _, (code, *_) = run_and_get_code(run, fn, x)
            for rows in (3, 5):
                x = torch.randn(rows, HIDDEN)
                for got, exact in zip(run(fn, x), run(model, x), strict=True):
                    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
            assert "torch.ops.tpfuse" not in code and code.count("_c10d_functional.all_reduce_.default(") == 2


WARM = """
    import sys
    import pytest, torch
    from torch._dynamo.utils import counters
    from tests.graphs import fake_world
    from tests.kernels.stub_kernel import in_place_of_gpus
    from tests.models import HIDDEN, Stack
    patch = pytest.MonkeyPatch()
    torch.set_num_threads(1)
    with fake_world(2):
        kernel = in_place_of_gpus(patch)
        torch.manual_seed(0)
        model, x = Stack(1, layers=1), torch.randn(3, HIDDEN)
        fn = torch.compile(model, backend="tpfuse", dynamic=True)
        with torch.no_grad():
            for rows in (3, 4, 4):
                x = torch.randn(rows, HIDDEN)
                torch.testing.assert_close(fn(x), model(x), rtol=1e-5, atol=1e-5)
        fn(x).sum().backward()
        print(counters["aot_autograd"]["autograd_cache_hit"], len(kernel.launches), len(kernel.compiled))
    patch.undo()
"""


@nightly
def test_a_second_process_takes_the_graph_from_the_cache_and_launches_by_itself(tmp_path):
    """Nothing of the first process is in it: not an address, not a number of a table."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    said = []
    for _ in range(2):
        command = [sys.executable, "-c", textwrap.dedent(WARM)]
        tree = Path(__file__).resolve().parents[1]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tree)
        assert done.returncode == 0, done.stderr[-3000:]
        said.append(done.stdout.split()[-3:])
    (cold, *launches), (warm, *again) = said
    assert int(cold) == 0 and int(warm) == 2 and launches == again
