"""What ties the compiled kernels to the model: memory accesses stand in the PTX for sm_90 in the model's order.

PTX is read from top to bottom; Triton emits a kernel's steps in that order, loops included. What an access is follows
from where its address comes from (a parameter, or an address loaded from `peers`) and from what it stores. What this
cannot show: which word of a slot is meant, and what the assembler moves.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels of this process are interpreted", allow_module_level=True)

from tpfuse.kernels.compat import next_power_of_2
from tpfuse.kernels.symmetric.barrier import _barrier_kernel
from tpfuse.kernels.symmetric.one_shot import _one_shot_kernel
from tpfuse.kernels.symmetric.two_shot import _two_shot_kernel, chunk_words
from tpfuse.kernels.words import SENTINEL

from .sm90 import compile_sm90

BF16 = torch.empty(0, dtype=torch.bfloat16)
I32, I64 = torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int64)
COMMON = (BF16, BF16, None, BF16, None, BF16, BF16, None, None, None, None, 1e-6, None, None, I64, I32, I32)
# By the numbers that parameters have in PTX, where None is no parameter and eps is one.
POINTERS = {0: "x", 1: "residual", 2: "weight", 3: "y", 4: "residual_out", 6: "peers", 7: "state", 8: "watch"}
_REGISTER = re.compile(r"%\w+|\b(?:a\d|t)\b")  # a0, a1, t: of receive.py


def events(ptx: str) -> list[str]:
    """The kernel's accesses in the order of the text: "read epoch and mark", "push", "wait", "bar", "clear", ..."""
    entry = ptx[ptx.index(".entry") :]
    roots: dict[str, set[str]] = {}  # register -> the pointers that its value was made of
    constant: dict[str, int] = {}
    out: list[str] = []
    for line in entry.splitlines():
        line = line.split("//")[0].strip().rstrip(";")
        if line.startswith("@"):
            line = line.split(" ", 1)[1].strip()
        if not line or line[0] in ".{})$" or line.endswith(":"):
            continue
        operation, _, rest = line.partition(" ")
        registers = _REGISTER.findall(rest)
        if operation.startswith("ld.param"):
            number = int(re.findall(r"_param_(\d+)", rest)[0])
            roots[registers[0]] = {POINTERS[number]} if number in POINTERS else set()
        elif operation.startswith("bar.sync"):
            out.append("bar")
        elif operation.startswith(("ld.volatile.global", "ld.global", "st.global", "st.volatile.global", "atom.")):
            inside = re.search(r"\[([^\]]*)\]", rest)
            assert inside is not None
            where = set().union(*(roots.get(r, set()) for r in _REGISTER.findall(inside.group(1))))
            values = [r for r in registers if r not in _REGISTER.findall(inside.group(1))]
            what = "buffer" if "buffer" in where else next(iter(where), "")
            empty = bool(values) and all(constant.get(r) == SENTINEL for r in values)
            if operation.startswith("atom."):
                out.append(next((kind for kind in ("release", "acquire") if kind in operation), operation))
            elif operation.startswith("ld"):
                if what == "state":
                    out.append("wait in inbox" if "volatile" in operation else "read epoch and mark")
                elif operation.startswith("ld.volatile") and what == "buffer":
                    out.append("wait")
                elif what == "buffer":
                    out.append("read peers")
                for register in values:
                    roots[register] = {{"peers": "buffer", "watch": "mark"}.get(what, "")}
            elif what == "buffer":
                out.append("clear" if empty else "push")
            elif what == "state":
                out.append("empty inbox" if empty else "write epoch")
            elif what in ("mark", "watch"):
                out.append("set mark" if what == "mark" else "report")
            elif what in ("y", "residual_out"):
                out.append("out")
        elif registers:
            first, *others = registers
            roots[first] = set().union(*(roots.get(r, set()) for r in others)) if others else set()
            number = re.search(r",\s*(-?\d+)$", rest)
            if operation.startswith("mov.") and number:
                constant[first] = int(number.group(1))
            elif operation.startswith("mov.") and others:
                constant.update({first: constant[others[0]]} if others[0] in constant else {})
    waits = [i for i, event in enumerate(out) if event == "wait in inbox"]  # what is written before that is no epoch
    return ["tell" if event == "write epoch" and i < max(waits, default=0) else event for i, event in enumerate(out)]


def runs(found: list[str], kept: tuple[str, ...]) -> list[str]:
    """Those of `kept`, repetitions as one."""
    out: list[str] = []
    for event in found:
        if event in kept and (not out or out[-1] != event):
            out.append(event)
    return out


