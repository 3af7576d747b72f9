"""A call is launched again from its record only as long as what the record says holds: same bits, same protocol.

A stub stands for the kernel (stub_kernel.py): it computes on the addresses that it is launched with.
"""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.graphs import fake_world
from tests.passes.test_quantised import recognised
from tests.quantisations import float8_per_row
from tpfuse import ops as _ops
from tpfuse.boundary_spec import BoundarySpec
from tpfuse.errors import OpError, PeerTimeoutError
from tpfuse.kernels import records
from tpfuse.kernels import rendezvous as groups
from tpfuse.kernels.add_norm import add_norm_reference
from tpfuse.kernels.call import Call as Operation
from tpfuse.kernels.rendezvous import WORKSPACE_REGISTRY, injected, workspace_of
from tpfuse.kernels.symmetric import dispatch, one_shot, operands
from tpfuse.kernels.symmetric.entries import Entry, Table
from tpfuse.kernels.symmetric.timeout import GONE
from tpfuse.kernels.symmetric.workspace import virtual_ranks

from .stub_kernel import StubKernel, in_place_of_gpus

H, F32, BF16, CPU = 64, torch.float32, torch.bfloat16, torch.device("cpu")
PEERS, SLOT_WORDS = 14, 17  # of a launch's arguments


@pytest.fixture
def kernel(monkeypatch):
    with fake_world(2):
        yield in_place_of_gpus(monkeypatch)
    dispatch.default_table.cache_clear()
    dispatch.choose.cache_clear()


MOST_ROWS = (1 << 16) // (2 * H * 4)  # of float32, in a slot for two ranks


def spec(group: str = "0", dtype: torch.dtype = F32, **changed: Any) -> BoundarySpec:
    given: dict[str, Any] = {
        "norm": "rms_norm", "eps": 1e-6, "weight_offset": 0.0, "alpha": 1.0, "post": False, "out_dtype": dtype,
        "hidden_dtype": dtype, "want_sum": False, "stats": False, "group_name": group, "batch_invariant": False,
        "operands": (dtype, dtype, None, dtype, None, None),
    }  # fmt: skip
    return BoundarySpec(**given | changed)


class Call:
    """One call's tensors; `run` makes it, compares with the reference, and says whether it was made as a first one."""

    def __init__(self, rows: int = 3, group: str = "0", dtype: torch.dtype = F32) -> None:
        self.text = spec(group, dtype).text()
        self.x, self.residual = torch.randn(rows, H).to(dtype), torch.randn(rows, H).to(dtype)
        self.weight, self.y, self.hidden = (
            torch.randn(H).to(dtype),
            self.x.new_empty(rows, H),
            self.x.new_empty(rows, H),
        )

    def run(self) -> bool:
        calls: list[Any] = []
        own = _ops.all_reduce_add_norm
        _ops.all_reduce_add_norm = lambda *a, **k: calls.append(k) or own(*a, **k)
        try:
            torch.ops.tpfuse.all_reduce_norm.lean(self.x, self.y, self.text, self.residual, self.weight, self.hidden)
        finally:
            _ops.all_reduce_add_norm = own
        out = add_norm_reference(
            Operation(
                self.x,
                self.residual,
                None,
                self.weight,
                eps=1e-6,
                norm="rms_norm",
                out_dtype=self.x.dtype,
                hidden_dtype=self.x.dtype,
            )
        )
        assert torch.equal(self.y, out.y) and torch.equal(self.hidden, out.residual_out)
        return bool(calls)


def again(rows: int = 3, **more: Any) -> bool:
    """Whether a call on tensors of its own was launched from a record."""
    return not Call(rows, **more).run()


def test_a_call_like_an_earlier_one_is_launched_again_on_its_own_tensors(kernel: StubKernel) -> None:
    assert [again(rows) for rows in (3, 3, 5, 3, 5)] == [False, True, False, True, True]
    assert len(kernel.launches) == 5 and len(kernel.compiled) == 1
    assert len({args[0] for args in kernel.launches}) > 1  # other addresses of x
    first, second = kernel.launches[0], kernel.launches[1]
    assert first[11:] == second[11:]


def test_another_dtype_group_or_option_has_a_record_of_its_own(kernel: StubKernel) -> None:
    pair = dist.new_group([0, 1]).group_name
    assert [again(), again(dtype=BF16), again(group=pair)] == [False] * 3
    assert [again(), again(dtype=BF16), again(group=pair)] == [True] * 3


