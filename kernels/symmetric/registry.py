"""The kernels that dispatch may take, by name. A new one is a file beside this one, and a line here."""

from __future__ import annotations

from .barrier import KERNEL as _BARRIER
from .copied import KERNEL as _COPIED
from .kernel import Kernel
from .one_shot import KERNEL as _ONE_SHOT
from .two_shot import KERNEL as _TWO_SHOT

KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (_ONE_SHOT, _TWO_SHOT, _BARRIER, _COPIED)}


def worlds() -> tuple[int, ...]:
    """The numbers of ranks that a kernel takes."""
    return tuple(sorted({world for kernel in KERNELS.values() for world in kernel.worlds}))
