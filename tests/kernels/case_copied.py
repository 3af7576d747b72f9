"""The boundary by copy engines: real processes, shared memory, delayed ranks, Triton's interpreter."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tpfuse.errors import PeerTimeoutError
from tpfuse.kernels.symmetric import copies
from tpfuse.kernels.symmetric.barrier import barrier
from tpfuse.kernels.symmetric.copied import copied
from tpfuse.kernels.symmetric.copies import chunks_of
from tpfuse.kernels.symmetric.one_shot import one_shot
from tpfuse.kernels.symmetric.timeout import raise_if_late, set_timeout
from tpfuse.kernels.symmetric.two_shot import two_shot
from tpfuse.kernels.words import COPIES

from .case_protocol import BF16, F16, F32, Call, bits, close, equal_on_all_ranks, near
from .copies_later import wrong_without_the_slot
from .protocol import Seat, run

CALLS = [
    Call(rows=rows, hidden=hidden, dtype=dtype, seed=n, fill=fill, options={"norm": norm, **options})
    for n, (rows, hidden, dtype, fill, norm, options) in enumerate([
        (1, 64, BF16, "random", "rms_norm", {}),
        (5, 64, BF16, "minus_zero", "layer_norm", {"stats": True}),
        (0, 64, BF16, "random", "rms_norm", {}),
        (9, 40, F16, "sentinel", "rms_norm", {"post": True, "alpha": 0.5}),
        (3, 72, F32, "random", "none", {"want_sum": True}),
        (4, 64, BF16, "random", "rms_norm", {"weight_offset": 1.0, "want_sum": True, "stats": True}),
    ])
]  # fmt: skip


#: What x of a rank may be: there, a product, or a product in the memory of y.
AS_IT_IS, PRODUCT, IN_PLACE = "as it is", "product", "in place"


def operands(call: Call, seat: Seat, what: str = AS_IT_IS) -> Any:
    """The operands; but for AS_IT_IS with an x that holds nothing before its rows are asked for."""
    op = call.operands(seat.ws.rank)
    if what == AS_IT_IS:
        return op
    given: dict[str, Any] = dict(zip(("out", "sum_out"), op.outputs(), strict=True)) if what == IN_PLACE else {}
    x = given["out"].y if given else torch.empty_like(op.x)
    x.fill_(float("nan"))

    def product(first: int, stop: int) -> None:
        seat.dawdle()
        x[first:stop] = op.x[first:stop]

    return dataclasses.replace(op, x=x, product=product, **given)


def strided(seat: Seat, call: Call) -> Any:
    """With an x that kernels do not load from where it lies."""
    op = call.operands(seat.ws.rank)
    x = torch.full((op.hidden, op.rows), float("nan"), dtype=op.x.dtype).t()

    def product(first: int, stop: int) -> None:
        x[first:stop] = op.x[first:stop]

    out, _ = copied(dataclasses.replace(op, x=x, product=product), seat.ws).run()
    close(out.y, call.expected(2)[0].y)
    return bits(out.y)


def play(seat: Seat, calls: list[Call], products: tuple[str, str]) -> list[Any]:
    answers = []
    for call in calls:
        seat.dawdle()
        op = operands(call, seat, products[seat.ws.rank])
        out, total = copied(op, seat.ws).run()
        expected, expected_sum = call.expected(2)
        close(out.y, expected.y)
        near(out.y, expected.y)
        near(out.residual_out, expected.residual_out)
        assert (out.rstd is None) == (expected.rstd is None) and (out.mean is None) == (expected.mean is None)
        if out.rstd is not None:
            close(out.rstd, expected.rstd, call.dtype)
        if total is not None:
            close(total, expected_sum)
        answers.append((bits(out.y), bits(out.residual_out)))
    return answers


@pytest.mark.parametrize(
    "products", [(AS_IT_IS, AS_IT_IS), (PRODUCT, IN_PLACE), (IN_PLACE, AS_IT_IS)], ids=", ".join
)
def test_every_norm_dtype_and_number_of_rows_is_right_and_equal_on_both_ranks(products: tuple[str, str]) -> None:
    equal_on_all_ranks(run(2, play, CALLS, products))


def test_calls_of_changing_sizes_never_read_rows_of_another_call() -> None:
    calls = [Call(rows=1 + (5 * n) % 7, hidden=64, seed=n) for n in range(30)]
    equal_on_all_ranks(run(2, play, calls, (PRODUCT, IN_PLACE), seed=3))


def test_an_x_that_is_copied_first_is_multiplied_before() -> None:
    equal_on_all_ranks(run(2, strided, Call(rows=5, seed=1)))


def without_copies(seat: Seat, calls: list[Call]) -> list[Any]:
    answers = []
    for n, call in enumerate(calls):
        launch = (one_shot, two_shot, barrier)[n % 3](operands(call, seat, IN_PLACE), seat.ws)
        assert launch.args[0].data_ptr() != launch.out.y.data_ptr()
        out, _ = launch.run()
        close(out.y, call.expected(2)[0].y, roundings=2)
        answers.append((bits(out.y),))
    return answers


def test_kernels_that_take_no_product_read_x_elsewhere_than_where_they_write_y() -> None:
    equal_on_all_ranks(run(2, without_copies, [Call(rows=3, hidden=128, seed=n) for n in range(6)]))


class _Stream:
    waited: Any = None

    def wait_stream(self, other: Any) -> None:
        self.waited = other


def test_a_call_that_raises_waits_for_the_copies_under_way() -> None:
    beside = object.__new__(copies._Beside)
    beside.main, beside.lane = _Stream(), copies.Lane(_Stream(), None)
    with beside:
        pass
    assert beside.main.waited is None  # each chunk was waited for
    with pytest.raises(ZeroDivisionError), beside:
        raise ZeroDivisionError
    assert beside.main.waited is beside.lane.stream


def hasty(seat: Seat, calls: list[Call]) -> int:
    return wrong_without_the_slot(seat, calls, between=lambda _: None)


def test_a_copy_that_does_not_wait_for_the_slot_is_found_out() -> None:
    calls = [Call(rows=5, hidden=64, seed=n) for n in range(20)]
    _, (wrong,) = run(2, hasty, calls)
    assert wrong > 0


def desert(seat: Seat) -> dict[str, Any]:
    copied(Call(rows=5).operands(seat.ws.rank), seat.ws).run()
    if seat.ws.rank == 1:
        return {}
    set_timeout(seat.ws.watch, 2e-3)
    op = Call(rows=5, seed=1).operands(0)
    out, _ = copied(op, seat.ws).run()
    with pytest.raises(PeerTimeoutError, match="rank 1"):
        raise_if_late(seat.ws, "tp")
    again, _ = copied(Call(rows=5, seed=2).operands(0), seat.ws).run()
    return {"nan": bool(out.y.isnan().all() and again.y.isnan().all()), "sent": bool(op.x.isnan().all())}


def test_a_rank_that_waited_in_vain_has_nan_and_sends_nan() -> None:
    (left,), _ = run(2, desert, rest=False)
    assert left == {"nan": True, "sent": True}


def worn(seat: Seat) -> list[int]:
    """Calls of one chunk over the point where the count wraps, then one of three chunks: how far behind the count the
    flags are that were never raised before it."""
    seat.ws.state[COPIES] = (1 << 31) - 3
    for n in range(4):
        copied(Call(rows=1, seed=n).operands(seat.ws.rank), seat.ws).run()
    flags = seat.ws.buffer[seat.ws.copies_offset + seat.ws.copy_words :][1 : copies.READY]
    count = int(seat.ws.state[COPIES])
    behind = (torch.tensor(count, dtype=torch.int32) - flags).tolist()  # wraps, as in the kernel
    call = Call(rows=5, seed=9)
    seat.dawdle()
    out, _ = copied(call.operands(seat.ws.rank), seat.ws).run()
    close(out.y, call.expected(2)[0].y)
    return behind


def test_flags_that_nobody_raised_for_long_do_not_look_raised_when_the_count_has_wrapped() -> None:
    for (behind,) in run(2, worn, rest=False):
        assert all(0 < far < 1 << 30 for far in behind)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 7, 4096, 5000])
def test_chunks_are_all_rows_in_order_and_few(rows: int) -> None:
    chunks = chunks_of(rows)
    assert [row for first, stop in chunks for row in range(first, stop)] == list(range(rows))
    assert len(chunks) <= 3
