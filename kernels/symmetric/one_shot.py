"""Lamport one-shot: every rank pushes its rows to every peer, and the data itself is the signal.

Each rank waits on its own memory until the rows of all ranks are there, adds them in rank order, finishes the rows as
`add_norm` does, and empties what it read. There is no barrier and no flag. Three slots take turns. A row may be split
over SPLIT programs, which then exchange their part of the statistics. A program with several rows pushes the next one
before it waits for this one, so that links and memory are busy at once. docs/kernels.md has the proof.
"""

from __future__ import annotations

from ...errors import OpError
from ..add_norm import quant_program
from ..call import Call
from ..compat import tl, triton
from ..device import finish_row, load_eps, load_row
from ..words import (
    INBOXES,
    MAX_SPLIT,
    MOST_RANKS,
    advance_epoch,
    as_words,
    begin_call,
    load_words,
    other_ranks,
    peer,
    slot_of,
)  # fmt: skip
from .kernel import Kernel
from .operands import Launch, constants, default_warps, launch_options, prepare
from .receive import clear, receive_sum
from .workspace import Workspace

_INBOXES = tl.constexpr(INBOXES)


@triton.jit
def _push(words, bases, offset, at, width, WORLD: tl.constexpr):
    """Store one row (part) at the same place of every peer's slot."""
    for i in tl.static_range(WORLD - 1):
        tl.store(bases[i] + offset + at, words, mask=at < width)


@triton.jit
def _take(
    own, mine, row, rows, residual_ptr, pre_bias_ptr, weight_ptr, bias_ptr, y_ptr, residual_out_ptr, sum_ptr, mean_ptr,
    rstd_ptr, eps, weight_offset, alpha, like_ptr, inbox, pid, part, rank, epoch,
    watch_ptr, H: tl.constexpr, ROW_WORDS: tl.constexpr, W: tl.constexpr, EL: tl.constexpr, SPLIT: tl.constexpr,
    WORLD: tl.constexpr, NORM: tl.constexpr, POST: tl.constexpr, SPIN: tl.constexpr, q_ptr, scale_ptr,
    QUANT: tl.constexpr,
):  # fmt: skip
    """Wait for one row (part) from every peer, finish it, empty its words."""
    P: tl.constexpr = H // SPLIT
    PW: tl.constexpr = ROW_WORDS // SPLIT
    local = tl.arange(0, EL)
    mask = local < P
    cols = part * P + local
    stride = rows * ROW_WORDS
    base = mine + row * ROW_WORDS + part * PW
    residual_row = residual_ptr
    if residual_ptr is not None:
        residual_row = residual_ptr + row * H
    residual, pre_bias, weight, bias = load_row(
        residual_row, pre_bias_ptr, weight_ptr, bias_ptr, weight_offset, cols, mask
    )
    s = receive_sum(own, base, W, PW, stride, rank, like_ptr, epoch, watch_ptr, WORLD, SPIN)
    if sum_ptr is not None:
        tl.store(sum_ptr + row * H + cols, s.to(sum_ptr.dtype.element_ty), mask=mask)
    finish_row(
        s, residual, pre_bias, weight, bias, alpha, eps, y_ptr, residual_out_ptr, mean_ptr, rstd_ptr,
        row, cols, mask, H, NORM, POST, inbox, pid, part, SPLIT, rank, epoch, watch_ptr, SPIN, q_ptr, scale_ptr, QUANT,
    )  # fmt: skip
    tl.debug_barrier()  # every warp has read its words
    clear(base, W, PW, stride, rank, WORLD)


@triton.jit(do_not_specialize=["rows", "rank", "programs", "first", "slot_words"],
            do_not_specialize_on_alignment=["eps_ptr"])  # fmt: skip
