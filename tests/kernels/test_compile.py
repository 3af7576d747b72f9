"""Every kernel compiles for Hopper without a GPU, and moves memory in 16-byte pieces."""

import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels of this process are interpreted", allow_module_level=True)

from tpfuse.kernels.add_norm import _add_norm_kernel
from tpfuse.kernels.compat import next_power_of_2

from .sm90 import compile_sm90

BF16 = torch.empty(0, dtype=torch.bfloat16)


def scalar_accesses(ptx: str) -> list[str]:
    return re.findall(r"(?:ld|st)\.global(?:\.b16|\.b8)\S*", ptx)


@pytest.mark.parametrize("H", [4096, 7168])
@pytest.mark.parametrize("norm", [0, 1])
def test_add_norm_is_vectorised(H: int, norm: int) -> None:
    constants = {
        "H": H, "BLOCK": next_power_of_2(H), "NORM": norm, "POST": False, "STRIDED": False,
    }  # fmt: skip
    args = (BF16, BF16, BF16, BF16, BF16, BF16, BF16, None, None, None, 1e-6, 0.0, 1.0, H, H)
    ptx = compile_sm90(_add_norm_kernel, args, constants, 8).asm["ptx"]
    assert not scalar_accesses(ptx)
    assert "local.depot" not in ptx


def test_kernel_files_can_be_imported_without_triton() -> None:
    """macOS has no Triton; the references and the decision not to use a kernel must still work there."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, tpfuse.kernels.compat as compat\n"
        "from tpfuse.kernels.add_norm import add_norm\n"
        "assert not compat.HAVE_TRITON\n"
        "add_norm(torch.ones(2, 8), None, None, None, None, 1e-6, norm='rms_norm', out_dtype=torch.float32,"
        " residual_dtype=None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
