"""Whether a module returns its row-wise projection as it is, or goes on after the sum; read from its source."""

from __future__ import annotations

import ast
import inspect

import torch.nn as nn

from tpfuse.parallel.calls import parsed
from tpfuse.parallel.roles import Role


def ends_with_sum(module: nn.Module, role: Role) -> bool:
    """Whether every return of the module's forward is the sum itself, or a tuple that starts with it.

    Only a proof answers True: with several row-wise weights, without a source, or in any other form of code the
    module is taken as one that goes on, which is right for all and costs two products in backward.
    """
    if len(role.rowwise) != 1 or "forward" in vars(module):
        return False
    function = _source(type(module))
    return function is not None and _proved(function, role.rowwise[0])


def _source(cls: type[nn.Module]) -> ast.FunctionDef | None:
    try:
        tree = parsed(inspect.unwrap(cls.forward))
    except (OSError, TypeError, SyntaxError):
        return None
    return tree.body[0] if tree.body and isinstance(tree.body[0], ast.FunctionDef) else None


def _proved(function: ast.FunctionDef, rowwise: str) -> bool:
    """One call of the weight in the whole body, at its end: `return call`, or `name = call; return name, ...`."""
    owner = function.args.args[0].arg if function.args.args else "self"
    body = function.body
    if sum(_is_leaf(node, owner, rowwise) for node in ast.walk(function)) != 1:
        return False
    if sum(isinstance(node, ast.Return) for node in ast.walk(function)) != 1 or not isinstance(body[-1], ast.Return):
        return False
    first, others = body[-1].value, []
    if isinstance(first, ast.Tuple) and first.elts:
        first, *others = first.elts
    if not all(isinstance(other, (ast.Name, ast.Constant)) for other in others):
        return False
    if isinstance(first, ast.Call):
        return _is_leaf(first.func, owner, rowwise)
    last = body[-2] if len(body) > 1 else None
    return (
        isinstance(first, ast.Name)
        and isinstance(last, ast.Assign)
        and len(last.targets) == 1
        and isinstance(last.targets[0], ast.Name)
        and last.targets[0].id == first.id
        and isinstance(last.value, ast.Call)
        and _is_leaf(last.value.func, owner, rowwise)
    )


def _is_leaf(node: ast.AST, owner: str, leaf: str) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) == f"{owner}.{leaf}"
