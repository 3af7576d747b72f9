"""A call by copies made again from what was noted of it: the steps of the first call, in its order, on other tensors.

Kernels, copies and events are stand-ins (copies_stub.py).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.graphs import fake_world
from tests.passes.test_quantised import recognised
from tests.quantisations import float8_per_row
from tpfuse import product_ops
from tpfuse.boundary_spec import BoundarySpec
from tpfuse.errors import OpError
from tpfuse.kernels import entry, records, rendezvous
from tpfuse.kernels.call import AddNormOut, Call
from tpfuse.kernels.symmetric import copied, dispatch, exchanged, noted, operands, pieces
from tpfuse.kernels.symmetric.dispatch import Entry, Table
from tpfuse.kernels.symmetric.workspace import Workspace

from .copies_stub import EPS, F32, MAIN, SLOT_ROWS, H, Rank
from .stub_kernel import in_place_of_gpus

MOST_ROWS = (1 << 14) // (2 * H * 4)  # that a slot of the one-shot holds


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Rank:
    return Rank(monkeypatch)


class Tensors:
    """One call's, on this rank, which is rank 0. product: x is one, in the memory of y."""

    def __init__(self, rank: Rank, rows: int, scattered: bool, product: bool, quant: str = "") -> None:
        self.rank, self.scattered, self.share = rank, scattered, rows // 2 if scattered else rows
        self.given, self.residual, self.weight = torch.randn(rows, H), torch.randn(self.share, H), torch.randn(H)
        self.y, self.hidden = torch.full((rows, H), float("nan")), torch.full((self.share, H), float("nan"))
        self.x = self.y if product else self.given.clone()
        self.product = self.multiply if product else None
        self.multiplied: list[tuple[int, int]] = []
        self.last: tuple[Tensor | None, Tensor | None] = (None, None)
        if quant:
            self.last = torch.zeros(rows, H).to(torch.float8_e4m3fn), torch.zeros(rows, 1)
        out = AddNormOut(self.y, self.hidden, None, None, *self.last)
        self.call = Call(
            self.x, self.residual, None, self.weight, norm="rms_norm", eps=EPS, out_dtype=F32, hidden_dtype=F32,
            overlap=True, product=self.product, quant=quant, out=out,
        )  # fmt: skip
        self.theirs = torch.randn(SLOT_ROWS, H)
        rank.slot.copy_(self.theirs)

    def multiply(self, first: int, stop: int) -> None:
        self.multiplied.append((first, stop))
        self.y[first:stop] = self.given[first:stop]

    @property
    def all(self) -> tuple[Tensor | None, ...]:
        """In the order of NAMES."""
        return self.x, self.residual, None, self.weight, None, self.y, self.hidden, None, None, None, None

    @property
    def addresses(self) -> tuple[int | None, ...]:
        return tuple(None if t is None else t.data_ptr() for t in self.all)

    def launch(self) -> Any:
        return (exchanged.exchanged if self.scattered else copied.copied)(self.call, self.rank.ws)

    def check(self) -> None:
        """Of a call that the slot holds."""
        h = self.given[: self.share] + self.theirs[: self.share] + self.residual
        y = torch.nn.functional.rms_norm(h, (H,), self.weight, EPS)
        torch.testing.assert_close(self.hidden, h)
        torch.testing.assert_close(self.y[: self.share], y)
        there = self.rank.peer.buffer[self.rank.ws.copies_offset :].view(F32).view(-1)[: SLOT_ROWS * H].view(-1, H)
        if self.scattered:
            assert torch.equal(self.y[self.share :], self.theirs[self.share : 2 * self.share])
            assert torch.equal(there[: self.share], self.given[self.share :])
            assert torch.equal(there[self.share : 2 * self.share], self.y[: self.share])
        else:
            assert torch.equal(there[: self.share], self.given)


def steps_of(tensors: Tensors) -> noted.Steps:
    """Of a first call, which is made."""
    launch = tensors.launch()
    launch.run()
    made = launch.again(tensors.addresses, tensors.rank.ws.watch)
    assert made is not None and not made[1]
    return made[0]


