"""All-reduces of other tools that a user declared, in the form of torch's own, and back.

    out = ns.all_reduce(x, group)    ⇄    pending = _c10d_functional.all_reduce(x, "sum", group); out = wait(pending)

The passes read and rewrite the form on the right. What they leave of it becomes the operator that the program wrote
again, so only a rewrite that is worth it ever takes the other tool's operator out of a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from tpfuse._torch_private import copied, operator_full_name
from tpfuse.declared import Declaration

from . import aten_ops as ops
from .graph import argument, function_of, same_shape, value

#: Metadata of an all-reduce that stands for a declared one, and of its wait.
DECLARED = "tpfuse_declared"


@dataclass(frozen=True)
class Written:
    """The call that the program wrote: `tensor` is where among its arguments (a position or a keyword) the tensor goes.
    `stands` are the other arguments of what stands for it."""

    declaration: Declaration
    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    tensor: int | str
    stands: tuple[Any, ...]


def operator_of(node: fx.Node) -> str:
    """The name of the declared operator that `node` stands for, or ''."""
    written = node.meta.get(DECLARED)
    return operator_full_name(written.target) if isinstance(written, Written) else ""


def as_functional(graph: fx.Graph, declared: Sequence[Declaration]) -> tuple[fx.Graph, list[str]]:
    """(`graph`, or a copy in which functional all-reduces stand for the declared ones; notes on those left)."""
    found = [node for node in graph.nodes if node.op == "call_function" and _declaration(node, declared) is not None]
    if not found:
        return graph, []
    changed, notes = copied(graph), []
    changed.owning_module = graph.owning_module
    for node in list(changed.nodes):
        declaration = _declaration(node, declared)
        if declaration is None:
            continue
        problem = declaration.problem(node.target) or _problem(node, declaration)
        if problem:
            notes.append(f"{declaration.name} is declared as an all-reduce and left as it is: {problem}")
        else:
            _put(changed, node, declaration)
    return changed, list(dict.fromkeys(notes))


def as_declared(graph: fx.Graph) -> None:
    """Put the declared operators back where what stands for them is left. Changes `graph`."""
    for node in list(graph.nodes):
        written = node.meta.get(DECLARED)
        if not isinstance(written, Written) or node.target is not ops.c10d.all_reduce.default:
            continue
        waits = list(node.users)
        if node.args[1:] != written.stands or any(wait.target is not ops.WAIT for wait in waits):
            continue  # something else was made of it
        args, kwargs = list(written.args), dict(written.kwargs)
        if isinstance(written.tensor, int):
            args[written.tensor] = node.args[0]
        else:
            kwargs[written.tensor] = node.args[0]
        with graph.inserting_before(node):
            call = graph.create_node("call_function", written.target, tuple(args), kwargs, name=written.name)
        call.meta = {key: found for key, found in node.meta.items() if key != DECLARED}
        for wait in waits:
            wait.replace_all_uses_with(call, propagate_meta=False)
            graph.erase_node(wait)
        graph.erase_node(node)


def _declaration(node: fx.Node, declared: Sequence[Declaration]) -> Declaration | None:
    if not declared or node.op != "call_function":
        return None
    return next((declaration for declaration in declared if declaration.means(node.target)), None)


def _problem(node: fx.Node, declaration: Declaration) -> str:
    tensor = argument(node, declaration.tensor(node.target))
    given, result = value(tensor), value(node)
    if given is None or result is None:
        return "its argument or its result has no fake value"
    if not same_shape(tensor, node) or given.dtype != result.dtype:
        return f"it makes {_described(result)} of {_described(given)}, and a sum has the shape and dtype of its parts"
    others = [arg for arg in (*node.args, *node.kwargs.values()) if arg is not tensor]
    if any(isinstance(arg, (fx.Node, list, tuple, dict)) for arg in others):
        return "an argument besides the tensor is computed in the graph, or holds several values"
    return ""


def _described(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _put(graph: fx.Graph, node: fx.Node, declaration: Declaration) -> None:
    tensor = argument(node, declaration.tensor(node.target))
    op_name = declaration.reduce_op(node.target)
    op = "sum" if op_name is None else argument(node, op_name)
    stands = (op.lower() if isinstance(op, str) else str(op), _group(node, declaration))
    place = node.args.index(tensor) if tensor in node.args else next(k for k, v in node.kwargs.items() if v is tensor)
    args = tuple(None if arg is tensor else arg for arg in node.args)
    kwargs = tuple((key, None if arg is tensor else arg) for key, arg in node.kwargs.items())
    written = Written(declaration, node.name, function_of(node), args, kwargs, place, stands)
    with graph.inserting_before(node):
        target = ops.c10d.all_reduce.default
        pending = graph.create_node("call_function", target, (tensor, *stands), name=f"{node.name}_functional")
        finished = graph.create_node("call_function", ops.WAIT, (pending,), name=f"{node.name}_finished")
    for new in (pending, finished):
        new.meta = dict(node.meta)
    pending.meta[DECLARED] = written
    node.replace_all_uses_with(finished, propagate_meta=False)
    graph.erase_node(node)


def _group(node: fx.Node, declaration: Declaration) -> Any:
    """The name by which torch knows the group."""
    name = argument(node, declaration.group)
    if declaration.resolve is None or not isinstance(name, str):
        return name
    group = declaration.resolve(name)
    return group.group_name if isinstance(group, dist.ProcessGroup) else group
