"""Barrier one-shot: every rank publishes its rows in its own memory, and peers read them once flags say so.

The baseline the other kernels are compared with, and the choice for values that must travel bit for bit: nothing is
reserved as a sentinel. Each program copies its rows into the stage, raises one flag at every peer, waits for theirs,
and reads. When it copies, and where registers allow (AHEAD) also when it reads, it loads a row before it is done with
the one before. Flags carry the epoch, so they are never lowered. Two stages take turns: a rank writes the stage of call
k again in call k+2, which it reaches only after every peer has signalled call k+1, hence left call k.
"""

from __future__ import annotations

from ...errors import OpError
from ..add_norm import quant_program
from ..call import Call
from ..compat import next_power_of_2, tl, triton
from ..device import finish_row, load_addends, load_eps, load_scales, nothing
from ..patience import POLLS, out_of_patience, report
from ..words import MOST_RANKS, advance_epoch, as_words, begin_call, count_of, peer, ranks_of, unpack
from .kernel import Kernel
from .operands import Launch, constants, default_warps, launch_options, prepare
from .workspace import Workspace

_POLLS = tl.constexpr(POLLS)


@triton.jit
def _meet(peers_ptr, flags, pid, rank, epoch, watch_ptr, WORLD: tl.constexpr):
    """Raise this program's flag at every peer and wait until every peer has raised its own here; returns how many did
    not (see `watch`). A peer may already be one call ahead, so this call's value or the next one's is waited for; "at
    least" would in time take a flag that was last raised half a wrap ago for a new one. A raised flag is a multiple of
    4, one never raised is 1: no count can make it look raised."""
    value = count_of(epoch) + 4
    lanes = ranks_of(WORLD)  # a flag may be raised twice: both times in this call
    theirs = tl.load(peers_ptr + lanes).to(tl.pointer_type(tl.int32)) + flags + pid * WORLD + rank
    here = peer(peers_ptr, rank) + flags + pid * WORLD + lanes
    tl.debug_barrier()  # all of the program's stores come before the release
    tl.atomic_xchg(theirs, tl.zeros(lanes.shape, tl.int32) + value, sem="release", scope="sys")
    behind = ((tl.load(here, volatile=True) - value) & -5) != 0  # neither this call's flag nor the next's
    absent = tl.sum(behind.to(tl.int32), axis=0)
    polls = 0
    began = lanes * 0
    ends = polls < 0
    while (absent > 0) & (not ends):
        behind = ((tl.load(here, volatile=True) - value) & -5) != 0
        absent = tl.sum(behind.to(tl.int32), axis=0)
        polls += 1
        if polls % _POLLS == 0:
            ends, began = out_of_patience(lanes, polls, began, watch_ptr)
    if ends:
        report(behind, lanes, epoch, watch_ptr)
    tl.atomic_add(here, 0, sem="acquire", scope="sys")
    tl.debug_barrier()
    return absent


@triton.jit
def _stages_of(peers_ptr, stage, WORLD: tl.constexpr):
    """Where the stage of each rank lies, in rank order."""
    bases = (peer(peers_ptr, 0) + stage,)
    for q in tl.static_range(1, WORLD):
        bases = bases + (peer(peers_ptr, q) + stage,)  # type: ignore[assignment]  # noqa: RUF005
    return bases


@triton.jit
def _load_parts(bases, row, at, width, ROW_WORDS: tl.constexpr, WORLD: tl.constexpr):
    """One row of each rank, in rank order; `width`: ROW_WORDS, or 0 for nothing."""
    parts = (tl.load(bases[0] + row * ROW_WORDS + at, mask=at < width, other=0),)
    for q in tl.static_range(1, WORLD):
        parts = parts + (tl.load(bases[q] + row * ROW_WORDS + at, mask=at < width, other=0),)  # type: ignore[assignment]  # noqa: RUF005
    return parts


@triton.jit
def _load_residual(residual_ptr, row, cols, width, H: tl.constexpr):
    """In its own dtype, which takes fewer registers; if there is none, what `load_addends` gives. `width`: H or 0."""
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * H + cols, mask=cols < width, other=0.0)
    else:
        residual = nothing(cols)
    return residual


@triton.jit(do_not_specialize=["rows", "rank", "programs", "first", "stage_words"],
            do_not_specialize_on_alignment=["eps_ptr"])  # fmt: skip
