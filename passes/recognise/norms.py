"""Find RMSNorm and LayerNorm in a graph, in every spelling. Reads only.

Norms that stay whole (`aten.rms_norm`, `native_layer_norm`, ...) are read off their arguments. Norms written out are
anchored on their statistics, because everything else varies between models:

    rms_norm     y = x * rsqrt(mean(x^2) + eps) [* weight] [+ bias]
    layer_norm   y = (x - mean(x)) * rsqrt(var(x) + eps) [* weight] [+ bias]

with `1/sqrt(...)`, `x / sqrt(...)` and `pow(..., -0.5)` for rsqrt, casts anywhere, the weight before or after the last
cast, and Gemma's `1 + weight`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..facts import aten_ops as ops
from ..facts.graph import (
    argument,
    input_node,
    is_call,
    is_float,
    is_number,
    last_dim,
    same_shape,
    same_size,
    strip,
    val,
    value,
)

aten = ops.aten

#: Leave the value as it is, up to rounding.
_TRANSPARENT = ops.CASTS | {aten.alias.default, aten.detach.default, aten.clone.default}


@dataclass(frozen=True)
class Norm:
    """One norm. `source` is normalised over its last dimension; `output` holds the normed value.

    `weight` enters as `weight + weight_offset`. `mean` and `rstd` are the nodes of the statistics (shape
    `source.shape[:-1] + (1,)`) or None. `problem` is empty, or one sentence on why it cannot be fused.
    """

    kind: str
    source: fx.Node
    output: fx.Node
    eps: float | fx.Node
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    weight_offset: float = 0.0
    mean: fx.Node | None = None
    rstd: fx.Node | None = None
    problem: str = ""


def find_norms(graph: fx.Graph) -> list[Norm]:
    """Every norm of the graph, in the order of their outputs' statistics."""
    found: list[Norm] = []
    for node in graph.nodes:
        norm = whole_norm(node) or written_out_norm(node)
        if norm is not None:
            found.append(norm)
    return found


def whole_norm(node: fx.Node) -> Norm | None:
    """A norm that is one operator."""
    if node.op != "call_function" or node.target not in ops.WHOLE_NORMS:
        return None
    kind = ops.WHOLE_NORMS[node.target]
    source, shape = argument(node, "input"), argument(node, "normalized_shape")
    eps = argument(node, "eps")
    outputs = {user.args[1]: user for user in node.users if user.target is ops.operator.getitem}
    statistics = ops.WHOLE_NORM_STATISTICS.get(node.target)
    output = node if statistics is None else outputs.get(0)
    if output is None or not is_float(source) or not isinstance(shape, (list, tuple)):
        return None
    if eps is None:
        eps = _finfo_eps(source)
    norm = Norm(
        kind,
        source,
        output,
        eps,
        weight=argument(node, "weight"),
        bias=argument(node, "bias"),
        mean=outputs.get((statistics or {}).get("mean", -1)),
        rstd=outputs.get((statistics or {}).get("rstd", -1)),
    )
    if not is_number(eps):
        return replace(norm, problem=f"the norm's eps is {eps!r}, not a finite number")
    if len(shape) != 1:
        return replace(norm, problem=f"the norm runs over the last {len(shape)} dimensions, not over the last one only")
    return norm


#: The operators that an inverse square root ends in, or a division by a square root.
_ANCHORS = {aten.rsqrt.default, aten.pow.Tensor_Scalar, aten.reciprocal.default, aten.sqrt.default}
_ANCHORS |= {in_place for in_place, twin in ops.IN_PLACE_TWINS.items() if twin in _ANCHORS}


def written_out_norm(node: fx.Node) -> Norm | None:
    """A norm spelled in elementary operators, anchored at `node` = (mean of squares or variance + eps)^(-1/2)."""
    if node.target not in _ANCHORS:
        return None
    inverse = _inverse_square_root(node)
    if inverse is None:
        return None
    radicand, divides = inverse
    statistic, eps = _split_eps(radicand)
    if statistic is None:
        return None
    moments = _mean_of_squares(statistic) or _variance(statistic)
    if moments is None:
        return None
    kind, centred, source, mean, problem = moments
    scaled = _scaled_by(node, centred, divides)
    if scaled is None:
        return None
    norm = Norm(kind, source, scaled, eps, mean=mean, rstd=None if divides else node, problem=problem)
    return _with_affine(norm)


# -- the statistics ---------------------------------------------------------------------------------------------------


def _inverse_square_root(node: fx.Node) -> tuple[fx.Node, bool] | None:
    """(radicand, whether the value is later divided by `node` rather than multiplied)."""
    if is_call(node, aten.rsqrt.default):
        return input_node(node), False
    if is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == -0.5:
        return input_node(node), False
    if is_call(node, aten.reciprocal.default) and is_call(node.args[0], aten.sqrt.default):
        return input_node(node.args[0]), False
    if is_call(node, aten.sqrt.default) or (is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == 0.5):
        return input_node(node), True
    return None


