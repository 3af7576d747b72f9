"""Small helpers over FX graphs: reading arguments by name, fake values, and new nodes that carry their metadata."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import fx

from tpfuse._torch_private import REQUIRED, defaults_of, operator_schema, storage_identity
from tpfuse.errors import TPFuseError

from . import aten_ops as ops
from .fakes import call_on_fakes

#: Metadata: the name of the collective that a node stands for (see accounting.py).
ORIGIN = "tpfuse_origin"
#: Metadata of an operation that gathers as well: the name of the gather that it stands for.
GATHERS = "tpfuse_gathers"
#: Metadata of a gather of quantised rows with their scales: (how they are quantised, whether it stands in the place of
#: the program's own gather, of the rows as they are).
QUANTISED_ROWS = "tpfuse_quantised_rows"
#: Metadata of a gather: it gathers what is each rank's own, whatever that is.
OWN_ROWS = "tpfuse_own_rows"
#: Metadata of a fused operation: its rank finishes rows that other ranks read, with its own residual, weight and bias.
FINISHES = "tpfuse_finishes"

#: Metadata a new node takes from the node it replaces, so that activation checkpointing, stack traces and module
#: names survive. "val" is not among them: the new node's own value is computed.
CARRIED_META = (
    ORIGIN,
    "recompute",
    "ac_graph_id",
    "has_backward_hook",
    "nn_module_stack",
    "fwd_nn_module_stack",
    "stack_trace",
    "source_fn_stack",
    "fwd_source_fn_stack",
    "seq_nr",
    "partitioner_tag",
    "mutation_region_id",
    "from_node",
    "custom",
)


def value(node: Any) -> torch.Tensor | None:
    """The fake tensor `node` stands for, or None when it has none (or is no single tensor)."""
    if not isinstance(node, fx.Node):
        return None
    val = node.meta.get("val")
    if val is None:
        val = node.meta.get("tensor_meta") if isinstance(node.meta.get("tensor_meta"), torch.Tensor) else None
    return val if isinstance(val, torch.Tensor) else None


def val(node: Any) -> torch.Tensor:
    """The fake tensor `node` stands for, where an earlier step made sure that there is one.

    Raises:
        TPFuseError: there is none; an error of ours, which leaves the graph as it was.
    """
    found = value(node)
    if found is None:
        raise TPFuseError(f"internal error: {node} has no fake value (meta['val']), and a step relies on one")
    return found


def input_node(node: fx.Node, position: int = 0) -> fx.Node:
    """The value that `node` reads as its argument number `position`, where that is known to be one of the graph.

    Raises:
        TPFuseError: it is none; an error of ours, which leaves the graph as it was.
    """
    found = node.args[position] if position < len(node.args) else None
    if not isinstance(found, fx.Node):
        raise TPFuseError(f"internal error: argument {position} of {node} ({node.target}) is {found!r}, no node")
    return found


def function_of(node: fx.Node) -> Callable[..., Any]:
    """What a node that calls a function calls."""
    if not callable(node.target):
        raise TPFuseError(f"internal error: {node} calls {node.target!r} by name")
    return node.target


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """The argument called `name` in the schema of `node.target`, wherever it was written."""
    if name in node.kwargs:
        return node.kwargs[name]
    if operator_schema(node.target) is None:
        return default
    known = defaults_of(node.target)
    if name not in known:
        return default
    position = list(known).index(name)
    if position < len(node.args):
        return node.args[position]
    return default if known[name] is REQUIRED else known[name]


def is_call(node: Any, targets: Any) -> TypeGuard[fx.Node]:
    """Whether `node` calls one of `targets` (a set, or one operator). An in-place form counts as its twin where nobody
    can tell the difference."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    target = node.target
    if target in ops.IN_PLACE_TWINS and writes_to_temporary(node):
        target = ops.IN_PLACE_TWINS[target]
    return target in targets if isinstance(targets, (set, frozenset, dict, tuple)) else target is targets


def is_number(x: Any) -> TypeGuard[float]:
    """Whether `x` is a finite number that a float can hold. Complex numbers and bools are none."""
    if not isinstance(x, (int, float)) or isinstance(x, bool):
        return False
    return -sys.float_info.max <= x <= sys.float_info.max


def symbols(number: object) -> frozenset[str]:
    """Names of the symbols in a symbolic number; none in any other value."""
    if not isinstance(number, (torch.SymInt, torch.SymFloat)):
        return frozenset()
    return frozenset(str(symbol) for symbol in number.node.expr.free_symbols)


