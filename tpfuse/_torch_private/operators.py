"""Operators: their schemas, names and overloads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def register_local_tensor_rule(op: Any, decomposition: Callable[..., Any]) -> None:
    """Let `LocalTensorMode` (many ranks in one process) see through a custom op: run its decomposition in the mode.

    If `LocalTensorMode` goes: drop this; only tests use it.
    """
    try:
        from torch.distributed._local_tensor import LocalTensorMode
    except ImportError:
        return

    def rule(mode: Any, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with mode:
            return decomposition(*args, **(kwargs or {}))

    torch.library.register_torch_dispatch(op, LocalTensorMode, rule)


def operator_schema(target: Any) -> torch.FunctionSchema | None:
    """The schema of an operator (`torch.ops.aten.add.Tensor`); None for anything else.

    If `_schema` goes: `torch.library` looks schemas up by name.
    """
    return getattr(target, "_schema", None)


def is_operator(target: Any) -> bool:
    """Whether it is an overload of an operator. If `OpOverload` goes: whether it has a schema."""
    return isinstance(target, torch._ops.OpOverload)


def is_higher_order(target: Any) -> bool:
    """Whether it is an operator that is given graphs. If `HigherOrderOperator` goes: as its namespace says."""
    return isinstance(target, torch._ops.HigherOrderOperator)


@functools.lru_cache(maxsize=4096)
def defaults_of(target: Any) -> Mapping[str, Any]:
    """The arguments by name, in order, of an operator that has a schema, each with its default, or `REQUIRED`. Kept,
    because a schema makes its list of arguments anew whenever it is asked. If `_schema` goes: as above."""
    return {a.name: a.default_value if a.has_default_value() else REQUIRED for a in target._schema.arguments}


#: In place of a default: there is none.
REQUIRED = object()


def argument_names(target: Any) -> list[str]:
    """The names of an operator's arguments, in order; none for anything else."""
    return list(defaults_of(target)) if operator_schema(target) is not None else []


def auto_functionalized() -> Any:
    """The higher-order operator by which compiled graphs hold operators that write into their arguments:
    auto_functionalized(operator, **arguments) gives (what it returns, the tensors it wrote into, in its order).

    If it goes: leave fused operations as they are; a call then costs the host some 20 us more.
    """
    return torch.ops.higher_order.auto_functionalized


def operator_full_name(target: Any) -> str:
    """The name of an operator with its namespace ("aten::add"); "" for anything else."""
    schema = operator_schema(target)
    return schema.name if schema is not None else ""


def operator_name(target: Any) -> str:
    """The same without namespace ("add"); in-place forms keep their underscore ("add_"), overloads have one name."""
    return operator_full_name(target).split("::")[-1]


def is_view(target: Any) -> bool:
    """Whether an operator gives its argument's memory in another shape, and reads none of it.

    If `is_view` goes: the schema's results have aliases that are not written to.
    """
    return bool(getattr(target, "is_view", False))


def written_arguments(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors among an operator's arguments that it writes to."""
    if (schema := operator_schema(target)) is None:
        return []
    named = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | dict(kwargs)
    written = [named.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [tensor for tensor in written if isinstance(tensor, torch.Tensor)]


def qualified_operator(op: Any) -> str:
    """ "ns::op" of torch.ops.ns.op or of what torch.library.custom_op returns, "ns::op.overload" of an overload; "" for
    anything else.

    If the names go: only an operator's name as a string is taken.
    """
    for name in ("_qualified_op_name", "_qualname"):
        if isinstance(found := getattr(op, name, None), str):
            return found
    return f"{operator_full_name(op)}.{op._overloadname}" if isinstance(op, torch._ops.OpOverload) else ""


def operator_overloads(name: str) -> list[Any]:
    """The operators that are called "ns::op", or the one called "ns::op.overload"; none where there is none yet."""
    namespace, _, rest = name.partition("::")
    op, _, overload = rest.partition(".")
    try:
        packet = getattr(getattr(torch.ops, namespace), op)
        return [getattr(packet, each) for each in ([overload] if overload else packet.overloads())]
    except AttributeError:
        return []


def kernel_name(index: int) -> str:
    """The name of the program's Triton kernel that graphs know by a number.

    If `kernel_side_table` goes: '', and reports say no more than that it is a Triton kernel.
    """
    try:
        from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

        kernel: Any = kernel_side_table.get_kernel(index)
    except (ImportError, AssertionError, KeyError):
        return ""
    while hasattr(kernel, "fn") and not hasattr(kernel, "__name__"):  # autotuning wraps what it tunes
        kernel = kernel.fn
    return str(getattr(kernel, "__name__", ""))
