"""Lamport two-shot: each rank adds up its own columns of every row, then tells the others.

A row is cut in N chunks. First every rank pushes chunk q of its rows to rank q; each rank adds up the N pieces of its
own chunk; then it pushes the sum, rounded to the dtype of x as a plain all-reduce rounds it, to every rank. Every rank
then holds the same whole rows, adds the residual and normalises. This moves 2(N-1)/N of the tensor where the one-shot
moves N-1 of it, in two trips instead of one. Every program does an equal part of each step, however few the rows.

Slots, sentinels and epochs are the one-shot's: the kernels may alternate on one workspace.
"""

from __future__ import annotations

from ...errors import OpError
from ..add_norm import quant_program
from ..call import Call
from ..compat import next_power_of_2, tl, triton
from ..device import finish_row, load_eps, load_row
from ..words import SENTINEL, advance_epoch, as_sent, as_words, begin_call, pack, peer, slot_of, unpack
from .kernel import Kernel
from .operands import Launch, constants, default_warps, launch_options, prepare
from .receive import clear_one, receive, receive_block
from .workspace import Workspace

_SENTINEL = tl.constexpr(SENTINEL)


@triton.jit
def _scatter(x_row, targets, C: tl.constexpr, CHUNK: tl.constexpr, WORLD: tl.constexpr, mark):
    """Chunk q of one row to the q-th of `targets` [WORLD, 1], the own chunk to oneself; NaN if the rank is dead."""
    at = tl.arange(0, C)[None, :]
    words = tl.load(x_row + tl.arange(0, WORLD)[:, None] * CHUNK + at, mask=at < CHUNK, other=0)
    tl.store(targets + at, as_sent(words, mark), mask=at < CHUNK)


@triton.jit
def _reduce(pieces, targets, stride, like_ptr, epoch, watch_ptr, mark, C: tl.constexpr, CHUNK: tl.constexpr,
            WORLD: tl.constexpr, SPIN: tl.constexpr):  # fmt: skip
    """Add up the pieces of the own chunk of one row and store the rounded sum at all `targets`. Only this rank adds
    these columns, so the order, a fixed one, need not be the rank order for all ranks to hold the same."""
    at = tl.arange(0, C)[None, :]
    words = receive_block(pieces, WORLD, stride, C, CHUNK, epoch, watch_ptr, SPIN)
    # A dead rank sends no number: its own piece, NaN, may lie under late words of a peer's call of another shape.
    total = pack(tl.sum(unpack(words, like_ptr), axis=0), like_ptr, mark)
    tl.store(targets + at, tl.broadcast_to(total[None, :], (WORLD, C)), mask=at < CHUNK)


@triton.jit
def _finish(
    there, row, residual_ptr, pre_bias_ptr, weight_ptr, bias_ptr, y_ptr, residual_out_ptr, sum_ptr, mean_ptr, rstd_ptr,
    eps, weight_offset, alpha, like_ptr, pid, epoch, watch_ptr, mark,
    H: tl.constexpr, ROW_WORDS: tl.constexpr, W: tl.constexpr, EL: tl.constexpr, CHUNK: tl.constexpr,
    NORM: tl.constexpr, POST: tl.constexpr, SPIN: tl.constexpr, q_ptr, scale_ptr, QUANT: tl.constexpr,
):  # fmt: skip
    """Wait for the sums of one row, from all ranks, and finish it."""
    cols = tl.arange(0, EL)
    mask = cols < H
    residual_row = residual_ptr
    if residual_ptr is not None:
        residual_row = residual_ptr + row * H
    residual, pre_bias, weight, bias = load_row(
        residual_row, pre_bias_ptr, weight_ptr, bias_ptr, weight_offset, cols, mask
    )
    words = receive(there, W, ROW_WORDS, 0, CHUNK, epoch, watch_ptr, SPIN)
    # Sums of other ranks that came late would pass for fresh ones: no column of a dead rank's row is a number.
    s = unpack(words | mark, like_ptr)
    if sum_ptr is not None:
        tl.store(sum_ptr + row * H + cols, s.to(sum_ptr.dtype.element_ty), mask=mask)
    finish_row(
        s, residual, pre_bias, weight, bias, alpha, eps, y_ptr, residual_out_ptr, mean_ptr, rstd_ptr,
        row, cols, mask, H, NORM, POST, None, pid, 0, 1, None, None, None, False, q_ptr, scale_ptr, QUANT,
    )  # fmt: skip