def symbols_told(numbers: Iterable[object]) -> frozenset[str]:
    """Names of the symbols that are equal wherever all of these numbers are. A number tells one that it is a multiple
    of, plus or minus what is told: not those of (1 + s - k) // 2, which is the same for several k. A product is taken
    to tell what each of its factors tells: the sizes of rows that were flattened."""
    expressions = {n.node.expr for n in numbers if isinstance(n, (torch.SymInt, torch.SymFloat))}
    told: set[Any] = set()
    while True:
        left = ((e, e.free_symbols - told) for e in expressions)
        more = {symbol for e, unknown in left if unknown and _tells(e, unknown) for symbol in unknown}
        if not more:
            return frozenset(map(str, told))
        told |= more


def _tells(expression: Any, unknown: Set[Any]) -> bool:
    if not expression.is_polynomial(*unknown):
        return False
    if len(unknown) == 1:
        (symbol,) = unknown
        slope = expression.diff(symbol)
        return bool(slope != 0 and symbol not in slope.free_symbols)
    factors = expression.factor()
    return bool(factors.is_Mul and all(len(each) < 2 for f in factors.args if (each := f.free_symbols & unknown)))


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs of `node` that may be tensors: all but those whose fake value says otherwise."""
    return [n for n in node.all_input_nodes if n.meta.get("val") is None or not isinstance(n.meta["val"], _NUMBERS)]


_NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)


def writes_to_temporary(node: fx.Node) -> bool:
    """Whether an in-place operator writes to a tensor that only it reads, so that its functional twin does the same."""
    written = node.args[0] if node.args else None
    if not isinstance(written, fx.Node) or len(written.users) != 1:
        return False
    if written.target in ops.IN_PLACE_TWINS:
        return writes_to_temporary(written)
    source = written
    if written.target is ops.operator.getitem:
        source, index = input_node(written), written.args[1]
        if sum(user.args[1:] == (index,) for user in source.users) != 1:
            return False
    schema = operator_schema(source.target)
    if source.op != "call_function" or schema is None or source.target is ops.WAIT:
        return False
    if any(result.alias_info is not None for result in schema.returns) or value(written) is None:
        return False
    storage = storage_identity(val(written))
    inputs = [value(parent) for parent in source.all_input_nodes]
    return storage is not None and all(read is None or storage_identity(read) != storage for read in inputs)


def why_unusual(node: fx.Node, what: str) -> str:
    """Why the fused operation cannot take or give `node`'s value, as a sentence about `what`; '' if it can."""
    val = value(node)
    if val is None:
        return f"{what} has no fake value (meta['val']), so its shape and dtype are unknown"
    if type(val) not in (torch.Tensor, torch.nn.Parameter) and not hasattr(val, "fake_mode"):
        return f"{what} is a {type(val).__name__}, not a plain tensor"
    if val.layout is not torch.strided or val.is_nested:
        return f"{what} is a tensor of layout {val.layout}, not a dense one"
    if val.dtype not in ops.FLOATS:
        return f"{what} has dtype {val.dtype}; only float16, bfloat16, float32 and float64 can be fused"
    if val.is_neg():
        return f"{what} is a view with its negative bit set"
    return ""


def row_major(node: fx.Node) -> bool:
    """Whether `node`'s value surely lies in memory row after row."""
    tensor = val(node)
    if any(same_size(size, 0) for size in tensor.shape):
        return True
    expected: Any = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not same_size(size, 1):
            if not same_size(stride, expected):
                return False
            expected = expected * size
    return True