@pytest.mark.parametrize("which", ["x", "residual", "weight", "y", "hidden"])
def test_tensors_that_lie_otherwise_are_a_first_call(kernel: StubKernel, which: str) -> None:
    """Off a 16-byte boundary, or with rows apart: kernels are compiled for neither, inputs are copied."""
    assert not again() and again()
    for strided in (False, True):
        call = Call()
        given = getattr(call, which)
        wide = given.new_zeros(*given.shape[:-1], 2 * H + 4)
        view = wide[..., : 2 * H : 2] if strided else wide.flatten()[1 : 1 + given.numel()].view(given.shape)
        setattr(call, which, view.copy_(given))
        assert call.run()
        setattr(call, which, given)
        assert not call.run()


def test_a_quantised_call_is_launched_again_into_its_own_rows_and_scales(kernel: StubKernel, monkeypatch) -> None:
    """q and scale are the launch's last arguments. (The stub writes neither.)"""
    firsts: list[Any] = []
    own = _ops.all_reduce_add_norm
    monkeypatch.setattr(_ops, "all_reduce_add_norm", lambda *a, **k: firsts.append(a) or own(*a, **k))
    text = spec(dtype=BF16, quant=recognised(float8_per_row).text()).text()

    def run(q: torch.Tensor) -> int:
        """How many calls were first ones so far."""
        call, scale = Call(dtype=BF16), torch.empty(3, 1)
        torch.ops.tpfuse.all_reduce_norm.quantised(
            call.x, call.y, text, call.residual, call.weight, call.hidden, q, scale
        )
        assert kernel.launches[-1][0] == call.x.data_ptr()
        assert (kernel.launches[-1][-2:] == (q.data_ptr(), scale.data_ptr())) == (q.data_ptr() % 16 == 0)
        return len(firsts)

    rows = [torch.empty(3, H, dtype=torch.float8_e4m3fn) for _ in range(3)]
    assert [run(q) for q in rows] == [1, 1, 1]
    assert len(kernel.compiled) == 1
    off = torch.empty(3 * H + 3, dtype=torch.float8_e4m3fn)[3:].view(3, H)
    assert [run(off), run(rows[0])] == [2, 2], "what lies otherwise is made elsewhere and copied"
    assert not again(dtype=BF16), "a plain call is another one"


def test_a_quantised_call_in_pieces_leaves_no_record(kernel: StubKernel) -> None:
    """Where q and scale of a piece lie is not in one."""
    text = spec(dtype=BF16, quant=recognised(float8_per_row).text()).text()
    rows = 2 * MOST_ROWS + 1
    for made in (2, 4):
        call = Call(rows, dtype=BF16)
        q, scale = torch.empty(rows, H, dtype=torch.float8_e4m3fn), torch.empty(rows, 1)
        torch.ops.tpfuse.all_reduce_norm.quantised(
            call.x, call.y, text, call.residual, call.weight, call.hidden, q, scale
        )
        assert len(kernel.launches) == made and not WORKSPACE_REGISTRY["0"].records.known


def test_without_rows_nothing_is_launched_or_kept(kernel: StubKernel) -> None:
    assert [again(0), again(0)] == [False, False]
    assert not kernel.launches


# -- when a record dies -----------------------------------------------------------------------------------------------


def test_records_die_when_the_workspace_grows(kernel: StubKernel) -> None:
    assert not again() and again()
    small = WORKSPACE_REGISTRY["0"].workspace
    large = workspace_of("0", CPU, 1 << 17)
    assert large is not small and not WORKSPACE_REGISTRY["0"].records.known
    assert not again() and again()
    assert {args[PEERS] for args in kernel.launches[-2:]} == {large.peers.data_ptr()}


def test_a_record_left_for_an_outgrown_workspace_is_not_launched(kernel: StubKernel, monkeypatch) -> None:
    """A thread may leave its record after another one let the group grow."""
    assert not again()
    stale = dict(WORKSPACE_REGISTRY["0"].records.known)
    large = workspace_of("0", CPU, 1 << 17)
    WORKSPACE_REGISTRY["0"].records.known.update(stale)
    assert not again() and kernel.launches[-1][PEERS] == large.peers.data_ptr()


