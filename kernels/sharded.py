"""Two-shot with a sharded residual: each rank adds up, finishes and hands out its own share of the rows.

Rows are cut in chunks of ceil(rows / N), one a rank. Every rank pushes its rows to their owners; an owner adds them up
in rank order, adds its rows of a residual that holds nothing but those, normalises, and pushes y to everyone. The new
residual stays where its rows are. This is reduce-scatter, add, norm and all-gather in one kernel, and moves
2(N-1)/N of the tensor. Slots, sentinels and epochs are the one-shot's.
"""

from __future__ import annotations

from .add_norm import AddNormOut
from .compat import tl, triton
from .device import (
    advance_epoch,
    as_words,
    finish_row,
    load_eps,
    load_row,
    load_words,
    other_ranks,
    pack,
    peer,
    slot_of,
)
from .symmetric.one_shot import constants, default_warps
from .symmetric.operands import Launch, Operands, launch_options, prepare
from .symmetric.receive import clear, clear_one, receive, receive_sum
from .symmetric.workspace import CHANNELS, DEAD, Workspace

_CHANNELS, _DEAD = tl.constexpr(CHANNELS), tl.constexpr(DEAD)


@triton.jit(do_not_specialize=["rows", "rank", "programs", "first", "slot_words"],
            do_not_specialize_on_alignment=["eps_ptr"])  # fmt: skip
def _sharded_kernel(
    x_ptr, residual_ptr, pre_bias_ptr, weight_ptr, bias_ptr, y_ptr, residual_out_ptr, sum_ptr, mean_ptr, rstd_ptr,
    eps_ptr, eps, weight_offset, alpha, peers_ptr, state_ptr, watch_ptr, slot_words, rows, rank, programs, first,
    H: tl.constexpr, ROW_WORDS: tl.constexpr, W: tl.constexpr, EL: tl.constexpr, WORLD: tl.constexpr,
    NORM: tl.constexpr, POST: tl.constexpr, SPIN: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0) + first
    epoch = tl.load(state_ptr + pid)
    mark = tl.load(state_ptr + _DEAD)
    slot = tl.multiple_of(slot_of(epoch) * slot_words, 4)
    at = tl.arange(0, W)
    cols = tl.arange(0, EL)
    mask = cols < H
    eps = load_eps(eps_ptr, eps)
    x_words = as_words(x_ptr)
    chunk = tl.cdiv(rows, WORLD)
    share = chunk * ROW_WORDS  # of one source, in the first part of a slot; the second part holds the totals
    totals = slot + WORLD * share
    begin = tl.minimum(rank * chunk, rows)
    count = tl.minimum(begin + chunk, rows) - begin
    # 1: my rows to their owners, the next rank's first, so that no owner is everyone's first
    i = pid
    while i < (WORLD - 1) * chunk:
        place = (rank + 1) * chunk + i
        row = place % (WORLD * chunk)
        if row < rows:
            words = load_words(x_words + row * ROW_WORDS, at, ROW_WORDS, mark)
            owner = row // chunk
            out = peer(peers_ptr, owner) + slot + rank * share + (row - owner * chunk) * ROW_WORDS
            tl.store(out + at, words, mask=at < ROW_WORDS)
        i += programs
    # 2: the rows I own
    bases = other_ranks(peers_ptr, rank, WORLD)
    mine = peer(peers_ptr, rank)
    residual_row = residual_ptr
    local = pid
    while local < count:
        row = begin + local
        if residual_ptr is not None:
            residual_row = residual_ptr + local * H
        residual, pre_bias, weight, bias = load_row(
            residual_row, pre_bias_ptr, weight_ptr, bias_ptr, weight_offset, cols, mask
        )
        own = load_words(x_words + row * ROW_WORDS, at, ROW_WORDS, mark)
        here = mine + slot + local * ROW_WORDS
        s = receive_sum(own, here, W, ROW_WORDS, share, rank, x_ptr, epoch, watch_ptr, WORLD, SPIN)
        n = finish_row(
            s, residual, pre_bias, weight, bias, alpha, eps, None, residual_out_ptr, mean_ptr, rstd_ptr,
            row, local, cols, mask, H, NORM, POST, None, pid, 0, 1,
        )  # fmt: skip
        words = pack(n, x_ptr)  # stored here as others receive it, which is without sentinels
        tl.store(as_words(y_ptr) + row * ROW_WORDS + at, words, mask=at < ROW_WORDS)
        for b in tl.static_range(WORLD - 1):
            tl.store(bases[b] + totals + row * ROW_WORDS + at, words, mask=at < ROW_WORDS)
        tl.debug_barrier()  # every warp has read its words
        clear(here, W, ROW_WORDS, share, rank, WORLD)
        local += programs
    # 3: the rows others own
    i = pid
    while i < rows - count:
        row = tl.where(i < begin, i, i + count)
        there = mine + totals + row * ROW_WORDS
        words = receive(there, W, ROW_WORDS, row // chunk, W, epoch, watch_ptr, SPIN)
        tl.store(as_words(y_ptr) + row * ROW_WORDS + at, words, mask=at < ROW_WORDS)
        tl.debug_barrier()
        clear_one(there, W, ROW_WORDS)
        i += programs
    advance_epoch(state_ptr, epoch, pid, programs, _CHANNELS)


def chunk_of(rows: int, rank: int, world: int) -> tuple[int, int]:
    """(first row, rows) that `rank` owns: chunks of ceil(rows / world), the last ranks may have fewer or none."""
    chunk = -(-rows // world)
    begin = min(rank * chunk, rows)
    return begin, min(begin + chunk, rows) - begin


def fits(op: Operands, ws: Workspace) -> bool:
    """Whether a slot holds the call, and the kernel can do what is asked: y travels in the dtype of x."""
    if op.out_dtype != op.x.dtype or op.want_sum or op.stats:
        return False
    return (ws.world * -(-op.rows // ws.world) + op.rows) * op.row_words <= ws.slot_words


def sharded(op: Operands, ws: Workspace, warps: int = 0, registers: int = 0, *, first: int | None = None,
            spin: bool | None = None) -> Launch:  # fmt: skip
    """The kernel bound to this rank's operands, as `one_shot` binds its own, except that op.residual is [own rows, H]
    (see `chunk_of`) and so is the residual_out that comes back. y has all rows."""
    ready = prepare(op)
    residual_out = ready.out.residual_out
    if residual_out is not None:
        _, count = chunk_of(op.rows, ws.rank, ws.world)
        residual_out = residual_out.reshape(-1, op.hidden)[:count]
    out = AddNormOut(ready.out.y, residual_out, None, None)
    programs = min(op.rows, ws.max_blocks)
    args = (
        *ready.inputs, out.y, residual_out, *ready.outputs[2:], *ready.scalars, ws.peers, ws.state, ws.watch,
        ws.slot_words, op.rows, ws.rank, programs, first or 0,
    )  # fmt: skip
    settings = constants(op, ws.world, 1, False, spin)
    del settings["SPLIT"], settings["MANY"]
    settings |= launch_options(warps or default_warps(op, 1), registers)
    kernel = _sharded_kernel if op.rows else None
    return Launch(kernel, programs if first is None else 1, args, settings, out, None)
