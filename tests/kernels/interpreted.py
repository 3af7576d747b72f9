"""Runs case files in Triton's interpreter, each in a fork of one process that has imported torch and Triton.

    python -m tests.kernels.interpreted MARKEXPR    reads names of case files, a line each; answers each with a line of
                                                    JSON: pytest's exit status and what it printed
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

import tpfuse.kernels.symmetric.dispatch  # noqa: F401

from .. import graphs  # noqa: F401
from . import interpreter, protocol  # noqa: F401

HERE = Path(__file__).parent


def run(case: str, markexpr: str) -> tuple[int, str]:
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if not child:
            status = 1
            try:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                status = pytest.main(["-p", "no:cacheprovider", "-x", "-m", markexpr, str(HERE / case)])
                sys.stdout.flush()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return status, said.read()


if __name__ == "__main__":
    interpreter.rewrite_all()
    gc.collect()
    gc.freeze()  # no fork's collections look at what was imported
    for line in sys.stdin:
        print(json.dumps(run(line.strip(), sys.argv[1])), flush=True)
