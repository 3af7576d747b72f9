"""Lowering: the fused operations of a graph that is split already, in the form that costs the host least.

    [y, h] = all_reduce_norm(x, residual, None, weight, None, None, norm="rms_norm", eps=1e-6, ...)

becomes

    y', h' = empty(...), empty(...)
    _, y, h, ... = auto_functionalized(all_reduce_norm.lean, x=x, y=y', spec="...", residual=..., hidden=h')

`auto_functionalized` is how compiled graphs hold operators that write into their arguments: the graph stays functional
for every pass behind this one, and at the end the compiler lets the operator write into y' and h' themselves. Outputs
that nobody reads are not asked for.

Where no kernel does an operation as one it is written out instead (`plain.py`). Two ranks' all-reduce of a large
product, or its reduce-scatter with the gather behind, may take the product with it (`overlap.py`). Only the calls are
written differently: what is sent, and in which order, stays.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tpfuse._torch_private import (
    argument_names,
    auto_functionalized,
    group_size,
    operator_full_name,
)
from tpfuse.boundary_spec import OPERANDS, OUTPUTS, BoundarySpec, form_for
from tpfuse.product_ops import PREFIX

from ..facts import aten_ops as ops
from ..facts.graph import argument, carry_meta, same_size, value
from ..verdict.runs import runs_in_a_kernel
from .empty import empty
from .lower_backward import lower_backward, lower_exchanges
from .overlap import Product, find_product
from .own_rows import both_handed_out, own_rows
from .plain import rows_divide, spec_of, write_out

#: On which devices a fused operation stays one operator whatever its group can: on the CPU it stands for the kernel,
#: in tests and in the demo.
STAY = ("cpu",)
_GATHERING = "tpfuse::reduce_scatter_norm_gather"
_OURS = ("tpfuse::all_reduce_norm", "tpfuse::reduce_scatter_norm", "tpfuse::rows_norm", _GATHERING)
#: Those that take a product along.
_BEHIND_PRODUCTS = ("tpfuse::all_reduce_norm", _GATHERING)


def lower(graph: fx.Graph) -> int:
    """Lower every fused operation of `graph` that can be; how many were. The others stay as they are, and run so."""
    found = [node for node in graph.nodes if operator_full_name(node.target) in _OURS]
    lowered = sum(_lower(graph, node) for node in found) + lower_backward(graph) + lower_exchanges(graph)
    if lowered:
        graph.lint()
    return lowered


def write_out_scattered(graph: fx.Graph) -> int:
    """Write every reduce-scatter and norm out that would be in the end, and no other; how many there were."""
    found = [node for node in graph.nodes if operator_full_name(node.target) == "tpfuse::reduce_scatter_norm"]
    written = 0
    for node in found:
        operands = {name: argument(node, name) for name in OPERANDS}
        spec = spec_of(node, operands)
        if spec is not None and _without_kernel(node, operands["x"], spec):
            write_out(graph, node, operands, spec)
            written += 1
    return written


def _lower(graph: fx.Graph, node: fx.Node) -> bool:
    operands = {name: argument(node, name) for name in OPERANDS}
    read = {user.args[1]: user for user in node.users if user.target is ops.operator.getitem and user.users}
    spec = spec_of(node, operands)
    if spec is None:
        return False
    if _without_kernel(node, operands["x"], spec):
        write_out(graph, node, operands, spec)
        return True
    results, own, apart = list(node.meta["val"]), None, False
    if operator_full_name(node.target) == _GATHERING:  # its lean forms have one y: that of all ranks
        own, gathered = read.pop(0, None), read.pop(len(results) - 1, None)
        apart = both_handed_out(own, gathered)
        if gathered is not None:
            read[0] = gathered
        results = [results[-1], *results[1:-1]]
    fakes = dict(zip(spec.outputs, results, strict=True))
    readers = {name: read[index] for index, name in enumerate(spec.outputs) if index in read}
    spec = _only(spec, readers)
    taken = spec.overlap and not spec.batch_invariant and operator_full_name(node.target) in _BEHIND_PRODUCTS
    product = find_product(operands, spec.group_name) if taken else None
    sizes = {name: _sizes(fakes[name], operands, product is None) for name in spec.outputs}
    if product is not None and None in sizes.values():
        product = None
        sizes = {name: _sizes(fakes[name], operands) for name in spec.outputs}
    if None in sizes.values():
        return False
    with graph.inserting_before(node):
        outputs = {name: empty(graph, sizes[name], fakes[name], node) for name in spec.outputs}
        given = {"spec": spec.text(), **operands, **outputs}
        overload = _overload(node, given, product)
        given |= product.arguments if product is not None else {}
        names = argument_names(overload)
        call = graph.call_function(auto_functionalized(), (overload,), {name: given.get(name) for name in names})
        carry_meta(node, call)
        filled = [name for name in names if name in OUTPUTS]
        call.meta["val"] = (None, *(fakes[name] if name in outputs else None for name in filled))
        for name, reader in readers.items():
            anew = graph.call_function(ops.operator.getitem, (call, 1 + filled.index(name)))
            anew.meta.update(reader.meta)
            reader.replace_all_uses_with(anew)
        if own is not None:
            every = graph.call_function(ops.operator.getitem, (call, 1 + filled.index("y")))
            carry_meta(call, every)
            every.meta["val"] = fakes["y"]
            own.replace_all_uses_with(own_rows(graph, every, spec.group_name, own, apart))
    for user in list(node.users):
        graph.erase_node(user)
    graph.erase_node(node)
    if product is not None:
        product.erase(graph)
    return True


def _without_kernel(node: fx.Node, x: fx.Node, spec: BoundarySpec) -> bool:
    """Whether no kernel does all of it as one, and other operations may give a row's bits. A compiler that made one
    kernel of norm and quantisation would not round y in between; the local kernel does."""
    given = value(x)
    if given is None or given.device.type in STAY or spec.batch_invariant or spec.quant:
        return False
    name = operator_full_name(node.target)
    if name == _GATHERING:  # those without were taken apart
        return False
    if name == "tpfuse::all_reduce_norm":
        return not runs_in_a_kernel(spec.group_name, x)
    return name == "tpfuse::rows_norm" or rows_divide(given.shape, group_size(spec.group_name))


def _overload(node: fx.Node, given: dict[str, Any], product: Product | None) -> Any:
    """The smallest of the operator's forms that takes all that is given."""
    name = operator_full_name(node.target).partition("::")[2]
    packet = getattr(ops.tpfuse, name if product is None else f"{PREFIX}{name}")
    return getattr(packet, form_for({name for name, value in given.items() if value is not None}))


def _only(spec: BoundarySpec, readers: dict[str, fx.Node]) -> BoundarySpec:
    """The same without the outputs that nobody reads; `y` there always is."""
    return replace(
        spec,
        hidden_dtype=spec.hidden_dtype if "hidden" in readers else None,
        quant=spec.quant if "q" in readers or "scale" in readers else "",
        want_sum="total" in readers,
        stats="mean" in readers or "rstd" in readers,
    )


def _sizes(output: torch.Tensor, operands: dict[str, Any], of_x: bool = True) -> list[int | tuple[fx.Node, int]] | None:
    """Each size of an output: a number, or the operand that has it in the same place; None where none has. `of_x`:
    whether x may be asked."""
    sizes: list[int | tuple[fx.Node, int]] = []
    asked = (operands["x"], operands["residual"]) if of_x else (operands["residual"],)
    known = [(node, fake.shape) for node in asked if (fake := value(node)) is not None]
    for dim, size in enumerate(output.shape):
        if isinstance(size, int):
            sizes.append(size)
            continue
        node = next((n for n, shape in known if len(shape) > dim and same_size(shape[dim], size)), None)
        if node is None:
            return None
        sizes.append((node, dim))
    return sizes
