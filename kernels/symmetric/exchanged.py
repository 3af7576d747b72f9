"""By copy engines, of rows that are scattered: each rank finishes its half of them, and sends what comes out. 2 ranks.

    the peer's half, chunk by chunk:  x of these rows [multiplied first, if the call has a `product`] -> sent
    the own half, chunk by chunk:     x of these rows [multiplied] -> the peer's part of them received
                                      -> s = x + the peer's x, finished as `add_norm` does -> y sent
    the peer's half again:            y received -> copied into the rows of all

    s = the own half of the rows of x + the peer's part of them
    h = s + residual;  y = norm(h);  gathered = the y of both ranks, in their order

A reduce-scatter, a norm and an all-gather in one call: what sequence parallelism has in the place of an all-reduce. As
many bytes travel, and a rank adds and normalises half of the rows. The peer's half is multiplied first, so while the
own one is, the peer's part of it has arrived, and y of its first rows travels. The protocol is that of `copies.py`,
with one flag for each chunk of x and one for each of y. The slot's first half holds x of the peer, the second one y.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import OpError
from ..add_norm import on_device_of
from ..call import AddNormOut, Call
from ..compat import tl, triton
from ..words import POISON
from .copied import finishing
from .copies import READY, Copies, Finish, InCalls, Step, Y, launch, slot
from .copies import refusal as copies_refusal
from .noted import noted
from .operands import Launch, Places, lies_ready, places_of, prepare
from .workspace import Workspace

_NAN = tl.constexpr(POISON)
_BLOCK = 1024
_TAKE = {"BLOCK": _BLOCK, "num_warps": 4}


@triton.jit(do_not_specialize=["quads"])
def _take_kernel(from_ptr, to_ptr, state_ptr, quads, BLOCK: tl.constexpr):
    """So many 16-byte pieces from the slot into a result; NaN on a dead rank."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < quads * 4
    taken = tl.load(from_ptr + at, mask=mask)
    if tl.load(state_ptr + 1) != 0:
        taken = tl.full([BLOCK], _NAN, tl.int32)
    tl.store(to_ptr + at, taken, mask=mask)


