"""Other spellings of a sum, in the form that the recogniser reads.

*Waited for twice*, as `funcol.wait_tensor(funcol.all_reduce(x))` is: the first wait is enough.

*Waited for here.* What a graph before this one sent is waited for by this one's first reader alone, and the others read
it as it came; they read what the wait gives.

*Returned before it is waited for*, as by the forward half of a training step where a checkpoint saves a collective and
not the wait for it: what the wait gives is returned, which is the same memory.

*Split and put together again* in the same order, as DTensor does it around a collective along the sequence, where the
batch is 1: a view, and no copy.

*Leading dimensions of size 1*. A sum [S, H] that is added to hidden states [1, S, H] is broadcast to nothing but
itself, so it is viewed as [1, S, H] first.

*Broadcast beside another sum.* Learned positions [S, H] whose sum is added to that of the tokens [B, S, H] are expanded
to that shape first, so that one can be sent with the other.

*Sizes of views.* A symbolic size that is read off a view of a sum is read off the same view of what is sent, so that
the view may go.

*In place.* torch.export keeps the write that the user wrote:

    y = mm(...)                        y = mm(...)
    s = wait(all_reduce(y))       →    s = wait(all_reduce(y))
    z = copy_(y, s)                    (readers of z read s)

The copy may go where nobody can tell: y is a temporary that nothing reads behind the copy but the copy's own readers,
and s is read by the copy alone, so that it can be written to in y's place.
"""

from __future__ import annotations

import torch
from torch import fx

from tpfuse._torch_private import operator_schema, storage_identity

from ..facts import aten_ops as ops
from ..facts.collectives import is_collective
from ..facts.graph import (
    argument,
    input_node,
    insert_call,
    is_call,
    last_dim,
    row_major,
    same_shape,
    same_size,
    same_strides,
    use_positions,
    val,
    value,
)
from ..facts.sizes import Place, find_size
from ..recognise.sums import Step
from .replay import replay


def normalise(graph: fx.Graph) -> None:
    """Bring `graph` into the form that the recogniser reads. Changes `graph`; what it computes stays."""
    use_positions(graph)
    drop_unread(graph)
    wait_once(graph)
    read_what_was_waited_for(graph)
    return_what_was_waited_for(graph)
    drop_copies(graph)
    view_whole_splits(graph)
    view_leading_ones(graph)
    expand_beside_sums(graph)
    read_sizes_before_sums(graph)


def drop_unread(graph: fx.Graph) -> None:
    """Erase views and casts that nobody reads, as decompositions leave them: they are no use of a sum."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and node.target in ops.VIEWS | ops.CASTS and not node.users:
            graph.erase_node(node)


def wait_once(graph: fx.Graph) -> None:
    """Let what waits for a collective a second time read the first wait's result."""
    first: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is not ops.WAIT or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        if source.target is not ops.WAIT and (not is_collective(source) or source not in first):
            first[source] = node
            continue
        node.replace_all_uses_with(source if source.target is ops.WAIT else first[source], propagate_meta=False)
        graph.erase_node(node)


def read_what_was_waited_for(graph: fx.Graph) -> None:
    """Let readers of an input read its wait, where they stand behind it."""
    for node in graph.find_nodes(op="call_function", target=ops.WAIT):
        source = node.args[0]
        if isinstance(source, fx.Node) and source.op == "placeholder":
            for user in [user for user in source.users if node < user]:
                user.replace_input_with(source, node)


def return_what_was_waited_for(graph: fx.Graph) -> None:
    """Of a collective whose result the graph waits for and returns, let it return the wait's."""
    for wait in graph.find_nodes(op="call_function", target=ops.WAIT):
        source = wait.args[0]
        if isinstance(source, fx.Node) and is_collective(source):
            for user in [user for user in source.users if user.op == "output"]:
                user.replace_input_with(source, wait)