@pytest.mark.parametrize("product", [False, True], ids=["x", "product"])
@pytest.mark.parametrize(("scattered", "rows"), [(False, 8), (False, 1), (True, 8), (True, 2), (True, 40)])
def test_a_call_made_again_takes_the_steps_of_the_first_one(rank: Rank, scattered: bool, rows: int, product: bool):
    """40 rows to be scattered are more than the slot holds: three calls of the protocol."""
    first = Tensors(rank, rows, scattered, product)
    launch = first.launch()
    launch.run()
    asked, multiplied, outputs = [*rank.log], [*first.multiplied], [first.y.clone(), first.hidden.clone()]
    made = launch.again(first.addresses, rank.ws.watch)
    assert made is not None and rank.log == asked, "to note the steps makes none"
    rank.log.clear()
    first.multiplied.clear()
    for t in (first.y, first.hidden):
        t.fill_(float("nan"))
    made[0](*first.addresses, *made[1], stream=MAIN, **({"product": first.product} if product else {}))
    assert rank.log == asked and first.multiplied == multiplied
    assert all(torch.equal(a, b) for a, b in zip((first.y, first.hidden), outputs, strict=True))


@pytest.mark.parametrize("product", [False, True], ids=["x", "product"])
@pytest.mark.parametrize("scattered", [False, True])
def test_it_computes_on_the_tensors_that_it_is_given(rank: Rank, scattered: bool, product: bool) -> None:
    first = Tensors(rank, 10, scattered, product)
    steps = steps_of(first)
    first.check()
    for _ in range(3):
        other = Tensors(rank, 10, scattered, product)
        rank.log.clear()
        steps(*other.addresses, stream=MAIN, product=other.product)
        other.check()
        # Rows of a dead rank become NaN where they lie.
        assert {each[2][0] for each in rank.log if each[0] == "_wait_kernel"} == {other.x.data_ptr()}


