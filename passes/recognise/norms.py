"""Find RMSNorm and LayerNorm in a graph, in every spelling. Reads only.

Norms that stay whole (`aten.rms_norm`, `native_layer_norm`, ...) are read off their arguments. Norms written out are
anchored on their statistics, because everything else varies between models:

    rms_norm     y = x * rsqrt(mean(x^2) + eps) [* weight] [+ bias]
    layer_norm   y = (x - mean(x)) * rsqrt(var(x) + eps) [* weight] [+ bias]

with `1/sqrt(...)`, `x / sqrt(...)` and `pow(..., -0.5)` for rsqrt, casts anywhere, the weight before or after the last
cast, on x (`weight * x * rsqrt(...)`) or on the root (`x * (rsqrt(...) * weight)`), and Gemma's `1 + weight`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import fx

from ..facts import aten_ops as ops
from ..facts.backward import is_incoming_gradient
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
from .statistics import (
    TRANSPARENT,
    Moments,
    keeps_order,
    moments,
    moments_of_squares,
    one_a_row,
    repeats_over_rows,
    root_of,
    strip_views,
    vector_norm,
)

aten = ops.aten


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
_ANCHORS |= {aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim}
#: `F.normalize` divides by max(|x|, least). As eps the square of a number as small changes only rows whose every
#: element is smaller still.
_LARGEST_LEAST = 1e-10


def written_out_norm(node: fx.Node) -> Norm | None:
    """A norm spelled in elementary operators, anchored at `node` = (mean of squares or variance + eps)^(-1/2)."""
    if node.target not in _ANCHORS:
        return None
    inverse = _inverse_square_root(node)
    if inverse is None:
        return None
    radicand, divides = inverse
    statistic, eps = _split_eps(radicand)
    found = moments(statistic) if radicand is not node else moments_of_squares(vector_norm(node))
    if found is None:
        return None
    scaled = _scaled_by(node, found, divides)
    if scaled is None:
        return None
    factor, size = scaled.factor, last_dim(found.source)
    if scaled.least:
        if isinstance(eps, fx.Node) or eps or scaled.least > _LARGEST_LEAST or not found.total:
            return None
        eps = scaled.least**2
    if found.total:
        if not isinstance(size, int) or not size or isinstance(eps, fx.Node):
            return None
        eps, factor = eps / size, factor / math.sqrt(size)
    rstd = None if divides or found.total or not _of_rows(node, scaled.source) else node
    mean = found.mean if found.mean is not None and _of_rows(found.mean, scaled.source) else None
    norm = Norm(found.kind, scaled.source, scaled.output, eps, mean=mean, rstd=rstd, problem=found.problem)
    if scaled.weight is not None:
        weight, offset = _split_offset(scaled.weight)
        norm = replace(norm, weight=weight, weight_offset=offset)
    return _with_affine(norm, factor)


def _inverse_square_root(node: fx.Node) -> tuple[fx.Node, bool] | None:
    """(radicand, whether the value is later divided by `node` rather than multiplied); of a vector norm, itself."""
    if is_call(node, aten.rsqrt.default):
        return input_node(node), False
    if is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == -0.5:
        return input_node(node), False
    if is_call(node, aten.reciprocal.default):
        radicand = root_of(node.args[0])
        return (radicand, False) if radicand is not None else None
    if vector_norm(node) is not None:
        return node, True
    radicand = root_of(node)
    return (radicand, True) if radicand is not None else None


def _split_eps(radicand: fx.Node) -> tuple[fx.Node, float | fx.Node]:
    """`statistic + eps` in either order, eps a number or a 0-d tensor; or the statistic alone."""
    if not is_call(radicand, ops.ADDS) or len(radicand.args) < 2 or radicand.kwargs.get("alpha", 1) != 1:
        return radicand, 0.0
    for statistic, eps in (radicand.args[:2], radicand.args[1::-1]):
        if not isinstance(statistic, fx.Node):
            continue
        if is_number(eps):
            return statistic, float(eps)
        if isinstance(eps, fx.Node) and _is_scalar(eps):
            root = strip(eps, TRANSPARENT)
            return statistic, root if value(root) is not None else eps
    return radicand, 0.0


def _is_scalar(node: fx.Node) -> bool:
    val = value(node)
    return val is not None and val.dim() == 0


def _of_rows(statistic: fx.Node, source: fx.Node) -> bool:
    """Whether a statistic has the rows' shape, with or without a last dimension of size 1."""
    numbers, rows = value(statistic), value(source)
    if numbers is None or rows is None:
        return False
    flat = numbers.dim() == rows.dim() - 1 and all(map(same_size, numbers.shape, rows.shape[:-1]))
    return flat or one_a_row(statistic, source)


