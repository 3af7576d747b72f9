"""A call's tensors, ready for a kernel: contiguous, aligned; and the launch of a kernel on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

from torch import Tensor

from ..._torch_private import raw_stream
from ..add_norm import on_device_of, quantised_tensors, scales, split_eps
from ..call import NORMS, AddNormOut, Call
from ..compat import INTERPRETED, next_power_of_2

#: The tensors of a call that a launch's arguments begin with, and records address them by.
NAMES = "x", "residual", "pre_bias", "weight", "bias", "y", "hidden", "total", "mean", "rstd", "eps"
TENSORS = len(NAMES)
#: Kernels that were launched before -> (compiled, their constexprs in order). Triton's own way from a call's arguments
#: to the compiled kernel costs the host more than all the rest of a launch.
COMPILED_REGISTRY: dict[tuple, tuple[Any, list[Any]]] = {}


@dataclass(frozen=True)
class Launch:
    """One kernel, bound to its arguments, with the tensors it will fill. `kernel` is None where nothing is to be done.

    `run` launches it. `load` only compiles it and loads it on the device; a harness whose ranks share one device must
    do that for every kernel before the first `run`, because loading waits for running kernels, and those for peers."""

    kernel: Any
    programs: int
    args: tuple
    constants: dict[str, Any]  # the kernel's constexprs and Triton's launch options
    out: AddNormOut
    sum: Tensor | None

    multiplies: ClassVar[bool] = False
    """Whether `run` fills an x that is a product. Otherwise x was there when the launch was bound."""

    def run(self) -> tuple[AddNormOut, Tensor | None]:
        if self.kernel is not None:
            with on_device_of(self.out.y):
                known = COMPILED_REGISTRY.get(key := self._specialisation())
                if known is not None:
                    compiled, constexprs = known
                    compiled[(self.programs, 1, 1)](*self.args, *constexprs, *self.last.values())
                else:
                    compiled = self.kernel[(self.programs,)](*self.args, **self.constants, **self.last)
                    if compiled is not None:  # the interpreter compiles nothing
                        names = [name for name in self.kernel.arg_names[len(self.args) :] if name not in self.last]
                        COMPILED_REGISTRY[key] = compiled, [self.constants.get(name) for name in names]
        return self.out, self.sum

    @cached_property
    def last(self) -> dict[str, Tensor]:
        """The kernel's last arguments, behind its constexprs, where it quantises. Made once: a first call asks for
        them to compile, to launch and for its record, and a view costs the host as much as any operator."""
        return quantised_tensors(self.out)

    def again(self, places: Places, watch: Tensor) -> tuple[Callable[..., None], tuple] | None:
        """What makes the same launch on other tensors, `launch(*addresses, *rest, *last, stream=...)`, and `rest`:
        addresses in the order of NAMES, `last` those of q and scale where it quantises. None where this one was not
        made on the tensors at `places`, but on copies, or nothing compiled was launched."""
        found = self.compiled()
        if found is None or places_of(self.args[:TENSORS]) != places:
            return None
        compiled, constexprs = found
        return compiled[(self.programs, 1, 1)], (*addressed(self.args[TENSORS:], watch), *constexprs)

    def compiled(self) -> tuple[Any, list[Any]] | None:
        """What `run` launched, and the kernel's constexprs in order; None before it, and where nothing is compiled."""
        return COMPILED_REGISTRY.get(self._specialisation()) if self.kernel is not None else None

    def _specialisation(self) -> tuple:
        return key_of(self.kernel, self.args, {**self.constants, **self.last}, self.out.y.device.index)

    def load(self) -> Any:
        """The compiled kernel (`n_regs`, `n_spills`, `metadata`), loaded; None where nothing is to be done."""
        if self.kernel is None:
            return None
        with on_device_of(self.out.y):
            compiled = self.kernel.warmup(*self.args, grid=(self.programs,), **self.constants, **self.last)
            compiled._init_handles()
        return compiled


#: Where a call's tensors lie, in the order of NAMES; None for those that it has not.
Places = tuple[int | None, ...]


def places_of(tensors: Iterable[Tensor | None]) -> Places:
    return tuple(None if t is None else t.data_ptr() for t in tensors)


def addressed(args: Iterable[Any], watch: Tensor) -> list[Any]:
    """Tensors as addresses; but the watch is pinned memory of the host, of which the launcher alone knows the device's
    address."""
    return [a.data_ptr() if isinstance(a, Tensor) and a is not watch else a for a in args]


