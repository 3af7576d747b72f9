"""A warm compile cache never answers with a graph that was made under other conditions.

Each test changes one condition between compilations that share a cache, and looks at what the compiled graph then does:
which operators it runs, what it computes. What goes into the key is `test_backend.py`'s business. `inner="aot_eager"`
keeps nothing, so everything here goes through Inductor.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import tpfuse
from tpfuse.kernels.symmetric import dispatch
from tpfuse.kernels.symmetric.dispatch import Entry, Table
from tpfuse.passes.plan.sites import REWRITES
from tpfuse.policy import SharingPolicy

from .graphs import all_reduce, executed_collectives, fake_world
from .models import HIDDEN, Stack, cut_from
from .policy_harness import HIDDEN as DECODER_HIDDEN
from .policy_harness import build
from .ranks import run_processes
from .test_sharing import Decoder, compile_for


@pytest.fixture(autouse=True)
def one_cache():
    """Empty at the start of a test, and shared by all that the test compiles."""
    with fresh_cache():
        yield
    torch._dynamo.reset()


def executed(fn, *args) -> Counter:
    """The operators of tpfuse and the collectives that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fn(*args)
    names = [event.name for event in profile.events()]
    fused = Counter(name.removeprefix("tpfuse::") for name in names if name.startswith("tpfuse::"))
    return fused + executed_collectives(fn, *args)


def compiled_anew(fn, options=None):
    """`fn` compiled as a new process would: nothing in memory, the cache on disk as it is."""
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(fn, backend="tpfuse", options=options)


def was_warm() -> bool:
    return counters["aot_autograd"]["autograd_cache_hit"] > 0


# -- options, groups, worlds ------------------------------------------------------------------------------------------


def two_sums(x, z, residual, weight):
    """Two all-reduces, over everyone and over the second group, whose sum is normed."""
    hidden = residual + all_reduce(x, "0") + all_reduce(z, "1")
    return F.rms_norm(hidden, (HIDDEN,), weight, 1e-6), hidden


def what_two_sums_run(world: int, second_group: list[int], rank: int = 0, **options) -> tuple[Counter, bool]:
    with fake_world(world, rank), torch.no_grad():
        dist.new_group(second_group)
        args = *(torch.randn(3, HIDDEN) for _ in range(3)), torch.randn(HIDDEN)
        fn = compiled_anew(two_sums, options)
        fn(*args)
        warm = was_warm()
        return executed(fn, *args), warm


def test_one_cache_serves_other_worlds_other_groups_and_other_rewrites_each_its_own_graph():
    """Names and members of groups are different things: the second group is called "1" in all of these."""
    without_merging = [name for name in REWRITES if name != "merge_all_reduces"]
    merged, separate = {"all_reduce_norm": 1, "all_reduce": 1}, {"all_reduce_norm": 1, "all_reduce": 2}
    settings = [
        ({"world": 2, "second_group": [0, 1]}, merged),
        ({"world": 4, "second_group": [0, 1]}, separate),
        ({"world": 4, "second_group": [0, 1, 2, 3]}, merged),
        ({"world": 2, "second_group": [0, 1], "rewrites": without_merging}, separate),
    ]
    for pass_over_settings in ("cold", "warm"):
        for setting, expected in settings:
            ran, warm = what_two_sums_run(**setting)
            assert ran == expected, (pass_over_settings, setting)
            assert warm == (pass_over_settings == "warm"), (pass_over_settings, setting)


def test_the_report_from_a_warm_cache_names_this_worlds_ranks():
    for world in (2, 4, 2):
        what_two_sums_run(world, list(range(world)))
        assert [boundary.group for boundary in tpfuse.reports()[-1].boundaries] == [tuple(range(world))] * 2


