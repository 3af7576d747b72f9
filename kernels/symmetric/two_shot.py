"""Lamport two-shot: each rank adds up its own columns of every row, then tells the others.

A row is cut in N chunks of whole 16 bytes, of which the last may be shorter. First every rank pushes chunk q of its
rows to rank q; each rank adds up the N pieces of its own chunk; then it pushes the sum, rounded to the dtype of x as a
plain all-reduce rounds it, to every rank. Every rank then holds the same whole rows, adds the residual and normalises.
This moves 2(N-1)/N of the tensor where the one-shot moves N-1 of it, in two trips instead of one. Every program does an
equal part of each step, however few the rows.

Slots, sentinels and epochs are the one-shot's: the kernels may alternate on one workspace.
"""

from __future__ import annotations

from ...errors import OpError
from ..add_norm import quant_program
from ..call import Call
from ..compat import next_power_of_2, tl, triton
from ..device import finish_row, load_eps, load_row
from ..words import (
    MOST_RANKS,
    SENTINEL,
    advance_epoch,
    as_sent,
    as_words,
    begin_call,
    lanes_of,
    pack,
    peer,
    ranks_of,
    slot_of,
    unpack,
)  # fmt: skip
from .kernel import Kernel
from .operands import Launch, constants, default_warps, launch_options, prepare
from .receive import clear_one, receive, receive_block
from .workspace import Workspace

_SENTINEL = tl.constexpr(SENTINEL)


@triton.jit
def _width(q, ROW_WORDS: tl.constexpr, CHUNK: tl.constexpr, WORLD: tl.constexpr):
    """How many words chunk q has: CHUNK, the last one what is left."""
    LAST: tl.constexpr = ROW_WORDS - (WORLD - 1) * CHUNK
    width = CHUNK
    if LAST != CHUNK:
        width = tl.where(q == WORLD - 1, LAST, CHUNK)
    return width


@triton.jit
def _of_ranks(at, width, WORLD: tl.constexpr):
    """`at` < `width` in the lane of each rank, and nothing in a lane that is no rank's."""
    mask = at < width
    lanes = lanes_of(WORLD)
    if lanes.shape[0] > WORLD:
        mask = mask & (lanes < WORLD)[:, None]
    return mask


@triton.jit
def _scatter(x_row, targets, ROW_WORDS: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, WORLD: tl.constexpr, mark):
    """Chunk q of one row to the q-th of `targets` (a column), the own chunk to oneself; NaN if the rank is dead."""
    at = tl.arange(0, C)[None, :]
    q = lanes_of(WORLD)[:, None]
    mask = _of_ranks(at, _width(q, ROW_WORDS, CHUNK, WORLD), WORLD)
    words = tl.load(x_row + q * CHUNK + at, mask=mask, other=0)
    tl.store(targets + at, as_sent(words, mark), mask=mask)


