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
from tpfuse.kernels.call import Call
from tpfuse.kernels.compat import next_power_of_2
from tpfuse.kernels.quantise_program import encoded
from tpfuse.kernels.symmetric.barrier import _barrier_kernel, barrier
from tpfuse.kernels.symmetric.one_shot import _one_shot_kernel
from tpfuse.kernels.symmetric.two_shot import _two_shot_kernel, chunk_words
from tpfuse.kernels.symmetric.workspace import virtual_ranks

from ..passes.test_quantised import recognised
from ..quantisations import SPELLINGS
from .sm90 import compile_sm90, stack_bytes

BF16 = torch.empty(0, dtype=torch.bfloat16)


def scalar_accesses(ptx: str) -> list[str]:
    return re.findall(r"(?:ld|st)\.global(?:\.b16|\.b8)\S*", ptx)


@pytest.mark.parametrize("H", [4096, 7168])
@pytest.mark.parametrize("norm", [0, 1])
@pytest.mark.parametrize(("pieces", "late"), [(1, False), (1, True), (2, True)])
def test_add_norm_is_vectorised(H: int, norm: int, pieces: int, late: bool) -> None:
    constants = {
        "H": H, "BLOCK": next_power_of_2(H) // pieces, "NORM": norm, "POST": False, "STRIDED": False,
        "PIECES": pieces, "LATE": late, "EVICT": "evict_first" if late else "", "STORE": ".cs" if late else "",
    }  # fmt: skip
    args = (BF16, BF16, BF16, BF16, BF16, BF16, BF16, None, None, None, 1e-6, None, None, H, H)
    ptx = compile_sm90(_add_norm_kernel, args, constants, 8).asm["ptx"]
    assert not scalar_accesses(ptx)
    assert "local.depot" not in ptx
    # the weight waits for the statistics, which keeps registers free for more rows
    assert bool(re.search(r"bar\.sync.*ld\.global.*evict_last", ptx, re.DOTALL)) == late


def test_what_is_absent_is_no_instruction() -> None:
    constants = {"H": 4096, "BLOCK": 4096, "NORM": 0, "POST": False, "STRIDED": False, "PIECES": 1, "LATE": True,
                 "EVICT": "", "STORE": ""}  # fmt: skip

    def operations(pre_bias=None, bias=None, weight_offset=None, alpha=None) -> int:
        args = (BF16, BF16, pre_bias, BF16, bias, BF16, BF16, None, None, None, 1e-6, weight_offset, alpha, 4096, 4096)
        ptx = compile_sm90(_add_norm_kernel, args, constants, 16).asm["ptx"]
        return len(re.findall(r"\b(?:add|sub|mul|fma)\.(?:rn\.)?f32", ptx))

    least, elements = operations(), 8  # a thread
    assert operations(pre_bias=BF16) == least + elements
    assert operations(weight_offset=0.0) == least + elements
    assert operations(alpha=1.0) <= least + elements  # a multiplication may join the addition behind it
    assert operations(pre_bias=BF16, bias=BF16, weight_offset=1.0, alpha=2.0) > least + elements


I32, I64 = torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int64)
COMMON = (BF16, BF16, None, BF16, None, BF16, BF16, None, None, None, None, 1e-6, None, None, I64, I32, I32)


