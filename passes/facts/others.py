"""Operators of other tools: what they are called, and that nobody here can see into them. Reads only."""

from __future__ import annotations

import re

from torch import fx

from tpfuse._torch_private import kernel_name, operator_name, operator_schema

from . import aten_ops as ops

#: Namespaces of operators that compiled graphs hold and that are torch's, or ours.
TORCHS = (*ops.COLLECTIVE_NAMESPACES, "aten", "prims", "c10d", "tpfuse", "inductor", "inductor_prims")
#: Words of which one, as a part of its name, makes an operator a norm: "fused_add_rms_norm", "rms", "ln_fwd".
_NORM = re.compile(r"norm|(^|_)(rms|ln)(_|$)", re.IGNORECASE)
#: Reductions and sums with a norm in their names that are not what a layer calls a norm.
NO_NORMS = ("linalg_vector_norm", "norm")


def operator_of(node: fx.Node) -> object:
    """What `node` calls; of the functional form of an operator that writes to its arguments, that operator."""
    first = node.args[0] if node.args else None
    return first if "auto_functionalized" in str(node.target) and operator_schema(first) is not None else node.target


def called(node: fx.Node) -> str:
    """ "rsqrt" for aten.rsqrt.default; a plain function's own name, and that of a Triton kernel of the program."""
    target = operator_of(node)
    kernel = node.kwargs.get("kernel_idx")
    if isinstance(kernel, int):
        return kernel_name(kernel)
    return operator_name(target) or getattr(target, "__name__", str(target))


def is_opaque(node: fx.Node) -> bool:
    """Whether `node` calls an operator of another tool, or a Triton kernel of the program: nothing is known of what it
    computes."""
    if node.op != "call_function":
        return False
    if isinstance(node.kwargs.get("kernel_idx"), int):
        return True
    target = operator_of(node)
    return operator_schema(target) is not None and getattr(target, "namespace", "aten") not in TORCHS


def is_called_norm(node: fx.Node) -> bool:
    """Whether the operator's name says that it is a norm of a layer."""
    name = called(node)
    if name.startswith(NO_NORMS) and not is_opaque(node):
        return False
    return "norm" in name if not is_opaque(node) else _NORM.search(name) is not None


__all__ = ["TORCHS", "called", "is_called_norm", "is_opaque", "operator_of"]