# -- from the statistics to the output --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scaled:
    """`output` = source (or what is centred) * `factor` / root, and times `weight` where that stands before `output`;
    `least`: where the root is max(root, least), else 0."""

    output: fx.Node
    source: fx.Node
    factor: float
    least: float = 0.0
    weight: fx.Node | None = None


def _scaled_by(inverse: fx.Node, found: Moments, divides: bool) -> _Scaled | None:
    """Where `found.centred` is multiplied by `inverse`, or divided by it, over casts, views, numbers and one weight.
    The first place in graph order, since a backward pass scales by it as well."""
    places: list[_Scaled] = []
    pending: list[tuple[fx.Node, float, float, fx.Node | None]] = [(inverse, 1.0, 0.0, None)]
    while pending:
        node, factor, least, weight = pending.pop(0)
        further: list[tuple[fx.Node, float, float, fx.Node | None]] = []
        for user in node.users:
            times = _times_number(user)
            if is_call(user, TRANSPARENT) or keeps_order(user) or repeats_over_rows(user):
                further.append((user, factor, least, weight))
            elif times is not None:
                further.append((user, factor * times[1], least, weight))
            elif divides and is_call(user, aten.clamp_min.default) and factor > 0 and is_number(user.args[1]):
                further.append((user, factor, float(user.args[1]) / factor, weight))
            elif (output := _scales(user, node, found, divides, weight)) is not None:
                number = output.factor / factor if divides else output.factor * factor
                places.append(replace(output, factor=number, least=least))
            elif not divides and weight is None and one_a_row(node, found.source):
                further += [(user, factor, least, vector) for _, vector in _times_weight(user, found.source, of=node)]
        pending = further + pending
    return min(places, key=lambda scaled: scaled.output, default=None)


def _scales(
    user: fx.Node, factor: fx.Node, found: Moments, divides: bool, weight: fx.Node | None = None
) -> _Scaled | None:
    """What `user` scales by `factor`, if that is `found.centred`, times a number and a weight before; `weight`: what
    `factor` was multiplied by."""
    if not is_call(user, ops.DIVS if divides else ops.MULS) or len(user.args) < 2:
        return None
    left, right = user.args[:2]
    other = left if right is factor else right
    if not isinstance(other, fx.Node) or (divides and right is not factor):
        return None
    broadcasts = one_a_row(factor, other) if weight is None else same_shape(user, other)
    if not found.problem and not broadcasts:
        return None
    pending = [(other, 1.0, weight)]
    while pending:
        rows, times, weight = pending.pop()
        rows = strip(rows, TRANSPARENT)
        if _same_value(rows, found.centred):
            return _Scaled(user, found.source, times, weight=weight)
        below = _times_number(rows)
        if below is not None:
            pending.append((below[0], times * below[1], weight))
            continue
        alike = found.centred is found.source and same_size(last_dim(rows), last_dim(found.source))
        if alike and strip_views(rows) is strip_views(found.source):
            return _Scaled(user, rows, times, weight=weight)
        if weight is None:
            pending += [(inner, times, vector) for inner, vector in _times_weight(rows, found.source)]
    return None


def _times_weight(node: fx.Node, source: fx.Node, of: fx.Node | None = None) -> list[tuple[fx.Node, fx.Node]]:
    """(x, weight) for either way to read `node` as x times one value per hidden unit; `of`: x is that node."""
    if not is_call(node, ops.MULS) or len(node.args) < 2:
        return []
    pairs = (node.args[:2], node.args[1::-1])
    return [
        (x, weight)
        for x, weight in pairs
        if isinstance(x, fx.Node) and isinstance(weight, fx.Node) and x is not weight
        if (of is None or x is of) and same_shape(node, x if of is None else source) and _is_row_vector(weight, source)
    ]


