"""The peak of a training step's live bytes, at real sizes and without running it: what Inductor's code holds.

    python benchmarks/peak_memory.py --out results/peak_memory.jsonl            Llama 3 8B's sizes, code for a GPU
    python benchmarks/peak_memory.py --layouts plain --tokens 4096 --vocabulary 64000 --device cpu

The model and its cut are those of training.py, on one rank of a fake process group. The code that Inductor writes for
forward and backward is run on tensors without data, its kernels left out: what it allocates, keeps and gives up is all
its own. Gradients count, parameters do not, and a step's result does until backward begins. A collective allocates
nothing besides its results.

`--device cuda` needs a build of PyTorch that knows CUDA, and no GPU (without_gpu.py). Every size runs with Inductor's
reuse of buffers, which is its default, and without it (`allow_buffer_reuse`).
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn
from torch._inductor.graph import GraphLowering
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import training

from tests.graphs import fake_world


@dataclass(frozen=True)
class Record:
    """reuse: whether Inductor may reuse buffers. kept_mb: what forward leaves for backward. Bytes are millions."""

    torch: str
    device: str
    world: int
    layout: str
    tokens: int
    vocabulary: int
    layers: int
    provider: str
    reuse: bool
    kept_mb: float
    peak_mb: float


# -- what code allocates ----------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Counts the bytes of storages that operations under it made and that are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def now(self) -> int:
        self.held = {key: kept for key, kept in self.held.items() if not kept[0].expired()}
        return sum(size for _, size in self.held.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self.now()  # a storage that went may have left its address to a new one
        for t in tree_leaves(out):
            storage = t.untyped_storage() if isinstance(t, Tensor) else None
            if storage is not None and storage._cdata not in given:
                self.held.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, self.now())
        return out


class _Operators:
    """`torch.ops` as Inductor's code calls it; collectives and our operators give results without data."""

    def __init__(self, path: tuple[str, ...] = (), real: Any = torch.ops) -> None:
        self.path, self.real = path, real

    def __getattr__(self, name: str) -> _Operators:
        return _Operators((*self.path, name), getattr(self.real, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        space, name = self.path[:2]
        if space == "tpfuse":
            return _norm_backward(*args, **kwargs) if name == "norm_backward" else None
        if space == "_c10d_functional":
            return _collective(name, *args)
        return args[0] if name == "index_put_" else self.real(*args, **kwargs)


def _norm_backward(*args: Any, **kwargs: Any) -> list[Tensor]:
    from tpfuse.backward_ops import _fake_results
    from tpfuse.kernels.norm_backward import NormBackwardCall

    call = NormBackwardCall(*args, **kwargs)
    return _fake_results(call, call.dy.shape[0], want_sum=False)


def _collective(name: str, x: Tensor, *args: Any) -> Tensor:
    if name in ("all_reduce_", "wait_tensor"):
        return x
    rows = {
        "all_reduce": lambda: x.shape[0],
        "all_gather_into_tensor": lambda: x.shape[0] * args[0],
        "reduce_scatter_tensor": lambda: x.shape[0] // args[1],
    }[name]()
    return x.new_empty((rows, *x.shape[1:]))


class _Kernels:
    """Every kernel that Inductor compiled, and what it compiles them with: nothing is launched."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None

    def __enter__(self) -> None:
        return None

    def __exit__(self, *args: Any) -> None:
        return None


def _without_data(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def _reinterpreted(t: Tensor, size: Any, stride: Any, offset: int = 0) -> Tensor:
    return torch.as_strided(t, size, stride, t.storage_offset() + offset)


_INSTEAD = (
    (r"^async_compile = AsyncCompile\(\)", "async_compile = KERNELS"),
    (r"^async_compile\.wait\(globals\(\)\)|^del async_compile", ""),
    (r"torch\._C\._dynamo\.guards\._empty_strided_\w+", "None"),
    (r"^from torch\._C import _cuda_getCurrentRawStream as get_raw_stream", "get_raw_stream = KERNELS"),
)


def call_of(source: str) -> Any:
    """What runs a graph, of the module that Inductor wrote for it."""
    for pattern, instead in _INSTEAD:
        source = re.sub(pattern, instead, source, flags=re.MULTILINE)
    kernels = _Kernels()
    names: dict[str, Any] = {"__name__": "graph", "KERNELS": kernels}
    exec(compile(source, "<graph>", "exec"), names)
    names |= {name: kernels for name in names if name.startswith(("cpp_fused", "triton_"))}
    names |= dict.fromkeys(("empty_strided_cpu", "empty_strided_cuda", "empty_strided_cpu_pinned"), _without_data)
    names |= {"reinterpret_tensor": _reinterpreted, "assert_size_stride": kernels, "assert_alignment": kernels}
    names["torch"] = SimpleNamespace(**{**vars(torch), "ops": _Operators(), "cuda": kernels})
    names["aten"] = _Operators().aten
    return names["call"]


@dataclass
class Peak:
    """kept: what forward leaves for backward. whole: the peak of both."""

    kept: int = 0
    whole: int = 0


@contextmanager
def counted() -> Iterator[Peak]:
    """What is compiled within it counts what it holds in place of computing; one model, one step."""
    peak, live = Peak(), Live()
    made: dict[int, Tensor] = {}  # by the address of what stands for it outside

    def run(call: Any, args: list[Any], backward: bool) -> list[Any]:
        given = [_stand_in(t, made) if isinstance(t, Tensor) else t for t in args]
        args.clear()
        made.clear()  # backward gives up what was kept where its code does
        with live, torch.no_grad():
            results = call(given)
        peak.kept = peak.kept if backward else live.now()
        peak.whole = live.peak
        return [_outside(t, live, made) if isinstance(t, Tensor) else t for t in results]

    def compile_to_module(graph: GraphLowering) -> Any:
        code, _ = graph.codegen()
        graph.cache_key, graph.cache_path, graph.cache_linemap = "", __file__, []
        backward = graph.is_backward
        return SimpleNamespace(__file__=__file__, call=lambda args: run(call_of(code.value), args, backward))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(GraphLowering, "compile_to_module", compile_to_module))
        stack.enter_context(torch._inductor.config.patch(force_disable_caches=True))
        yield peak


def _stand_in(t: Tensor, made: dict[int, Tensor]) -> Tensor:
    """The tensor without data for one outside: over the storage that forward made, or of what counts nowhere."""
    kept = made.get(t.untyped_storage()._cdata)
    if kept is None:
        return _without_data(t.shape, t.stride(), t.dtype)
    empty = torch.empty(0, dtype=t.dtype, device="meta")
    return empty.set_(kept.untyped_storage(), t.storage_offset(), t.shape, t.stride())


def _outside(t: Tensor, live: Live, made: dict[int, Tensor]) -> Tensor:
    """What stands for a result outside: memory that nobody touches, and so takes none."""
    storage = t.untyped_storage()
    base = next((key for key, kept in made.items() if kept.untyped_storage()._cdata == storage._cdata), None)
    if base is None:
        whole = torch.empty(storage.nbytes(), dtype=torch.uint8)
        if storage._cdata in live.held:
            made[whole.untyped_storage()._cdata] = t
        outside = whole.untyped_storage()
        _KEPT.append(outside)
    else:
        outside = next(each for each in _KEPT if each._cdata == base)
    return torch.empty(0, dtype=t.dtype).set_(outside, t.storage_offset(), t.shape, t.stride())


_KEPT: list[Any] = []  # so that no address is given twice


def peak_of(model: nn.Module, x: Tensor, **compile_options: Any) -> Peak:
    """Of one step of a model on the CPU, whatever the device that its code is written for."""
    torch._dynamo.reset()
    with counted() as peak:
        y = torch.compile(model, fullgraph=True, **compile_options)(x)
        y.backward(torch.empty_like(y))
    _KEPT.clear()
    return peak


# -- the model of training.py -----------------------------------------------------------------------------------------


def _attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, enable_gqa: bool) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    sizes = training.Sizes(layers=arguments.layers, vocabulary=arguments.vocabulary)
    with ExitStack() as stack:
        if arguments.device == "cuda":
            from without_gpu import compiled_for_cuda  # which needs Triton

            stack.enter_context(compiled_for_cuda())
            stack.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", _attention))
        stack.enter_context(fake_world(arguments.world))
        mesh = init_device_mesh("cpu", (arguments.world,))
        for layout in arguments.layouts:
            for reuse in (True, False):
                for provider in arguments.providers:
                    with torch.device("meta"):
                        model = training.Model(sizes).bfloat16()
                    model = training.cut(model, mesh, layout, sizes.layers).to_empty(device="cpu")
                    tokens = torch.zeros(1, arguments.tokens, dtype=torch.int64)
                    with torch._inductor.config.patch(allow_buffer_reuse=reuse):
                        peak = peak_of(model, tokens, **training.PROVIDERS[provider])
                    yield Record(
                        torch.__version__, arguments.device, arguments.world, layout, arguments.tokens,
                        sizes.vocabulary, sizes.layers, provider, reuse, round(peak.kept / 1e6, 1),
                        round(peak.whole / 1e6, 1),
                    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="records are added to it, one a line")
    parser.add_argument("--layouts", nargs="+", default=["plain", "sequence"], choices=["plain", "sequence"])
    parser.add_argument("--providers", nargs="+", default=["inductor", "tpfuse"], choices=training.PROVIDERS)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=training.Sizes.vocabulary)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"], help="for which code is written")
    arguments = parser.parse_args()
    for record in records(arguments):
        print(record, flush=True)
        if arguments.out is not None:
            with arguments.out.open("a", encoding="utf-8") as file:
                day = datetime.date.today().isoformat()
                file.write(json.dumps({**asdict(record), "date": day}) + "\n")


if __name__ == "__main__":
    main()
