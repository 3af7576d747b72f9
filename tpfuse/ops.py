"""Functional all-reduce + add + norm operations, for eager code and compiled graphs alike.

    s = sum of x over the ranks of `group`
    h = s + residual                                               (float32)
    rms_norm:    y = h * rsqrt(mean(h^2) + eps) * (weight + weight_offset)
    layer_norm:  y = (h - mean(h)) * rsqrt(var(h) + eps) * weight + bias

A weight of None counts as ones. `y` and `h` are rounded once, to the dtype of `x`; the norm runs on the unrounded `h`.
Means are over the last dimension. Nothing is mutated and no output aliases an input.

Gradients follow the tensor-parallel convention: every rank holds the same outputs and the same gradients of them, so
the gradient of `x` is that of `s`, without a collective (the conjugate of the all-reduce is the identity). Replicated
arguments get the gradient of the replicated computation.

Three operators with the same arguments hold every variant; the passes insert them, the functions below wrap the first:

    tpfuse::all_reduce_norm       s = the sum over the group
    tpfuse::reduce_scatter_norm   s = this rank's share of the rows of that sum: ceil(rows / n) of them, the last ranks'
                                  padded with zero rows; residual and results have the share's shape, [share, H]
    tpfuse::rows_norm             s = x, nothing is communicated

On GPUs with peer access the first of them is one kernel (docs/kernels.md). Where that cannot be, and for the other two,
it is a functional collective and the local kernel. gather_ops.py has the second with the gather behind it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from ._torch_private import group_size, process_group, register_local_tensor_rule, runs_as_it_stands
from .boundary_spec import Options
from .errors import OpError
from .kernels.add_norm import add_norm
from .kernels.call import AddNormOut, Call
from .kernels.entry import all_reduce_add_norm
from .lean import call_leanly
from .lean import define as define_lean
from .parallel.mesh import group_name_of, no_such_group
from .product_ops import define as define_behind_product

_LIBRARY = torch.library.Library("tpfuse", "FRAGMENT")
#: Of each of the operators, and what it returns.
ARGUMENTS = (
    "(Tensor x, Tensor? residual, Tensor? pre_bias, Tensor? weight, Tensor? bias, Tensor? eps_tensor, *, "
    f"{Options.schema()}) -> Tensor[]"
)


def all_reduce_add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float | Tensor,
    group: Any,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """All-reduce `x` over `group`, add `residual`, RMSNorm.

    Args:
        x: [..., H], this rank's partial sum; float16, bfloat16, float32 or float64.
        residual: the shape of `x`, or None. Replicated over the group.
        weight: [H], or None for ones. Enters as `weight + weight_offset` (1.0 for Gemma).
        eps: a float, or a 0-d tensor.
        group: a ProcessGroup, a group's name, a 1-D DeviceMesh, or (mesh, dim).

    Returns:
        (y, residual_out), both of the shape and dtype of `x`: the normed value, and the sum with the residual added.

    Raises:
        OpError: a shape, dtype, eps or group that does not fit; the message names it.
    """
    return _call(x, residual, weight, None, eps, group, "rms_norm", weight_offset)


def all_reduce_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | Tensor,
    group: Any,
) -> tuple[Tensor, Tensor]:
    """All-reduce `x` over `group`, add `residual`, LayerNorm. Arguments, results and errors as in
    `all_reduce_add_rms_norm`; `bias` is the norm's, [H] or None."""
    return _call(x, residual, weight, bias, eps, group, "layer_norm", 0.0)