@lru_cache
def compiled(kernel: str, world: int, many: bool = False) -> str:
    H, split = 4096, 4 if kernel == "split" else 1
    words = H // 2
    shared = {"H": H, "ROW_WORDS": words, "W": next_power_of_2(words), "EL": H, "WORLD": world, "NORM": 0,
              "POST": False}  # fmt: skip
    tail: tuple = (1 << 22, 8, 0, 8, 0)
    if kernel in ("one_shot", "split"):
        more = {"SPIN": True, "MANY": many, "SPLIT": split, "W": next_power_of_2(words // split), "EL": H // split}
        return compile_sm90(_one_shot_kernel, (*COMMON, *tail), {**shared, **more}, 8).asm["ptx"]
    if kernel == "two_shot":
        more = {"SPIN": True, "MANY": many, "C": next_power_of_2(chunk_words(words, world))}
        return compile_sm90(_two_shot_kernel, (*COMMON, *tail), {**shared, **more}, 8).asm["ptx"]
    tail = (3 << 22, 1 << 20, 1 << 22, 8, 0, 8, 0)
    return compile_sm90(_barrier_kernel, (*COMMON, *tail), {**shared, "AHEAD": False}, 8).asm["ptx"]


READ, PUSH, WAIT, CLEAR, WRITE = "read epoch and mark", "push", "wait", "clear", "write epoch"
INBOX = ("tell", "wait in inbox", "empty inbox")
PROTOCOL = (READ, PUSH, WAIT, CLEAR, WRITE, *INBOX, "release", "acquire", "read peers")
#: The model's order (tests/kernels/model.py: `Model.program`).
ORDERS = {
    ("one_shot", False): [READ, PUSH, WAIT, CLEAR, WRITE],
    ("one_shot", True): [READ, PUSH, WAIT, CLEAR, WRITE],
    ("split", False): [READ, PUSH, WAIT, *INBOX, CLEAR, WRITE],
    ("two_shot", False): [READ, PUSH, WAIT, PUSH, WAIT, CLEAR, WRITE],
    ("barrier", False): [READ, PUSH, "release", WAIT, "acquire", "read peers", WRITE],
}


def differences(kernel: str, many: bool, ptx: str) -> list[str]:
    """In what a kernel departs from the model; empty if in nothing."""
    found = events(ptx)
    out = []
    if (order := ORDERS.get((kernel, many))) is not None and runs(found, PROTOCOL) != order:
        out.append(f"order: {runs(found, PROTOCOL)}")
    if found[0] != READ or found.count(READ) != 1:
        out.append("mark before push: epoch and mark are not read first, and together")
    if found[-1] != WRITE:
        out.append("all epochs: the epoch is not written last")
    between = found[: found.index(WRITE)] if WRITE in found else []
    if "bar" not in between:
        out.append("own epoch: no barrier between reading and writing the epoch")
    for i, event in enumerate(found):
        if event in (CLEAR, "empty inbox") and found[i - 1] not in (CLEAR, "empty inbox", "bar"):
            out.append("barrier before clear: it is missing")
        if kernel == "barrier" and event == "release" and found[i - 1] != "bar":
            out.append("release: no barrier before it")
        if kernel == "barrier" and event == "acquire" and found[i + 1] != "bar":
            out.append("no barrier behind the acquire")
    waits = runs([WAIT if event == "wait in inbox" else event for event in found], (WAIT, "set mark"))
    if not waits or waits != [WAIT, "set mark"] * (len(waits) // 2):
        out.append("dead mark: a wait that is given up does not set it")
    return out


@pytest.mark.parametrize(
    ("kernel", "world", "many"),
    [("one_shot", 2, False), ("one_shot", 4, True), ("split", 2, False), ("two_shot", 2, False),
     ("two_shot", 4, True), ("barrier", 2, False), ("one_shot", 3, True), ("split", 3, False), ("two_shot", 3, False),
     ("barrier", 3, False), *(pytest.param(kernel, world, many, marks=pytest.mark.nightly) for world in (5, 6, 7)
                              for kernel in ("one_shot", "two_shot") for many in (False, True))],
)  # fmt: skip
def test_the_compiled_kernel_keeps_the_models_order(kernel: str, world: int, many: bool) -> None:
    assert not differences(kernel, many, compiled(kernel, world, many))


def without(pattern: str, count: int = 0):
    return lambda ptx: re.sub(pattern, "", ptx, count=count)


@pytest.mark.parametrize(
    ("rule", "edit"),
    [
        ("barrier before clear", without(r"bar\.sync[^\n]*")),
        ("order", lambda ptx: ptx.replace(str(SENTINEL), "0")),  # nothing is emptied
        ("order", without(r"@%p\w+ st\.global\.v4\.b32[^\n]*", 2)),  # nothing is pushed before the wait
        ("mark before push", without(r"ld\.global\.b64[^\n]*", 1)),
        ("dead mark", without(r"st\.volatile\.global\.b32 \[t\], gone;")),
        ("all epochs", without(r"@%p\w+ st\.global\.b32 [^\n]*")),
    ],
)
def test_a_kernel_that_departs_from_the_order_is_found(rule: str, edit) -> None:
    ptx = compiled("one_shot", 2)
    assert edit(ptx) != ptx
    assert any(said.startswith(rule) for said in differences("one_shot", False, edit(ptx)))
