"""The symmetric-memory kernels' protocol: real processes, shared memory, delayed ranks, Triton's interpreter."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tpfuse.kernels.add_norm import add_norm_reference
from tpfuse.kernels.call import Call as Operation
from tpfuse.kernels.symmetric.barrier import barrier
from tpfuse.kernels.symmetric.one_shot import one_shot
from tpfuse.kernels.symmetric.two_shot import chunk_words, two_shot
from tpfuse.kernels.words import EPOCHS, SENTINEL

from .protocol import Seat, run

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ROWS, NORMS = (0, 1, 2, 3, 5, 9, 0), ("rms_norm", "layer_norm", "rms_norm", "layer_norm", "none")


def nightly(*values: Any) -> list[Any]:
    return [pytest.param(value, marks=pytest.mark.nightly) for value in values]


@dataclass(frozen=True)
class Call:
    """One collective call; inputs follow from `seed` and the rank, so every rank knows what the others send."""

    kernel: str = "one_shot"
    rows: int = 1
    hidden: int = 64
    dtype: torch.dtype = BF16
    seed: int = 0
    fill: str = "random"  # or "minus_zero", "sentinel", "special", "negated_zero" (y is -0.0)
    options: dict[str, Any] = field(default_factory=dict)

    def x(self, rank: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(self.seed * 64 + rank)
        x = torch.randn(self.rows, self.hidden, generator=g).to(self.dtype)
        if self.fill == "minus_zero":
            x.fill_(-0.0)
        if self.fill == "sentinel":
            x.view(torch.int32).fill_(SENTINEL)
        if self.fill == "negated_zero":
            x.fill_(0.0)
        if self.fill == "special" and rank == 1:
            x[0, 3], x[1, 5], x[2, 7] = float("nan"), float("inf"), -float("inf")
        return x

    def operands(self, rank: int) -> Operation:
        g = torch.Generator().manual_seed(self.seed * 64 + 63)
        residual = torch.randn(self.rows, self.hidden, generator=g).to(self.dtype)
        vectors = [torch.randn(self.hidden, generator=g).to(self.dtype) for _ in range(3)]
        if self.fill == "negated_zero":
            residual.fill_(0.0)
            vectors = [None, torch.full_like(vectors[1], -1.0), None]
        merged = {"norm": "rms_norm", "out_dtype": self.dtype, "hidden_dtype": self.dtype, **self.options}
        return Operation(self.x(rank), residual, *vectors, eps=1e-5, **merged)

    def expected(self, world: int) -> tuple[Any, torch.Tensor]:
        """In float64."""
        op = self.operands(0)
        total = torch.stack([self.x(rank).double() for rank in range(world)]).sum(0)
        if self.kernel == "two_shot":
            total = total.to(self.dtype).double()
        out = add_norm_reference(dataclasses.replace(op, x=total))
        return out, total


def close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype | None = None, roundings: int = 1) -> None:
    """Each element; `roundings`: how often a number of 16 bits was rounded on its way."""
    tolerance = 1e-4 if (dtype or a.dtype) == F32 else 2e-2 * roundings**2
    torch.testing.assert_close(a, b.to(a.dtype), rtol=tolerance, atol=tolerance, equal_nan=True)


def near(a: torch.Tensor, b: torch.Tensor) -> None:
    """All of them together: the relative error of what is finite."""
    finite = b.isfinite()
    off = (a.double() - b.double())[finite].norm()
    assert off <= (1e-5 if a.dtype == F32 else 1e-2) * b[finite].double().norm(), off


def launch(call: Call, seat: Seat) -> tuple[Any, Any]:
    op = call.operands(seat.ws.rank)
    if call.kernel == "one_shot":
        return one_shot(op, seat.ws).run()
    if call.kernel == "two_shot":
        return two_shot(op, seat.ws).run()
    return barrier(op, seat.ws).run()


def play(seat: Seat, calls: list[Call]) -> list[Any]:
    """Make every call, check it, and hand back what must be bitwise equal on all ranks."""
    answers = []
    for call in calls:
        seat.dawdle()
        out, total = launch(call, seat)
        expected, expected_sum = call.expected(seat.ws.world)
        roundings = 2 if call.kernel == "two_shot" else 1  # of the sum, hence of the statistics of it
        close(out.y, expected.y, roundings=roundings)
        for name in ("residual_out", "rstd", "mean"):
            a, b = getattr(out, name), getattr(expected, name)
            assert (a is None) == (b is None)
            if a is not None:
                close(a, b, call.dtype, roundings)
        near(out.y, expected.y)
        near(out.residual_out, expected.residual_out)
        if total is not None:
            close(total, expected_sum, roundings=roundings)
        answers.append((bits(out.y), bits(out.residual_out)))
    return answers


def bits(t: torch.Tensor) -> torch.Tensor:
    """What must be equal on all ranks, the sign of zero included; NaN may have any bits in float32."""
    if t.dtype == F32:
        return t.nan_to_num(7.0).view(torch.int32)
    return t.view(torch.int16)


def equal_on_all_ranks(answers: list[list[Any]]) -> None:
    first = answers[0][0]
    for rank, (other,) in enumerate(answers):
        for n, (a, b) in enumerate(zip(first, other, strict=True)):
            assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True)), (rank, n)


def mixture(kernels: list[str], count: int, world: int) -> list[Call]:
    """Random widths, dtypes and variants of calls with ROWS rows in turn: none, more than programs, fewer than ranks;
    for a two-shot rows that divide into equal chunks and rows that do not."""
    pick = random.Random(world)
    widths = [64, 200, 320, 336] if kernels == ["two_shot"] else [64, 72, 192, 200]
    calls = []
    for n in range(count):
        options = {
            "norm": NORMS[n % len(NORMS)], "post": pick.random() < 0.3,
            "want_sum": pick.random() < 0.5, "stats": pick.random() < 0.5, "alpha": pick.choice([1.0, 0.5]),
            "weight_offset": pick.choice([0.0, 1.0]),
        }  # fmt: skip
        rows, hidden = ROWS[n % len(ROWS)], pick.choice(widths)
        dtype = pick.choice([BF16, F16, F32])
        kernel = pick.choice(kernels)
        words = hidden * dtype.itemsize // 4
        if (world - 1) * chunk_words(words, world) >= words:  # a rank without a chunk
            kernel = "one_shot" if kernel == "two_shot" else kernel
        calls.append(Call(kernel, rows, hidden, dtype, seed=n, options=options))
    return calls


@pytest.mark.parametrize("kernel", ["one_shot", "two_shot", "barrier"])
@pytest.mark.parametrize("world", [2, 3, *nightly(5, 6, 7)])
def test_each_kernel_right_and_bitwise_equal(world: int, kernel: str) -> None:
    calls = mixture([kernel], 8 if world < 4 else 14, world)
    equal_on_all_ranks(run(world, play, calls, slot_bytes=1 << 17, seed=world))


@pytest.mark.parametrize("world", [3, *nightly(2, 4, 5, 6, 7, 8)])
def test_rows_that_do_not_divide_into_equal_chunks(world: int) -> None:
    """A row of 47 or 43 times 16 bytes, each slot used once: what lay behind a row would still be there."""
    calls = [
        Call("two_shot", rows, hidden, seed=n, options={"norm": norm, "want_sum": True})
        for n, (rows, hidden, norm) in enumerate([(9, 376, "rms_norm"), (1, 344, "layer_norm"), (3, 344, "rms_norm")])
    ]
    equal_on_all_ranks(run(world, play, calls))


@pytest.mark.parametrize("world", [4, *nightly(3, 5, 6, 7, 8)])
def test_kernels_alternate_on_one_workspace(world: int) -> None:
    kernels = ["one_shot", "one_shot", "two_shot", "barrier"]
    equal_on_all_ranks(run(world, play, mixture(kernels, 16 if world < 8 else 8, world), seed=10 + world))


@pytest.mark.parametrize("kernel", ["one_shot", "two_shot", "barrier"])
def test_minus_zero_sentinels_nan_and_inf_travel(kernel: str) -> None:
    """A payload made of nothing but the sentinel's bits neither hangs nor is lost; NaN and inf stay in their rows."""
    fills = [(fill, dtype) for dtype in (BF16, F32) for fill in ("minus_zero", "sentinel", "special", "negated_zero")]
    calls = [Call(kernel, 3, 64, dtype, seed=n, fill=fill) for n, (fill, dtype) in enumerate(fills)]
    equal_on_all_ranks(run(2, play, calls))