def all_reduce_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float | Tensor, group: Any, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`all_reduce_add_rms_norm` without a residual: the second result is the all-reduced sum itself."""
    return _call(x, None, weight, None, eps, group, "rms_norm", weight_offset)


def all_reduce_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | Tensor, group: Any
) -> tuple[Tensor, Tensor]:
    """`all_reduce_add_layer_norm` without a residual: the second result is the all-reduced sum itself."""
    return _call(x, None, weight, bias, eps, group, "layer_norm", 0.0)


def _call(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | Tensor,
    group: Any,
    norm: str,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    _check(x, residual, weight, bias, eps)
    as_tensor, group_name = isinstance(eps, Tensor), group_name_of(group)
    given = [t for t in (x, residual, weight, bias) if t is not None]
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    if not (differentiated or as_tensor or torch.compiler.is_compiling()) and runs_as_it_stands(given):
        return call_leanly(x, residual, weight, bias, float(eps), group_name, norm, weight_offset)
    outputs = torch.ops.tpfuse.all_reduce_norm.default(
        x,
        residual,
        None,
        weight,
        bias,
        eps if as_tensor else None,
        norm=norm,
        eps=0.0 if as_tensor else eps,
        weight_offset=weight_offset,
        alpha=1.0,
        post=False,
        out_dtype=x.dtype,
        hidden_dtype=x.dtype,
        want_sum=False,
        stats=differentiated,  # only gradients are computed from them
        group_name=group_name,
    )
    return outputs[0], outputs[1]


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: Any) -> None:
    if not isinstance(x, Tensor) or x.dim() < 1 or x.dtype not in _FLOATS:
        raise OpError(f"x {_has(x)}; needed: a tensor [..., H] of {_FLOATS}")
    for name, other, shape in (
        ("residual", residual, x.shape),
        ("weight", weight, x.shape[-1:]),
        ("bias", bias, x.shape[-1:]),
    ):
        if other is None:
            continue
        if not isinstance(other, Tensor) or other.shape != shape or other.dtype not in _FLOATS:
            whose = "the shape of x" if name == "residual" else "the last dimension of x"
            raise OpError(f"{name} {_has(other)}; needed: None, or {tuple(shape)} ({whose}) of {_FLOATS}")
        if other.device != x.device:
            raise OpError(f"{name} is on {other.device}; needed: the device of x, {x.device}")
    if isinstance(eps, Tensor):
        if eps.dim() != 0:
            raise OpError(f"eps is a tensor of shape {tuple(eps.shape)}; needed: a float or a 0-d tensor")
    elif isinstance(eps, bool) or not isinstance(eps, (float, int, torch.SymFloat)):
        raise OpError(f"eps is a {type(eps).__name__}; needed: a float or a 0-d tensor")


def _has(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"has shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"is a {type(value).__name__}"


# -- the operators ----------------------------------------------------------------------------------------------------


def _all_reduced(x: Tensor, group_name: str) -> Tensor:
    try:
        pending = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group_name)
    except RuntimeError as error:
        if process_group(group_name) is not None:
            raise
        raise OpError(no_such_group(group_name)) from error
    return funcol.wait_tensor(pending)


def _own_share(x: Tensor, group_name: str) -> Tensor:
    ranks = group_size(group_name)
    rows = x.reshape(-1, x.shape[-1])
    missing = -rows.shape[0] % ranks
    # The padding lives inside the boundary: every rank pads alike, since all hold the same rows.
    rows = torch.constant_pad_nd(rows, (0, 0, 0, missing)) if missing else rows.contiguous()
    return funcol.wait_tensor(torch.ops._c10d_functional.reduce_scatter_tensor(rows, "sum", ranks, group_name))


def _own_share_shape(x: Tensor, group_name: str) -> tuple:
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    ranks = group_size(group_name)
    return (rows + ranks - 1) // ranks, x.shape[-1]


def _unchanged(x: Tensor, group_name: str) -> Tensor:
    return x


def _same_shape(x: Tensor, group_name: str) -> tuple:
    return tuple(x.shape)


def _outputs(out: AddNormOut, total: Tensor | None) -> list[Tensor]:
    """[y, h if hidden_dtype, the sum if want_sum, mean and rstd if stats (LayerNorm) or rstd (RMSNorm), q and scale
    if quant]."""
    made = (out.y, out.residual_out, total, out.mean, out.rstd, out.q, out.scale)
    return [tensor for tensor in made if tensor is not None]


def _never(call: Call, site: Any = None) -> None:
    return None


def _fake_outputs(call: Call, shape: tuple) -> list[Tensor]:
    x = call.x
    exact = any(t is not None and t.dtype == torch.float64 for t in (x, *call.addends))
    outputs = [x.new_empty(shape, dtype=call.out_dtype)]
    if call.hidden_dtype is not None:
        outputs.append(x.new_empty(shape, dtype=call.hidden_dtype))
    if call.want_sum:
        outputs.append(x.new_empty(shape))
    if call.stats:
        count = 2 if call.norm == "layer_norm" else 1
        dtype = torch.float64 if exact else torch.float32
        outputs += [x.new_empty((*shape[:-1], 1), dtype=dtype) for _ in range(count)]
    if (how := call.quantisation) is not None:
        outputs += [x.new_empty(shape, dtype=how.q_dtype), x.new_empty(how.scales_of(shape), dtype=how.scale_dtype)]
    return outputs


def _surely_differ(a: tuple, b: tuple) -> bool:
    """Whether two shapes differ whatever their symbolic sizes are; adds no guard."""
    pairs = zip(a, b, strict=False)
    return len(a) != len(b) or any(isinstance(x, int) and isinstance(y, int) and x != y for x, y in pairs)


def _define(name: str, pay: Any, shape_of: Any, in_one_kernel: Any = _never) -> None:
    """Define the operator `name`, which pays the sum by `pay` and then adds and normalises, unless `in_one_kernel` does
    all of it (None, on all ranks alike, where it cannot)."""

    def functional(call: Call) -> list[Tensor]:
        call = call.multiplied()
        total = pay(call.x, call.group_name)
        out = add_norm(call if total is call.x else replace(call, x=total))
        return _outputs(out, total if call.want_sum else None)

    def lean(call: Call, site: Any) -> list[Tensor]:
        done = in_one_kernel(call, site)
        return functional(call) if done is None else _outputs(*done)

    def result_shape(call: Call) -> tuple:
        shape, residual = shape_of(call.x, call.group_name), call.residual
        if residual is not None and _surely_differ(residual.shape, shape):
            need = f"needed: that of the result, {tuple(shape)}"
            raise OpError(f"tpfuse::{name}: residual has shape {tuple(residual.shape)}; {need}")
        return shape

    def run(*operands: Any, **options: Any) -> list[Tensor]:
        call = Call(*operands, **options)
        result_shape(call)
        return lean(call, None)

    def fake(*operands: Any, **options: Any) -> list[Tensor]:
        call = Call(*operands, **options)
        return _fake_outputs(call, result_shape(call))

    def rule(*operands: Any, **options: Any) -> list[Tensor]:
        return functional(Call(*operands, **options))

    _LIBRARY.define(name + ARGUMENTS, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tpfuse::{name}", fake, lib=_LIBRARY)
    register_local_tensor_rule(f"tpfuse::{name}", rule)
    define_lean(_LIBRARY, name, lean)
    if name == "all_reduce_norm":
        define_behind_product(_LIBRARY, name, lean)


def _in_one_kernel(call: Call, site: Any = None) -> tuple[AddNormOut, Tensor | None] | None:
    return all_reduce_add_norm(call, site)  # looked up anew each time: tests put another in its place


_define("all_reduce_norm", _all_reduced, _same_shape, _in_one_kernel)
_define("reduce_scatter_norm", _own_share, _own_share_shape)
_define("rows_norm", _unchanged, _same_shape)


# -- autograd ---------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: list[Tensor]) -> None:
    x, residual, pre_bias, weight, bias, _ = inputs
    options = keyword_only_inputs
    ctx.differentiable = options["hidden_dtype"] is not None and options["stats"] and not options["post"]
    if not ctx.differentiable:
        return  # an exported model runs with gradients on, and nobody asks for any
    ctx.save_for_backward(output[1], weight, *output[-2 if options["norm"] == "layer_norm" else -1 :])
    ctx.options = options
    ctx.dtypes = [t.dtype if t is not None else None for t in (x, residual, pre_bias, weight, bias)]


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple:
    """The gradients of the replicated computation behind the all-reduce, in float32 (float64 where x is)."""
    if not ctx.differentiable:
        raise OpError(
            "all_reduce_norm has gradients only with hidden_dtype set, stats=True and post=False; a graph that "
            "fuse_graph rewrote is for inference: to train, compile the model with the backend"
        )
    hidden, weight, *statistics = ctx.saved_tensors
    options = ctx.options
    compute = torch.promote_types(hidden.dtype, torch.float32)
    rstd = statistics[-1].to(compute)
    h = hidden.to(compute)
    centred = h - statistics[0].to(compute) if options["norm"] == "layer_norm" else h
    normed = centred * rstd
    rows = tuple(range(h.dim() - 1))

    grad_hidden = torch.zeros_like(h)
    grad_weight = grad_bias = None
    if grads[0] is not None:
        grad_y = grads[0].to(compute)
        grad_weight, grad_bias = (grad_y * normed).sum(rows), grad_y.sum(rows)
        factor = 1.0 if weight is None else weight.to(compute)
        inner = grad_y * (factor + options["weight_offset"])
        correction = normed * (inner * normed).mean(-1, keepdim=True)
        if options["norm"] == "layer_norm":
            correction = correction + inner.mean(-1, keepdim=True)
        grad_hidden = (inner - correction) * rstd
    if grads[1] is not None:
        grad_hidden = grad_hidden + grads[1].to(compute)
    grad_sum = grad_hidden * options["alpha"]
    if options["want_sum"] and grads[2] is not None:
        grad_sum = grad_sum + grads[2].to(compute)
    found = (grad_sum, grad_hidden, grad_hidden.sum(rows), grad_weight, grad_bias)
    kept = [
        grad.to(dtype) if dtype is not None and grad is not None else None
        for grad, dtype in zip(found, ctx.dtypes, strict=True)
    ]
    return (*kept, None)


torch.library.register_autograd("tpfuse::all_reduce_norm", _backward, setup_context=_setup_context, lib=_LIBRARY)