@pytest.mark.parametrize("world", [2, 4, 8, 3, *(pytest.param(n, marks=pytest.mark.nightly) for n in (5, 6, 7))])
@pytest.mark.parametrize("many", [False, True])
def test_one_shot_moves_16_bytes_and_waits_in_one_loop(world: int, many: bool, tmp_path) -> None:
    for H, split, warps in ((4096, 1, 16), (7168, 4, 8)):
        words = H // 2
        W = next_power_of_2(words // split)
        constants = {"H": H, "ROW_WORDS": words, "W": W, "EL": 2 * W, "SPLIT": split, "WORLD": world, "NORM": 0,
                     "POST": False, "MANY": many, "SPIN": True}  # fmt: skip
        compiled = compile_sm90(_one_shot_kernel, (*COMMON, 1 << 22, 8, 0, 8, 0), constants, warps)
        ptx = compiled.asm["ptx"]
        assert not scalar_accesses(ptx) and "local.depot" not in ptx and not stack_bytes(compiled, tmp_path)
        sources = 1 if world == 2 else world
        assert ptx.count("ld.volatile.global.v4.b32") == sources  # one loop, all ranks in flight


def test_a_wait_whose_loop_holds_a_barrier_is_given_up_by_all_warps_at_once() -> None:
    """Between the clock and the branch on it, the portable wait joins what the warps read."""
    constants = {"H": 4096, "ROW_WORDS": 2048, "W": 2048, "EL": 4096, "SPLIT": 1, "WORLD": 2, "NORM": 0, "POST": False,
                 "MANY": False, "SPIN": False}  # fmt: skip
    ptx = compile_sm90(_one_shot_kernel, (*COMMON, 1 << 22, 8, 0, 8, 0), constants, 16).asm["ptx"]
    decisions = re.findall(r"globaltimer.*?\bbra", ptx, re.DOTALL)
    assert decisions and all("bar.sync" in decision for decision in decisions)


@pytest.mark.parametrize("spin", [True, False])
def test_the_wait_in_an_inbox_holds_no_barrier(spin: bool) -> None:
    """In the inbox of a split row each warp, or thread, decides for itself, so none may be needed by another there."""
    constants = {"H": 4096, "ROW_WORDS": 2048, "W": 512, "EL": 1024, "SPLIT": 4, "WORLD": 2, "NORM": 0, "POST": False,
                 "MANY": False, "SPIN": spin}  # fmt: skip
    ptx = compile_sm90(_one_shot_kernel, (*COMMON, 1 << 22, 8, 0, 8, 0), constants, 4).asm["ptx"]
    inbox = re.split("AGAIN:" if spin else "Loop Header", ptx)[-1]
    wait, given_up = re.search("(.*?)globaltimer(.*?)bar\\.sync", inbox, re.DOTALL).groups()
    assert "ld.volatile" in wait and "bar.sync" not in wait and ("st.volatile" if spin else "st.global") in given_up


@pytest.mark.parametrize("world", [8, 3, *(pytest.param(n, marks=pytest.mark.nightly) for n in (5, 6, 7))])
def test_two_shot_moves_16_bytes_and_compiles_without_spilling(world: int, tmp_path) -> None:
    """Three, five, six and seven chunks of a row are not equal, and no power of two."""
    H, warps = 8192, 16
    words = H // 2
    shared = {"H": H, "ROW_WORDS": words, "W": words, "EL": H, "WORLD": world, "NORM": 0, "POST": False}
    settings = {**shared, "SPIN": True, "MANY": True, "C": next_power_of_2(chunk_words(words, world))}
    two = compile_sm90(_two_shot_kernel, (*COMMON, 1 << 22, 8, 0, 8, 0), settings, warps)
    assert not scalar_accesses(two.asm["ptx"]) and "local.depot" not in two.asm["ptx"]
    assert not stack_bytes(two, tmp_path)


@pytest.mark.parametrize(
    ("H", "world", "ahead"), [(4096, 8, True), (4096, 3, True), (8192, 4, True), (8192, 8, False), (16384, 4, False)]
)
def test_barrier_loads_a_row_ahead_where_registers_hold_it(H: int, world: int, ahead: bool, tmp_path) -> None:
    words = H // 2
    [ws, *_] = virtual_ranks(world, "cpu", 4)
    x = torch.empty(9, H, dtype=torch.bfloat16)
    launch = barrier(Call(x, x, norm="rms_norm", out_dtype=torch.bfloat16, hidden_dtype=torch.bfloat16, eps=1e-6), ws)
    warps = launch.constants["num_warps"]
    assert launch.constants["AHEAD"] == ahead and warps == (16 if ahead else 32)
    constants = {"H": H, "ROW_WORDS": words, "W": words, "EL": H, "WORLD": world, "NORM": 0, "POST": False,
                 "AHEAD": ahead}  # fmt: skip
    compiled = compile_sm90(_barrier_kernel, (*COMMON, 3 << 22, 1 << 20, 1 << 22, 8, 0, 8, 0), constants, warps)
    assert not scalar_accesses(compiled.asm["ptx"]) and not stack_bytes(compiled, tmp_path)


@pytest.mark.parametrize("name", SPELLINGS)
def test_each_quantisation_compiles(name: str) -> None:
    how = recognised(SPELLINGS[name], torch.bfloat16)
    constants = {
        "H": 1024, "BLOCK": 1024, "NORM": 0, "POST": False, "STRIDED": False, "PIECES": 1, "LATE": True, "EVICT": "",
        "STORE": "", "q_ptr": torch.empty(0, dtype=torch.int8), "scale_ptr": torch.empty(0, dtype=how.scale_dtype),
        "QUANT": encoded(how, torch.bfloat16, on_gpu=True, converts=True),
    }  # fmt: skip
    args = (BF16, BF16, None, BF16, None, BF16, BF16, None, None, None, 1e-6, None, None, 1024, 1024)
    ptx = compile_sm90(_add_norm_kernel, args, constants, 2).asm["ptx"]
    assert "local.depot" not in ptx
    assert not scalar_accesses(ptx) or how.group  # rows in groups are laid out by groups, whatever is stored


def test_kernel_files_can_be_imported_without_triton() -> None:
    """macOS has no Triton; the references and the decision not to use a kernel must still work there."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, tpfuse.kernels.compat as compat\n"
        "from tpfuse.kernels.add_norm import add_norm\n"
        "assert not compat.HAVE_TRITON\n"
        "from tpfuse.kernels.call import Call\n"
        "add_norm(Call(torch.ones(2, 8), norm='rms_norm', eps=1e-6, out_dtype=torch.float32))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