def _split_eps(radicand: fx.Node) -> tuple[fx.Node | None, float | fx.Node]:
    """`statistic + eps` in either order; eps is a number or a 0-d tensor."""
    if not is_call(radicand, ops.ADDS) or len(radicand.args) < 2 or radicand.kwargs.get("alpha", 1) != 1:
        return None, 0.0
    for statistic, eps in (radicand.args[:2], radicand.args[1::-1]):
        if not isinstance(statistic, fx.Node):
            continue
        if is_number(eps):
            return statistic, float(eps)
        if isinstance(eps, fx.Node) and _is_scalar(eps):
            root = strip(eps, _TRANSPARENT)
            return statistic, root if value(root) is not None else eps
    return None, 0.0


def _is_scalar(node: fx.Node) -> bool:
    val = value(node)
    return val is not None and val.dim() == 0


def _mean_of(node: fx.Node) -> tuple[fx.Node, str] | None:
    """(the value averaged, problem) if `node` averages over dimensions: mean, or a sum divided by the size."""
    node = strip(node, _TRANSPARENT)
    if is_call(node, aten.mean.dim):
        return input_node(node), _dims_problem(node)
    if not is_call(node, ops.DIVS | ops.MULS) or len(node.args) < 2:
        return None
    divided, factor = strip(node.args[0], _TRANSPARENT), node.args[1]
    if not is_call(divided, aten.sum.dim_IntList):
        return None
    size = last_dim(input_node(divided))
    return (input_node(divided), _dims_problem(divided)) if _divides_by(node, factor, size) else None


def _divides_by(node: fx.Node, factor: object, size: Any) -> bool:
    """Whether dividing (or multiplying) by `factor` divides by `size`, a number or a symbol."""
    if is_call(node, ops.DIVS) and isinstance(factor, fx.Node):
        return same_size(factor.meta.get("val"), size)
    if not is_number(factor) or not isinstance(size, int) or not size or not factor:
        return False
    return math.isclose(factor if is_call(node, ops.DIVS) else 1 / factor, size, rel_tol=1e-6)


def _dims_problem(reduction: fx.Node) -> str:
    dims, keepdim = argument(reduction, "dim"), argument(reduction, "keepdim", False)
    dims = [dims] if isinstance(dims, int) else dims
    if dims is not None and not all(isinstance(d, int) for d in dims):
        return "the dimensions that the norm runs over are computed in the graph"
    val = value(reduction.args[0])
    rank = val.dim() if val is not None else 0
    if dims is None or [d % rank if rank else d for d in dims] != [rank - 1]:
        return f"the norm runs over dimensions {list(dims) if dims is not None else 'all'}, not over the last one only"
    if not keepdim and rank > 1:
        return "the norm's statistics drop the last dimension (keepdim=False)"
    return ""


def _squared(node: fx.Node) -> fx.Node | None:
    node = strip(node, _TRANSPARENT)
    if is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == 2:
        return input_node(node)
    if is_call(node, aten.square.default):
        return input_node(node)
    if is_call(node, ops.MULS) and len(node.args) > 1 and isinstance(node.args[1], fx.Node):
        left, right = (strip(a, _TRANSPARENT) for a in node.args[:2])
        if left is right:
            return input_node(node)
    return None


_Moments = tuple[str, fx.Node, fx.Node, "fx.Node | None", str]


def _mean_of_squares(statistic: fx.Node) -> _Moments | None:
    """mean(x^2): RMSNorm's statistic, or LayerNorm's when x is `v - mean(v)`."""
    averaged = _mean_of(statistic)
    if averaged is None:
        return None
    squared, problem = averaged
    root = _squared(squared)
    if root is None:
        return None
    source = strip(root, _TRANSPARENT)
    if _subtracts_value(source):
        mean = strip(source.args[1], _TRANSPARENT)
        inner = _mean_of(mean)
        if inner is not None and strip(inner[0], _TRANSPARENT) is strip(source.args[0], _TRANSPARENT):
            return "layer_norm", source, strip(source.args[0], _TRANSPARENT), mean, problem or inner[1]
    return "rms_norm", source, source, None, problem


def _variance(statistic: fx.Node) -> _Moments | None:
    """var(x) from `var_mean` or `var`, uncorrected: LayerNorm's statistic. The centred value is `x - mean`."""
    node = strip(statistic, _TRANSPARENT)
    pair = input_node(node) if node.target is ops.operator.getitem and node.args[1] == 0 else None
    if is_call(node, aten.var.correction) or is_call(node, aten.var.dim):
        reduction = node
    elif is_call(pair, aten.var_mean.correction):
        reduction = pair
    else:
        return None
    correction = argument(reduction, "correction")
    if is_call(reduction, aten.var.dim):
        correction = 1 if argument(reduction, "unbiased", True) else 0
    problem = _dims_problem(reduction)
    if correction != 0:
        problem = problem or f"the norm's variance is corrected by {1 if correction is None else correction}, not 0"
    source = strip(input_node(reduction), _TRANSPARENT)
    for candidate in _through_casts(input_node(reduction), source):
        for user in candidate.users:
            if _subtracts_value(user) and user.args[0] is candidate:
                mean = strip(user.args[1], _TRANSPARENT)
                from_pair = mean.target is ops.operator.getitem and mean.args == (pair, 1)
                averaged = None if from_pair else _mean_of(mean)
                if from_pair or (averaged is not None and strip(averaged[0], _TRANSPARENT) is source):
                    return "layer_norm", user, source, mean, problem or (averaged[1] if averaged else "")
    return None


