"""Runs every `case_*.py` beside this file in a process of its own with TRITON_INTERPRET=1.

Triton reads the variable when a kernel is decorated, so the kernels of this process cannot be interpreted as well.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("case", sorted(path.name for path in HERE.glob("case_*.py")))
def test_interpreted(case: str, request: pytest.FixtureRequest) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", str(HERE / case)]
    command += ["-m", request.config.option.markexpr]  # what is nightly out here is so in there
    done = subprocess.run(command, env=env, cwd=HERE.parents[1], capture_output=True, text=True, timeout=240)
    print(done.stdout[-6000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