@triton.jit
def _empty(pieces, there, stride, C: tl.constexpr, CHUNK: tl.constexpr, W: tl.constexpr, ROW_WORDS: tl.constexpr,
           WORLD: tl.constexpr):  # fmt: skip
    """Empty what was read of one row, once every warp of the program has read it."""
    at = tl.arange(0, C)[None, :]
    tl.debug_barrier()
    here = pieces + tl.arange(0, WORLD)[:, None] * stride + at
    tl.store(here, tl.full([WORLD, C], _SENTINEL, tl.int32), mask=at < CHUNK)
    clear_one(there, W, ROW_WORDS)


@triton.jit(do_not_specialize=["rows", "rank", "programs", "first", "slot_words"],
            do_not_specialize_on_alignment=["eps_ptr"])  # fmt: skip
def _two_shot_kernel(
    x_ptr, residual_ptr, pre_bias_ptr, weight_ptr, bias_ptr, y_ptr, residual_out_ptr, sum_ptr, mean_ptr, rstd_ptr,
    eps_ptr, eps, weight_offset, alpha, peers_ptr, state_ptr, watch_ptr, slot_words, rows, rank, programs, first,
    H: tl.constexpr, ROW_WORDS: tl.constexpr, W: tl.constexpr, EL: tl.constexpr, WORLD: tl.constexpr,
    NORM: tl.constexpr, POST: tl.constexpr, SPIN: tl.constexpr, MANY: tl.constexpr, C: tl.constexpr,
    QUANT: tl.constexpr = None, q_ptr=None, scale_ptr=None,
):  # fmt: skip
    CHUNK: tl.constexpr = ROW_WORDS // WORLD
    pid = tl.program_id(0) + first
    epoch, mark = begin_call(state_ptr, pid)
    slot = tl.multiple_of(slot_of(epoch) * slot_words, 4)
    totals = slot + rows * ROW_WORDS  # the second part of the slot: whole rows of sums
    x_words = as_words(x_ptr)
    bases = tl.load(peers_ptr + tl.arange(0, WORLD)).to(tl.pointer_type(tl.int32))
    bases = tl.multiple_of(bases, 16)[:, None]
    mine = peer(peers_ptr, rank)
    stride = rows * CHUNK  # between the pieces of different ranks
    eps = load_eps(eps_ptr, eps)
    row = pid
    _scatter(x_words + row * ROW_WORDS, bases + slot + rank * stride + row * CHUNK, C, CHUNK, WORLD, mark)
    # Each row is scattered two rows, and added up one row, before it is finished (docs/kernels.md).
    if MANY:
        sent = row + programs
        if sent < rows:
            _scatter(x_words + sent * ROW_WORDS, bases + slot + rank * stride + sent * CHUNK, C, CHUNK, WORLD, mark)
    there = bases + totals + row * ROW_WORDS + rank * CHUNK
    _reduce(mine + slot + row * CHUNK, there, stride, x_ptr, epoch, watch_ptr, mark, C, CHUNK, WORLD, SPIN)
    if MANY:
        while row < rows:
            added = row + programs
            sent = added + programs
            if sent < rows:
                _scatter(x_words + sent * ROW_WORDS, bases + slot + rank * stride + sent * CHUNK, C, CHUNK, WORLD, mark)
            if added < rows:
                there = bases + totals + added * ROW_WORDS + rank * CHUNK
                pieces = mine + slot + added * CHUNK
                _reduce(pieces, there, stride, x_ptr, epoch, watch_ptr, mark, C, CHUNK, WORLD, SPIN)
            _finish(
                mine + totals + row * ROW_WORDS, row, residual_ptr, pre_bias_ptr, weight_ptr, bias_ptr, y_ptr,
                residual_out_ptr, sum_ptr, mean_ptr, rstd_ptr, eps, weight_offset, alpha, x_ptr, pid,
                epoch, watch_ptr, mark, H, ROW_WORDS, W, EL, CHUNK, NORM, POST, SPIN, q_ptr, scale_ptr, QUANT,
            )  # fmt: skip
            _empty(mine + slot + row * CHUNK, mine + totals + row * ROW_WORDS, stride, C, CHUNK, W, ROW_WORDS, WORLD)
            row = added
    else:
        _finish(
            mine + totals + row * ROW_WORDS, row, residual_ptr, pre_bias_ptr, weight_ptr, bias_ptr, y_ptr,
            residual_out_ptr, sum_ptr, mean_ptr, rstd_ptr, eps, weight_offset, alpha, x_ptr, pid,
            epoch, watch_ptr, mark, H, ROW_WORDS, W, EL, CHUNK, NORM, POST, SPIN, q_ptr, scale_ptr, QUANT,
        )  # fmt: skip
        _empty(mine + slot + row * CHUNK, mine + totals + row * ROW_WORDS, stride, C, CHUNK, W, ROW_WORDS, WORLD)
    advance_epoch(state_ptr, epoch, pid, programs)