def _subtracts_value(node: fx.Node) -> bool:
    """Whether `node` is one value minus another, once."""
    if not is_call(node, ops.SUBS) or len(node.args) < 2 or node.kwargs.get("alpha", 1) != 1:
        return False
    return all(isinstance(side, fx.Node) for side in node.args[:2])


def _through_casts(node: fx.Node, source: fx.Node) -> Iterator[fx.Node]:
    """`source` and every cast of it, `node` first."""
    yield node
    pending = [source]
    while pending:
        current = pending.pop()
        if current is not node:
            yield current
        pending.extend(user for user in current.users if is_call(user, _TRANSPARENT))


# -- from the statistics to the output --------------------------------------------------------------------------------


def _scaled_by(inverse: fx.Node, centred: fx.Node, divides: bool) -> fx.Node | None:
    """The node `centred * inverse` (or `centred / inverse`), looking through casts of both."""
    wanted = ops.DIVS if divides else ops.MULS
    root = strip(centred, _TRANSPARENT)
    for factor in _through_casts(inverse, inverse):
        for user in factor.users:
            if not is_call(user, wanted) or len(user.args) < 2:
                continue
            left, right = user.args[:2]
            other = left if right is factor else right
            if divides and right is not factor:
                continue
            if isinstance(other, fx.Node) and _same_value(strip(other, _TRANSPARENT), root):
                return user
    return None


def _same_value(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes are one, or the same subtraction written twice (Cohere centres once for each use)."""
    if a is b:
        return True
    if not (is_call(a, ops.SUBS) and is_call(b, ops.SUBS)) or a.target is not b.target or a.kwargs != b.kwargs:
        return False
    return all(strip(x, _TRANSPARENT) is strip(y, _TRANSPARENT) for x, y in zip(a.args, b.args, strict=True))


def _with_affine(norm: Norm) -> Norm:
    """Extend the output over casts, one multiplication by a weight and one addition of a bias.

    A value used twice is followed along its last user that fits, which is the forward's: other users, such as
    backward's, keep the old chain alive, and that chain is computed from the statistics.
    """
    while True:
        longer = next((step for user in norm.output.users if (step := _affine_step(norm, user)) is not None), None)
        if longer is None:
            return norm
        norm = longer


def _affine_step(norm: Norm, user: fx.Node) -> Norm | None:
    at = norm.output
    if is_call(user, ops.CASTS):
        val = value(user)
        return replace(norm, output=user) if val is not None and val.dtype in ops.FLOATS else None
    if len(user.args) < 2 or not same_shape(user, at):
        return None
    left, right = user.args[:2]
    vector = left if right is at else right
    if not isinstance(vector, fx.Node) or vector is at or not _is_row_vector(vector, norm.source):
        return None
    if norm.weight is None and norm.bias is None and is_call(user, ops.MULS):
        weight, offset = _split_offset(vector)
        return replace(norm, output=user, weight=weight, weight_offset=offset)
    if norm.bias is None and is_call(user, ops.ADDS) and user.kwargs.get("alpha", 1) == 1:
        return replace(norm, output=user, bias=vector)
    return None


def _is_row_vector(node: fx.Node, source: fx.Node) -> bool:
    """Whether `node` is one value per hidden unit, the same for every row, and comes from the graph's inputs."""
    val = value(node)
    if val is None or val.dim() < 1 or val.dtype not in ops.FLOATS:
        return False
    if not same_size(val.shape[-1], last_dim(source)) or any(not same_size(s, 1) for s in val.shape[:-1]):
        return False
    return _from_inputs(node)


def _from_inputs(node: fx.Node, depth: int = 12) -> bool:
    """Whether `node` is a graph input, or computed from graph inputs alone in a few steps."""
    if node.op in ("placeholder", "get_attr"):
        return not str(node.target).startswith("tangents")
    if depth == 0 or node.op != "call_function":
        return False
    return all(_from_inputs(parent, depth - 1) for parent in node.all_input_nodes)


def _split_offset(vector: fx.Node) -> tuple[fx.Node, float]:
    """Gemma's `1 + weight`: (weight, 1.0); anything else: (vector, 0.0)."""
    node = strip(vector, _TRANSPARENT)
    if is_call(node, ops.ADDS) and len(node.args) > 1 and node.kwargs.get("alpha", 1) == 1:
        for weight, offset in (node.args[:2], node.args[1::-1]):
            if isinstance(weight, fx.Node) and is_number(offset):
                root = strip(weight, _TRANSPARENT)
                return (root if value(root) is not None else weight), float(offset)
    return vector, 0.0


def _finfo_eps(source: fx.Node) -> float:
    """The eps of `F.rms_norm(eps=None)`: machine epsilon of the dtype that the norm is computed in."""
    dtype = val(source).dtype
    return torch.finfo(torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype).eps
