"""Head counts of an attention module: into how many units each projection divides, and what the class remembers of it.

A cut projection gives fewer heads. Attributes that the role names are rewritten to this rank's counts; a class that
reshapes by a count nobody named would answer wrongly without a word, so the cut is refused.

The source is read because a run on fake tensors says less. It needs inputs that nobody has told us (masks, positions,
caches, and whichever branch they take), and it finds a wrong count only where sizes no longer fit: `view(b, s, -1, d)`
fits any count, and so does `repeat` by a ratio that is wrong on this rank. The name of the count to rewrite is in the
source alone. Blocks that can be run are run as well (`probe`, `block_probe`).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from tpfuse.errors import PlanError
from tpfuse.parallel.calls import chunks_of, methods
from tpfuse.parallel.cuts import Units
from tpfuse.parallel.roles import Role
from tpfuse.parallel.structure import configured

_COUNT = re.compile(r"^(n|num|nb|nr|number|local|total)?_?(of_)?(\w+_)?heads?$|^nh$|^n_?kv$")
_RATIO = re.compile(r"group|n_rep|repeat|per_kv|per_key")
_RESHAPES = {"view", "reshape", "unflatten", "rearrange", "repeat", "expand", "new_empty"}
_SPLITS = {"split", "split_with_sizes", "chunk", "tensor_split"}


@dataclass(frozen=True)
class Heads:
    """Whole (uncut) head counts; None where nobody said."""

    q: int | None
    kv: int | None
    dim: int | None

    def units(self, width: int, widest: int) -> Units:
        """The heads in a projection part of this width.

        `widest` is the widest colwise part of the module, i.e. the queries: key/value heads are as wide, and fewer,
        and so the only ones that ranks may share.
        """
        q, kv = self.q or 0, self.kv or 0
        fewer = kv and q and kv != q
        # Queries may be wider than their heads (an output gate beside them), so the heads' own size counts as well.
        by_size = self.dim and kv and width == kv * self.dim and width < widest
        if fewer and (width * q == widest * kv or by_size):
            return Units(kv, "key/value heads", shared=True)
        if self.q and width % self.q == 0:
            return Units(self.q)
        if self.dim and width % self.dim == 0:
            return Units(width // self.dim, shared=width < widest)
        return Units(width, "features")


def heads_of(name: str, module: nn.Module, role: Role) -> Heads:
    """The head counts that the role names, read from the module; else from its Hugging Face style `config`.

    Raises:
        PlanError: when a named attribute is missing or no positive integer.
    """
    counts = []
    for argument, said in (("heads", "num_attention_heads"), ("kv_heads", "num_key_value_heads")):
        attribute = getattr(role, argument)
        value = None if attribute is None else getattr(module, attribute, None)
        if attribute is not None and (type(value) is not int or value < 1):
            raise PlanError(
                f"{name} ({type(module).__name__}): {argument}={attribute!r} is {value!r}; "
                "allowed: an attribute that holds a positive integer"
            )
        if attribute is None and type(count := configured(module, said)) is int:
            value = count
        counts.append(value)
    dim = getattr(module, "head_dim", None)
    return Heads(counts[0], counts[1], dim if type(dim) is int and dim > 0 else None)


def vectors_in(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that might hold one number a head: the module's own, and those of modules in it that hold nothing but
    vectors and are no norms."""
    yield from module.named_parameters(recurse=False)
    for leaf, child in module.named_children():
        held = list(child.named_parameters())
        if all(p.ndim == 1 for _, p in held) and "norm" not in f"{leaf} {type(child).__name__}".lower():
            yield from ((f"{leaf}.{name}", p) for name, p in held)


