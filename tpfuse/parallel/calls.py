"""What a class's methods do with the output of one of its projections, read from their source.

A weight that holds several matrices side by side gives an output that the class takes apart: `chunk(2)`, two slices, a
split. Cut as one matrix it would give each rank a part of the first matrix alone, and wrong numbers without a word.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Collection, Iterator
from typing import Any

from tpfuse import _state as state

_OTHER_SHAPE = {"view", "reshape", "unflatten", "transpose", "permute", "split", "chunk", "unbind", "rearrange", "mean"}
_REDUCTIONS = {"mean", "std", "var", "var_mean", "std_mean", "norm", "vector_norm", "rms_norm", "layer_norm"}


def parsed(function: Any) -> ast.Module:
    """The syntax tree of a function; raises as inspect.getsource and ast.parse do."""
    with state.PARSING:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))


def methods(cls: type) -> list[ast.FunctionDef]:
    """The methods of a class and its bases, but for `__init__` and torch's own."""
    with state.PARSING:
        if cls not in state.METHODS:
            state.METHODS[cls] = list(_parse(cls))
        return state.METHODS[cls]


def _parse(cls: type) -> Iterator[ast.FunctionDef]:
    for base in cls.__mro__:
        if base.__module__.split(".")[0] == "torch" or base is object:
            continue
        for member in vars(base).values():
            if inspect.isfunction(member) and member.__name__ != "__init__":
                try:
                    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(member))))
                except (OSError, TypeError, SyntaxError):
                    continue
                if tree.body and isinstance(tree.body[0], ast.FunctionDef):
                    yield _with_self(tree.body[0])


def _with_self(method: ast.FunctionDef) -> ast.FunctionDef:
    """The method with its first parameter called `self`, whatever its author calls it."""
    given = [*method.args.posonlyargs, *method.args.args]
    if given and given[0].arg != "self":
        first = given[0].arg
        given[0].arg = "self"
        for node in ast.walk(method):
            if isinstance(node, ast.Name) and node.id == first:
                node.id = "self"
    return method


def chunks_of(cls: type, leaf: str) -> int:
    """Into how many equal parts the methods of `cls` take the output of `self.<leaf>`; 1 where they do not."""
    return max((_parts(method, leaf) for method in methods(cls)), default=1)


def _parts(method: ast.FunctionDef, leaf: str) -> int:
    assigned = _assigned(method)

    def carries(node: ast.expr, depth: int = 0) -> bool:
        """Whether an expression is the projection's output with its last dimension as it was."""
        if depth > 12:
            return False
        if isinstance(node, ast.Name):
            return any(carries(value, depth + 1) for value in assigned.get(node.id, ()))
        if isinstance(node, ast.BinOp):
            return carries(node.left, depth + 1) or carries(node.right, depth + 1)
        if not isinstance(node, ast.Call):
            return False
        called = node.func
        if isinstance(called, ast.Attribute):
            if _is_self(called.value) and called.attr == leaf:
                return True
            if called.attr in _OTHER_SHAPE:
                return False
            if carries(called.value, depth + 1):
                return True
        return bool(node.args) and carries(node.args[0], depth + 1)

    found = 1
    for node in ast.walk(method):
        if isinstance(node, ast.Subscript) and carries(node.value):
            found = max(found, _sliced(node.slice))
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        called, source = node.func, node.func.value
        arguments = list(node.args)
        if isinstance(source, ast.Name) and source.id in ("torch", "F") and arguments:
            source, *arguments = arguments
        if not carries(source):
            continue
        arguments += [k.value for k in node.keywords if k.arg not in ("dim", "axis")]
        constants = [a.value for a in _flat(arguments) if isinstance(a, ast.Constant) and type(a.value) is int]
        if called.attr in ("chunk", "tensor_split"):
            found = max(found, constants[0] if constants else 2)
        elif called.attr in ("split", "split_with_sizes", "unbind"):
            found = max(found, 2)
        elif called.attr == "unflatten" and len(arguments) > 1:
            sizes = list(_flat(arguments[1:]))
            first = sizes[0].value if sizes and isinstance(sizes[0], ast.Constant) else None
            found = max(found, first if isinstance(first, int) and first in (2, 3) else 1)
        elif called.attr in ("view", "reshape"):
            found = max(found, _leading_part(list(_flat(arguments))))
    return found


def _sliced(index: ast.expr) -> int:
    """2 where a subscript takes a range of the last dimension with one open end, `[..., :n]`; else 1."""
    last = index.elts[-1] if isinstance(index, ast.Tuple) and index.elts else index
    whole = not isinstance(index, ast.Tuple)
    if whole or not isinstance(last, ast.Slice) or last.step is not None:
        return 1
    return 2 if last.lower is not None or last.upper is not None else 1


def _leading_part(sizes: list[ast.expr]) -> int:
    """The 2 or 3 of `view(b, s, 3, heads, d)`: a constant in front of everything that a cut changes."""
    for size in sizes:
        if isinstance(size, ast.Constant) and isinstance(size.value, int) and size.value in (2, 3):
            return size.value
        if isinstance(size, ast.UnaryOp) or any(_is_self(inner) for inner in ast.walk(size)):
            return 1
    return 1


def reduces_features(cls: type, apart: Collection[str] = ()) -> str:
    """The name of a reduction over the last dimension in the methods of `cls` (`mean`, `std`, a norm), or ''.

    `apart`: submodules that are known to see other features than those that are cut.
    """
    for method in methods(cls):
        for node in ast.walk(method):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            own = isinstance(node.func, ast.Attribute) and _is_self(node.func.value) and called in apart
            if called in _REDUCTIONS and not own:
                return called
    return ""


def names_configured(cls: type, attribute: str) -> bool:
    """Whether a method of `cls` other than `__init__` reads `self.config.<attribute>`."""
    pattern = re.compile(rf"self\.config\.{attribute}\b")
    return any(pattern.search(ast.unparse(method)) for method in methods(cls))


def _assigned(method: ast.FunctionDef) -> dict[str, list[ast.expr]]:
    """What each name is assigned, where it is assigned one by one and not from itself."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(method):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
    return found


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _flat(arguments: list[ast.expr]) -> Iterator[ast.expr]:
    for argument in arguments:
        if isinstance(argument, (ast.Tuple, ast.List)):
            yield from _flat(list(argument.elts))
        else:
            yield argument