@dataclass(frozen=True)
class Exchange(InCalls):
    """The steps of one exchange, whatever finishes the rows. gathered: as x, in a dtype of the same size."""

    gathered: Tensor
    parts, most_chunks = 2, 2

    def call(self, copies: Copies, start: int, stop: int, finish: Finish) -> None:
        rank, row, half = self.ws.rank, self.row, len(self.x) // 2
        own, theirs, rows = rank * half + start, (1 - rank) * half + start, stop - start
        y, chunks = self.gathered.view(-1).view(torch.int32), halves_of(rows)
        copies.begin()
        self.send(copies, chunks, theirs)
        for i, (first, last) in enumerate(chunks):
            self.multiply(own + first, own + last)
            copies.receive(i)
            finish(first, last)
            copies.send(len(chunks) + i, y[(own + first) * row : (own + last) * row], (rows + first) * row, Y)
        for i, (first, last) in enumerate(chunks):
            copies.receive(len(chunks) + i)
            words = (last - first) * row
            taking = self._taking(y, (rows + first) * row, (theirs + first) * row, words)
            copies.launch(taking, -(-words // _BLOCK))

    def load(self, step: Step) -> Any:
        """Compile and load the kernels, that of `step` too, which finishes rows; the last of them."""
        loaded = None
        y, copies = self.gathered.view(-1).view(torch.int32), Copies(self.ws, self.words)
        with on_device_of(y):
            for each in (copies.beginning(), copies.waiting(READY, 0, 4), step, self._taking(y, 0, 0, 4)):
                loaded = each.load()
        return loaded

    def _taking(self, y: Tensor, start: int, to: int, words: int) -> Step:
        args = slot(self.ws, start, torch.int32), y[to:], self.ws.state, words // 4
        key = (_take_kernel, y.get_device(), *(t.data_ptr() % 16 for t in args[:2]))
        return Step(_take_kernel, args, _TAKE, key, ((1, Y),))


def halves_of(rows: int) -> list[tuple[int, int]]:
    """[first, stop) of each chunk: two of them, in each direction."""
    return [(first, stop) for first, stop in ((0, rows // 2), (rows // 2, rows)) if first < stop]


@dataclass(frozen=True)
class ExchangedLaunch(Launch):
    """As `CopiedLaunch`. `out.y` is the own half of what is gathered; `inputs` begin with the own half of x."""

    call: Call
    ws: Workspace
    inputs: tuple
    scalars: tuple
    gathered: Tensor
    exchange: Exchange
    multiplies = True

    def run(self) -> tuple[AddNormOut, Tensor | None]:
        self.exchange.run(self.finisher)
        return replace(self.out, y=self.gathered), self.sum

    def again(self, places: Places, watch: Tensor) -> tuple[Callable[..., None], tuple] | None:
        out, results = self.out, (self.gathered, self.out.residual_out, self.sum)
        given = (self.exchange.x, *self.inputs[1:], *results, out.mean, out.rstd, self.scalars[0])
        if places_of(given) != places:
            return None
        return noted(self.exchange, places, self._step)

    def load(self) -> Any:
        return self.exchange.load(self._step(0, self.call.rows // 2)(0)) if self.call.rows else None

    def finisher(self, start: int, stop: int) -> Finish:
        """What finishes some of these rows of the own half, `start` of it and those behind."""
        step, device = self._step(start, stop), self.call.x.device
        return lambda first, last: launch(step(first), last - first, device)

    def _step(self, start: int, stop: int) -> Callable[[int], Step]:
        """The step that finishes own rows from `first` of these on."""

        def rows(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.view(self.call.rows // 2, -1)[start:stop]

        x, residual, *vectors = self.inputs
        inputs, total = (rows(x), rows(residual), *vectors), rows(self.sum)
        y, hidden, mean, rstd = map(rows, (self.out.y, self.out.residual_out, self.out.mean, self.out.rstd))
        assert y is not None, "it always is there"
        out = AddNormOut(y, hidden, mean, rstd)
        return finishing(self.call, inputs, out, total, self.scalars, self.ws, {})


def exchanged(call: Call, ws: Workspace) -> ExchangedLaunch:
    """The call bound to this rank's operands. x: [rows, H], this rank's part of all rows; residual: [rows / 2, H], of
    the own ones, as all results are but `out.y`: [rows, H], what is gathered. Both ranks must make the same call;
    whether its x is a product is a rank's own affair.

    Raises OpError where there is no such call (`refusal`), or the residual is not of the own rows.
    """
    if said := refusal(call, ws):
        raise OpError(f"exchanged: {said}")
    if call.residual is not None and 2 * call.residual.numel() != call.x.numel():
        raise OpError(f"exchanged: residual has shape {tuple(call.residual.shape)}; needed: own rows, {call.rows // 2}")
    call = call if lies_ready(call.x) else call.multiplied()
    x = call.x if lies_ready(call.x) else call.x.contiguous().clone()
    x, share = x.view(call.rows, call.hidden), call.rows // 2
    own = slice(ws.rank * share, (ws.rank + 1) * share)
    gathered = call.out.y if call.out is not None else x.new_empty(x.shape, dtype=call.out_dtype)
    given = None if call.out is None else replace(call.out, y=gathered[own])
    ready = prepare(replace(call, x=x[own], out=given, product=None))
    return ExchangedLaunch(
        None, 0, (), {}, replace(ready.out, y=gathered[own]), ready.sum, replace(call, x=x), ws, ready.inputs,
        ready.scalars, gathered, Exchange(ws, x, call.product, gathered.view(x.shape)),
    )  # fmt: skip


def unfit(call: Call) -> str:
    """Why no such call is made in this way; empty where it may be. Equal on all ranks."""
    if call.hidden % 8:
        return f"rows of {call.hidden}; allowed: multiples of 8"
    if call.rows % 2 or call.quant or call.batch_invariant:
        allowed = "an even number of rows, and neither of the others"
        return f"{call.rows} rows, quant={call.quant!r}, batch_invariant={call.batch_invariant}; allowed: {allowed}"
    if call.out_dtype.itemsize != call.x.dtype.itemsize:
        return f"y of {call.out_dtype} for x of {call.x.dtype}; allowed: dtypes of one size"
    return ""


def refusal(call: Call, ws: Workspace) -> str:
    """The same, or why the workspace does not take it."""
    return unfit(call) or copies_refusal(2 * call.row_words, ws)
