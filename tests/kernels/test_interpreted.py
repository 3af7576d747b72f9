"""Runs every `case_*.py` beside this file in a process of its own with TRITON_INTERPRET=1.

Triton reads the variable when a kernel is decorated, so the kernels of this process cannot be interpreted as well.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(scope="module")
def interpreting(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen]:
    """One process imports torch and Triton; the cases run in its forks."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    markexpr = request.config.option.markexpr  # what is nightly out here is so in there
    command = [sys.executable, "-m", "tests.kernels.interpreted", markexpr]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, cwd=HERE.parents[1], start_new_session=True, **pipes) as process:
        yield process
        os.killpg(process.pid, signal.SIGKILL)  # with whatever hangs


@pytest.mark.parametrize("case", sorted(path.name for path in HERE.glob("case_*.py")))
def test_interpreted(case: str, interpreting: subprocess.Popen) -> None:
    interpreting.stdin.write(f"{case}\n")
    interpreting.stdin.flush()
    status, said = json.loads(interpreting.stdout.readline())
    print(said[-6000:])
    assert status == 0, said[-8000:]
