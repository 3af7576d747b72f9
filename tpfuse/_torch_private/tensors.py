"""Tensors: fake ones, modes that see every operator, DTensors, streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn


def raw_stream(device: int) -> int:
    """The address of the current stream of the GPU with this number; 0 for a CPU (-1).

    If `_cuda_getCurrentRawStream` goes: `torch.cuda.current_stream(device).cuda_stream`, at several times the cost.
    """
    return _raw_stream(device) if device >= 0 else 0


#: A build for CPUs has none.
_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)

#: The number of the GPU that kernels are launched on now. If `_cuda_getDevice` goes: `torch.cuda.current_device`.
current_gpu: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def tensor_leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors in nested lists, tuples and dicts.

    If `_pytree` goes: `torch.utils.pytree`.
    """
    from torch.utils import _pytree

    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def map_tensors(function: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """`tree` with `function` applied to its tensors.

    If `_pytree` goes: `torch.utils.pytree`.
    """
    from torch.utils import _pytree

    return _pytree.tree_map_only(torch.Tensor, function, tree)


def new_fake_mode() -> Any:
    """A mode in which operators compute shapes and dtypes and nothing else.

    If `FakeTensorMode` moves: `torch.compiler` and `torch.export` trace under one; take it from there.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def new_fake_like(val: Any) -> torch.Tensor:
    """A fake tensor in `val`'s fake mode, with its sizes, strides, dtype and device, and memory of its own.

    If that way of making a `FakeTensor` goes: `val.new_empty_strided(val.shape, val.stride())` under `val.fake_mode`.
    """
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils._mode_utils import no_dispatch

    with no_dispatch():
        plain = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device="meta")
    return FakeTensor(val.fake_mode, plain, val.device)


def storage_identity(val: torch.Tensor) -> int | None:
    """What tells the storage of a tensor, fake ones included, from others; None for those without one (sparse).

    If `_cdata` goes: `id(val.untyped_storage())` serves as long as the tensor keeps its storage object.
    """
    try:
        return val.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def under_dispatch_mode() -> bool:
    """Whether some mode (fake tensors, many ranks in one process, a tracer) sees every operator.

    If `_get_current_dispatch_mode` goes: answer False; then the row counts are compared under such modes too.
    """
    from torch.utils._python_dispatch import _get_current_dispatch_mode, _get_current_dispatch_mode_stack

    if _get_current_dispatch_mode() is None:
        return False
    return not all(hasattr(mode, "only_looks") for mode in _get_current_dispatch_mode_stack())


def storage_reference(val: torch.Tensor) -> Any:
    """An object that keeps a storage's identity from being given to another, and none of its memory.

    If `StorageWeakRef` goes: the storage itself, whose memory then stays until the object goes.
    """
    from torch.multiprocessing.reductions import StorageWeakRef

    return StorageWeakRef(val.untyped_storage())


def seeing_operators(before: Callable[..., None], after: Callable[..., None]) -> Callable[[], None]:
    """From now on every operator that this thread runs goes between `before(operator, args, kwargs)` and
    `after(operator, args, kwargs, result)`, until the function that comes back is called.

    Pushed by hand: entering the mode would set flags of the whole process, which threads that come and go leave wrong.

    If `_push_mode` goes: `__enter__` and `__exit__` of the mode; or do nothing, and nothing is looked at.
    """
    from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

    class Sees(TorchDispatchMode):
        only_looks = True
        supports_higher_order_operators = True

        @classmethod
        def is_infra_mode(cls) -> bool:
            """Functions that are compiled by themselves are compiled under it as well."""
            return True

        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            before(func, args, kwargs or {})
            out = func(*args, **(kwargs or {}))
            after(func, args, kwargs or {}, out)
            return out

    _push_mode(Sees())
    return _pop_mode


def runs_as_it_stands(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether an operator on these tensors just runs: nobody traces, transforms or differentiates it, forward neither.

    If one of these looks goes: answer False, and eager calls cost the host what they did before.
    """
    if under_dispatch_mode() or not all(type(t) in _PLAIN for t in tensors):
        return False
    return torch._C._functorch.maybe_current_level() is None and torch.autograd.forward_ad._current_level < 0


def under_transform(x: torch.Tensor) -> str | None:
    """What transforms x or differentiates it forward, by the name that users know; None otherwise.

    If one of these looks goes: answer None, and torch's own errors are raised.
    """
    if torch._C._functorch.maybe_current_level() is not None:
        return "a transform of torch.func (grad, vmap, jvp, ...)"
    if torch.autograd.forward_ad._current_level < 0 or torch.autograd.forward_ad.unpack_dual(x).tangent is None:
        return None
    return "forward-mode differentiation"


_PLAIN = (torch.Tensor, nn.Parameter)


def without_modes() -> AbstractContextManager:
    """Operators run as they are inside it, under no dispatch mode (a fake-tensor mode, say).

    If `_disable_current_modes` goes: torch.utils._python_dispatch has the stack of modes to be taken off by hand.
    """
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def new_dtensor(kind: type, local: torch.Tensor, mesh: Any, placements: Sequence[Any], shape: Sequence[int]) -> Any:
    """An instance of `kind`, a subclass of DTensor, that holds `local` and has `shape`; nothing is communicated.

    If `_dtensor_spec` moves: `DTensor.from_local(local, mesh, placements, shape=..., stride=...)` has such a spec.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(torch.Size(shape), torch.empty(tuple(shape), device="meta").stride(), local.dtype)
    spec = DTensorSpec(mesh, tuple(placements), tensor_meta=meta)
    return DTensor.__new__(kind, local, spec, requires_grad=False)  # type: ignore[call-arg]


def local_of(tensor: Any) -> torch.Tensor:
    """What a DTensor holds on this rank, the very storage.

    If `_local_tensor` goes: `tensor.to_local()` without gradients.
    """
    return tensor._local_tensor


def part_of(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offsets, sizes) of what this rank holds of a DTensor.

    If `compute_local_shape_and_global_offset` goes: the DTensor's chunk of `torch.distributed.checkpoint` says it.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offsets), tuple(sizes)


def call_plainly(func: Any, args: tuple, kwargs: dict[str, Any] | None, handle: Any = None) -> Any:
    """Calls `func` as if the tensors among its arguments had no `__torch_function__`. With `handle`, every operator in
    it goes through `handle(operator, args, kwargs)`, in front of what a class of tensors would do.

    If `TorchDispatchMode` moves: 2.13 and later ask the class's own `__torch_dispatch__` as well.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    kwargs = kwargs or {}
    with torch._C.DisableTorchFunctionSubclass():
        if handle is None:
            return func(*args, **kwargs)

        class Handled(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
                return handle(func, args, kwargs or {})

        with Handled():
            return func(*args, **kwargs)
