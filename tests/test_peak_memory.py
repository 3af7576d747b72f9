"""The peak of a training step's live bytes, by the code that Inductor writes (benchmarks/peak_memory.py): no more than
Inductor's own where it reuses no buffers. What it reuses, and so keeps, hangs on its estimate of each graph."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from torch.distributed.device_mesh import init_device_mesh

from tpfuse import _torch_private as private
from tpfuse.passes.plan.sites import DEFAULT_REWRITES, REWRITES

from . import sequence_models as models
from .graphs import fake_world

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CUTS = {
    "plain": models.cut_plainly,
    "dtensor": models.cut_by_dtensor,
    "megatron": lambda model, mesh: models.cut_by_hand(model, 0),
    "torchtitan": lambda model, mesh: models.cut_by_hand(model, 1),
}


@pytest.fixture
def peaks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("peak_memory", "training", "machine", "records", "without_gpu"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import peak_memory

    return peak_memory


def test_what_is_held_is_counted(peaks):
    """Of y = relu(x w): forward leaves y, or where it is positive; backward holds its gradient and makes that of w."""
    with fake_world(2):
        w = torch.nn.Linear(64, 32, bias=False)
        peak = peaks.peak_of(torch.nn.Sequential(w, torch.nn.ReLU()), torch.randn(128, 64), backend="inductor")
    y, mask, dw = 4 * 128 * 32, 128 * 32, 4 * 32 * 64
    assert peak.kept in (y, y + mask) and peak.whole == y + dw


@pytest.mark.parametrize(
    ("device", "trains", "given", "told"),
    [
        ("meta", True, {}, False),
        ("meta", True, {"allow_buffer_reuse": True}, True),
        ("meta", False, {}, None),
        ("cpu", True, {}, None),
    ],
    ids=["a training step", "told to", "inference", "CPU"],
)
def test_inductor_is_told_to_reuse_no_buffers_of_a_training_step(device, trains, given, told, monkeypatch):
    """On whatever device that is not the CPU, unless the user says otherwise."""
    patches: list = []

    def as_it_is(gm, _, its_patches):
        patches.append(its_patches)
        return gm.forward

    monkeypatch.setattr(private, "compile_with_inductor", as_it_is)
    torch._dynamo.reset()
    with torch.set_grad_enabled(trains):
        compiled = torch.compile(torch.nn.Linear(4, 4, device=device), backend="tpfuse", options={"inductor": given})
        compiled(torch.ones(2, 4, device=device))
    assert [each.get("allow_buffer_reuse") for each in patches] == [told]


@pytest.mark.parametrize(
    ("how", "rewrites"),
    [
        ("plain", DEFAULT_REWRITES),
        *(
            pytest.param(how, rewrites, marks=pytest.mark.nightly)
            for how in CUTS
            for rewrites in (DEFAULT_REWRITES, REWRITES)
            if (how, rewrites) != ("plain", DEFAULT_REWRITES)
        ),
    ],
)
def test_the_peak_is_no_higher_than_inductors_without_reuse(how, rewrites, peaks):
    found = []
    with fake_world(2), torch._inductor.config.patch(allow_buffer_reuse=False):
        for how_compiled in ({"backend": "inductor"}, {"backend": "tpfuse", "options": {"rewrites": rewrites}}):
            model = CUTS[how](models.whole(dtype=torch.bfloat16), init_device_mesh("cpu", (2,)))
            shape = (32, 2) if how == "megatron" else (2, 32)
            found.append(peaks.peak_of(model, torch.randint(0, models.TOKENS, shape), **how_compiled))
    alone, fused = found
    assert fused.kept <= alone.kept and fused.whole <= alone.whole