@pytest.mark.parametrize("product", [False, True], ids=["x", "product"])
def test_a_call_in_pieces_is_made_again_piece_by_piece(rank: Rank, product: bool) -> None:
    rows, entry, kept = 2 * SLOT_ROWS + 5, Entry("*", 2, H, 1 << 20, "copied"), []
    first = Tensors(rank, rows, False, product)
    pieces.run(entry, first.call, rank.ws, kept.extend)
    asked, y = [*rank.log], first.y.clone()
    assert len(kept) == 3
    record = records.record_of(kept, first.all, rank.ws, Table(), (rank.ws,))
    assert record is not None
    rank.log.clear()
    first.y.fill_(float("nan"))
    record.launch(*first.addresses, *record.rest, stream=MAIN, **({"product": first.product} if product else {}))
    assert rank.log == asked and torch.equal(first.y, y)
    other = Tensors(rank, rows, False, product)
    record.launch(*other.addresses, *record.rest, stream=MAIN, product=other.product)
    each = -(-rows // 3)
    theirs = torch.cat([other.theirs[: min(each, rows - start)] for start in range(0, rows, each)])
    torch.testing.assert_close(other.hidden, other.given + theirs + other.residual)


def test_records_are_bounded_by_the_steps_they_hold(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Tensors(rank, 8, False, True)
    launch = first.launch()
    launch.run()
    record = records.record_of([launch], first.all, rank.ws, Table(), (rank.ws,))
    assert record is not None and record.size == len(record.launch) > 10
    monkeypatch.setattr(records, "MOST", 3 * record.size + 1)
    kept = records.Records()
    for n in range(8):
        kept.keep(n, record)
        assert len(kept.known) == n % 3 + 1 and n in kept.known
    kept.clear()
    for n in (0, 1, 1, 1, 2):  # one in the place of another takes its room
        kept.keep(n, record)
    assert len(kept.known) == 3


def test_quantised_rows_and_their_scales_go_where_a_later_call_wants_them(rank: Rank) -> None:
    quant = recognised(float8_per_row, F32).text()
    first, other = (Tensors(rank, 8, False, False, quant) for _ in range(2))
    steps = steps_of(first)
    last = [t.data_ptr() for t in other.last if t is not None]
    rank.log.clear()
    steps(*other.addresses, *last, stream=MAIN)
    finished = [args for name, _, args in (each for each in rank.log if each[0] == "_finish_kernel")]
    names = copied._finish_kernel.arg_names
    assert finished and all([args[names.index(n)] for n in ("q_ptr", "scale_ptr")] == last for args in finished)


def test_a_product_that_raises_leaves_the_callers_stream_behind_the_copies_under_way(rank: Rank) -> None:
    first = Tensors(rank, 8, False, True)
    steps = steps_of(first)
    rank.log.clear()

    def multiply(first: int, stop: int) -> None:
        if first:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        steps(*first.addresses, stream=MAIN, product=multiply)
    assert ("copy" in {each[0] for each in rank.log}) and rank.log[-2:] == [
        ("record", "asked", "beside"), ("wait", MAIN, "asked"),
    ]  # fmt: skip


def test_what_a_product_raised_is_not_covered_by_what_the_driver_says_then(rank: Rank) -> None:
    """In a graph, of a stream of copies that it does not hold yet."""
    first = Tensors(rank, 8, False, True)
    steps = steps_of(first)

    def refused(*_: Any) -> None:
        raise OpError("the stream is not captured")

    def multiply(first: int, stop: int) -> None:
        raise ZeroDivisionError

    steps = replace(steps, driver=steps.driver._replace(record=refused, wait=refused))
    with pytest.raises(ZeroDivisionError):
        steps(*first.addresses, stream=MAIN, product=multiply)


@pytest.mark.parametrize("scattered", [False, True])
def test_nothing_is_noted_of_copies_of_the_calls_tensors_nor_of_kernels_that_were_not_compiled(rank, scattered) -> None:
    first, other = (Tensors(rank, 8, scattered, False) for _ in range(2))
    launch = first.launch()
    assert launch.again(first.addresses, rank.ws.watch) is None, "it was not run"
    launch.run()
    assert launch.again(first.addresses, rank.ws.watch) is not None
    for index in (0, 1, 3, 5, 6):
        places = list(first.addresses)
        places[index] = other.addresses[index]
        assert launch.again(tuple(places), rank.ws.watch) is None


# -- by the operators -------------------------------------------------------------------------------------------------


@pytest.fixture
def in_graph(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rank]:
    """The operators of compiled graphs find the rank's workspace, and calls of any size are made by copies."""
    with fake_world(2):
        in_place_of_gpus(monkeypatch)
        monkeypatch.setattr(noted, "COMPILED_REGISTRY", operands.COMPILED_REGISTRY)
        monkeypatch.setattr(rendezvous, "_meet", lambda *_: (rank.ws, ""))
        for module in (entry, product_ops):
            monkeypatch.setattr(module, "FROM_BYTES", 1)
        yield rank
    dispatch.default_table.cache_clear()
    dispatch.choose.cache_clear()


def call_operator(name: str, first: Tensor, second: Tensor, out_dtype: torch.dtype, residual: Tensor, own: Tensor):
    """y of a product and the boundary behind it."""
    text = BoundarySpec(norm="rms_norm", eps=EPS, out_dtype=out_dtype, hidden_dtype=F32, group_name="0", overlap=True,
                        operands=(F32, F32, None, F32, None, None)).text()  # fmt: skip
    y, weight = torch.full((len(first), H), float("nan"), dtype=out_dtype), torch.ones(H)
    operator = getattr(torch.ops.tpfuse, name).lean
    factors = ([first, second], "mm") if name.startswith("product") else (first @ second,)
    operator(*factors, y, text, residual, weight, torch.empty_like(own))
    return y


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("product", ["", "product_"], ids=["x", "product"])
def test_only_the_first_call_of_an_operator_is_a_first_call(in_graph, monkeypatch, scattered: bool, product: str):
    name = product + ("reduce_scatter_norm_gather" if scattered else "all_reduce_norm")
    module, bind = (entry, "exchanged") if scattered else (dispatch.KERNELS["copied"], "bind")
    made, real = [], getattr(module, bind)

    def counted(*given: Any) -> Any:
        made.append(given)
        return real(*given)

    if scattered:
        monkeypatch.setattr(entry, "exchanged", counted)
    else:
        monkeypatch.setitem(dispatch.KERNELS, "copied", replace(module, bind=counted))
    for n in range(4):
        rows = 8 if n < 3 else 6
        own = torch.randn(rows // 2 if scattered else rows, H)
        theirs = torch.randn(SLOT_ROWS, H)
        in_graph.slot.copy_(theirs)
        first, second = torch.randn(rows, 3), torch.randn(3, H)
        y = call_operator(name, first, second, F32, own, own)
        h = (first @ second)[: len(own)] + theirs[: len(own)] + own
        torch.testing.assert_close(y[: len(own)], torch.nn.functional.rms_norm(h, (H,), None, EPS))
    assert len(made) == 2, "of each number of rows"


@pytest.mark.parametrize("copies_too", [False, True], ids=["no slot", "too few bytes"])
def test_no_record_is_left_of_a_product_that_was_made_before_its_launch(in_graph, monkeypatch, copies_too: bool):
    """The kernel of one launch takes no product; y of another dtype is not where x goes."""
    if copies_too:
        monkeypatch.setattr(entry, "FROM_BYTES", 1 << 30)
    else:
        monkeypatch.setattr(rendezvous, "_meet", lambda *_: (replace(in_graph.ws, copy_words=0), ""))
    for _ in range(3):
        first, second, residual = torch.randn(8, 3), torch.randn(3, H), torch.randn(8, H)
        y = call_operator("product_all_reduce_norm", first, second, torch.bfloat16, residual, residual)
        right = torch.nn.functional.rms_norm(first @ second + residual, (H,), None, EPS)  # the peer's rows are zero
        torch.testing.assert_close(y.float(), right, rtol=1e-2, atol=1e-2)


# -- where every tensor of a call lies --------------------------------------------------------------------------------


class Every:
    """All operands and outputs that a call may have."""

    def __init__(self, ws: Workspace, rows: int, scattered: bool, alike: bool) -> None:
        share = rows // 2 if scattered else rows
        self.x, self.y = torch.randn(rows, H), torch.empty(rows, H)
        self.residual = self.x if alike and not scattered else torch.randn(share, H)
        self.pre_bias, self.weight, self.bias = (torch.randn(H) for _ in range(3))
        self.hidden, self.total = torch.empty(share, H), torch.empty(share, H)
        self.mean, self.rstd, self.eps = torch.empty(share, 1), torch.empty(share, 1), torch.tensor(EPS)
        out = AddNormOut(self.y, self.hidden, self.mean, self.rstd)
        call = Call(
            self.x, self.residual, self.pre_bias, self.weight, self.bias, self.eps, norm="layer_norm", out_dtype=F32,
            hidden_dtype=F32, want_sum=True, stats=True, overlap=True, out=out, sum_out=self.total,
        )  # fmt: skip
        self.launch = (exchanged.exchanged if scattered else copied.copied)(call, ws)

    @property
    def all(self) -> list[Tensor]:
        """In the order of NAMES."""
        return [self.x, self.residual, self.pre_bias, self.weight, self.bias, self.y, self.hidden, self.total,
                self.mean, self.rstd, self.eps]  # fmt: skip

    def moved(self, log: list[tuple], to: Every) -> list[tuple]:
        """The steps, with addresses within tensors of this call moved to those of the other one."""

        def move(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(move, value))
            for here, there in zip(self.all, to.all, strict=True):
                if isinstance(value, int) and here.data_ptr() <= value < here.data_ptr() + here.nbytes:
                    return there.data_ptr() + value - here.data_ptr()
            return value

        return [move(step) for step in log]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("alike", [False, True], ids=["", "the residual is x"])
@pytest.mark.parametrize(("scattered", "rows"), [(False, 8), (False, 1), (True, 8), (True, 2), (True, 40)])
def test_every_step_is_made_where_the_tensors_of_the_later_call_lie(monkeypatch, number, alike, scattered, rows):
    rank = Rank(monkeypatch, number)
    copied._finish_kernel.does = lambda *_: None  # the addresses count
    first, other = (Every(rank.ws, rows, scattered, alike) for _ in range(2))
    first.launch.run()
    asked = [*rank.log]
    made = first.launch.again(tuple(t.data_ptr() for t in first.all), rank.ws.watch)
    assert made is not None
    rank.log.clear()
    made[0](*(t.data_ptr() for t in other.all), *made[1], stream=MAIN)
    assert rank.log == first.moved(asked, other)


@pytest.mark.parametrize("scattered", [False, True])
def test_no_tensor_of_the_call_is_kept(rank: Rank, scattered: bool) -> None:
    first = Tensors(rank, 8, scattered, True)
    steps = steps_of(first)
    gone = [weakref.ref(t) for t in first.all if t is not None]
    del first
    gc.collect()
    assert len(steps) > 10 and all(t() is None for t in gone)


def test_copies_of_rows_of_a_product_are_not_kept_for_a_record(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a kernel that takes no product each have one."""
    seen, bind = [], pieces.bind

    def counted(*given: Any) -> Any:
        assert all(launch() is None for launch in seen[:-1])
        launch = bind(*given)
        if launch is not None:
            seen.append(weakref.ref(launch))
        return launch

    first = Tensors(rank, 3 * MOST_ROWS, False, True)
    in_place_of_gpus(monkeypatch)
    monkeypatch.setattr(pieces, "bind", counted)
    told: list[Any] = []
    pieces.run(Entry("*", 2, H, 1 << 20, "one_shot"), first.call, rank.ws, told.append)
    assert len(seen) == 3 and not told


def test_nothing_is_noted_where_the_driver_is_not_found(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Tensors(rank, 8, False, False)
    launch = first.launch()
    launch.run()
    monkeypatch.setattr(noted, "driver", lambda: None)
    assert launch.again(first.addresses, rank.ws.watch) is None