def _marks(args: Iterable[Any]) -> list[Any]:
    return [
        (a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else (a == 1, a % 16 == 0) if isinstance(a, int) else
        a is None
        for a in args
    ]  # fmt: skip


def launch_again(
    kernel: Any, programs: int, args: tuple, options: dict[str, Any], device: int | None, key: tuple | None = None
) -> None:  # fmt: skip
    """As `kernel[(programs,)](*args, **options)`, but what was compiled before is launched at once. For a call of many
    kernels, which is no `Launch`. `options`: constexprs, tensors behind them, and Triton's own. `key`: `key_of` the
    rest, where the caller knows it."""
    key = key or key_of(kernel, args, options, device)
    known = COMPILED_REGISTRY.get(key)
    if known is not None:
        stream = None if device is None else raw_stream(device)
        known[0][(programs, 1, 1)](*args, *(options.get(name) for name in known[1]), stream=stream)
        return
    compiled = kernel[(programs,)](*args, **options)
    if compiled is not None:  # the interpreter compiles nothing
        COMPILED_REGISTRY[key] = compiled, kernel.arg_names[len(args) :]


def key_of(kernel: Any, args: tuple, options: dict[str, Any], device: int | None) -> tuple:
    """All that Triton compiles a kernel for: of tensors the dtype and alignment, of integers whether they are 1 or
    multiples of 16 (told apart also where a kernel forbids it, which costs an entry and no compilation).

    To find that out costs the host more than the launch: who launches a kernel several times, and changes nothing but
    numbers that it is not compiled for, asks once."""
    tensors = [value for value in options.values() if isinstance(value, Tensor)]
    named = [(name, value) for name, value in options.items() if not isinstance(value, Tensor)]
    return (kernel, device, *named, *_marks((*args, *tensors)))


def launch_options(warps: int, registers: int) -> dict[str, int]:
    """Triton's launch options; `registers` (of a thread, 0: the compiler's choice) buys residency."""
    return {"num_warps": warps, **({"maxnreg": registers} if registers else {})}


@dataclass(frozen=True)
class Prepared:
    """Kernel arguments: inputs made contiguous and 16-byte aligned, outputs allocated."""

    inputs: tuple[Tensor | None, ...]  # x, residual, pre_bias, weight, bias
    out: AddNormOut
    sum: Tensor | None
    scalars: tuple  # eps tensor or None, eps, weight_offset, alpha; None where they change nothing

    @property
    def outputs(self) -> tuple[Tensor | None, ...]:
        return self.out.y, self.out.residual_out, self.sum, self.out.mean, self.out.rstd


def lies_ready(t: Tensor) -> bool:
    """Whether kernels load a tensor from where it lies, and no copy of it."""
    return t.is_contiguous() and t.data_ptr() % 16 == 0


def _ready(t: Tensor | None) -> Tensor | None:
    if t is None or lies_ready(t):
        return t
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def prepare(call: Call, multiply: bool = True) -> Prepared:
    """Allocate the outputs and bring the inputs into the form the kernels load. An x that is a product is multiplied
    here, unless the kernel does so (`multiply`)."""
    call = call.multiplied() if multiply else call
    inputs = tuple(_ready(t) for t in (call.x, call.residual, call.pre_bias, call.weight, call.bias))
    out, total = call.outputs()
    eps_tensor, eps = split_eps(call.eps_given, call.x.device)
    return Prepared(inputs, out, total, (eps_tensor, eps, *scales(call.weight_offset, call.alpha)))


def default_warps(call: Call, split: int) -> int:
    """One 16-byte load a thread and rank: the shortest code, and the most loads in flight. Never more threads than
    that, because a word must be read by one thread only."""
    return max(1, min(32, next_power_of_2(call.row_words // split) // 128))


def constants(call: Call, world: int, split: int, many: bool, spin: bool | None) -> dict:
    """The constexprs of a kernel, a dict of the caller's own."""
    size = call.hidden, call.row_words, call.x.element_size()
    return dict(_constants(*size, call.norm, call.post, world, split, many, spin))


@lru_cache(maxsize=1024)
def _constants(
    hidden: int, row_words: int, itemsize: int, norm: str, post: bool, world: int, split: int, many: bool,
    spin: bool | None,
) -> dict:  # fmt: skip
    words = max(next_power_of_2(row_words // split), 4)
    return {
        "H": hidden, "ROW_WORDS": row_words, "W": words, "EL": words * (4 // itemsize), "SPLIT": split, "WORLD": world,
        "NORM": NORMS[norm], "POST": post, "MANY": many, "SPIN": not INTERPRETED if spin is None else spin,
    }  # fmt: skip