def sleepy(seat: Seat, calls: list[Call]) -> list[Any]:
    """Rank 0 is asleep before the calls without rows, the others are two calls ahead by then."""
    if seat.ws.rank == 0:
        import time

        time.sleep(0.3)
    return play(seat, calls)


def test_two_calls_without_rows_beside_a_late_rank() -> None:
    calls = [Call(rows=rows, seed=n) for n, rows in enumerate([2, 0, 0, 3, 0, 1, 2, 2])]
    equal_on_all_ranks(run(2, sleepy, calls))


def count_epochs(seat: Seat, calls: list[Call]) -> int:
    play(seat, calls)
    return int(seat.ws.state[0]) >> 2


def test_a_call_without_rows_leaves_the_epoch_alone() -> None:
    calls = [Call(kernel, rows=0) for kernel in ("one_shot", "two_shot", "barrier")]
    assert run(2, count_epochs, [*calls, Call(rows=1)]) == [[1], [1]]


def play_late(seat: Seat, calls: list[Call], epoch: int) -> list[Any]:
    """As if a great many calls had been made."""
    seat.ws.state[EPOCHS] = epoch
    return play(seat, calls)


# The count's sign flips. (A barrier first used just before the count is 0 again would take a flag that was never
# raised, which is 0 too, for a raised one: one call in 2^30.)
@pytest.mark.parametrize("epoch", [0x7FFFFFFC - 8 + 1])
def test_epochs_wrap(epoch: int) -> None:
    pick = random.Random(epoch)
    kernels = [pick.choice(["one_shot", "two_shot", "barrier"]) for _ in range(10)]
    equal_on_all_ranks(run(2, play_late, [Call(k, 1 + n % 6, seed=n) for n, k in enumerate(kernels)], epoch))


