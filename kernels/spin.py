"""Waiting in PTX: each thread waits for its own words of every source, with all loads in flight; text for Triton's
inline assembly.

A wait that is given up notes in the watch whose words did not come, sets the rank's dead marks, and brings POISON.
"""

from __future__ import annotations

from .compat import tl
from .patience import GONE, LATE, MARK, POLLS
from .words import CHANNELS, POISON, SENTINEL


def spin_ptx(sources: int, width: int = 4) -> str:
    """PTX that loads `width` words (4 or 1) from each of `sources` ranks until no word is SENTINEL, or until the wait
    has lasted too long.

    Outputs $0 ... $(width * sources - 1). Inputs of one source: its address, the watch, the epoch, its rank. Of
    several: the address of source 0, the address to use in place of the own rank's, bytes between sources, own rank;
    the watch, the epoch. A label inside braces is local, so the text may appear several times in a kernel.
    """
    n = width * sources
    watch, epoch = (n + 1, n + 2) if sources == 1 else (n + 4, n + 5)
    lines = ["{", ".reg .pred p, q;", f".reg .b64 t, a<{sources}>;", ".reg .b32 polls, began, now, limit, gone;"]
    if sources == 1:
        lines.append(f"mov.b64 a0, ${n};")
    else:
        for s in range(sources):
            lines.append(f"mad.lo.s64 a{s}, ${n + 2}, {s}, ${n};")
            lines.append(f"setp.eq.s32 p, ${n + 3}, {s};")
            lines.append(f"selp.b64 a{s}, ${n + 1}, a{s}, p;")
    lines += ["mov.b32 polls, 0;", "mov.b32 began, 0;", "AGAIN:"]
    for s in range(sources):
        out = ", ".join(f"${width * s + i}" for i in range(width))
        lines.append(f"ld.volatile.global{f'.v4.b32 {{{out}}}' if width == 4 else f'.b32 {out}'}, [a{s}];")
    lines += [*_any_empty("p", range(n)), "@!p bra DONE;"]
    lines += ["add.u32 polls, polls, 1;", f"and.b32 now, polls, {POLLS - 1};"]
    lines += ["setp.ne.u32 q, now, 0;", "@q bra AGAIN;"]
    # Once in a while: the time, the limit, and whether somebody else gave up.
    lines += ["mov.u64 t, %globaltimer;", "shr.u64 t, t, 20;", "cvt.u32.u64 now, t;"]
    lines += ["setp.eq.u32 q, began, 0;", "selp.b32 began, now, began, q;", "sub.u32 now, now, began;"]
    assert GONE == 1  # so that one load brings both
    lines.append(f"ld.volatile.global.v2.b32 {{limit, gone}}, [${watch}];")
    # Signed: a clock that was read too low, or a beginning too high, must not look like a wait of fifty days.
    lines += ["setp.lt.s32 q, now, limit;", "setp.eq.and.u32 q, gone, 0, q;", "@q bra AGAIN;"]
    lines += ["mov.b32 gone, 1;", f"st.volatile.global.b32 [${watch} + {4 * GONE}], gone;"]
    # Every channel's mark. `polls` is a multiple of POLLS here; a count that the assembler knows it would unroll.
    lines += [f"ld.volatile.global.b64 t, [${watch} + {4 * MARK}];", f"mov.b32 gone, {POISON};"]
    lines += ["NEXT:", "st.volatile.global.b32 [t], gone;", "add.s64 t, t, 8;"]
    lines += [f"add.u32 polls, polls, {POLLS // CHANNELS};", f"and.b32 now, polls, {POLLS - 1};"]
    lines += ["setp.ne.u32 q, now, 0;", "@q bra NEXT;"]
    lines += [f"shr.u32 now, ${epoch}, 2;", "add.u32 now, now, 1;"]
    for s in range(sources):
        words = range(width * s, width * s + width)
        lines.append(f"mov.b32 limit, {f'${n + 3}' if sources == 1 else s};")
        if sources > 1:  # the own rank's place was taken by the next rank
            lines += [f"setp.eq.s32 q, ${n + 3}, {s};", f"selp.b32 limit, {(s + 1) % sources}, limit, q;"]
        lines.append(f"mad.wide.u32 t, limit, 4, ${watch};")
        lines += [*_any_empty("p", words), f"@p st.volatile.global.b32 [t + {4 * LATE}], now;"]
        for i in words:
            lines += [f"setp.eq.s32 p, ${i}, {SENTINEL};", f"selp.b32 ${i}, {POISON}, ${i}, p;"]
    return "\n".join([*lines, "DONE:", "}"])


def _any_empty(predicate: str, words: range) -> list[str]:
    first, *rest = words
    lines = [f"setp.eq.s32 {predicate}, ${first}, {SENTINEL};"]
    return lines + [f"setp.eq.or.s32 {predicate}, ${i}, {SENTINEL}, {predicate};" for i in rest]


def constraints(sources: int, width: int = 4) -> str:
    # outputs are written before the inputs are used for the last time: "&" keeps their registers apart
    inputs = ["l", "l", "r", "r"] if sources == 1 else ["l", "l", "l", "r", "l", "r"]
    return ",".join(["=&r"] * (width * sources) + inputs)


#: One word of one source; four words of one, or of each of several.
WORD, QUAD = tl.constexpr(spin_ptx(1, 1)), tl.constexpr(spin_ptx(1))
WORD_REGISTERS, QUAD_REGISTERS = tl.constexpr(constraints(1, 1)), tl.constexpr(constraints(1))