def same_strides(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes of one shape surely have equal strides wherever a stride means something."""
    return strides_agree(val(a), val(b))


def strides_agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same of two tensors."""
    return any(same_size(size, 0) for size in a.shape) or all(
        same_size(size, 1) or same_size(x, y) for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def use_positions(graph: fx.Graph) -> None:
    """Write arguments by position where the operator's schema has them so: the passes read them off `node.args`."""
    for node in graph.nodes:
        if node.op != "call_function" or not node.kwargs:
            continue
        schema = operator_schema(node.target)
        if schema is None:
            continue
        args, kwargs = list(node.args), dict(node.kwargs)
        for parameter in schema.arguments[len(args) :]:
            if parameter.kwarg_only or parameter.name not in kwargs:
                break
            args.append(kwargs.pop(parameter.name))
        if len(args) > len(node.args):
            node.args, node.kwargs = tuple(args), kwargs


def last_dim(node: fx.Node) -> Any:
    """The size of the last dimension, or None for a scalar or a node without a tensor value."""
    val = value(node)
    return val.shape[-1] if val is not None and val.dim() > 0 else None


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes surely have equal shapes; an undecidable symbolic comparison counts as no."""
    va, vb = value(a), value(b)
    if va is None or vb is None or va.dim() != vb.dim():
        return False
    return all(same_size(x, y) for x, y in zip(va.shape, vb.shape, strict=True))


def same_size(x: Any, y: Any) -> bool:
    """Whether two sizes are equal for certain. Never adds a guard: an answer must not narrow the compiled graph."""
    if isinstance(x, int) and isinstance(y, int):
        return x == y
    return _expression(x) == _expression(y)


def _expression(size: Any) -> Any:
    """The expression of a symbolic size, or what else stands for it (sizes of nested tensors have none)."""
    node = getattr(size, "node", None)
    return size if node is None else getattr(node, "expr", node)


def permutation(node: fx.Node) -> list[int]:
    """Of a view in `REORDERINGS`: which dimension of its input each of its own is."""
    count = val(node).dim()
    order = list(range(count))
    if is_call(node, ops.aten.permute.default):
        return [dim % count for dim in argument(node, "dims")]
    if count < 2:
        return order
    a, b = (0, 1) if is_call(node, ops.aten.t.default) else (argument(node, "dim0"), argument(node, "dim1"))
    order[a], order[b] = order[b], order[a]
    return order


def strip(node: Any, targets: set[Any]) -> Any:
    """Walk from `node` towards the inputs while it is one of `targets` (unary operators) and stays a floating-point
    value: a cast to an integer and back is no rounding."""
    while is_call(node, targets) and node.args and is_float(node) and is_float(node.args[0]):
        node = node.args[0]
    return node


def is_float(node: Any) -> TypeGuard[fx.Node]:
    """Whether `node` is a tensor of a dtype that the fused operation takes."""
    val = value(node)
    return val is not None and val.dtype in ops.FLOATS


def insert_call(
    graph: fx.Graph, target: Callable[..., Any], args: tuple, kwargs: dict | None = None, *, like: fx.Node
) -> fx.Node:
    """Insert a call at the graph's insertion point, with its fake value computed and `like`'s metadata carried."""
    node = graph.call_function(target, args, kwargs or {})
    carry_meta(like, node)
    node.meta["val"] = fake_result(node)
    return node


@contextmanager
def inserting_behind(graph: fx.Graph, node: fx.Node) -> Iterator[None]:
    """Whatever is inserted inside stands behind `node`, in the order in which it is inserted."""
    with graph.inserting_after(node):
        place = graph.call_function(_here)
    with graph.inserting_before(place):
        yield
    graph.erase_node(place)


def _here() -> None:
    """Marks a place in a graph while nodes are inserted there."""


def scaled(graph: fx.Graph, node: fx.Node, scale: float) -> fx.Node:
    return node if scale == 1.0 else insert_call(graph, ops.aten.mul.Tensor, (node, scale), like=node)


def added(graph: fx.Graph, left: fx.Node | None, right: fx.Node) -> fx.Node:
    return right if left is None else insert_call(graph, ops.aten.add.Tensor, (left, right), like=right)


def carry_meta(source: fx.Node, target: fx.Node) -> None:
    for key in CARRIED_META:
        if key in source.meta:
            target.meta[key] = source.meta[key]


def fake_result(node: fx.Node) -> Any:
    """What `node` returns for the fake values of its arguments; no real work is done."""
    if node.target is ops.operator.getitem:
        return input_node(node).meta["val"][node.args[1]]
    given: list[Any] = []

    def fake(arg: fx.Node) -> Any:
        given.append(arg.meta["val"])
        return given[-1]

    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), fake)
    return call_on_fakes(function_of(node), args, kwargs, given)


def depends_on(node: fx.Node, sources: set[fx.Node]) -> bool:
    """Whether `node` is computed from any of `sources`. Looks only at nodes that stand after the first source."""
    if not sources:
        return False
    first = min(sources)
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in sources:
            return True
        if current in seen or current < first:
            continue
        seen.add(current)
        stack.extend(current.all_input_nodes)
    return False


def region_between(out: fx.Node, waits: set[fx.Node]) -> set[fx.Node]:
    """The nodes on a way from one of `waits` to `out`, `out` included."""
    first = min(waits)
    known: dict[fx.Node, bool] = {}

    def leads_here(node: fx.Node) -> bool:
        stack = [(node, iter(node.all_input_nodes))]
        while stack:
            current, parents = stack[-1]
            if current in known:
                stack.pop()
                continue
            for parent in parents:
                if parent not in known and parent not in waits and not parent < first:
                    stack.append((parent, iter(parent.all_input_nodes)))
                    break
            else:
                known[current] = any(p in waits or known.get(p, False) for p in current.all_input_nodes)
                stack.pop()
        return known[node]

    leads_here(out)
    return {node for node, leads in known.items() if leads} | {out}
