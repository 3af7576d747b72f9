"""Triton where there is one, and a stand-in that only lets the kernel files be imported where there is none.

`HAVE_TRITON` says which; `INTERPRETED` whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 at import), on
CPU tensors. Triton reads that variable when a kernel is decorated, so it cannot change later in the same process.
"""

from __future__ import annotations

import os
from typing import Any

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
except ImportError:  # macOS, Windows: the references and the functional path still work
    HAVE_TRITON = False

    class _Stub:
        """Takes the place of `triton` and `tl`: decorators hand the function back, everything else is a name."""

        def jit(self, fn: Any = None, **_: Any) -> Any:
            return fn if fn is not None else (lambda f: f)

        def constexpr(self, value: Any) -> Any:
            return value

        def __getattr__(self, name: str) -> Any:
            return None

    triton: Any = _Stub()  # type: ignore[no-redef]
    tl: Any = triton  # type: ignore[no-redef]

INTERPRETED = HAVE_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()
