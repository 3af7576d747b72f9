"""Name a boundary: which block produced the sum, and which block reads the normed value. Reads only.

Evidence in this order: a tpfuse role on a module's class, the classes and names in `nn_module_stack`, and, where a
graph has neither, the operators around.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache

import torch
from torch import fx

from ..facts import aten_ops as ops
from ..facts.collectives import is_collective
from ..facts.graph import input_node
from ..facts.others import called, operator_of

aten = ops.aten

#: Tried in this order on every module of the stack: attention inside a MoE model is attention.
_NAMES = (
    ("attention", re.compile(r"attn|attention", re.IGNORECASE)),
    ("moe", re.compile(r"Mo[eE]$|MoeBlock|SparseMoe|[Ee]xperts?$|^(block_sparse_)?moe$|^shared_expert")),
    ("dense_mlp", re.compile(r"mlp|feed_?forward|ffn|^ff$", re.IGNORECASE)),
    ("embedding", re.compile(r"embed|^wte$|^wpe$", re.IGNORECASE)),
)

#: A norm is no block, whatever it is called ("post_feedforward_layernorm", "q_norm" inside an attention).
_NORM = re.compile(r"norm", re.IGNORECASE)

_ATTENTION_OPS = ("scaled_dot_product", "softmax", "flash_attn", "flex_attention")
_MATMULS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.linear.default, aten.matmul.default}
_MATMULS |= {aten._scaled_mm.default, aten._int_mm.default}  # of FP8 and INT8 weights


def boundary_kind(
    producer: fx.Node, consumer: fx.Node | None, normed: frozenset[fx.Node] = frozenset(),
    gradients: Collection[fx.Node] = (),
) -> str:  # fmt: skip
    """`producer`: the collective; `consumer`: the normed value (or the collective's result), or None.

    `normed`: the outputs of the graph's norms, where blocks usually begin. `gradients`: the backward pass, which reads
    what a norm gives as well and says nothing of the block behind it.
    """
    source = _role(producer)
    if source is None and (not _stack(producer) or "all_reduce" in str(producer.target)):
        source = _structural_role(producer, normed)
    target = _consumer_role(consumer, gradients) if consumer is not None else None
    if source is None:
        return f"…→{target}" if target == "final_norm" else "unknown"
    return f"{source}→{target}" if target is not None else "unknown"


def module_name(node: fx.Node) -> str:
    """Qualified name of the innermost module `node` was traced in, as `named_modules` would give it; '' if unknown."""
    stack = _stack(node)
    return clean_path(stack[-1][0]) if stack else ""


@cache
def clean_path(path: str) -> str:
    """`L['self'].model.layers[0].mlp` -> `model.layers.0.mlp`: the way from the compiled module, as `named_modules`
    spells it. What only Dynamo spells out (`__dict__`, `_modules`, cells of closures) goes, and so does the wrapper
    that `torch.compile` makes around a whole model."""
    names = [first or second for _, first, second in _PART.findall(_ROOT.sub("", path))]
    names = [name for name in names if name not in _SPELLED_OUT]
    while names and names[0] in ("_orig_mod", "args"):  # "args": of a functools.partial
        names = names[2:] if names[0] == "args" and names[1:2] != [] and names[1].isdigit() else names[1:]
    return ".".join(names)


#: Where a way begins: a local or global name, a cell of a closure, `self`.
_ROOT = re.compile(r"^.*\.cell_contents(?![\w'\"])|^[LG]\[(['\"]).*?\1\]|^L__self___?|^self(?=\.|$)")
#: `name`, `['name']` or `[0]`.
_PART = re.compile(r"\[(['\"]?)(.*?)\1\]|([^.\[\]]+)")
_TORCH = torch.__file__.rpartition("/")[0]
_SPELLED_OUT = ("__dict__", "_modules")


def place(node: fx.Node) -> str:
    """`aten.relu.default in model.layers.0 (model.py:12)`: an operator, and where in the program it stands. One of
    several results bears the name of the operator that gives them."""
    while node.target is ops.operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    module, line = module_name(node), _line(node)
    return f"{_operator(node)}{f' in {module}' if module else ''}{f' ({line})' if line else ''}"


#: Functions and classes that are norms, by their names.
_NORMS = re.compile(r"(batch|group|instance|layer|local|rms|cross|spectral)_?norm|norm$|norm\dd$", re.IGNORECASE)


def norm_around(node: fx.Node) -> str:
    """What the program calls a norm and `node` is a part of: a module's class, or a function; '' for none."""
    stack, functions = _stack(node), node.meta.get("source_fn_stack") or node.meta.get("fwd_source_fn_stack") or ()
    names = [_class_name(stack[-1][1])] if stack else []
    names += [getattr(function, "__name__", "") for _, function in functions[-1:]]
    return next((name for name in names if name != "norm" and _NORMS.search(name)), "")


def _operator(node: fx.Node) -> str:
    if isinstance(node.kwargs.get("kernel_idx"), int):
        return f"{called(node)} (a Triton kernel of the program)".lstrip()
    target = operator_of(node)
    name = getattr(target, "__name__", str(target)) if callable(target) else str(target)
    return str(target) if "." in str(target) and "<" not in str(target) else name


def _line(node: fx.Node) -> str:
    """`model.py:12`: the innermost line of the program, not of torch, that `node` comes from; '' if unknown."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', str(node.meta.get("stack_trace") or ""))
    frames = [frame for frame in frames if not frame[0].startswith(_TORCH)] or frames
    return f"{frames[-1][0].rsplit('/', 1)[-1]}:{frames[-1][1]}" if frames else ""


def _stack(node: fx.Node) -> list[tuple[str, object]]:
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    entries = stack.values() if isinstance(stack, dict) else ()
    return [(str(entry[0]), entry[1]) for entry in entries if isinstance(entry, tuple) and len(entry) == 2]


def _role(node: fx.Node) -> str | None:
    stack = _stack(node)
    for _, cls in reversed(stack):
        role = getattr(cls, "__tpfuse_role__", None)
        if role is not None:
            return role.kind
    names = [(clean_path(path).rsplit(".", 1)[-1], _class_name(cls)) for path, cls in stack]
    if names and any(_NORM.search(word) for word in names[-1]):
        return None
    for role, pattern in _NAMES:
        for segment, cls in names:
            if pattern.search(segment) or (pattern.search(cls) and not cls.endswith(("Layer", "Model", "ForCausalLM"))):
                return role
    return None


@cache
def role_of_name(segment: str) -> str | None:
    """ "attention", "moe", "dense_mlp" or "embedding" of one part of a module's name; None where it does not tell."""
    return next((role for role, pattern in _NAMES if pattern.search(segment)), None)


def _class_name(cls: object) -> str:
    return getattr(cls, "__name__", str(cls).rsplit(".", 1)[-1])


def _consumer_role(start: fx.Node, gradients: Collection[fx.Node]) -> str | None:
    """The role of the first block that computes something from `start`; "final_norm" if it is the end of the model.
    A gather of rows on the way to it is passed through.

    Matrix products in no module whose name tells (a layer that holds its own projections) are judged by the operators
    up to the next sum, the nearest one first: a gate beside a block has no sum of its own.
    """
    computes = ends = False
    for node in _walk(start, lambda n: _forward_users(n, gradients), limit=200, through=_gathers):
        if node is start:
            continue
        ends = node.op == "output"
        if ends or (is_collective(node) and (computes or not _gathers(node))):
            break
        role = _role(node)
        if role in ("attention", "moe", "dense_mlp"):
            return role
        if node.target in _MATMULS:
            computes = True
            role = _structural_consumer_role(node, gradients)
            if role is not None:
                return role
    if computes or ends or _stack(start):
        return "final_norm"
    return None


def _structural_consumer_role(product: fx.Node, gradients: Collection[fx.Node]) -> str | None:
    """What the operators from a matrix product up to the next sum over ranks look like; None if no sum follows, or if
    the sum is of the product itself: a row-wise output projection sums its logits."""
    forward = _walk(product, lambda n: () if is_collective(n) else _forward_users(n, gradients), limit=60)
    names = [str(node.target) for node in forward]
    if not any("all_reduce" in name or "reduce_scatter" in name for name in names):
        return None
    if all(node is product or is_collective(node) or node.target in ops.VIEWS for node in forward):
        return None
    if _attends(names):
        return "attention"
    return "moe" if any("topk" in name for name in names) else "dense_mlp"


def _forward_users(node: fx.Node, gradients: Collection[fx.Node]) -> list[fx.Node]:
    return [user for user in node.users if user not in gradients]


def _attends(names: Sequence[str]) -> bool:
    """Whether some of the operators are an attention's: a name that tells, or a softmax in its parts between products
    of batches of matrices."""
    if any(word in name for name in names for word in _ATTENTION_OPS):
        return True
    return all(any(name.startswith(part) for name in names) for part in ("aten.bmm", "aten.amax", "aten.exp"))


def _structural_role(node: fx.Node, normed: frozenset[fx.Node]) -> str | None:
    """What the operators before `node` look like, up to the previous norm or collective."""
    behind = _walk(node, lambda n: () if n in normed else n.all_input_nodes, limit=60)
    found = [before for before in behind if before is not node and before.target is not ops.WAIT]
    names = [str(before.target) for before in found]
    if _attends(names):
        return "attention"
    if any("topk" in name for name in names):
        return "moe"
    matmul = any(before.target in _MATMULS for before in found)
    # What an attention adds to its scores is looked up as well: an embedding is one that no product stands behind.
    looked_up = any(before.target is aten.embedding.default for before in found)
    return "dense_mlp" if matmul else "embedding" if looked_up else None


def _gathers(collective: fx.Node) -> bool:
    return "all_gather" in str(collective.target)


def _walk(
    start: fx.Node,
    step: Callable[[fx.Node], Iterable[fx.Node]],
    limit: int,
    through: Callable[[fx.Node], bool] = lambda collective: False,
) -> list[fx.Node]:
    """Breadth first from `start`, not past a collective's wait, unless `through` says so."""
    seen = {start}
    order: list[fx.Node] = []
    pending = deque([start])
    while pending and len(order) < limit:
        node = pending.popleft()
        order.append(node)
        if node is not start and node.target is ops.WAIT and not through(input_node(node)):
            continue
        for following in step(node):
            if following not in seen:
                seen.add(following)
                pending.append(following)
    return order
