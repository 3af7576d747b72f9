"""Which operators mean what to the recogniser. Data only: every other file of the passes asks these tables."""

from __future__ import annotations

import operator

import torch

aten = torch.ops.aten
prims = torch.ops.prims
c10d = torch.ops._c10d_functional
tpfuse = torch.ops.tpfuse

WAIT = c10d.wait_tensor.default

#: Namespaces whose operators are collectives (but for the wait), and the word the report uses for each kind.
COLLECTIVE_NAMESPACES = ("_c10d_functional", "_c10d_functional_autograd")
COLLECTIVE_KINDS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast")

#: Rearrange elements and compute nothing, so they commute with an element-wise sum over ranks.
#: The tensor is the first argument.
VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.flatten.using_ints,
}

#: Those among them that keep shape and order: a copy, or another name.
COPIES_OF_VALUES = {
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
}

#: The views among them that may put elements into another order.
REORDERINGS = {aten.permute.default, aten.transpose.int, aten.t.default}

#: Choose some of the elements and keep them as they are. The tensor is the first argument.
SELECTIONS = {aten.slice.Tensor, aten.select.int}

#: Put elements elsewhere by a table of indices, or in a circle. The tensor is the first argument.
PICKS = {aten.index.Tensor, aten.roll.default}

#: Repeats elements along new dimensions, or along those of size 1. The tensor is the first argument.
SPREADS = {aten.expand.default}

#: Add up rows, where they leave the last dimension alone: linear, and fewer rows have to be summed over the ranks.
ROW_SUMS = {aten.sum.dim_IntList, aten.mean.dim}

#: Change the dtype only.
CASTS = {
    prims.convert_element_type.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
}

#: copy(destination, source): how an in-place `dist.all_reduce` looks once functionalised.
COPIES = {aten.copy.default}

ADDS = {aten.add.Tensor, aten.add.Scalar, operator.add}
SUBS = {aten.sub.Tensor, aten.sub.Scalar, operator.sub}
MULS = {aten.mul.Tensor, aten.mul.Scalar, operator.mul}
DIVS = {aten.div.Tensor, aten.div.Scalar, operator.truediv}

#: make_fx keeps the in-place form of a step of LayerNorm's decomposition; on a fresh temporary it is the same step.
IN_PLACE_TWINS = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.add_.Scalar: aten.add.Scalar,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.mul_.Scalar: aten.mul.Scalar,
    aten.div_.Tensor: aten.div.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.rsqrt_.default: aten.rsqrt.default,
    aten.pow_.Scalar: aten.pow.Tensor_Scalar,
}

#: Norms that stay whole, and the name of each.
WHOLE_NORMS = {
    aten.rms_norm.default: "rms_norm",
    aten._fused_rms_norm.default: "rms_norm",
    aten.layer_norm.default: "layer_norm",
    aten.native_layer_norm.default: "layer_norm",
}

#: Whole norms that return (y, statistics...): the index of each statistic. `y` is at 0.
WHOLE_NORM_STATISTICS = {
    aten._fused_rms_norm.default: {"rstd": 1},
    aten.native_layer_norm.default: {"mean": 1, "rstd": 2},
}

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