def _times_number(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(x, number) if `node` is x times a number, or divided by one."""
    if not is_call(node, ops.MULS | ops.DIVS) or len(node.args) < 2 or not is_float(node):
        return None
    left, right = node.args[:2]
    if isinstance(left, fx.Node) and is_number(right) and right:
        return left, float(right) if is_call(node, ops.MULS) else 1.0 / right
    if is_call(node, ops.MULS) and isinstance(right, fx.Node) and is_number(left) and left:
        return right, float(left)
    return None


def _same_value(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes are one, or the same subtraction written twice (Cohere centres once for each use)."""
    if a is b:
        return True
    if not (is_call(a, ops.SUBS) and is_call(b, ops.SUBS)) or a.target is not b.target or a.kwargs != b.kwargs:
        return False
    return all(strip(x, TRANSPARENT) is strip(y, TRANSPARENT) for x, y in zip(a.args, b.args, strict=True))


def _with_affine(norm: Norm, factor: float) -> Norm | None:
    """Extend the output over casts, one multiplication by a weight and one addition of a bias; None where a `factor` is
    left over that is not 1.

    A value used twice is followed along its last user that fits, which is the forward's: other users, such as
    backward's, keep the old chain alive, and that chain is computed from the statistics.
    """
    while True:
        steps = (step for user in norm.output.users if (step := _affine_step(norm, user, factor)) is not None)
        longer = next(steps, None)
        if longer is None:
            return norm if _is_one(factor) else None
        norm, factor = longer


def _is_one(factor: float) -> bool:
    return math.isclose(factor, 1.0, rel_tol=1e-6)


def _affine_step(norm: Norm, user: fx.Node, factor: float) -> tuple[Norm, float] | None:
    at = norm.output
    if is_call(user, ops.CASTS):
        val = value(user)
        longer = (replace(norm, output=user), factor) if val is not None and val.dtype in ops.FLOATS else None
        # Others read what was rounded: a wider cast of it is one more reader, unless a weight or bias is behind it.
        if longer is not None and val is not None and len(at.users) > 1 and _wider(val, value(at)):
            return longer if any(_affine_step(*longer[:1], each, factor) for each in user.users) else None
        return longer
    if not _is_one(factor) and (times := _times_number(user)) is not None:
        return replace(norm, output=user), factor * times[1]
    if len(user.args) < 2 or not same_shape(user, at):
        return None
    left, right = user.args[:2]
    vector = left if right is at else right
    if not isinstance(vector, fx.Node) or vector is at or not _is_row_vector(vector, norm.source):
        return None
    if norm.weight is None and norm.bias is None and is_call(user, ops.MULS):
        if not _is_one(factor) and (times := _times_number(vector)) is not None:
            vector, factor = times[0], factor * times[1]
        weight, offset = _split_offset(vector)
        return replace(norm, output=user, weight=weight, weight_offset=offset), factor
    if norm.bias is None and is_call(user, ops.ADDS) and user.kwargs.get("alpha", 1) == 1 and _is_one(factor):
        return replace(norm, output=user, bias=vector), factor
    return None


def _wider(new: torch.Tensor, old: torch.Tensor | None) -> bool:
    return old is not None and new.dtype.itemsize > old.dtype.itemsize


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
        return not is_incoming_gradient(node)
    if depth == 0 or node.op != "call_function":
        return False
    return all(_from_inputs(parent, depth - 1) for parent in node.all_input_nodes)


def _split_offset(vector: fx.Node) -> tuple[fx.Node, float]:
    """Gemma's `1 + weight`: (weight, 1.0); anything else: (vector, 0.0)."""
    node = strip(vector, TRANSPARENT)
    if is_call(node, ops.ADDS) and len(node.args) > 1 and node.kwargs.get("alpha", 1) == 1:
        for weight, offset in (node.args[:2], node.args[1::-1]):
            if isinstance(weight, fx.Node) and is_number(offset):
                root = strip(weight, TRANSPARENT)
                return (root if value(root) is not None else weight), float(offset)
    return vector, 0.0


def _finfo_eps(source: fx.Node) -> float:
    """The eps of `F.rms_norm(eps=None)`: machine epsilon of the dtype that the norm is computed in."""
    dtype = val(source).dtype
    return torch.finfo(torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype).eps