def _one_shot_kernel(
    x_ptr, residual_ptr, pre_bias_ptr, weight_ptr, bias_ptr, y_ptr, residual_out_ptr, sum_ptr, mean_ptr, rstd_ptr,
    eps_ptr, eps, weight_offset, alpha, peers_ptr, state_ptr, watch_ptr, slot_words, rows, rank, programs, first,
    H: tl.constexpr, ROW_WORDS: tl.constexpr, W: tl.constexpr, EL: tl.constexpr, SPLIT: tl.constexpr,
    WORLD: tl.constexpr, NORM: tl.constexpr, POST: tl.constexpr, MANY: tl.constexpr, SPIN: tl.constexpr,
    QUANT: tl.constexpr = None, q_ptr=None, scale_ptr=None,
):  # fmt: skip
    PW: tl.constexpr = ROW_WORDS // SPLIT
    pid = tl.program_id(0) + first
    part = pid % SPLIT
    row = pid // SPLIT
    step = programs // SPLIT
    epoch, mark = begin_call(state_ptr, pid)
    slot = tl.multiple_of(slot_of(epoch) * slot_words, 4)
    at = tl.arange(0, W)
    x_part = as_words(x_ptr) + part * PW
    out = slot + rank * rows * ROW_WORDS + part * PW
    bases = other_ranks(peers_ptr, rank, WORLD)
    own = load_words(x_part + row * ROW_WORDS, at, PW, mark)
    _push(own, bases, out + row * ROW_WORDS, at, PW, WORLD)
    mine = peer(peers_ptr, rank) + slot
    eps = load_eps(eps_ptr, eps)
    inbox = state_ptr + _INBOXES
    if MANY:
        # One row ahead, no more: what peers push is then read while it is in the cache, and links are not idle while
        # rows are finished. All ranks take equally many programs, so each finds the row it waits for pushed.
        while row < rows:
            later = row + step
            width = tl.where(later < rows, PW, 0)
            following = load_words(x_part + later * ROW_WORDS, at, width, mark)
            _push(following, bases, out + later * ROW_WORDS, at, width, WORLD)
            _take(
                own, mine, row, rows, residual_ptr, pre_bias_ptr, weight_ptr, bias_ptr, y_ptr, residual_out_ptr,
                sum_ptr, mean_ptr, rstd_ptr, eps, weight_offset, alpha, x_ptr, inbox, pid, part, rank,
                epoch, watch_ptr, H, ROW_WORDS, W, EL, SPLIT, WORLD, NORM, POST, SPIN, q_ptr, scale_ptr, QUANT,
            )  # fmt: skip
            own = following
            row = later
    else:
        _take(
            own, mine, row, rows, residual_ptr, pre_bias_ptr, weight_ptr, bias_ptr, y_ptr, residual_out_ptr,
            sum_ptr, mean_ptr, rstd_ptr, eps, weight_offset, alpha, x_ptr, inbox, pid, part, rank,
            epoch, watch_ptr, H, ROW_WORDS, W, EL, SPLIT, WORLD, NORM, POST, SPIN, q_ptr, scale_ptr, QUANT,
        )  # fmt: skip
    advance_epoch(state_ptr, epoch, pid, programs)


def one_shot(call: Call, ws: Workspace, split: int = 1, warps: int = 0, registers: int = 0, *,
             first: int | None = None, spin: bool | None = None) -> Launch:  # fmt: skip
    """The kernel bound to this rank's operands; `.run()` gives (outputs as of `add_norm`, the sum or None). Every rank
    of the workspace must run the same call. Without rows nothing is launched.

    `split`: programs a row; `warps`: of one program (0: 16 bytes a thread); `spin`: wait in PTX (the default on a GPU).
    `first`: run this one program only; for harnesses on interpreters, where the programs of a grid take turns.
    Raises OpError where the workspace does not hold the call (`refusal`).
    """
    if said := refusal(call, ws, split):
        raise OpError(f"one_shot: {said}")
    ready = prepare(call)
    programs = programs_of(call, ws, split)
    args = (
        *ready.inputs, *ready.outputs, *ready.scalars, ws.peers, ws.state, ws.watch, ws.slot_words, call.rows, ws.rank,
        programs, first or 0,
    )  # fmt: skip
    settings = constants(call, ws.world, split, programs < call.rows * split, spin)
    settings |= launch_options(warps or default_warps(call, split), registers) | quant_program(call)
    kernel = _one_shot_kernel if call.rows else None
    return Launch(kernel, programs if first is None else 1, args, settings, ready.out, ready.sum)


def programs_of(call: Call, ws: Workspace, split: int) -> int:
    """As many as there are row parts, at most what may be resident; whole rows only."""
    return min(call.rows * split, ws.max_blocks // split * split)


def refusal(call: Call, ws: Workspace, split: int) -> str:
    """Why the workspace does not hold the call; empty where it does. The programs of a split row have one inbox each,
    so none may take a second row; and parts are whole 16 bytes."""
    need = ws.world * call.rows * call.row_words
    if need > ws.slot_words:
        return (
            f"{call.rows} rows of {4 * call.row_words} bytes from {ws.world} ranks take {4 * need:,} bytes of a slot; "
            f"it has {4 * ws.slot_words:,}"
        )
    if split > MAX_SPLIT or call.row_words % (4 * split):
        given = f"split={split} of a row of {4 * call.row_words} bytes"
        return f"{given}; allowed: up to {MAX_SPLIT} parts of whole 16 bytes"
    if split > 1 and call.quant:
        return f"split={split} of a row that is quantised; allowed: whole rows, whose greatest value one program sees"
    if split > 1 and call.rows * split > ws.max_blocks:
        return f"{call.rows} rows, each split over {split}, take {call.rows * split} programs; allowed: {ws.max_blocks}"
    return ""


def fits(call: Call, ws: Workspace, split: int) -> bool:
    return not refusal(call, ws, split)


def _candidates(quads: int) -> list[tuple[int, int]]:
    """One or two 16-byte pieces a thread; two only for whole rows."""
    pieces = {(split, warps): quads / split / (32 * warps) for split in (1, 2, 4, 8) for warps in (32, 16, 8, 4, 2)}
    return [way for way, each in pieces.items() if each == 1 or (each == 2 and way[0] == 1)]


KERNEL = Kernel(
    name="one_shot",
    worlds=range(2, MOST_RANKS + 1),
    refusal=refusal,
    bind=one_shot,
    most_rows=lambda call, ws: ws.slot_words // ws.world // call.row_words,
    candidates=_candidates,
    label=lambda split, warps: f"one_shot s{split} w{warps}",
    splits=True,
    otherwise="two_shot",
)