def test_records_die_with_their_group_and_a_new_one_of_that_name_has_its_own(monkeypatch) -> None:
    kernel = in_place_of_gpus(monkeypatch)
    held = []
    for _ in range(2):
        with fake_world(2):
            assert not again() and again()
            held.append(dist.group.WORLD)  # a program may keep what it destroys
    assert kernel.launches[1][PEERS] != kernel.launches[-1][PEERS]
    known = WORKSPACE_REGISTRY["0"].records.known
    with pytest.raises((OpError, RuntimeError)):
        Call().run()
    assert known and len(kernel.launches) == 4
    held.clear()
    gc.collect()
    assert not WORKSPACE_REGISTRY


def test_records_die_when_the_dispatch_table_changes(kernel: StubKernel, monkeypatch) -> None:
    assert not again(2) and again(2)
    table = Table([Entry("*", 2, H, 64, "one_shot", split=2), Entry("*", 2, H, 1 << 20, "one_shot")])
    monkeypatch.setattr(dispatch, "SHIPPED", table)
    dispatch.default_table.cache_clear()
    dispatch.choose.cache_clear()
    assert not again(2) and again(2)
    assert [args[20] for args in kernel.launches] == [2, 2, 4, 4]  # programs


def test_an_injected_workspace_has_records_of_its_own(kernel: StubKernel) -> None:
    assert not again() and again()
    played = virtual_ranks(2, "cpu", 4, 1 << 12)
    for ws in played:
        with injected("0", ws):
            assert not again() and again()
            assert kernel.launches[-1][PEERS] == ws.peers.data_ptr()
    with injected("0", None):
        before = len(kernel.launches)
        assert not again() and not again() and len(kernel.launches) == before
    assert again() and kernel.launches[-1][PEERS] == WORKSPACE_REGISTRY["0"].workspace.peers.data_ptr()


# -- what stays as it was ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grown", [False, True])
def test_a_late_peer_is_heard_of_at_the_next_call(kernel: StubKernel, grown: bool) -> None:
    """By the watch of any workspace of the group: captured graphs run on outgrown ones."""
    assert not again()
    ws = WORKSPACE_REGISTRY["0"].workspace
    if grown:
        workspace_of("0", CPU, 1 << 17)
        assert not again()
    assert again()
    ws.watch[GONE] = 1
    before = len(kernel.launches)
    with pytest.raises(PeerTimeoutError):
        Call().run()
    assert len(kernel.launches) == before


def test_a_captured_launch_keeps_its_workspace(kernel: StubKernel, monkeypatch) -> None:
    monkeypatch.setattr(groups, "CAPTURED", [])
    assert not again() and again() and not groups.CAPTURED
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert again() and [WORKSPACE_REGISTRY["0"].workspace] == groups.CAPTURED


def test_calls_on_the_functional_path_leave_no_record(kernel: StubKernel) -> None:
    again()
    WORKSPACE_REGISTRY["0"].workspace = None  # what a group that cannot share memory has
    assert not again() and not again() and len(kernel.launches) == 1


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pieces", [2, 3, 5])
def test_a_call_in_pieces_is_launched_again_piece_by_piece(kernel: StubKernel, pieces: int, dtype: torch.dtype) -> None:
    """In pieces of one size, but for the last one."""
    most = MOST_ROWS * 4 // dtype.itemsize
    rows = (pieces - 1) * most + 3
    assert [again(rows, dtype=dtype) for _ in range(3)] == [False, True, True]
    assert len(kernel.launches) == 3 * pieces and len(WORKSPACE_REGISTRY["0"].records.known) == 1
    counts = [args[18] for args in kernel.launches]
    assert counts[:pieces] == counts[pieces : 2 * pieces] == counts[2 * pieces :] and sum(counts) == 3 * rows
    # What is in pieces for a small workspace is one launch in a larger one.
    assert workspace_of("0", CPU, 1 << 20) is not None
    assert not again(rows, dtype=dtype) and again(rows, dtype=dtype) and len(kernel.launches) == 3 * pieces + 2


def test_no_more_records_are_kept_than_allowed(kernel: StubKernel, monkeypatch) -> None:
    monkeypatch.setattr(records, "MOST", 2)
    for rows in (1, 2, 3, 4, 5):
        again(rows)
    assert len(WORKSPACE_REGISTRY["0"].records.known) <= 2
    assert again(5)


