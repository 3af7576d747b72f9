"""Inductor's code for a Hopper GPU on a host that has none: graphs traced on the CPU are compiled as if on `cuda:0`.

Nothing of it can run; peak_memory.py looks at what it would hold. PyTorch must be a build that knows CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.compile_fx
import torch._inductor.scheduler
from torch import Tensor, fx
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.compile_fx import _InProcessFxCompile
from torch._subclasses import fake_tensor
from torch.utils._mode_utils import no_dispatch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

CUDA = torch.device("cuda:0")
H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=140 << 30, warp_size=32,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472, L2_cache_size=50 << 20,
)  # fmt: skip


@contextmanager
def compiled_for_cuda() -> Iterator[None]:
    """Within it, what Inductor compiles is for `cuda:0`, and an all-reduce and its norm are one kernel. Only while it
    compiles is there a GPU: whoever traces finds none."""
    compile_on_cpu = _InProcessFxCompile.codegen_and_compile

    def codegen_and_compile(self: Any, gm: fx.GraphModule, example_inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mode = next(v.fake_mode for n in gm.graph.nodes if hasattr(v := n.meta.get("val"), "fake_mode"))
        for node in gm.graph.find_nodes(op="get_attr"):
            setattr(gm, node.target, _moved(getattr(gm, node.target), mode))
        for node in gm.graph.nodes:
            if node.op == "call_function" and node.kwargs.get("device") is not None:
                node.update_kwarg("device", CUDA)
        with ExitStack() as stack:
            for target, name, instead in _THERE:
                stack.enter_context(mock.patch.object(target, name, instead))
            return compile_on_cpu(self, gm, [_moved(t, mode) for t in example_inputs], *args, **kwargs)

    with (
        mock.patch.object(_InProcessFxCompile, "codegen_and_compile", codegen_and_compile),
        mock.patch.object(driver, "_active", _Driver()),
        mock.patch("tpfuse.passes.rewrite.lower.runs_in_a_kernel", lambda *_: True),
    ):
        yield


def _moved(t: Any, mode: Any) -> Any:
    """A fake of `t` on the GPU; numbers stay."""
    if not isinstance(t, Tensor) or (t.dim() == 0 and not t.is_floating_point()):
        return t
    with no_dispatch():
        meta = torch.empty_strided(tuple(t.shape), tuple(t.stride()), dtype=t.dtype, device="meta")
    return fake_tensor.FakeTensor(mode, meta, CUDA)


class _Driver:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


def _gives(result: Any) -> Any:
    return lambda *_, **__: result


#: What PyTorch asks of a GPU while it compiles.
_THERE: tuple[tuple[Any, str, Any], ...] = (
    (torch.cuda, "is_available", _gives(True)),
    (torch.cuda, "is_initialized", _gives(False)),
    (torch.cuda, "_lazy_init", _gives(None)),
    (torch.cuda, "_is_compiled", _gives(True)),
    (torch.cuda, "device_count", _gives(1)),
    (torch.cuda, "current_device", _gives(0)),
    (torch.cuda, "device", _gives(nullcontext())),
    (torch.cuda, "synchronize", _gives(None)),
    (torch.cuda, "is_bf16_supported", _gives(True)),
    (torch.cuda, "get_device_capability", _gives((9, 0))),
    (torch.cuda, "get_device_properties", _gives(H200)),
    (torch.cuda, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8)),
    (torch.cuda, "set_rng_state", _gives(None)),
    (CudaInterface, "get_compute_capability", staticmethod(_gives(90))),
    (CudaInterface, "get_device_properties", staticmethod(_gives(H200))),
    (CudaInterface, "exchange_device", staticmethod(_gives(0))),
    (CudaInterface, "raise_if_triton_unavailable", staticmethod(_gives(None))),
    (CudaInterface.Worker, "get_device_properties", staticmethod(_gives(H200))),
    (fake_tensor, "init_gpu_context", _gives(None)),
    (torch._inductor.scheduler, "has_triton", _gives(True)),
)
