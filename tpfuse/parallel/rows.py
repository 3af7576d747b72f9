"""Rows: how many each dp replica holds, and the two ops that cut and trim them.

Rows are a hidden state's leading dimensions, flattened. Cutting one's own rows and undoing padding are one op each, so
that a traced graph shows each as one node; neither communicates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tpfuse._state import ANNOUNCED
from tpfuse.errors import PolicyError

_lib = torch.library.Library("tpfuse", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_lib.define("cut_rows(Tensor x, int parts, int index) -> Tensor", tags=_TAGS)
_lib.define("trim_rows(Tensor x, SymInt rows) -> Tensor", tags=_TAGS)


def _cut_rows(x: Tensor, parts: int, index: int) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    rows = x.shape[0]
    chunk = (rows + parts - 1) // parts
    first = min(index * chunk, rows)
    own = x[first : min(first + chunk, rows)]
    out = x.new_zeros(chunk, x.shape[1])
    out[: own.shape[0]] = own
    return out


def _cut_rows_fake(x: Tensor, parts: int, index: int) -> Tensor:
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return x.new_empty((rows + parts - 1) // parts, x.shape[-1])


def _trim_rows(x: Tensor, rows: int) -> Tensor:
    return x[:rows].clone(memory_format=torch.contiguous_format)


def _trim_rows_fake(x: Tensor, rows: int) -> Tensor:
    return x.new_empty(rows, *x.shape[1:])


def _cut_rows_setup(ctx, inputs, output) -> None:
    x, ctx.parts, ctx.index = inputs
    ctx.shape = x.shape


def _cut_rows_backward(ctx, grad: Tensor):
    rows = 1
    for size in ctx.shape[:-1]:
        rows = rows * size
    chunk = grad.shape[0]
    before, after = ctx.index * chunk, (ctx.parts - 1 - ctx.index) * chunk
    full = torch.constant_pad_nd(grad, (0, 0, before, after))
    return trim_rows(full, rows).view(ctx.shape), None, None


def _trim_rows_setup(ctx, inputs, output) -> None:
    ctx.padded = inputs[0].shape[0]


def _trim_rows_backward(ctx, grad: Tensor):
    return pad_rows(grad, ctx.padded), None


_lib.impl("cut_rows", _cut_rows, "CompositeExplicitAutograd")
_lib.impl("trim_rows", _trim_rows, "CompositeExplicitAutograd")
torch.library.register_fake("tpfuse::cut_rows", _cut_rows_fake, lib=_lib)
torch.library.register_fake("tpfuse::trim_rows", _trim_rows_fake, lib=_lib)
torch.library.register_autograd("tpfuse::cut_rows", _cut_rows_backward, setup_context=_cut_rows_setup, lib=_lib)
torch.library.register_autograd("tpfuse::trim_rows", _trim_rows_backward, setup_context=_trim_rows_setup, lib=_lib)


def cut_rows(x: Tensor, parts: int, index: int) -> Tensor:
    """Chunk `index` of `parts` of x's rows, padded with zero rows to full length; never aliases x.

    Args:
        x: [..., H], any dtype; its leading dimensions are flattened to R rows.

    Returns:
        [ceil(R / parts), H], contiguous.
    """
    return torch.ops.tpfuse.cut_rows.default(x, parts, index)


def trim_rows(x: Tensor, rows: int) -> Tensor:
    """The first `rows` rows of x [N, H], N >= rows; contiguous, never aliases x."""
    return torch.ops.tpfuse.trim_rows.default(x, rows)


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """x [N, H] followed by zero rows up to `rows`, N <= rows."""
    return torch.constant_pad_nd(x, (0, 0, 0, rows - x.shape[0]))


@contextmanager
def rows(counts: Iterable[int]) -> Iterator[None]:
    """Announces how many rows each dp replica holds, for the forward and backward passes inside the context.

    Every rank announces the same counts, in the order of the dp replicas; a replica may have none. Around a gather
    over replicas everyone pads to the largest count and takes its own rows afterwards. Nothing is communicated to
    learn the counts and nothing synchronises with the host. Compiled code guards on the counts.

    Args:
        counts: rows (leading dimensions of the hidden states, flattened) of each replica.

    Raises:
        PolicyError: for counts that are not integers >= 0; and, in the model's forward, for a number of counts other
            than dp_size or hidden states with other rows than announced for this replica.
    """
    given, counts = counts, tuple(counts) if isinstance(counts, Iterable) else ()
    if not counts or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in counts):
        raise PolicyError(f"tpfuse.rows({given!r}): allowed: one integer >= 0 for each dp replica")
    previous = ANNOUNCED.counts
    ANNOUNCED.counts = counts
    try:
        yield
    finally:
        ANNOUNCED.counts = previous


def announced_rows() -> tuple[int, ...] | None:
    """The counts of the innermost `rows` context of this thread, or None."""
    return ANNOUNCED.counts
