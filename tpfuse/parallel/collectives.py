"""Collectives with the gradients tensor parallelism needs, each traced as plain `_c10d_functional` ops.

Differentiating through a plain all-reduce gives N times the unsharded gradient: a value that is equal on all ranks of
a group has one gradient, equal on all of them too. So each collective comes with its conjugate:

    function         forward                            backward
    copy_to          identity                           all-reduce
    reduce_from      all-reduce                         identity
    gather_rows      pad, all-gather                    own rows
    scatter_rows     own rows                           all-gather, undo padding
    gather_columns   all-gather along the last dim      own columns

Groups are passed by name, so that modules which hold them can be copied and traced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpfuse._torch_private import under_transform
from tpfuse.errors import PlanError
from tpfuse.parallel.rows import cut_rows, pad_rows, trim_rows


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum of x over the group, without autograd."""
    c10d = torch.ops._c10d_functional
    return c10d.wait_tensor(c10d.all_reduce(x.contiguous(), "sum", group))


def all_gather(x: Tensor, size: int, group: str) -> Tensor:
    """x of every rank of the group, concatenated along dim 0 in rank order, without autograd."""
    c10d = torch.ops._c10d_functional
    return c10d.wait_tensor(c10d.all_gather_into_tensor(x.contiguous(), size, group))


def first_order() -> None:
    """In a backward pass: refuses one whose result is to be differentiated again.

    Sums of gradients would have sums of their own to pay, over ranks that each have a loss of their own.

    Raises:
        PlanError: with create_graph=True.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise PlanError(
            "create_graph=True: this backward pass goes through a model that parallelize cut, whose second derivatives "
            "would lack other ranks' parts; leave create_graph out, or take second derivatives of the uncut model"
        )


def untransformed(x: Tensor) -> None:
    """In a forward pass: refuses transforms that no cut model can follow.

    Raises:
        PlanError: under torch.func's transforms and under forward-mode differentiation.
    """
    if not torch.compiler.is_compiling() and (what := under_transform(x)):
        raise PlanError(
            f"{what} of a model that parallelize cut: what it computes would lack other ranks' parts; use "
            "loss.backward() or torch.autograd.grad, or transform the uncut model"
        )


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        first_order()
        return all_reduce(grad, ctx.group), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx, grad):
        first_order()
        return grad, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        first_order()
        return grad * ctx.scale, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, padded, size, index, group):
        ctx.size, ctx.index, ctx.rows = size, index, None if padded is None else x.shape[0]
        return all_gather(x if padded is None else pad_rows(x, padded), size, group)

    @staticmethod
    def backward(ctx, grad):
        first_order()
        own = cut_rows(grad, ctx.size, ctx.index)
        return own if ctx.rows is None else trim_rows(own, ctx.rows), None, None, None, None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, size, index, group, even):
        ctx.size, ctx.group, ctx.rows = size, group, None if even else x.shape[0]
        return cut_rows(x, size, index)

    @staticmethod
    def backward(ctx, grad):
        first_order()
        full = all_gather(grad, ctx.size, ctx.group)
        return full if ctx.rows is None else trim_rows(full, ctx.rows), None, None, None, None


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, size, index, group):
        ctx.size, ctx.index = size, index
        return torch.cat(all_gather(x, size, group).chunk(size), dim=-1)

    @staticmethod
    def backward(ctx, grad):
        first_order()
        return grad.chunk(ctx.size, dim=-1)[ctx.index].contiguous(), None, None, None


def copy_to(x: Tensor, group: str) -> Tensor:
    """x, whose consumers on each rank give partial gradients that are summed over the group."""
    untransformed(x)
    return _CopyTo.apply(x, group)


def reduce_from(x: Tensor, group: str) -> Tensor:
    """The sum of x over the group; the gradient of the sum is already whole on every rank."""
    untransformed(x)
    return _ReduceFrom.apply(x, group)


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x itself; its gradient is multiplied by scale."""
    untransformed(x)
    return _ScaleGradient.apply(x, scale)


def gather_rows(x: Tensor, size: int, index: int, group: str, padded: int | None = None) -> Tensor:
    """Rows [R, H] of every rank in rank order: [size * (padded or R), H]; R must be equal unless padded."""
    untransformed(x)
    return _GatherRows.apply(x, padded, size, index, group)


def scatter_rows(x: Tensor, size: int, index: int, group: str, even: bool = False) -> Tensor:
    """This rank's chunk of ceil(R / size) rows of x [R, H], which is equal on all ranks; zero-padded.

    `even`: R is known to be a multiple of size, so that the gradient needs no trimming.
    """
    untransformed(x)
    return _ScatterRows.apply(x, size, index, group, even)


def gather_columns(x: Tensor, size: int, index: int, group: str) -> Tensor:
    """x [..., C] of every rank side by side: [..., size * C]."""
    untransformed(x)
    return _GatherColumns.apply(x, size, index, group)
