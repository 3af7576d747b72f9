"""What happens around a module that is cut: hooks that bring it the rows it needs and pay the sums it owes.

    module              its group    before                      row-wise output    after
    attention           attention    copy_to                     reduce_from
    dense MLP, attn     attention    copy_to                     reduce_from
    dense MLP, 1        attention    own rows of the group                          gather rows, undo padding
    dense MLP, whole    whole        gather rows over dp, copy_to reduce_from       own rows of dp, undo padding
    MoE block           whole        the same, and the sum is paid once, at the block's output

All are frozen dataclasses that hold names and numbers only, so that modules can be copied and Dynamo can trace them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tpfuse.errors import PlanError
from tpfuse.parallel.collectives import (
    copy_to,
    gather_columns,
    gather_rows,
    reduce_from,
    scale_gradient,
    scatter_rows,
)
from tpfuse.parallel.containers import map_tensors, tensors_in
from tpfuse.parallel.mesh import Group
from tpfuse.parallel.paths import gives_own, is_own
from tpfuse.parallel.rows import announced_rows, trim_rows
from tpfuse.parallel.rows_check import OTHER_REPLICAS, OTHER_THAN_ANNOUNCED, TOO_MANY, RowsCheck, Says
from tpfuse.parallel.used import UsedParameters, agree_before


@dataclass(frozen=True)
class CopyIn:
    """Before a module that works on all rows it is given with cut weights: gradients of its inputs are partial."""

    group: Group

    def __call__(self, module: nn.Module | None, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # What a model hands on from layer to layer in these is each rank's own, and is written into.
        apart = {k: v for k, v in kwargs.items() if k in _MEMORY}
        given = (args, {k: v for k, v in kwargs.items() if k not in _MEMORY})
        hidden = None if torch.compiler.is_compiling() else next(tensors_in(given), None)

        def enter(x: Tensor) -> Tensor:
            own = hidden is not None and x is not hidden and is_own(x)
            return x if own else copy_to(x, self.group.name)

        args, kwargs = map_tensors(enter, given, _wanted)
        return args, {**kwargs, **apart}


@dataclass(frozen=True)
class ReduceOut:
    """After a row-wise weight (or a routed block): pays the sum over the group.

    `scaled`: the module goes on after the sum, and `ShareOut` stands at its output. `beside`: what a routed block gives
    beside its output (its router's scores) is equal on all ranks, and each has its whole gradient.
    """

    group: Group
    scaled: bool = False
    beside: bool = False

    def __call__(self, module: nn.Module | None, args: tuple, output: Any) -> Any:
        if self.beside and isinstance(output, tuple):
            output = (output[0], *ShareOut(self.group)(module, args, output[1:]))
        x, rest = _first(type(module).__name__, output)
        y = reduce_from(x, self.group.name)
        return rest(scale_gradient(y, self.group.size) if self.scaled else y)


@dataclass(frozen=True)
class ShareOut:
    """After a cut module that goes on behind its sum (a layer scale, the residual and a norm, a gate).

    What stands before the sum has a gradient of its own on each rank, which are summed over the n ranks; what stands
    behind it has the whole gradient on each, and would be counted n times. So each rank starts backward with one n-th
    of the output's gradient, and the sum multiplies by n again: on both sides the ranks' gradients then add up to the
    whole one, wherever a parameter or an input is used, and on both sides at once too.
    """

    group: Group

    def __call__(self, module: nn.Module | None, args: tuple, output: Any) -> Any:
        several = not isinstance(output, Tensor) and not torch.compiler.is_compiling()

        def share(x: Tensor) -> Tensor:
            own = several and gives_own(x)  # keys and values, which no sum was paid for
            return x if own else scale_gradient(x, 1 / self.group.size)

        shared = map_tensors(share, output, _wanted)
        if shared is output and torch.is_grad_enabled() and not any(True for _ in tensors_in(output)):
            raise PlanError(
                f"{type(module).__name__} returned {type(output).__name__}; allowed for a cut module: tensors, by "
                "themselves or in tuples, lists, dicts or dataclasses"
            )
        return shared


def _wanted(x: Tensor) -> bool:
    return x.is_floating_point() and x.requires_grad


@dataclass(frozen=True)
class OwnRows:
    """Around a module that holds its weights whole: each rank of the group works on its own share of the rows."""

    name: str
    group: Group

    def __call__(self, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        x, put = _hidden(self.name, args, kwargs)
        own = scatter_rows(_flat(x), self.group.size, self.group.index, self.group.name)
        args, kwargs = put(_like(own, x))
        y, rest = _first(self.name, forward(*args, **kwargs), alone=True)
        full = gather_rows(_flat(y), self.group.size, self.group.index, self.group.name)
        return rest(trim_rows(full, _rows(x)).view(*x.shape[:-1], y.shape[-1]))


@dataclass(frozen=True)
class AllRows:
    """Around a module that is cut over the whole group: it works on the rows of every dp replica."""

    name: str
    site: int
    dp: Group
    max_rows: int | None
    check: RowsCheck = field(compare=False)
    used: UsedParameters = field(compare=False)
    inner: CopyIn
    owes: ReduceOut | None = None
    share: ShareOut | None = None
    alone: bool = False

    def __call__(self, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        x, put = _hidden(self.name, args, kwargs)
        dp, says = self.dp, self._says(x)
        padded = None if says.padded < 0 else says.padded
        flat = self.check(_flat(x), dp, self.site, says)
        args, kwargs = put(_like(gather_rows(flat, dp.size, dp.index, dp.name, padded), x))
        args, kwargs = self.inner(None, args, kwargs)
        y, rest = _first(self.name, forward(*args, **kwargs), self.alone)
        if self.owes is not None:
            y = self.owes(None, (), y)
        if self.share is not None:
            y = self.share(None, (), y)
        every = dp.size * (flat.shape[0] if padded is None else padded)
        if y.ndim < 2 or _rows(y) != every:
            raise PlanError(
                f"{self.name} returned a tensor of shape {list(y.shape)} for {every} rows; a module that works on the "
                "rows of every dp replica returns one row for each. Give the role to the module around it that does, "
                "leave it whole, or use dp_size=1"
            )
        own = scatter_rows(_flat(y), dp.size, dp.index, dp.name, even=True)
        if padded is not None:
            own = trim_rows(own, _rows(x))
        own = agree_before(own, self.used)
        return rest(own.view(*x.shape[:-1], y.shape[-1]))

    def _says(self, x: Tensor) -> Says:
        """To how many rows every replica pads, and what is wrong with this one's."""
        counts, rows = announced_rows(), _rows(x)
        if counts is None:
            limit = self.max_rows
            if limit is None:
                return Says()
            return Says(limit, TOO_MANY, limit) if rows > limit else Says(limit)
        if len(counts) != self.dp.size:
            return Says(max(counts), OTHER_REPLICAS, len(counts))
        padded = max(counts) if min(counts) != max(counts) else -1
        own = counts[self.dp.index]
        return Says(padded, OTHER_THAN_ANNOUNCED, own) if rows != own else Says(padded)


@dataclass(frozen=True)
class IdleAttention:
    """Around the attention of a Hugging Face model, which cannot reshape zero rows (`view(0, length, -1, head_dim)`).

    An idle replica runs it on one row of zeros and drops the result. It runs the very operations of the other replicas
    and not a shortcut, because gradients are summed over replicas in the order in which backward reaches them.
    """

    def __call__(self, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        if 0 not in x.shape[:-1]:
            return forward(*args, **kwargs)
        args = tuple(_at_least_one(a) for a in args)
        # An idle replica has nothing to remember.
        kwargs = {k: None if k in _MEMORY[:3] else _at_least_one(v) for k, v in kwargs.items()}
        y, rest = _first(type(self).__name__, forward(*args, **kwargs))
        return rest(y[tuple(slice(0, size) for size in x.shape[:-1])])


_MEMORY = ("past_key_values", "past_key_value", "cache_params", "shared_kv_states")


@dataclass(frozen=True)
class WideNorm:
    """Around a norm over the features of all heads, inside attention that is cut by heads.

    Every rank gathers all features, norms them as the whole module does, and keeps its own slice. `count`: into how
    many slices they are cut; fewer than ranks where neighbours hold the same key/value heads. The norm's weights stay
    whole, and each rank's gradient of them is that of its own slice.
    """

    group: Group
    count: int
    width: int

    def __call__(self, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        x, *rest = args
        if x.shape[-1] == self.width:  # behind the sum, in a model as wide as its heads: every feature is here
            return forward(*args, **kwargs)
        size, index = self.group.size, self.group.index
        full = copy_to(gather_columns(x, size, index, self.group.name), self.group.name)
        same = size // self.count
        if same > 1:
            full = torch.cat(full.chunk(size, dim=-1)[::same], dim=-1)
        return forward(full, *rest, **kwargs).chunk(self.count, dim=-1)[index // same]


def _at_least_one(value: Any) -> Any:
    """Tensors without elements, padded to one along every empty dimension; also those in tuples."""
    if isinstance(value, tuple):
        return tuple(_at_least_one(v) for v in value)
    if not isinstance(value, Tensor) or 0 not in value.shape:
        return value
    pads = [pad for size in reversed(value.shape) for pad in (0, int(size == 0))]
    # True in a mask lets a row see itself; a row that sees nothing is NaN, in backward too.
    return F.pad(value, pads, value=value.dtype == torch.bool)


#: Where a class keeps its subclass with a boundary around `forward`.
AROUND = "_tpfuse_around"


def install(module: nn.Module, boundary: OwnRows | AllRows | IdleAttention | WideNorm) -> None:
    """Puts a boundary around the module's forward.

    By a subclass of its class, as FSDP2 does, and not by hooks: what follows the module needs the shape of what came
    before it, and between two hooks that could only be kept in mutable state. Modules of one class share the subclass,
    so that layers which are compiled one by one share their code.

    A `forward` of the instance's own, which would hide the subclass's (accelerate's hooks, Liger's patches), moves
    inside the boundary. One that is put on afterwards must call the one it replaces, as accelerate's do.
    """
    base = type(module)
    if AROUND not in vars(base):

        @functools.wraps(base.forward)
        def forward(self, *args, **kwargs):
            inner = self._tpfuse_inner or functools.partial(base.forward, self)
            return self._tpfuse_boundary(inner, args, kwargs)

        members = {"forward": forward, "__module__": base.__module__}
        setattr(base, AROUND, type(f"TP{base.__name__}", (base,), members))
    module._tpfuse_inner = vars(module).pop("forward", None)
    module._tpfuse_boundary = boundary  # type: ignore[assignment]
    module.__class__ = vars(base)[AROUND]


class RowwiseLinear(nn.Linear):
    """A row-wise cut nn.Linear with a bias, which is added once, after the sum."""

    tpfuse_group: Group
    tpfuse_scaled: bool

    def forward(self, x: Tensor) -> Tensor:
        y = reduce_from(F.linear(x, self.weight), self.tpfuse_group.name) + self.bias
        return scale_gradient(y, self.tpfuse_group.size) if self.tpfuse_scaled else y


class PartialLinear(nn.Linear):
    """A row-wise cut nn.Linear with a bias inside a routed block, whose sum is paid later: each rank adds a share."""

    tpfuse_group: Group

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias / self.tpfuse_group.size)


class VocabEmbedding(nn.Embedding):
    """An embedding whose rows are cut; ids of other ranks give zeros, and the sum over the group fills them in."""

    tpfuse_group: Group

    def forward(self, ids: Tensor) -> Tensor:
        local = ids - self.tpfuse_group.index * self.weight.shape[0]
        inside = (local >= 0) & (local < self.weight.shape[0])
        local = torch.where(inside, local, 0)
        if self.padding_idx is not None:
            # The padding row gets no gradient; which rank holds it must not change the graph.
            inside_grad = inside & (ids != self.padding_idx)
            weight = F.embedding(local, self.weight)
            x = torch.where(inside_grad.unsqueeze(-1), weight, weight.detach())
        else:
            x = F.embedding(local, self.weight)
        return reduce_from(x.masked_fill(~inside.unsqueeze(-1), 0), self.tpfuse_group.name)


@dataclass(frozen=True)
class GatherColumns:
    """After an output projection whose columns are cut."""

    group: Group

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return gather_columns(output, self.group.size, self.group.index, self.group.name)


def _rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _flat(x: Tensor) -> Tensor:
    return x.reshape(_rows(x), x.shape[-1])


def _like(rows: Tensor, x: Tensor) -> Tensor:
    """Rows with as many leading dimensions as x had; modules unpack them by number."""
    return rows.view(*(1,) * max(0, x.ndim - 2), *rows.shape)


def _hidden(name: str, args: tuple, kwargs: dict):
    """The hidden states among a module's inputs, and a function that puts other ones in their place."""
    tensors = [(i, a) for i, a in enumerate(args) if isinstance(a, Tensor)]
    tensors += [(k, v) for k, v in kwargs.items() if isinstance(v, Tensor)]
    count = sum(1 for _ in tensors_in((args, kwargs)))
    if count != 1 or not tensors:
        raise PlanError(
            f"{name} is called with {count} tensors; a module that works on other "
            "rows than its caller's takes its hidden states and no other tensor, whose rows would be those of other "
            "ranks. Leave it whole, or give it moe_dense_tp_size=attn_tp_size (SharingPolicy.overrides)"
        )
    key, x = tensors[0]

    def put(value: Tensor) -> tuple[tuple, dict]:
        if isinstance(key, int):
            return (*args[:key], value, *args[key + 1 :]), kwargs
        return args, {**kwargs, key: value}

    return x, put


def _first(name: str, output: Any, alone: bool = False):
    """The hidden states in a module's output (it, or the first of a tuple), and a function that replaces them.

    `alone`: no other tensor may come with them.
    """
    if isinstance(output, Tensor):
        return output, lambda value: value
    if alone and (count := sum(1 for _ in tensors_in(output))) > 1:
        raise PlanError(
            f"{name} returned {count} tensors; an MLP that works on other rows than its caller's returns its hidden "
            "states and no other tensor, whose rows would be those of other ranks. Leave it whole, or give it "
            "moe_dense_tp_size=attn_tp_size (SharingPolicy.overrides)"
        )
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0], lambda value: (value, *output[1:])
    raise PlanError(f"{name} returned {type(output).__name__}; allowed: a tensor, or a tuple that starts with one")