@pytest.mark.nightly
def test_each_policy_gets_its_own_graph():
    expected = {  # by the residual and the rows that the policy states
        ("replicated", 16384): {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1},
        ("scattered", None): {"reduce_scatter": 2, "all_gather": 2},
    }
    x = torch.randn(2, 4, DECODER_HIDDEN, dtype=torch.float64)
    for pass_over_policies in ("cold", "warm"):
        for (residual, max_rows), collectives in expected.items():
            torch._dynamo.reset()
            counters.clear()
            with fake_world(8), torch.no_grad():
                policy = SharingPolicy(8, 2, None, residual=residual, max_rows=max_rows)
                fn = compile_for(build(lambda: Decoder(1)).eval(), policy, inner="inductor")
                fn(x)
                assert was_warm() == (pass_over_policies == "warm"), residual
                assert executed_collectives(fn, x) == collectives, (pass_over_policies, residual)


def test_the_dispatch_table_is_read_at_run_time_and_not_kept_with_the_graph(monkeypatch, tmp_path):
    """The graph names an operator; the table says which kernel that is, in this process."""
    picked = []

    def pick(call, *_):
        x = call.x
        picked.append(dispatch.choose("GPU", 2, x.shape[-1], x.element_size(), x.shape[0]).kernel)

    monkeypatch.setattr("tpfuse.ops.all_reduce_add_norm", pick)
    for kernel in ("one_shot", "two_shot"):
        path = tmp_path / f"{kernel}.json"
        path.write_text(Table([Entry("*", 2, HIDDEN, 64, kernel)]).to_json())
        monkeypatch.setenv(dispatch.TABLE_VARIABLE, str(path))
        dispatch.default_table.cache_clear()
        dispatch.choose.cache_clear()
        with fake_world(2), torch.no_grad():
            compiled_anew(norm_of_sum)(torch.randn(3, HIDDEN))
        assert was_warm() == (kernel == "two_shot") and picked.pop() == kernel
    monkeypatch.undo()
    dispatch.default_table.cache_clear()
    dispatch.choose.cache_clear()


def norm_of_sum(x):
    return F.rms_norm(all_reduce(x), (HIDDEN,))


# -- sources ----------------------------------------------------------------------------------------------------------

#: A change of what the pass writes into the graph: sums count ten times.
BEFORE, AFTER = '"alpha": scale,', '"alpha": scale * 10,'

SCRIPT = """
    import json, sys, torch
    import torch.distributed as dist
    import torch.distributed._functional_collectives as funcol
    from torch._dynamo.utils import counters
    from torch.testing._internal.distributed.fake_pg import FakeStore
    import tpfuse
    from tpfuse.backend import tpfuse as backend

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())

    def boundary(x, residual):
        h = residual + funcol.all_reduce(x, "sum", dist.group.WORLD)
        return torch.nn.functional.rms_norm(h, (8,)), h

    def run():
        torch.compiler.reset()
        counters.clear()
        with torch.no_grad():
            _, h = torch.compile(boundary, backend=backend)(torch.ones(1, 8), torch.zeros(1, 8))
        hit = counters["aot_autograd"]["autograd_cache_hit"]
        print(json.dumps({"h": h[0, 0].item(), "hit": hit, "report": tpfuse.reports()[-1].to_json()}))

    run()
    if len(sys.argv) > 1:
        path, before, after = sys.argv[1:]
        text = open(path).read()
        assert before in text
        open(path, "w").write(text.replace(before, after))
        run()
"""


