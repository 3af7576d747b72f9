"""Forty random kernels in one CUDA graph, ranks delayed differently, every output checked; a planted fault is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from tpfuse.kernels.words import MOST_RANKS

ROOT = Path(__file__).resolve().parents[2]
LINKED = min(torch.cuda.device_count(), MOST_RANKS)
GRAPHS = ("--graphs", "3", "--calls-a-graph", "40")

pytestmark = pytest.mark.gpu


def stress(tmp_path: Path, linked: bool, *arguments: str) -> dict:
    """What a run of benchmarks/stress.py says; its exit status is 0."""
    script = [str(ROOT / "benchmarks" / "stress.py"), *arguments, *GRAPHS, "--out", str(tmp_path / "line")]
    if linked:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(LINKED)]
    else:
        command = [sys.executable]
    done = subprocess.run([*command, *script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    print(done.stdout[-500:])
    return json.loads((tmp_path / "line").read_text())


@pytest.mark.parametrize("world", [2, 3, 4])
def test_overlapping_calls_of_virtual_ranks(world: int, tmp_path) -> None:
    said = stress(tmp_path, False, "--virtual", str(world), "--calls", "4000", "--seed", str(world))
    assert said["calls"] == 4000 and said["wrong_rows"] == 0


@pytest.mark.parametrize("plant", ["slot", "epoch", "flag"])
def test_a_fault_put_in_is_found_on_virtual_ranks(plant: str, tmp_path) -> None:
    assert stress(tmp_path, False, "--virtual", "2", "--calls", "10000", "--plant", plant)["as_expected"]


@pytest.mark.skipif(LINKED < 2, reason="needs several CUDA devices")
def test_overlapping_calls_of_linked_gpus(tmp_path) -> None:
    said = stress(tmp_path, True, "--calls", "20000", "--seed", "7")
    assert said["calls"] == 20000 and said["wrong_rows"] == 0


@pytest.mark.skipif(LINKED != 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kernels", [
    ("copied",), ("exchanged",), ("copied", "exchanged"), ("backward", "backward_scattered"),
], ids=" ".join)  # fmt: skip
def test_calls_by_copy_engines_alone(kernels: tuple[str, ...], tmp_path) -> None:
    said = stress(tmp_path, True, "--calls", "5000", "--seed", "8", "--kernels", *kernels)
    assert said["calls"] >= 5000 and said["wrong_rows"] == 0


@pytest.mark.skipif(LINKED != 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kernel", ["copied", "exchanged", "backward", "backward_scattered"])
def test_a_flag_that_is_up_before_the_copy_is_found(kernel: str, tmp_path) -> None:
    assert stress(tmp_path, True, "--calls", "10000", "--plant", "copy", "--kernels", kernel)["as_expected"]


@pytest.mark.skipif(LINKED < 2, reason="needs several CUDA devices")
@pytest.mark.parametrize("plant", ["slot", "epoch", "flag"])
def test_a_fault_put_in_is_found_on_linked_gpus(plant: str, tmp_path) -> None:
    assert stress(tmp_path, True, "--calls", "10000", "--plant", plant)["as_expected"]