def view_whole_splits(graph: fx.Graph) -> None:
    """Where what is scattered, or was gathered, is split and concatenated in the same order, view it so: in graphs that
    write nowhere, as a view shares what a copy does not."""
    schemas = map(operator_schema, {node.target for node in graph.nodes if node.op == "call_function"})
    if any(schema is not None and schema.is_mutable for schema in schemas):
        return
    for node in list(graph.find_nodes(op="call_function", target=ops.aten.cat.default)):
        source = _split_whole(node)
        if source is None or not row_major(source) or not _beside_a_collective(node, source):
            continue
        sizes = [size if isinstance(size, int) else -1 for size in val(node).shape]
        if sizes.count(-1) > 1 or 0 in sizes:
            continue
        parts = node.all_input_nodes
        splits = [input_node(part) for part in parts]
        node.target, node.args, node.kwargs = ops.aten.reshape.default, (source, sizes), {}
        for dead in (*parts, *dict.fromkeys(splits)):
            if not dead.users:
                graph.erase_node(dead)


def _beside_a_collective(node: fx.Node, source: fx.Node) -> bool:
    return source.target is ops.WAIT or all(is_collective(user) for user in node.users)


def _split_whole(node: fx.Node) -> fx.Node | None:
    """What `node` concatenates every part of, if that gives its elements in their order; else None."""
    parts, into = node.all_input_nodes, argument(node, "dim")
    if node.args[0] != parts or not isinstance(into, int) or any(value(part) is None for part in parts):
        return None
    if any(not is_call(part, ops.operator.getitem) or part.args[1] != i for i, part in enumerate(parts)):
        return None
    first, *others = (input_node(part) for part in parts)
    if not all(is_call(split, ops.aten.split.Tensor) and split.args == first.args for split in (first, *others)):
        return None
    if len(first.meta["val"]) != len(parts) or not all(same_shape(part, parts[0]) for part in parts):
        return None
    shape = val(parts[0]).shape
    into, along = into % len(shape), argument(first, "dim") % len(shape)
    passed = shape[min(into, along) : max(into, along)]
    return input_node(first) if passed and all(same_size(size, 1) for size in passed) else None


#: What a sum may go through and still be one that is added to something.
_LINEAR = ops.VIEWS | ops.SELECTIONS | ops.CASTS | ops.ROW_SUMS | ops.ADDS | ops.SUBS | ops.MULS | ops.DIVS
_LINEAR |= {ops.aten.bmm.default}


def view_leading_ones(graph: fx.Graph) -> None:
    """Where a sum is added to (or multiplied by) a value that has leading dimensions of size 1 besides, view it so."""
    carrying: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.target is ops.WAIT:
            carrying.add(node)
        if node.op != "call_function" or node.target not in _LINEAR or carrying.isdisjoint(node.all_input_nodes):
            continue
        carrying.add(node)
        if node.target in ops.ADDS | ops.SUBS | ops.MULS | ops.DIVS:
            for position, child in enumerate(node.args[:2]):
                missing = _leading_ones(node, child) if child in carrying else 0
                with graph.inserting_before(node):
                    for _ in range(missing):
                        child = insert_call(graph, ops.aten.unsqueeze.default, (child, 0), like=node)
                if missing:
                    node.update_arg(position, child)
                    carrying.add(child)


def expand_beside_sums(graph: fx.Graph) -> None:
    """Where a sum is added to a larger one, and broadcast to it, expand it so. Where it is not known without either sum
    how large that is, it stays."""
    carrying: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.target is ops.WAIT:
            carrying.add(node)
        if node.op != "call_function" or node.target not in _LINEAR | ops.SPREADS:
            continue
        read = [child for child in node.args[:2] if isinstance(child, fx.Node)]
        if carrying.isdisjoint(read):
            continue
        carrying.add(node)
        if node.target not in ops.ADDS | ops.SUBS or not carrying.issuperset(read) or len(read) < 2:
            continue
        for position, (child, other) in enumerate((read, read[::-1])):
            rows = value(child)
            if rows is None or rows.dim() < 2 or not same_size(last_dim(child), last_dim(node)):
                continue  # a number a row is a statistic, and no sum of rows
            if same_shape(other, node) and not same_shape(child, node):
                expanded = _expanded(graph, child, node)
                if expanded is not None:
                    node.update_arg(position, expanded)
                    carrying.add(expanded)