def local_counts(name: str, module: nn.Module, role: Role, heads: Heads, size: int) -> dict[str, int]:
    """The attributes to rewrite for a cut over `size` ranks, with their new values.

    Raises:
        PlanError: when a head count neither divides by `size` nor, for key/value heads, divides it.
    """
    if size == 1:
        return {}
    out: dict[str, int] = {}
    if heads.q:
        if heads.q % size:
            raise PlanError(
                f"{name}: {heads.q} heads do not divide by the {size} ranks of the attention group; allowed: an "
                "attn_tp_size (tp_size // dp_size of the policy) that divides them"
            )
        if role.heads:
            out[role.heads] = heads.q // size
    if heads.kv:
        if heads.kv % size and size % heads.kv:
            raise PlanError(
                f"{name}: {heads.kv} key/value heads neither divide by the {size} ranks of the "
                f"attention group nor divide {size}; allowed: an attn_tp_size (tp_size // dp_size) that does either"
            )
        if role.kv_heads:
            out[role.kv_heads] = max(1, heads.kv // size)
    if heads.q and heads.kv:
        before, after = heads.q // heads.kv, (heads.q // size) // max(1, heads.kv // size)
        for attribute, value in vars(module).items():
            if before != after and type(value) is int and value == before and _RATIO.search(attribute):
                out[attribute] = after
    return out


def check_reshapes(name: str, module: nn.Module, role: Role, named: Mapping[str, int], widths: set[int]) -> None:
    """Refuses a class whose methods reshape by a count that the cut changes and that was not named.

    Args:
        named: attributes with their rewritten values.
        widths: full widths (features) of the weights that are cut.

    Raises:
        PlanError: naming the attribute.
    """
    for leaf in role.colwise:
        parts = chunks_of(type(module), leaf)
        if parts > 1 and role.packed.get(leaf, 1) == 1:
            raise PlanError(
                f"{name}: {type(module).__name__} takes the output of {leaf} apart, so its weight holds several "
                f"matrices, and no role says so; write packed={{{leaf!r}: {parts}}} in the decorator (or the sizes "
                "of the parts in features), or the style 'packed_colwise' in a plan"
            )
    for method in methods(type(module)):
        for attribute in _offenders(method, module, named, widths):
            argument = "heads=/kv_heads=" if _COUNT.match(attribute) else "heads= of what it is made of"
            raise PlanError(
                f"{name}: {type(module).__name__}.{method.name} reshapes by self.{attribute}, which the cut changes "
                f"and no role names; name it ({argument} in @tpfuse.attention), or use -1 in that reshape"
            )


def _offenders(method: ast.FunctionDef, module: nn.Module, named: Mapping[str, int], widths: set[int]) -> Iterator[str]:
    assigned: dict[str, ast.expr | None] = {}
    for node in ast.walk(method):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            target = node.targets[0].id
            assigned[target] = None if target in assigned else node.value
    inputs = {a.arg for a in method.args.args} - set(assigned)

    def flatten(node: ast.expr) -> Iterator[ast.expr]:
        if isinstance(node, (ast.Tuple, ast.List)):
            for element in node.elts:
                yield from flatten(element)
        elif isinstance(node, ast.Starred):
            yield from flatten(node.value)
        elif isinstance(node, ast.Name) and isinstance(assigned.get(node.id), (ast.Tuple, ast.List)):
            yield from flatten(assigned[node.id])  # type: ignore[arg-type]
        else:
            yield node

    for call in ast.walk(method):
        if not isinstance(call, ast.Call):
            continue
        called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if called not in _RESHAPES | _SPLITS:
            continue
        if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) and (
            call.func.value.id in inputs
        ):  # fmt: skip
            continue  # the module's own input has its full width
        arguments = [e for a in [*call.args, *(k.value for k in call.keywords)] for e in flatten(a)]
        # Right is a reshape whose counts shrink with the cut; wrong is one that still spells a full width.
        before, after, blamed = 1, 1, None
        for argument in arguments:
            value, attributes = _evaluate(argument, module, named, assigned)
            original, _ = _evaluate(argument, module, {}, assigned)
            if value is None or original is None:
                continue
            unnamed = [a for a in attributes if a.split(".")[-1] not in named]
            counts = [a for a in unnamed if _COUNT.match(a.split(".")[-1])]
            if counts and value > 1:
                yield counts[0]
            if called in _SPLITS:
                if unnamed and value == original and value in widths:
                    yield unnamed[0]
            elif value > 0:
                before, after = before * original, after * value
                blamed = blamed or (unnamed[0] if unnamed else None)
        if blamed and before == after and after in widths:
            yield blamed


def _evaluate(
    node: ast.expr, module: nn.Module, named: Mapping[str, int], assigned: Mapping[str, ast.expr | None], depth: int = 0
) -> tuple[int | None, list[str]]:
    """The integer that an expression over `self`'s attributes has after rewriting, and the attributes in it."""
    if depth > 8:
        return None, []
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value, []
    if isinstance(node, ast.Attribute):
        chain: list[str] = []
        at: ast.expr = node
        while isinstance(at, ast.Attribute):
            chain.append(at.attr)
            at = at.value
        if not (isinstance(at, ast.Name) and at.id == "self"):
            return None, []
        value: Any = module
        for attribute in reversed(chain):
            value = getattr(value, attribute, None)
        if len(chain) == 1 and chain[0] in named:
            value = named[chain[0]]
        return (value if type(value) is int else None), [".".join(reversed(chain))]
    if isinstance(node, ast.Name) and assigned.get(node.id) is not None:
        return _evaluate(assigned[node.id], module, named, assigned, depth + 1)  # type: ignore[arg-type]
    if isinstance(node, ast.BinOp):
        left, in_left = _evaluate(node.left, module, named, assigned, depth + 1)
        right, in_right = _evaluate(node.right, module, named, assigned, depth + 1)
        if left is not None and right is not None:
            both = in_left + in_right
            if isinstance(node.op, ast.Mult):
                return left * right, both
            if isinstance(node.op, ast.Add):
                return left + right, both
            if isinstance(node.op, ast.Sub):
                return left - right, both
            if isinstance(node.op, ast.FloorDiv) and right:
                return left // right, both
    return None, []