def refusal(call: Call, ws: Workspace) -> str:
    """Why the workspace does not hold the call; empty where it does."""
    if 2 * call.rows * call.row_words > ws.slot_words:
        return (
            f"{call.rows} rows of {4 * call.row_words} bytes and their sums take {8 * call.rows * call.row_words:,} "
            f"bytes of a slot; it has {4 * ws.slot_words:,}"
        )
    if call.row_words % (4 * ws.world):
        return f"a row of {4 * call.row_words} bytes; allowed: {ws.world} chunks, one a rank, of whole 16 bytes"
    return ""


def fits(call: Call, ws: Workspace) -> bool:
    return not refusal(call, ws)


def two_shot(call: Call, ws: Workspace, warps: int = 0, registers: int = 0, *, first: int | None = None,
             spin: bool | None = None) -> Launch:  # fmt: skip
    """The kernel bound to this rank's operands, as `one_shot` binds its own."""
    if said := refusal(call, ws):
        raise OpError(f"two_shot: {said}")
    ready = prepare(call)
    programs = min(call.rows, ws.max_blocks)
    args = (
        *ready.inputs, *ready.outputs, *ready.scalars, ws.peers, ws.state, ws.watch, ws.slot_words, call.rows, ws.rank,
        programs, first or 0,
    )  # fmt: skip
    settings = constants(call, ws.world, 1, programs < call.rows, spin)
    settings |= {"C": next_power_of_2(call.row_words // ws.world)}
    del settings["SPLIT"]
    settings |= launch_options(warps or min(default_warps(call, 1), 16), registers)  # 32 lose with many rows
    settings |= quant_program(call)
    kernel = _two_shot_kernel if call.rows else None
    return Launch(kernel, programs if first is None else 1, args, settings, ready.out, ready.sum)


def _candidates(quads: int) -> list[tuple[int, int]]:
    """One or two 16-byte pieces a thread."""
    most = max(min(quads // 32, 32), 1)
    return [(1, warps) for warps in {most, max(most // 2, 1)}]


KERNEL = Kernel(
    name="two_shot",
    why_not=lambda call, ws, split: refusal(call, ws),
    bind=lambda call, ws, split, warps, registers: two_shot(call, ws, warps, registers),
    room=lambda ws: ws.slot_words // 2,
    candidates=_candidates,
    label=lambda split, warps: f"two_shot w{warps}",
)
