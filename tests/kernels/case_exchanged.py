"""Scattered rows by copy engines: real processes, shared memory, delayed ranks, Triton's interpreter."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tpfuse.errors import OpError, PeerTimeoutError
from tpfuse.kernels.call import Call as Operation
from tpfuse.kernels.symmetric.copied import copied
from tpfuse.kernels.symmetric.exchanged import exchanged
from tpfuse.kernels.symmetric.timeout import raise_if_late, set_timeout

from .case_copied import AS_IT_IS, IN_PLACE, PRODUCT
from .case_copied import operands as whole_operands
from .case_protocol import BF16, F16, F32, Call, bits, close, equal_on_all_ranks, near
from .copies_later import Later, copied_later, wrong_without_the_slot
from .protocol import Seat, run

CALLS = [
    Call(rows=rows, hidden=hidden, dtype=dtype, seed=n, fill=fill, options={"norm": norm, **options})
    for n, (rows, hidden, dtype, fill, norm, options) in enumerate([
        (2, 64, BF16, "random", "rms_norm", {}),
        (10, 64, BF16, "minus_zero", "layer_norm", {"stats": True}),
        (0, 64, BF16, "random", "rms_norm", {}),
        (18, 40, F16, "sentinel", "rms_norm", {"post": True, "alpha": 0.5}),
        (6, 72, F32, "random", "none", {"want_sum": True}),
        (8, 64, BF16, "random", "rms_norm", {"weight_offset": 1.0, "want_sum": True, "stats": True}),
    ])
]  # fmt: skip


def own(call: Call, rank: int) -> slice:
    return slice(rank * call.rows // 2, (rank + 1) * call.rows // 2)


def operands(call: Call, seat: Seat, what: str = AS_IT_IS, given: bool = False) -> Operation:
    """The operands of this rank: the residual of own rows; x as it is, or one that holds nothing before its rows are
    asked for; results new, or given, as they are where x lies in them."""
    op = call.operands(seat.ws.rank)
    op = dataclasses.replace(op, residual=op.residual[own(call, seat.ws.rank)].clone())
    if given or what == IN_PLACE:
        out, total = dataclasses.replace(op, x=op.residual).outputs()  # of own rows, as all are but y
        op = dataclasses.replace(op, out=dataclasses.replace(out, y=torch.empty_like(op.x)), sum_out=total)
    if what == AS_IT_IS:
        return op
    x = op.out.y if what == IN_PLACE else torch.empty_like(op.x)
    x.fill_(float("nan"))

    def multiply(first: int, stop: int) -> None:
        seat.dawdle()
        x[first:stop] = op.x[first:stop]

    return dataclasses.replace(op, x=x, product=multiply)


def play(seat: Seat, calls: list[Call], products: tuple[str, str], given: bool = False) -> list[Any]:
    answers = []
    for call in calls:
        seat.dawdle()
        op = operands(call, seat, products[seat.ws.rank], given)
        out, total = exchanged(op, seat.ws).run()
        expected, expected_sum = call.expected(2)
        mine = own(call, seat.ws.rank)
        assert not given or op.out is None or out.y is op.out.y
        close(out.y, expected.y)
        near(out.y, expected.y)
        near(out.residual_out, expected.residual_out[mine])
        assert (out.rstd is None) == (expected.rstd is None) and (out.mean is None) == (expected.mean is None)
        if out.rstd is not None:
            close(out.rstd, expected.rstd[mine], call.dtype)
        if total is not None:
            close(total, expected_sum[mine])
        answers.append((bits(out.y),))
    return answers


@pytest.mark.parametrize("given", [False, True], ids=["new results", "given results"])
@pytest.mark.parametrize(
    "products", [(AS_IT_IS, AS_IT_IS), (PRODUCT, IN_PLACE), (IN_PLACE, AS_IT_IS)], ids=", ".join
)
def test_every_norm_dtype_and_number_of_rows_is_right_and_gathered_alike(
    products: tuple[str, str], given: bool
) -> None:
    equal_on_all_ranks(run(2, play, CALLS, products, given))


def both(seat: Seat, calls: list[Call]) -> list[Any]:
    return [each for call in calls for each in (*play(seat, [call], (PRODUCT, IN_PLACE)), *whole(seat, call))]


def whole(seat: Seat, call: Call, what: str = AS_IT_IS) -> list[Any]:
    out, _ = copied(whole_operands(call, seat, what), seat.ws).run()
    close(out.y, call.expected(2)[0].y)
    return [(bits(out.y),)]


def test_calls_of_both_kinds_share_a_slot() -> None:
    equal_on_all_ranks(run(2, both, [Call(rows=2 + 2 * ((5 * n) % 7), seed=n) for n in range(12)]))


def test_a_call_that_the_slot_does_not_hold_is_made_in_several() -> None:
    calls = [Call(rows=26, hidden=64, seed=n) for n in range(3)]
    equal_on_all_ranks(run(2, play, calls, (PRODUCT, IN_PLACE), slot_bytes=400))


def test_calls_of_changing_sizes_never_read_rows_of_another_call() -> None:
    calls = [Call(rows=2 + 2 * ((5 * n) % 7), hidden=64, seed=n) for n in range(30)]
    equal_on_all_ranks(run(2, play, calls, (PRODUCT, IN_PLACE), seed=3))


def later(seat: Seat, calls: list[Call], longest: tuple[float, float], behind: str = "each") -> list[Any]:
    """Calls of both kinds, whose copies are made beside what the caller does; `longest`: by how many seconds later;
    `behind`: which copies the caller waits for, "each" of them before it finishes their rows, the "last" at the end of
    a call, or "none"."""
    if behind != "each":
        Later.behind = lambda *_: None  # type: ignore[method-assign]
    if behind == "last":
        Later.__exit__ = lambda self, *_: self.last and self.last.result()  # type: ignore[method-assign]
    with copied_later(seat, longest[seat.ws.rank]) as seat:
        return [each for n, call in enumerate(calls) for each in
                (whole(seat, call, IN_PLACE) if n % 3 == 2 else play(seat, [call], (IN_PLACE, PRODUCT)))]  # fmt: skip


def test_copies_that_lag_behind_the_caller() -> None:
    calls = [Call(rows=2 + 2 * ((5 * n) % 11), hidden=64, seed=n) for n in range(24)]
    equal_on_all_ranks(run(2, later, calls, (4e-3, 4e-3)))
    cut = [Call(rows=12 if n % 3 == 2 else 26, hidden=64, seed=n) for n in range(6)]
    equal_on_all_ranks(run(2, later, cut, (1e-3, 8e-3), slot_bytes=400))


@pytest.mark.parametrize(("behind", "calls", "longest"), [("none", 8, 5e-2), ("last", 9, 0.15)])
def test_a_caller_that_does_not_wait_for_its_copies_is_found_out(behind: str, calls: int, longest: float) -> None:
    """Not before rows that lie where they are sent from are finished, or not at all."""
    with pytest.raises(RuntimeError, match="not close"):
        run(2, later, [Call(rows=10, hidden=64, seed=n) for n in range(calls)], (longest, 0.0), behind)


def refused(seat: Seat) -> list[str]:
    said = []
    for call, more in (
        (Call(rows=5), {}),
        (Call(rows=4), {"batch_invariant": True}),
        (Call(rows=4), {"out_dtype": F32}),
        (Call(rows=4, hidden=4), {}),
        (Call(rows=4), {}),
    ):
        with pytest.raises(OpError) as raised:
            exchanged(dataclasses.replace(call.operands(seat.ws.rank), **more), seat.ws)
        said.append(str(raised.value))
    return said


def test_what_cannot_be_exchanged_is_refused_with_the_reason() -> None:
    (said,), _ = run(2, refused)
    reasons = "5 rows", "batch_invariant=True", "torch.float32", "multiples of 8", "own rows, 2"
    for sentence, words in zip(said, reasons, strict=True):
        assert words in sentence


def hasty(seat: Seat, calls: list[Call]) -> int:
    """Exchanges between other calls: those of one size alone wait for what the peer did last in any case."""
    return wrong_without_the_slot(seat, calls, lambda call: exchanged(operands(call, seat), seat.ws).run())


def test_a_copy_that_does_not_wait_for_the_slot_is_found_out() -> None:
    _, (wrong,) = run(2, hasty, [Call(rows=10, hidden=64, seed=n) for n in range(20)])
    assert wrong > 0


def desert(seat: Seat) -> dict[str, Any]:
    exchanged(operands(Call(rows=6), seat), seat.ws).run()
    if seat.ws.rank == 1:
        return {}
    set_timeout(seat.ws.watch, 2e-3)
    op = operands(Call(rows=6, seed=1), seat)
    out, _ = exchanged(op, seat.ws).run()
    with pytest.raises(PeerTimeoutError, match="rank 1"):
        raise_if_late(seat.ws, "tp")
    again, _ = exchanged(operands(Call(rows=6, seed=2), seat), seat.ws).run()
    return {"nan": bool(out.y.isnan().all() and again.y.isnan().all()), "sent": bool(op.x[3:].isnan().all())}


def test_a_rank_that_waited_in_vain_has_nan_and_sends_nan() -> None:
    (left,), _ = run(2, desert, rest=False)
    assert left == {"nan": True, "sent": True}