def _barrier_kernel(
    x_ptr, residual_ptr, pre_bias_ptr, weight_ptr, bias_ptr, y_ptr, residual_out_ptr, sum_ptr, mean_ptr, rstd_ptr,
    eps_ptr, eps, weight_offset, alpha, peers_ptr, state_ptr, watch_ptr, stages, stage_words, flags, rows, rank,
    programs, first,
    H: tl.constexpr, ROW_WORDS: tl.constexpr, W: tl.constexpr, EL: tl.constexpr, WORLD: tl.constexpr,
    NORM: tl.constexpr, POST: tl.constexpr, AHEAD: tl.constexpr,
    QUANT: tl.constexpr = None, q_ptr=None, scale_ptr=None,
):  # fmt: skip
    pid = tl.program_id(0) + first
    epoch, mark = begin_call(state_ptr, pid)
    stage = tl.multiple_of(stages + ((epoch >> 2) & 1) * stage_words, 4)
    at = tl.arange(0, W)
    cols = tl.arange(0, EL)
    mask = cols < H
    eps = load_eps(eps_ptr, eps)
    mine = peer(peers_ptr, rank) + stage
    row = pid
    words = tl.load(as_words(x_ptr) + row * ROW_WORDS + at, mask=at < ROW_WORDS, other=0)
    while row < rows:
        later = row + programs
        width = tl.where(later < rows, ROW_WORDS, 0)
        following = tl.load(as_words(x_ptr) + later * ROW_WORDS + at, mask=at < width, other=0)
        words |= mark  # NaN if the rank is dead
        tl.store(mine + row * ROW_WORDS + at, words, mask=at < ROW_WORDS)
        words = following
        row = later
    absent = _meet(peers_ptr, flags, pid, rank, epoch, watch_ptr, WORLD)
    stages_of = _stages_of(peers_ptr, stage, WORLD)
    row = pid
    if AHEAD:
        parts = _load_parts(stages_of, row, at, ROW_WORDS, ROW_WORDS, WORLD)
        residual = _load_residual(residual_ptr, row, cols, H, H)
    while row < rows:
        later = row + programs
        if AHEAD:
            following = _load_parts(stages_of, later, at, tl.where(later < rows, ROW_WORDS, 0), ROW_WORDS, WORLD)
            following_residual = _load_residual(residual_ptr, later, cols, tl.where(later < rows, H, 0), H)
        else:
            parts = _load_parts(stages_of, row, at, ROW_WORDS, ROW_WORDS, WORLD)
            residual = _load_residual(residual_ptr, row, cols, H, H)
        _, pre_bias = load_addends(None, pre_bias_ptr, cols, mask)
        weight, bias = load_scales(weight_ptr, bias_ptr, weight_offset, cols, mask)
        s = unpack(parts[0], x_ptr)
        for q in tl.static_range(1, WORLD):
            s += unpack(parts[q], x_ptr)
        s = tl.where(absent > 0, float("nan"), s)
        if sum_ptr is not None:
            tl.store(sum_ptr + row * H + cols, s.to(sum_ptr.dtype.element_ty), mask=mask)
        finish_row(
            s, residual.to(tl.float32), pre_bias, weight, bias, alpha, eps, y_ptr, residual_out_ptr, mean_ptr, rstd_ptr,
            row, cols, mask, H, NORM, POST, None, pid, 0, 1, None, None, None, False, q_ptr, scale_ptr, QUANT,
        )  # fmt: skip
        if AHEAD:
            parts = following
            residual = following_residual
        row = later
    advance_epoch(state_ptr, epoch, pid, programs)


def refusal(call: Call, ws: Workspace) -> str:
    """Why the workspace does not hold the call; empty where it does."""
    if call.rows * call.row_words <= ws.stage_words:
        return ""
    return (
        f"{call.rows} rows of {4 * call.row_words} bytes take {4 * call.rows * call.row_words:,} bytes of a stage; it "
        f"has {4 * ws.stage_words:,}"
    )


def fits(call: Call, ws: Workspace) -> bool:
    return not refusal(call, ws)


def _fits_ahead(call: Call, world: int, warps: int) -> bool:
    """Whether a thread has registers for a row of every rank besides the one it works on. (Half of those that it may
    have, which what a row takes otherwise, about four times its words, leaves.)"""
    words = max(next_power_of_2(call.row_words) // (32 * warps), 1)
    return (world + 4) * words <= min(65536 // (32 * warps), 256) // 2


def barrier(call: Call, ws: Workspace, warps: int = 0, registers: int = 0) -> Launch:
    """The kernel bound to this rank's operands, as `one_shot` binds its own."""
    if said := refusal(call, ws):
        raise OpError(f"barrier: {said}")
    ready = prepare(call)
    programs = min(call.rows, ws.max_blocks)
    args = (
        *ready.inputs, *ready.outputs, *ready.scalars, ws.peers, ws.state, ws.watch, ws.slots_end,
        ws.stage_words, ws.flags_offset, call.rows, ws.rank, programs, 0,
    )  # fmt: skip
    usual = default_warps(call, 1)
    fewer = min(usual, 16)
    warps = warps or (fewer if _fits_ahead(call, ws.world, fewer) else usual)
    settings = constants(call, ws.world, 1, False, False)
    settings["AHEAD"] = _fits_ahead(call, ws.world, warps)
    del settings["SPLIT"], settings["MANY"], settings["SPIN"]
    settings |= launch_options(warps, registers)
    settings |= quant_program(call)
    return Launch(_barrier_kernel if call.rows else None, programs, args, settings, ready.out, ready.sum)


KERNEL = Kernel(
    name="barrier",
    worlds=range(2, MOST_RANKS + 1),
    refusal=lambda call, ws, split: refusal(call, ws),
    bind=lambda call, ws, split, warps, registers: barrier(call, ws, warps, registers),
    most_rows=lambda call, ws: ws.stage_words // call.row_words,
    candidates=lambda quads: [(1, 0)],
    label=lambda split, warps: "barrier rotating",
)
