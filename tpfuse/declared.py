"""Collectives of other tools: all-reduces that a user declares, so that they are recognised like torch's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from . import _state as state
from ._torch_private import operator_full_name, operator_overloads, operator_schema, qualified_operator
from .errors import DeclarationError

#: Which process group a group's name means: a ProcessGroup, or the name torch knows it by.
Resolve = Callable[[str], "dist.ProcessGroup | str"]

_NAME = re.compile(r"[A-Za-z_]\w*::[A-Za-z_]\w*(\.\w+)?")
#: Their collectives are recognised already, and nothing else in them is one.
_TORCHS = ("aten", "prims", "c10d", "_c10d_functional", "_c10d_functional_autograd", "symm_mem", "tpfuse")
_REDUCE_OPS = ("reduce_op", "reduceop", "reduce_type", "op")
_ALLOWED = (
    "an operator that returns a new tensor, the sum of its one tensor argument over the ranks of the group that an "
    "argument of type str names"
)


@dataclass(frozen=True)
class Declaration:
    """One declared all-reduce: the operator's name ("ns::op", or "ns::op.overload"), the argument that names its
    group, and what tells torch's group from that name (None: it is torch's own)."""

    name: str
    group: str
    resolve: Resolve | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What a compile cache is told. A `resolve` cannot be told, so caches are bypassed where there is one."""
        return self.name, self.group

    def means(self, target: Any) -> bool:
        """Whether `target`, what a node calls, is the operator."""
        full = operator_full_name(target)
        if not full:
            return False
        schema = operator_schema(target)
        overload = getattr(schema, "overload_name", "") or "default"
        return self.name in (full, f"{full}.{overload}")

    def problem(self, target: Any) -> str:
        """Why the operator is no all-reduce that could be declared so, or ''."""
        schema = operator_schema(target)
        if schema is None:
            return "it has no schema"
        arguments = {argument.name: str(argument.type) for argument in schema.arguments}
        tensors = [name for name, kind in arguments.items() if "Tensor" in kind]
        if self.group not in arguments:
            return f"it has no argument {self.group!r}, but {', '.join(arguments) or 'none'}"
        if arguments[self.group] != "str":
            return f"its argument {self.group!r} is of type {arguments[self.group]}, not str"
        if schema.is_mutable:
            return "it writes to its arguments"
        if [arguments[name] for name in tensors] != ["Tensor"]:
            several = f"several tensors ({','.join(tensors)})"
            return f"it reads {several if tensors else 'no tensor'}, not one"
        results = schema.returns
        if len(results) != 1 or str(results[0].type) != "Tensor" or results[0].alias_info is not None:
            return "it does not return one new tensor"
        return ""

    def tensor(self, target: Any) -> str:
        """The name of the argument that is summed."""
        return next(argument.name for argument in _arguments(target) if str(argument.type) == "Tensor")

    def reduce_op(self, target: Any) -> str | None:
        """The name of the argument that tells the reduce op, or None: it sums."""
        return next((argument.name for argument in _arguments(target) if argument.name in _REDUCE_OPS), None)


def _arguments(target: Any) -> list[Any]:
    schema = operator_schema(target)
    return list(schema.arguments) if schema is not None else []


def register_all_reduce(op: Any, group: str, *, resolve: Resolve | None = None) -> None:
    """Declare an operator of another tool as an all-reduce that sums: what is compiled from then on treats it like
    torch's own, and a fused operation takes its place. Where it is not fused it stays as it is.

    The operator returns a new tensor, `out = sum of x over the ranks of the group`, finished (nothing waits for it),
    of the shape and dtype of its one tensor argument. An argument called `reduce_op` or `op` is read, if it has one:
    with anything but a sum it is left alone. All ranks of a group must declare the same; where one did not, all of them
    run what the program wrote.

    Args:
        op: the operator's name, "ns::op" or "ns::op.overload", or torch.ops.ns.op itself. It may be defined later.
        group: the name of its argument, a str, that names the group.
        resolve: where that is no name of torch's (an engine's "tp:0"): a function of it that returns the ProcessGroup.
            Called while compiling. With one, compile caches are bypassed: they cannot know what it will answer.

    Raises:
        DeclarationError: `op` is no operator's name, or one of torch's own; an operator of that name exists and has no
            such argument, writes to an argument, reads several tensors or none, or returns anything but one new tensor;
            or it is declared already, in another way.
    """
    name = op if isinstance(op, str) else qualified_operator(op)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        allowed = 'a name like "vllm::all_reduce" or "vllm::all_reduce.default", or torch.ops.vllm.all_reduce'
        raise DeclarationError(f"register_all_reduce(op={op!r}): allowed: {allowed}")
    if name.split("::")[0] in _TORCHS:
        raise DeclarationError(f"register_all_reduce(op={name!r}): torch's collectives are recognised without it")
    if not isinstance(group, str) or not group.isidentifier():
        raise DeclarationError(f"register_all_reduce({name!r}, group={group!r}): allowed: the name of an argument")
    if resolve is not None and not callable(resolve):
        raise DeclarationError(f"register_all_reduce({name!r}, resolve={resolve!r}): allowed: a function of a name")
    declaration = Declaration(name, group, resolve)
    problems = [declaration.problem(target) for target in operator_overloads(name)]
    if problems and all(problems):
        raise DeclarationError(f"register_all_reduce({name!r}, group={group!r}): {problems[0]}. Allowed: {_ALLOWED}")
    with state.LOCK:
        known = state.DECLARED.setdefault(name, declaration)
    if known != declaration:
        raise DeclarationError(
            f"register_all_reduce({name!r}, group={group!r}, resolve={resolve!r}): it is declared already, with "
            f"group={known.group!r}, resolve={known.resolve!r}"
        )


def declarations() -> tuple[Declaration, ...]:
    """What was declared until now, by name."""
    with state.LOCK:
        return tuple(sorted(state.DECLARED.values(), key=lambda declaration: declaration.key))


__all__ = ["Declaration", "declarations", "register_all_reduce"]
