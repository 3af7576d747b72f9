"""torch.export: a fused program keeps its signature, is valid, and can be saved, loaded and decomposed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn

import tpfuse

from .graphs import fake_world

HIDDEN = 16


class Block(nn.Module):
    """The normed value is an output, and so are the residual stream and a buffer that is written to."""

    def __init__(self):
        super().__init__()
        self.norm, self.down = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x):
        self.steps.add_(1)
        h = x + funcol.all_reduce(self.down(x), "sum", dist.group.WORLD)
        return self.norm(h), h


@pytest.fixture
def exported():
    """(the program as it was, and fused) with a symbolic number of rows"""
    with fake_world(2):
        sizes = {"x": {0: torch.export.Dim("rows")}}
        before, program = (torch.export.export(Block(), (torch.randn(2, HIDDEN),), dynamic_shapes=sizes) for _ in "ab")
        report = tpfuse.fuse_graph(program.graph_module)
        assert report.fused_forward == 1
        yield before, program


def fused_calls(program) -> int:
    return sum("tpfuse.all_reduce_norm" in str(node.target) for node in program.graph.nodes)


def test_the_signature_stays_that_of_the_graph(exported):
    before, program = exported
    outputs = [[arg.name for arg in p.graph.output_node().args[0]] for p in exported]
    assert outputs[0] == outputs[1] and before.graph_signature == program.graph_signature
    program.validate()
    x = torch.randn(5, HIDDEN)
    program.module()(x)
    assert fused_calls(program) == 1


def test_it_can_be_decomposed(exported):
    decomposed = exported[1].run_decompositions()
    decomposed.validate()
    assert fused_calls(decomposed) == 1


LOAD = """
import sys, torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
import tpfuse
dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
program = torch.export.load(sys.argv[1])
program.validate()
print([tuple(t.shape) for t in program.module()(torch.randn(5, 16))])
"""


@pytest.mark.nightly
def test_it_is_saved_and_loaded_in_a_fresh_process_that_imports_tpfuse(exported, tmp_path):
    path = tmp_path / "program.pt2"
    torch.export.save(exported[1], path)
    ran = subprocess.run([sys.executable, "-c", LOAD, str(path)], capture_output=True, text=True, timeout=200)
    assert ran.stdout.strip() == "[(5, 16), (5, 16)]", ran.stderr[-2000:]


LOAD_COMPILED = """
import sys, torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
import tpfuse
dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
compiled = torch._inductor.aoti_load_package(sys.argv[1])
torch.save(compiled(torch.arange(80.0).reshape(5, 16) / 80), sys.argv[2])
"""


@pytest.mark.nightly
def test_it_is_compiled_ahead_of_time_and_loaded_in_a_fresh_process_that_imports_tpfuse(exported, tmp_path):
    with torch.no_grad():
        program = exported[1].run_decompositions()
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "compiled.pt2"))
        right = program.module()(torch.arange(80.0).reshape(5, 16) / 80)
    command = [sys.executable, "-c", LOAD_COMPILED, path, str(tmp_path / "made")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-2000:]
    for made, expected in zip(torch.load(tmp_path / "made"), right, strict=True):
        torch.testing.assert_close(made, expected)