def play_split(seat: Seat, calls: list[Call], split: int) -> list[Any]:
    """This seat is one program: it fills its columns of its rows, and the other seats of its rank the rest."""
    answers = []
    for call in calls:
        seat.dawdle()
        op = call.operands(seat.ws.rank)
        out = None
        if seat.program < call.rows * split:
            out, _ = one_shot(op, seat.ws, split, first=seat.program).run()
            expected, _ = call.expected(seat.ws.world)
            row, part = divmod(seat.program, split)
            columns = slice(part * call.hidden // split, (part + 1) * call.hidden // split)
            close(out.y[row, columns], expected.y[row, columns])
            close(out.residual_out[row, columns], expected.residual_out[row, columns])
            answers.append(out.y[row, columns].view(torch.int16))
        seat.fence.wait()  # the next kernel of a stream starts when this one has ended
    return answers


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("world", [2, *nightly(3, 5, 6, 7)])
def test_split_rows(world: int, norm: str) -> None:
    calls = [Call(rows=1, hidden=hidden, seed=n, options={"norm": norm}) for n, hidden in enumerate([64, 80, 64, 2048])]
    answers = run(world, play_split, calls, 2, programs_per_rank=2)
    for program in range(2):
        for rank in range(1, world):
            for a, b in zip(answers[0][program], answers[rank][program], strict=True):
                assert torch.equal(a, b)


def hang(seat: Seat) -> None:
    if seat.ws.rank == 0:
        one_shot(Call(rows=1).operands(0), seat.ws).run()


def test_the_harness_notices_a_hang() -> None:
    """Rank 1 never calls: without this the tests above would prove little."""
    with pytest.raises(TimeoutError, match=r"\(0, 0\)"):
        run(2, hang, timeout=3)
