"""By copy engines: the part of the peer is copied in chunks of rows, and programs take no part in sending. 2 ranks.

    chunk by chunk:       x of these rows there [, if the call has a `product`: multiplied first] -> sent
    then chunk by chunk:  received -> s = x + the peer's x, and rows are finished as `add_norm` does

For calls so large that links decide, and told that they may (`overlap`). A copy engine drives a link as fast as all
multiprocessors together would, so these are free to multiply later rows meanwhile, where the x of this call is a
product (`Call.product`). The protocol is that of `copies.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ...errors import OpError
from ..add_norm import on_device_of, quant_program
from ..call import NORMS, AddNormOut, Call
from ..compat import next_power_of_2, tl, triton
from ..device import finish_row, load_eps, load_row
from ..words import POISON
from .copies import RANKS, READY, Copies, Finish, InCalls, Step, chunks_of, launch, slot
from .copies import refusal as _refusal
from .kernel import Kernel
from .noted import noted
from .operands import TENSORS, Launch, Places, key_of, lies_ready, places_of, prepare
from .workspace import Workspace

_NAN = tl.constexpr(POISON)
_OF_CALL = tuple((i, i) for i in range(TENSORS))  # the kernel's first arguments


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["eps_ptr"])
def _finish_kernel(
    x_ptr, residual_ptr, pre_bias_ptr, weight_ptr, bias_ptr, y_ptr, residual_out_ptr, sum_ptr, mean_ptr, rstd_ptr,
    eps_ptr, eps, weight_offset, alpha, slot_ptr, state_ptr, first,
    H: tl.constexpr, EL: tl.constexpr, NORM: tl.constexpr, POST: tl.constexpr,
    QUANT: tl.constexpr = None, q_ptr=None, scale_ptr=None,
):  # fmt: skip
    row = (tl.program_id(0) + first).to(tl.int64)
    cols = tl.arange(0, EL)
    mask = cols < H
    residual_row = residual_ptr
    if residual_ptr is not None:
        residual_row = residual_ptr + row * H
    residual, pre_bias, weight, bias = load_row(
        residual_row, pre_bias_ptr, weight_ptr, bias_ptr, weight_offset, cols, mask
    )
    own = tl.load(x_ptr + row * H + cols, mask=mask, other=0.0).to(tl.float32)
    theirs = tl.load(slot_ptr + row * H + cols, mask=mask, other=0.0).to(tl.float32)
    s = own + theirs  # of two ranks, in any order the same bits
    if tl.load(state_ptr + 1) != 0:
        s = tl.full([EL], _NAN, tl.int32).to(tl.float32, bitcast=True)
    if sum_ptr is not None:
        tl.store(sum_ptr + row * H + cols, s.to(sum_ptr.dtype.element_ty), mask=mask)
    finish_row(
        s, residual, pre_bias, weight, bias, alpha, load_eps(eps_ptr, eps), y_ptr, residual_out_ptr, mean_ptr, rstd_ptr,
        row, cols, mask, H, NORM, POST, None, 0, 0, 1, q_ptr=q_ptr, scale_ptr=scale_ptr, QUANT=QUANT,
    )  # fmt: skip


@dataclass(frozen=True)
class Whole(InCalls):
    """The steps of such a call, whatever finishes the rows."""

    parts, most_chunks = 1, 3

    def call(self, copies: Copies, start: int, stop: int, finish: Finish) -> None:
        chunks = chunks_of(stop - start)
        copies.begin()
        self.send(copies, chunks, start)
        for i, (first, last) in enumerate(chunks):
            copies.receive(i)
            finish(first, last)


@dataclass(frozen=True)
class CopiedLaunch(Launch):
    """As `Launch`, of several kernels and copies."""

    call: Call
    ws: Workspace
    inputs: tuple
    scalars: tuple
    multiplies = True

    def run(self) -> tuple[AddNormOut, Tensor | None]:
        self._whole.run(lambda *_: self.finish)
        return self.out, self.sum

    def again(self, places: Places, watch: Tensor) -> tuple[Callable[..., None], tuple] | None:
        if places_of(self._finishing(0).args[:TENSORS]) != places:
            return None
        return noted(self._whole, places, lambda *_: self._finishing)

    def finish(self, first: int, stop: int) -> None:
        """These rows of x, of which the peer's are there."""
        launch(self._finishing(first), stop - first, self.call.x.device)

    def load(self) -> Any:
        """Compile and load the kernels; the last of them."""
        loaded = None
        copies = Copies(self.ws, self._whole.words)
        with on_device_of(self.inputs[0]):
            for step in (copies.beginning(), copies.waiting(READY, 0, 4), self._finishing(0)):
                loaded = step.load()
        return loaded

    @property
    def _whole(self) -> Whole:
        return Whole(self.ws, self.inputs[0].view(self.call.rows, self.call.hidden), self.call.product)

    @cached_property
    def _finishing(self) -> Callable[[int], Step]:
        return finishing(self.call, self.inputs, self.out, self.sum, self.scalars, self.ws,
                         {**self.constants, **self.last})  # fmt: skip


def finishing(
    call: Call, inputs: tuple, out: AddNormOut, total: Tensor | None, scalars: tuple, ws: Workspace,
    quant: dict[str, Any],
) -> Callable[[int], Step]:  # fmt: skip
    """The step that finishes rows of x, a first one and those behind it, with the peer's rows at the start of the slot,
    by the first one's number."""
    theirs = slot(ws, 0, call.x.dtype)
    args = (*inputs, out.y, out.residual_out, total, out.mean, out.rstd, *scalars, theirs, ws.state)
    warps = max(4, min(16, next_power_of_2(call.hidden) // 512))
    constants = {"H": call.hidden, "EL": next_power_of_2(call.hidden), "NORM": NORMS[call.norm], "POST": call.post}
    options = {**constants, **quant, "num_warps": warps}
    key = key_of(_finish_kernel, args, options, call.x.device.index)
    return lambda first: Step(_finish_kernel, (*args, first), options, key, _OF_CALL)


def copied(call: Call, ws: Workspace, split: int = 1, warps: int = 0, registers: int = 0) -> CopiedLaunch:
    """The call bound to this rank's operands, as `one_shot` has it. Both ranks must make the same call; whether its x
    is a product is a rank's own affair.

    Raises OpError where the workspace does not hold the call (`refusal`).
    """
    if said := refusal(call, ws, split):
        raise OpError(f"copied: {said}")
    call = call if lies_ready(call.x) else call.multiplied()  # else rows would be sent of a copy that was made before
    ready = prepare(call, multiply=False)
    return CopiedLaunch(
        None, 0, (), quant_program(call), ready.out, ready.sum, call, ws, ready.inputs, ready.scalars
    )  # fmt: skip


def refusal(call: Call, ws: Workspace, split: int) -> str:
    return _refusal(call.rows * call.row_words, ws)


def most_rows(call: Call, ws: Workspace) -> int:
    return 0 if ws.world != RANKS or ws.remote is None else ws.copy_words // call.row_words


def _candidates(quads: int) -> list[tuple[int, int]]:
    """None: tables are measured without products, where another kernel is ahead."""
    return []


def _label(split: int, warps: int) -> str:
    return "copied"


KERNEL = Kernel(
    name="copied",
    worlds=range(RANKS, RANKS + 1),
    refusal=refusal,
    bind=copied,
    most_rows=most_rows,
    candidates=_candidates,
    label=_label,
    otherwise="one_shot",
)
