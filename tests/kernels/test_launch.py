"""A launch finds its compiled kernel again by what Triton compiles for, and nothing else."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tpfuse.errors import OpError
from tpfuse.kernels.call import AddNormOut, Call
from tpfuse.kernels.symmetric import copied, copies, exchanged, operands
from tpfuse.kernels.symmetric.barrier import barrier
from tpfuse.kernels.symmetric.one_shot import one_shot
from tpfuse.kernels.symmetric.operands import Launch
from tpfuse.kernels.symmetric.registry import KERNELS
from tpfuse.kernels.symmetric.two_shot import two_shot
from tpfuse.kernels.symmetric.workspace import virtual_ranks

ARGS = {"x_ptr": torch.zeros(64), "rows": 3, "eps": 1e-6, "absent_ptr": None}


class Compiled:
    """What a kernel was compiled to: notes how it is launched."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []

    def __getitem__(self, grid: tuple) -> Any:
        return lambda *args: self.launches.append((grid, args))


class Kernel:
    """Stands for a Triton kernel: notes what it compiles."""

    arg_names = (*ARGS, "WIDTH")

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple) -> Any:
        def launch(*args: Any, **constants: Any) -> Compiled:
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return launch


def run(kernel: Kernel, width: int = 8, **changed: Any) -> None:
    args = tuple((ARGS | changed).values())
    out = AddNormOut(torch.zeros(1), None, None, None)
    Launch(kernel, 5, args, {"num_warps": 4, "WIDTH": width}, out, None).run()


def test_the_same_call_again_goes_straight_to_the_compiled_kernel() -> None:
    kernel = Kernel()
    run(kernel)
    other = torch.ones(64)
    run(kernel, x_ptr=other, eps=1e-5)
    assert len(kernel.compiled) == 1
    assert kernel.compiled[0].launches == [((5, 1, 1), (other, 3, 1e-5, None, 8))]  # constants behind the arguments


@pytest.mark.parametrize(
    "changed",
    [
        {"x_ptr": torch.zeros(64, dtype=torch.bfloat16)},
        {"x_ptr": torch.zeros(64)[1:]},  # not on a 16-byte boundary
        {"x_ptr": None},
        {"absent_ptr": torch.zeros(64)},
        {"rows": 16},
        {"rows": 1},
        {"width": 16},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_what_triton_compiles_for_is_told_apart(changed: dict) -> None:
    kernel = Kernel()
    run(kernel)
    run(kernel, **changed)
    assert len(kernel.compiled) == 2


def test_a_launch_that_quantises_views_its_rows_as_bytes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[AddNormOut] = []
    own = operands.quantised_tensors
    monkeypatch.setattr(operands, "quantised_tensors", lambda out: made.append(out) or own(out))
    kernel = Kernel()
    for count in (1, 2):  # of launches: one compiles, one does not
        q = torch.zeros(8, dtype=torch.float8_e4m3fn)
        out = AddNormOut(torch.zeros(1), None, None, None, q, torch.zeros(1))
        launch = Launch(kernel, 5, tuple(ARGS.values()), {"num_warps": 4, "WIDTH": 8}, out, None)
        launch.run()
        assert launch.compiled() is not None
        assert len(made) == count and launch.last["q_ptr"].data_ptr() == q.data_ptr()
    [(_, args)] = kernel.compiled[0].launches
    assert args[-2:] == (*launch.last.values(),)


@pytest.mark.parametrize(
    ("bind", "rows", "hidden", "said"),
    [
        (one_shot, 9, 64, r"one_shot: 9 rows of 128 bytes from 2 ranks take 2,304 bytes of a slot; it has 2,048"),
        (partial(one_shot, split=2), 3, 64, r"one_shot: 3 rows, each split over 2, take 6 programs; allowed: 4"),
        (partial(one_shot, split=4), 1, 40, r"one_shot: split=4 of a row of 80 bytes; allowed: up to 8 parts of whole"),
        (two_shot, 9, 64, r"two_shot: 9 rows of 128 bytes and their sums take 2,304 bytes of a slot; it has 2,048"),
        (two_shot, 1, 8, r"two_shot: a row of 16 bytes in chunks of 16; allowed: 2 chunks, one a rank and none empty"),
        (barrier, 9, 64, r"barrier: 9 rows of 128 bytes take 1,152 bytes of a stage; it has 1,024"),
    ],
)
def test_a_kernel_refuses_what_its_workspace_does_not_hold(bind: Any, rows: int, hidden: int, said: str) -> None:
    """Larger calls would write over what lies behind the slot, on every rank."""
    ws = virtual_ranks(2, "cpu", 4, 2048)[0]
    x = torch.zeros(rows, hidden, dtype=torch.bfloat16)
    with pytest.raises(OpError, match=said):
        bind(Call(x, x, norm="rms_norm", out_dtype=x.dtype, hidden_dtype=x.dtype, eps=1e-6), ws)


@pytest.mark.parametrize("world", range(2, 9))
@pytest.mark.parametrize("hidden", [512, 520, 672, 7168])
def test_each_kernel_holds_as_many_rows_as_it_says(world: int, hidden: int) -> None:
    """Among them rows that do not divide into equal chunks; a slot that does not divide among the ranks."""
    ws = virtual_ranks(world, "cpu", 4, 100_000)[0]

    def rows(count: int) -> Call:
        x = torch.zeros(count, hidden, dtype=torch.bfloat16)
        return Call(x, x, norm="rms_norm", out_dtype=x.dtype, hidden_dtype=x.dtype, eps=1e-6)

    for kernel in KERNELS.values():
        most = kernel.most_rows(rows(1), ws)
        holds = kernel.fits(rows(most), ws, 1) and not kernel.fits(rows(most + 1), ws, 1)
        assert holds if world in kernel.worlds else most == 0, kernel.name


def test_more_ranks_than_a_watch_has_words_for_are_refused() -> None:
    with pytest.raises(OpError, match="a workspace of 9 ranks; allowed: 8"):
        virtual_ranks(9, "cpu", 4, 2048)


def test_short_keys_of_calls_by_copies_leave_out_only_what_is_not_compiled_for() -> None:
    ws = virtual_ranks(2, "cpu", 4, 1 << 14)[1]
    memory = torch.zeros(8 * 64 + 2, dtype=torch.bfloat16)
    rows, off = memory[:-2].view(8, 64), memory[2:].view(8, 64)

    def steps(x: torch.Tensor) -> list[copies.Step]:
        words = x.view(-1).view(torch.int32)
        calls, exchange = copies.Copies(ws, words), exchanged.Exchange(ws, x, None, x)
        call = Call(x, norm="rms_norm", out_dtype=x.dtype)
        finishing = copied.finishing(call, (x, None, None, None, None), call.outputs()[0], None, (None,) * 4, ws, {})
        return [calls.beginning(), calls.waiting(copies.READY, 0, 4), exchange._taking(words, 0, 96, 64), finishing(2)]

    assert rows.data_ptr() % 16 == 0 and off.data_ptr() % 16
    assert [a.key == b.key for a, b in zip(steps(rows), steps(off), strict=True)] == [True, False, False, False]
    assert [a.key == b.key for a, b in zip(steps(rows), steps(rows.clone()), strict=True)] == [True] * 4
    assert all(t.data_ptr() % 16 == 0 for t in (ws.state, ws.peers, ws.watch))
    for step in steps(rows):
        for given, parameter in zip(step.args, step.kernel.params, strict=False):
            assert not isinstance(given, int) or parameter.do_not_specialize, parameter.name
