"""Copies and events by the CUDA driver, on addresses: a record of a call has nothing else (`symmetric/noted.py`)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from ..errors import OpError


class Driver(NamedTuple):
    """`copy(to, source, size, stream)`: so many bytes from one address of the device to another; `record(event,
    stream)`; `wait(stream, event, 0)`. Streams and events are handles as PyTorch gives them. All of it is captured
    where the stream is. Each raises OpError where the driver refuses."""

    copy: Callable[[int, int, int, int], None]
    record: Callable[[int, int], None]
    wait: Callable[[int, int, int], None]


@lru_cache
def driver() -> Driver | None:
    """None where its library is not found by its usual name."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    checked: Any = _checked  # a type that ctypes' stubs do not know
    handle, number = ctypes.c_void_p, ctypes.c_uint64
    copy, record, wait = library.cuMemcpyDtoDAsync_v2, library.cuEventRecord, library.cuStreamWaitEvent
    for function, takes in (
        (copy, (number, number, ctypes.c_size_t, handle)),
        (record, (handle, handle)),
        (wait, (handle, handle, ctypes.c_uint)),
    ):
        function.argtypes, function.restype, function.errcheck = takes, ctypes.c_int, checked
    return Driver(copy, record, wait)


def _checked(result: int, *_: Any) -> None:
    if result:
        raise OpError(f"the CUDA driver refused a copy or an event: error {result}")