def read_sizes_before_sums(graph: fx.Graph) -> None:
    """Let what reads a symbolic size off views of an all-reduce's result read it off the same views of its input."""
    for node in graph.find_nodes(op="call_function", target=ops.aten.sym_size.int):
        steps: list[fx.Node] = []
        source = input_node(node)
        while is_call(source, ops.VIEWS):
            steps.append(source)
            source = input_node(source)
        if not steps or source.target is not ops.WAIT or not isinstance(node.meta.get("val"), torch.SymInt):
            continue
        collective = input_node(source)
        if not is_collective(collective) or not same_shape(input_node(collective), source):
            continue
        views = [Step(step) for step in reversed(steps) if not is_call(step, ops.COPIES_OF_VALUES)]
        with graph.inserting_before(node):
            node.update_arg(0, replay(graph, views, input_node(collective)))


def _expanded(graph: fx.Graph, child: fx.Node, node: fx.Node) -> fx.Node | None:
    """`child` in the shape of `node`; None where a size is neither a number nor known of an input of the graph."""
    found = [size if isinstance(size, int) else find_size(graph, size) for size in val(node).shape]
    if None in found:
        return None
    with graph.inserting_before(node):
        sizes = [place.read(graph, node) if isinstance(place, Place) else place for place in found]
        return insert_call(graph, ops.aten.expand.default, (child, sizes), like=node)


def _leading_ones(node: fx.Node, child: fx.Node) -> int:
    """How many leading dimensions of size 1 the shape of `node` has more than that of `child`, where that is all."""
    whole, part = value(node), value(child)
    if whole is None or part is None or part.dim() == 0 or part.dim() >= whole.dim():
        return 0
    missing = whole.dim() - part.dim()
    sizes = zip(whole.shape, (1,) * missing + tuple(part.shape), strict=True)
    return missing if all(same_size(x, y) for x, y in sizes) else 0


def drop_copies(graph: fx.Graph) -> None:
    """Let readers of `copy_(temporary, source)` read the source. Changes `graph`."""
    copies = [node for node in graph.nodes if node.target is ops.aten.copy_.default]
    if not copies:
        return
    sharing = _by_storage(graph)
    for copy in copies:
        if _can_go(copy, sharing):
            copy.replace_all_uses_with(copy.args[1], propagate_meta=False)
            graph.erase_node(copy)


def _by_storage(graph: fx.Graph) -> dict[int, list[fx.Node]]:
    """The nodes whose values live in one storage, in graph order."""
    sharing: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        tensor = value(node)
        identity = storage_identity(tensor) if tensor is not None else None
        if identity is not None:
            sharing.setdefault(identity, []).append(node)
    return sharing


def _can_go(copy: fx.Node, sharing: dict[int, list[fx.Node]]) -> bool:
    target, source = copy.args[:2]
    if not isinstance(target, fx.Node) or not isinstance(source, fx.Node):
        return False
    if value(target) is None or value(source) is None or value(copy) is None:
        return False
    old, new = val(target), val(source)
    if (old.dtype, old.device) != (new.dtype, new.device) or not same_shape(target, source):
        return False
    if not same_strides(target, source) or list(source.users) != [copy]:
        return False
    schema = operator_schema(target.target)
    if target.op != "call_function" or schema is None or any(r.alias_info is not None for r in schema.returns):
        return False
    identity = storage_identity(old)
    same_memory = sharing.get(identity, []) if identity is not None else []
    if not same_memory or same_memory[0] is not target:
        return False  # a view, or an operator that handed out its input
    readers = {user for node in same_memory if node < copy for user in node.users} - {copy}
    return all(reader < copy for reader in readers)