def test_threads_that_call_while_the_group_grows_never_get_a_wrong_result(kernel: StubKernel) -> None:
    wrong: list[BaseException] = []
    done = threading.Event()

    def calls() -> None:
        tensors = Call()
        out = add_norm_reference(
            Operation(
                tensors.x,
                tensors.residual,
                None,
                tensors.weight,
                eps=1e-6,
                norm="rms_norm",
                out_dtype=F32,
                hidden_dtype=F32,
            )
        )
        while not done.is_set():
            try:
                torch.ops.tpfuse.all_reduce_norm.lean(
                    tensors.x, tensors.y, tensors.text, tensors.residual, tensors.weight, tensors.hidden
                )
                assert torch.equal(tensors.y, out.y)
            except BaseException as error:
                wrong.append(error)
                return

    threads = [threading.Thread(target=calls) for _ in range(3)]
    for thread in threads:
        thread.start()
    for size in (17, 18, 19):
        ws = workspace_of("0", CPU, 1 << size)
        assert ws is not None and ws.slot_words * 4 == 1 << size
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert again() or again()
    assert kernel.launches[-1][SLOT_WORDS] * 4 == 1 << 19


# -- every argument where it belongs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize(("rows", "pieces"), [(6, 1), (2 * MOST_ROWS + 2, 3)], ids=["one launch", "pieces"])
def test_a_replayed_call_with_every_operand_and_output_is_the_first_call(
    kernel: StubKernel, norm: str, rows: int, pieces: int
) -> None:
    """Of 258 rows in three pieces, means of the second one do not lie on 16 bytes."""
    operands = tuple([F32] * 6)
    text = spec(norm=norm, operands=operands, want_sum=True, stats=True, weight_offset=1.0, alpha=0.5).text()
    x, residual = torch.randn(2, rows // 2, H), torch.randn(2, rows // 2, H)
    pre_bias, weight, bias, eps = torch.randn(H), torch.randn(H), torch.randn(H), torch.tensor(1e-3)
    found = []
    for _ in range(2):
        y, hidden, total = (torch.full_like(x, -1.0) for _ in range(3))
        rstd = torch.zeros(2, rows // 2, 1)
        mean = torch.zeros_like(rstd) if norm == "layer_norm" else None
        torch.ops.tpfuse.all_reduce_norm.full(
            x, y, text, residual, weight, hidden, rstd, bias, mean, pre_bias, total, eps
        )
        found.append([t for t in (y, hidden, total, mean, rstd) if t is not None])
    assert len(kernel.launches) == 2 * pieces and len(WORKSPACE_REGISTRY["0"].records.known) == 1
    exact = add_norm_reference(
        Operation(
            x,
            residual,
            pre_bias,
            weight,
            bias,
            eps=eps,
            norm=norm,
            weight_offset=1.0,
            alpha=0.5,
            out_dtype=F32,
            hidden_dtype=F32,
            stats=True,
        )
    )
    expected = [t for t in (exact.y, exact.residual_out, x, exact.mean, exact.rstd) if t is not None]
    for got in found:
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_tensors_that_are_not_the_specs_are_refused(kernel: StubKernel) -> None:
    call = Call()
    with pytest.raises(OpError, match="are not those of"):
        torch.ops.tpfuse.all_reduce_norm.lean(call.x.half(), call.y, call.text, call.residual, call.weight, call.hidden)
    with pytest.raises(OpError, match="are not those of"):
        torch.ops.tpfuse.all_reduce_norm.lean(call.x, call.y, call.text, call.residual, call.weight)
    with pytest.raises(OpError, match="is none of tpfuse's"):
        torch.ops.tpfuse.all_reduce_norm.lean(call.x, call.y, "rms_norm|fast", call.residual, call.weight, call.hidden)


def test_a_launch_on_other_tensors_than_the_calls_leaves_no_record(kernel: StubKernel) -> None:
    """Copies of inputs, or a number that was read from a tensor of eps: a later call's would not be read."""
    call = Call()
    call.run()
    ws = WORKSPACE_REGISTRY["0"].workspace
    op = Operation(call.x, call.residual, None, call.weight, norm="rms_norm", out_dtype=F32, hidden_dtype=F32, eps=1e-6)
    launch = one_shot.one_shot(op, ws)
    launch.run()
    tensors = launch.args[: operands.TENSORS]
    table = dispatch.default_table()
    assert records.record_of([launch], tensors, ws, table, (ws,)) is not None
    for index, other in ((0, call.x.clone()), (10, torch.tensor(1e-6))):
        changed = (*tensors[:index], other, *tensors[index + 1 :])
        assert records.record_of([launch], changed, ws, table, (ws,)) is None
        assert records.record_of([launch, launch], tensors, ws, table, (ws,)) is None  # the second one of other rows
