"""How many boundaries of public programs' forms are fused, and that their outputs are those of eager mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import tpfuse

from . import others_programs as programs
from .graphs import fake_world
from .policy_harness import compiles_in_threads, run_threads


@dataclass(frozen=True)
class Program:
    """fused: how many of its all-reduces. left: of each collective that is not, what its line in the report says."""

    build: Callable[[int], torch.nn.Module]
    given: Callable[[], tuple]
    fused: int
    left: tuple[str, ...] = ()


LOGITS = "no norm reads what it gathers, so there is nothing to fuse it with: the graph returns it"
PROGRAMS = (
    Program(programs.gpt_fast, programs.one_token, 6),
    Program(programs.gpt_fast_mixtral, programs.one_token, 6),
    Program(programs.whisper_encoder, programs.sound, 4),
    Program(programs.clip_vision, programs.picture, 4),
    Program(programs.siglip_vision, programs.picture, 4),
    Program(programs.torch_transformer, programs.tokens, 6, (LOGITS,)),
    Program(programs.torch_transformer_untied, programs.tokens, 6, (LOGITS,)),
    Program(programs.megatron, programs.tokens, 3),
)
each_program = pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.build.__name__)


def assert_counts(report: tpfuse.Report, program: Program) -> None:
    assert report.fused_forward == program.fused and len(report.unfused) == len(program.left), report
    assert all(word in str(boundary) for word, boundary in zip(program.left, report.unfused, strict=True)), report
    assert not report.missed


@each_program
def test_the_boundaries_of_a_public_program_are_fused(program):
    torch._dynamo.reset()
    with fake_world(programs.WORLD), torch.no_grad():
        assert_counts(tpfuse.explain(program.build(0), program.given()), program)


def outputs(rank: int, program: Program) -> tuple[float, list[tpfuse.Report]]:
    """The error, and the reports so far: those of all ranks, which are threads of one process."""
    given = program.given()
    before = len(tpfuse.reports())
    with torch.no_grad():
        compiled = torch.compile(program.build(rank), backend="tpfuse", fullgraph=True, options={"inner": "aot_eager"})
        got, expected = (_first(model(*given)) for model in (compiled, program.build(rank)))
    return float((got - expected).norm() / expected.norm()), tpfuse.reports()[before:]


def _first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.nightly
@compiles_in_threads
@each_program
def test_its_outputs_are_those_of_eager_mode(program):
    torch._dynamo.reset()
    with fake_world(programs.WORLD):
        torch.compile(program.build(0), backend="tpfuse")  # threads may not import at the same time what this imports
    for error, reports in run_threads(programs.WORLD, outputs, program):
        assert reports and error < 1e-5
        for report in reports:
            assert_counts(report, program)