@triton.jit
def _reduce(pieces, targets, width, stride, like_ptr, epoch, watch_ptr, mark, C: tl.constexpr, WORLD: tl.constexpr,
            SPIN: tl.constexpr):  # fmt: skip
    """Add up the pieces of the own chunk (`width` words) of one row and store the rounded sum at all `targets`. Only
    this rank adds these columns, so the order, a fixed one, need not be the rank order for all to hold the same."""
    at = tl.arange(0, C)[None, :]
    words = receive_block(pieces, WORLD, stride, C, width, epoch, watch_ptr, SPIN)
    lanes = lanes_of(WORLD)
    if lanes.shape[0] > WORLD:
        words = tl.where(lanes[:, None] < WORLD, words, 0)
    # A dead rank sends no number: its own piece, NaN, may lie under late words of a peer's call of another shape.
    total = pack(tl.sum(unpack(words, like_ptr), axis=0), like_ptr, mark)
    tl.store(targets + at, tl.broadcast_to(total[None, :], words.shape), mask=_of_ranks(at, width, WORLD))


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
def _empty(pieces, there, width, stride, C: tl.constexpr, W: tl.constexpr, ROW_WORDS: tl.constexpr,
           WORLD: tl.constexpr):  # fmt: skip
    """Empty what was read of one row, once every warp of the program has read it."""
    at = tl.arange(0, C)[None, :]
    tl.debug_barrier()
    here = pieces + lanes_of(WORLD)[:, None] * stride + at
    tl.store(here, tl.full(here.shape, _SENTINEL, tl.int32), mask=_of_ranks(at, width, WORLD))
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
    CHUNK: tl.constexpr = (ROW_WORDS // 4 + WORLD - 1) // WORLD * 4
    pid = tl.program_id(0) + first
    epoch, mark = begin_call(state_ptr, pid)
    slot = tl.multiple_of(slot_of(epoch) * slot_words, 4)
    totals = slot + rows * (WORLD * CHUNK)  # the second part of the slot: whole rows of sums
    x_words = as_words(x_ptr)
    bases = tl.load(peers_ptr + ranks_of(WORLD)).to(tl.pointer_type(tl.int32))
    bases = tl.multiple_of(bases, 16)[:, None]
    mine = peer(peers_ptr, rank)
    stride = rows * CHUNK  # between the pieces of different ranks
    width = _width(rank, ROW_WORDS, CHUNK, WORLD)
    eps = load_eps(eps_ptr, eps)
    row = pid
    _scatter(x_words + row * ROW_WORDS, bases + slot + rank * stride + row * CHUNK, ROW_WORDS, C, CHUNK, WORLD, mark)
    # Each row is scattered two rows, and added up one row, before it is finished (docs/kernels.md).
    if MANY:
        sent = row + programs
        if sent < rows:
            _scatter(
                x_words + sent * ROW_WORDS, bases + slot + rank * stride + sent * CHUNK, ROW_WORDS, C, CHUNK, WORLD,
                mark,
            )  # fmt: skip
    there = bases + totals + row * ROW_WORDS + rank * CHUNK
    _reduce(mine + slot + row * CHUNK, there, width, stride, x_ptr, epoch, watch_ptr, mark, C, WORLD, SPIN)
    if MANY:
        while row < rows:
            added = row + programs
            sent = added + programs
            if sent < rows:
                _scatter(
                    x_words + sent * ROW_WORDS, bases + slot + rank * stride + sent * CHUNK, ROW_WORDS, C, CHUNK, WORLD,
                    mark,
                )  # fmt: skip
            if added < rows:
                there = bases + totals + added * ROW_WORDS + rank * CHUNK
                pieces = mine + slot + added * CHUNK
                _reduce(pieces, there, width, stride, x_ptr, epoch, watch_ptr, mark, C, WORLD, SPIN)
            _finish(
                mine + totals + row * ROW_WORDS, row, residual_ptr, pre_bias_ptr, weight_ptr, bias_ptr, y_ptr,
                residual_out_ptr, sum_ptr, mean_ptr, rstd_ptr, eps, weight_offset, alpha, x_ptr, pid,
                epoch, watch_ptr, mark, H, ROW_WORDS, W, EL, CHUNK, NORM, POST, SPIN, q_ptr, scale_ptr, QUANT,
            )  # fmt: skip
            _empty(mine + slot + row * CHUNK, mine + totals + row * ROW_WORDS, width, stride, C, W, ROW_WORDS, WORLD)
            row = added
    else:
        _finish(
            mine + totals + row * ROW_WORDS, row, residual_ptr, pre_bias_ptr, weight_ptr, bias_ptr, y_ptr,
            residual_out_ptr, sum_ptr, mean_ptr, rstd_ptr, eps, weight_offset, alpha, x_ptr, pid,
            epoch, watch_ptr, mark, H, ROW_WORDS, W, EL, CHUNK, NORM, POST, SPIN, q_ptr, scale_ptr, QUANT,
        )  # fmt: skip
        _empty(mine + slot + row * CHUNK, mine + totals + row * ROW_WORDS, width, stride, C, W, ROW_WORDS, WORLD)
    advance_epoch(state_ptr, epoch, pid, programs)


def chunk_words(row_words: int, world: int) -> int:
    """Words of a chunk: the smallest number of whole 16 bytes with which `world` chunks hold a row."""
    return -(-row_words // 4 // world) * 4


def slot_words_a_row(call: Call, ws: Workspace) -> int:
    """What one row takes of a slot: its chunks of all ranks, and the whole row of sums."""
    return ws.world * chunk_words(call.row_words, ws.world) + call.row_words


def refusal(call: Call, ws: Workspace) -> str:
    """Why the workspace does not hold the call; empty where it does."""
    need = call.rows * slot_words_a_row(call, ws)
    if need > ws.slot_words:
        return (
            f"{call.rows} rows of {4 * call.row_words} bytes and their sums take {4 * need:,} bytes of a slot; it has "
            f"{4 * ws.slot_words:,}"
        )
    chunk = chunk_words(call.row_words, ws.world)
    if call.row_words % 4 or (ws.world - 1) * chunk >= call.row_words:
        given = f"a row of {4 * call.row_words} bytes in chunks of {4 * chunk}"
        return f"{given}; allowed: {ws.world} chunks, one a rank and none empty, of whole 16 bytes"
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
    settings |= {"C": next_power_of_2(chunk_words(call.row_words, ws.world))}
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
    worlds=range(2, MOST_RANKS + 1),
    refusal=lambda call, ws, split: refusal(call, ws),
    bind=lambda call, ws, split, warps, registers: two_shot(call, ws, warps, registers),
    most_rows=lambda call, ws: ws.slot_words // slot_words_a_row(call, ws),
    candidates=_candidates,
    label=lambda split, warps: f"two_shot w{warps}",
)