@pytest.fixture
def source_tree(tmp_path) -> Path:
    """A copy of the package that a test may edit."""
    package = Path(tpfuse.__file__).parent
    shutil.copytree(package, tmp_path / "tree" / "tpfuse", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "tree"


def in_new_process(tree: Path, cache: Path, *edit: str) -> list[dict]:
    """What each run in a process over `tree` printed; with `edit`, the process edits a file between two runs."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    command = [sys.executable, "-B", "-c", textwrap.dedent(SCRIPT), *edit]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tree)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.nightly
def test_an_edited_pass_is_used_by_the_next_process_and_the_report_outlives_the_first(source_tree, tmp_path):
    """Also when the file was edited under a process that goes on running, and compiling, the old source."""
    cache = tmp_path / "cache"
    (first,) = in_new_process(source_tree, cache)
    edit = str(source_tree / "tpfuse" / "passes" / "rewrite" / "all_reduce_norm.py"), BEFORE, AFTER
    warm, after_edit = in_new_process(source_tree, cache, *edit)
    (edited,) = in_new_process(source_tree, cache)
    assert (first["h"], first["hit"]) == (1.0, 0)
    assert (warm["h"], warm["hit"]) == (1.0, 1), "another process, the same source"
    assert warm["report"] == first["report"] and json.loads(first["report"])["boundaries"][0]["fused"]
    assert after_edit["h"] == 1.0, "the process still runs the source it imported"
    assert (edited["h"], edited["hit"]) == (10.0, 0), "the new source was not used"


USERS_PASS = """
    import sys
    import torch
    import torch.distributed as dist
    import torch.distributed._functional_collectives as funcol
    from torch._dynamo.utils import counters
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch.testing._internal.distributed.fake_pg import FakeStore
    import tpfuse
    from tpfuse.backend import tpfuse as backend

    class Doubles(CustomGraphPass):
        def __call__(self, graph):
            # Between the sum and the norm, it does what no fused operation can.
            for node in list(graph.nodes):
                if node.target is torch.ops._c10d_functional.wait_tensor.default:
                    with graph.inserting_after(node):
                        sine = graph.call_function(torch.ops.aten.sin.default, (node,))
                    sine.meta.update(node.meta)
                    node.replace_all_uses_with(sine, delete_user_cb=lambda user: user is not sine)

        def uuid(self):
            return "sine"

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    inductor = {sys.argv[1]: Doubles()} if len(sys.argv) > 1 else {}
    fn = lambda x, r: torch.nn.functional.rms_norm(r + funcol.all_reduce(x, "sum", dist.group.WORLD), (8,))
    try:
        with torch.no_grad():
            torch.compile(fn, backend=backend, options={"inductor": inductor, "expect_fused": 1})(
                torch.ones(1, 8), torch.zeros(1, 8)
            )
    except tpfuse.FusionError:
        print("refused", end=" ")
    print(len(tpfuse.reports()[-1].fused), counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.nightly
@pytest.mark.parametrize("stage", ["joint_custom_post_pass", "joint_custom_pre_pass"])
def test_a_report_is_that_of_the_graph_with_the_users_own_pass(stage, tmp_path):
    """Three processes on one cache: with a pass of the user's that keeps the boundary from fusing, without, with."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    said = []
    for arguments in ([stage], [], [stage], []):
        command = [sys.executable, "-c", textwrap.dedent(USERS_PASS), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split())
    refused, fused, again, warm = said
    assert refused[:2] == again[:2] == ["refused", "0"], said
    assert fused[0] == warm[0] == "1", said


def test_the_key_stays_when_a_group_found_out_that_it_cannot_use_the_kernels(monkeypatch):
    import weakref

    from tpfuse.backend import FusionPass
    from tpfuse.kernels.rendezvous import WORKSPACE_REGISTRY, Member
    from tpfuse.options import Options

    with fake_world(2):
        before = FusionPass(Options()).uuid()
        group = dist.group.WORLD
        refusal = Member(weakref.ref(group), None, "The group spans several hosts.")
        monkeypatch.setitem(WORKSPACE_REGISTRY, group.group_name, refusal)
        assert FusionPass(Options()).uuid() == before


# -- ranks ------------------------------------------------------------------------------------------------------------


def run_stack(rank: int) -> dict:
    torch.manual_seed(0)
    whole = Stack(1, "none", layers=1).eval()
    x = torch.randn(3, HIDDEN)
    with torch.no_grad():
        got = torch.compile(cut_from(whole, rank, 2, "funcol"), backend="tpfuse", options={"expect_fused": 2})(x)
        error = float((got - whole(x)).norm() / got.norm())
    return {"hit": was_warm(), "error": error, "report": str(tpfuse.reports()[-1])}


@pytest.mark.nightly
def test_a_rank_with_a_warm_cache_and_one_with_a_cold_cache_work_together(tmp_path):
    cold = run_processes(2, run_stack, cache_dir=str(tmp_path))
    shutil.rmtree(tmp_path / "rank1")
    mixed = run_processes(2, run_stack, cache_dir=str(tmp_path))
    assert [rank["hit"] for rank in cold + mixed] == [False, False, True, False]
    assert max(rank["error"] for rank in cold + mixed) < 1e-5
    assert len({rank["report"] for rank in cold + mixed}) == 1
