"""Trace small functions into graphs, and run graphs on several ranks inside one process with true sums.

`LocalTensorMode` gives every value one tensor per rank and performs the collectives on them, so a rewritten graph is
judged by its numbers. Sums of float16 and bfloat16 are rounded to that dtype as a real all-reduce would.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore

import tpfuse
from tpfuse._torch_private import inductor_decompositions
from tpfuse.passes.rewrite.take_apart import take_apart


@contextmanager
def fake_world(size: int, rank: int = 0) -> Iterator[None]:
    """A process group of `size` ranks of which only this one exists; its collectives do nothing."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def all_reduce(x: Tensor, group: Any = None, op: str = "sum") -> Tensor:
    """A functional all-reduce as compiled graphs have it, wait included."""
    name = (group or dist.group.WORLD).group_name if not isinstance(group, str) else group
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, op, name))


def trace(fn: Callable[..., Any], *args: Any, dynamic: bool = False, decompose: bool = True) -> fx.GraphModule:
    """The aten graph of `fn(*args)`, functional, decomposed as Inductor does it (or not at all)."""
    return make_fx(
        torch.func.functionalize(fn) if decompose else fn,
        decomposition_table=inductor_decompositions() if decompose else {},
        tracing_mode="symbolic" if dynamic else "fake",
    )(*args)


def fused(gm: fx.GraphModule, **options: Any) -> tuple[fx.GraphModule, tpfuse.Report]:
    """A fused copy of `gm`, and the report."""
    import copy

    copied = copy.deepcopy(gm)
    report = tpfuse.fuse_graph(copied, **options)
    return copied, report


def on_ranks(gm: Callable[..., Any], world: int, *args: Any) -> list[list[Tensor]]:
    """Run `gm` on `world` ranks; an argument that is a list holds one tensor per rank. Outputs per rank."""
    with LocalTensorMode(world):
        placed = [LocalTensor(dict(enumerate(a))) if isinstance(a, list) else a for a in args]
        outputs = gm(*placed)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        return [[_local(output, rank) for output in outputs] for rank in range(world)]


def _local(output: Any, rank: int) -> Tensor:
    return output._local_tensors[rank] if isinstance(output, LocalTensor) else output


def relative_error(got: Sequence[Tensor], reference: Sequence[Tensor]) -> list[float]:
    """Relative L2 error of each output against float64."""
    return [
        float((g.double() - r.double()).norm() / r.double().norm().clamp_min(1e-300))
        for g, r in zip(got, reference, strict=True)
    ]


#: c10d's own names, as a substring, and the word for each.
_C10D_NAMES = {"allreduce": "all_reduce", "reduce_scatter": "reduce_scatter", "allgather": "all_gather"}


def executed_collectives(fn: Callable[..., Any], *args: Any) -> Counter:
    """Which collectives a call really performs.

    Counted by the profiler below all wrappers, so that a collective nobody reads is seen as well.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fn(*args)
    return collectives_of(profile.events())


def collectives_of(events: Iterable[Any]) -> Counter:
    """The collectives among the profiler's events."""
    names = [e.name.removeprefix("c10d::") for e in events if e.name.startswith("c10d::")]
    words = {name: next((word for part, word in _C10D_NAMES.items() if part in name), name) for name in names}
    return Counter(words[name] for name in names if "barrier" not in name)


#: How many bytes a number has, by the profiler's name of its dtype.
_SIZES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "int": 4}
_PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::_scaled_dot_product_flash_attention_for_cpu")


def sent_bytes(fn: Callable[[], Any]) -> tuple[int, Counter]:
    """(the bytes that a call gives to functional collectives, which matrix products and attentions it runs)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        fn()
    sent, products = 0, Counter[str]()
    for event in profile.profiler.kineto_results.events():
        space, _, name = event.name().partition("::")
        if space == "_c10d_functional" and not name.startswith("wait"):
            sent += math.prod(event.shapes()[0]) * _SIZES[event.dtypes()[0]]
        elif event.name() in _PRODUCTS:
            products[event.name()] += 1
    return sent, products


def taken_apart_with_the_same_bits(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Take the one fused operation of `gm` apart, in place; on two ranks it gives the bits that it gave."""
    whole = on_ranks(gm, 2, *inputs)
    assert take_apart(gm.graph) == 1
    gm.graph.lint()
    gm.recompile()
    for old, new in zip(whole, on_ranks(gm, 2, *inputs), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)
