"""Proves a cut: every module that `parallelize` cut, against the uncut computation, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from tpfuse._torch_private import process_group
from tpfuse.errors import PlanError, PolicyError, VerifyError
from tpfuse.parallel.collectives import all_reduce
from tpfuse.parallel.mesh import Group
from tpfuse.parallel.record import Parallelized
from tpfuse.parallel.uncut import uncut

#: |cut - uncut| / |uncut| that other orders of summation explain; a sum that is missing or paid twice gives 0.1 to 3.
#: Routers and norms of many models compute in float32 whatever the model's dtype.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.06, torch.float16: 0.02}

#: A gradient may differ by as many roundings of the module's largest one: where its terms cancel, as those of a key
#: bias do in softmax, nothing but rounding is left of it.
ROUNDINGS = 2


@dataclass(frozen=True)
class Verified:
    """What `verify` compared: the modules, innermost first, and how many outputs and gradients; all were equal."""

    modules: tuple[str, ...]
    compared: int
    worst: float

    def __str__(self) -> str:
        return (
            f"{len(self.modules)} modules equal the uncut computation: {self.compared} outputs and gradients, the "
            f"largest relative difference {self.worst:.1e}"
        )


@dataclass(frozen=True)
class _Compared:
    what: str
    error: float
    cause: str


def verify(model: nn.Module, *args: Any, **kwargs: Any) -> Verified:
    """Runs every cut module, its layer, and the model beside an uncut copy of it, forward and backward.

    All ranks call it. Each module gets random rows (other ones on each dp replica) and whatever else the model gives
    it; its output, the gradient of its input and of every parameter are compared with those of a copy with gathered
    weights. One module's weights are gathered at a time; the whole model's at the end. The model, its gradients, its
    training mode and the random state are left as they were.

    The copy is made of the ranks' slices, since nothing else is left of the whole weights: slices that all ranks hold
    in another order than the uncut model (its packed halves swapped) are another model's, and right for it.
    `parallelize(..., verify=True)` compares with the weights from before the cut, and finds that too.

    Args:
        model: a parallelized model.
        args, kwargs: what the model is called with to see what its modules are given; a few random ids for a Hugging
            Face model when left out. The same on all ranks of a dp replica.

    Raises:
        PolicyError: for a model that was not parallelized.
        PlanError: when there are no arguments and the model is no Hugging Face model.
        VerifyError: on all ranks, for the first module that differs: its name, what differs, by how much, and why
            where the numbers tell.
    """
    return verify_against(model, None, *args, **kwargs)


def verify_against(model: nn.Module, before: nn.Module | None, *args: Any, **kwargs: Any) -> Verified:
    """`verify`, against a copy of the model from before the cut instead of one made of the ranks' slices."""
    state: Parallelized | None = getattr(model, "_tpfuse", None)
    if state is None:
        raise PolicyError(f"verify: this {type(model).__name__} was not parallelized; call tpfuse.parallelize first")
    devices = [t.device for t in model.parameters()]
    done, count, worst, tolerance = [], 0, 0.0, _tolerance(model)
    with torch.random.fork_rng([d for d in {*devices} if d.type == "cuda"]), _as_it_was(model):
        args, kwargs = _example(model, state, args, kwargs, devices[0])
        calls = _record(model, _names(model, state), args, kwargs)
        calls[""] = (args, kwargs)
        for name, (inputs, named) in calls.items():
            twin = _twin(name, model, before, state)
            found = _check(name, model.get_submodule(name), twin, inputs, named, state, tolerance)
            found = _together(found, state.groups.whole)
            for one in found:
                if not one.error <= tolerance:
                    raise VerifyError(
                        f"{name or 'the model'} ({_class_name(model.get_submodule(name))}): {one.what} differs from "
                        f"the uncut computation by {one.error:.2g} of its size (allowed: {tolerance:g})"
                        + (f"; {one.cause}" if one.cause else "")
                    )
            done.append(name or "the model")
            count += len(found)
            worst = max([worst, *(one.error for one in found)])
    return Verified(tuple(done), count, worst)


def _class_name(module: nn.Module) -> str:
    return type(module).__name__


def _tolerance(model: nn.Module) -> float:
    return max(TOLERANCE.get(p.dtype, 0.1) for p in model.parameters())


def _names(model: nn.Module, state: Parallelized) -> list[str]:
    """Sites, then the layers that hold them, then cut modules outside of both (embedding, output projection)."""
    sites = [site.name for site in state.sites if site.name]
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in sites if "." in name))
    edges = [name.rpartition(".")[0] for name in state.cuts]
    outside = [e for e in dict.fromkeys(edges) if e and not any((e + ".").startswith(n + ".") for n in sites + layers)]
    return [n for n in (*sites, *layers, *outside) if not isinstance(model.get_submodule(n), nn.ModuleList)]


def _example(model: nn.Module, state: Parallelized, args: tuple, kwargs: dict, device: torch.device):
    if args or kwargs:
        return args, kwargs
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise PlanError(f"verify({type(model).__name__}) does not know its inputs; give them: verify(model, ids)")
    torch.manual_seed(1 + state.groups.dp.index)
    return (torch.randint(min(3, vocabulary - 1), vocabulary, (2, 4)).to(device),), {"use_cache": False}


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter, grad in grads:
            parameter.grad = grad


def _record(model: nn.Module, names: list[str], args: tuple, kwargs: dict) -> dict[str, tuple[tuple, dict]]:
    """What each module is given in its first call; modules that are not called are left out."""
    calls: dict[str, tuple[tuple, dict]] = {}

    def hook_of(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calls.setdefault(name, (args, {k: None if k == "past_key_values" else v for k, v in kwargs.items()}))

        return hook

    handles = [
        model.get_submodule(n).register_forward_pre_hook(hook_of(n), with_kwargs=True, prepend=True) for n in names
    ]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: calls[name] for name in names if name in calls}


def _twin(name: str, model: nn.Module, before: nn.Module | None, state: Parallelized) -> nn.Module:
    if before is None:
        return uncut(name, model.get_submodule(name), state.cuts, state.groups)
    before.eval()
    for parameter in before.parameters():
        parameter.grad = None
    return before.get_submodule(name)


def _check(
    name: str, module: nn.Module, twin: nn.Module, args: tuple, kwargs: dict, state: Parallelized, tolerance: float
) -> list[_Compared]:
    """This rank's comparison of one module. The same collectives in the same order on all ranks."""
    twin_args, twin_kwargs, twin_x = _inputs(args, kwargs, state.groups.dp.index)
    args, kwargs, x = _inputs(args, kwargs, state.groups.dp.index)
    want, got = _run(twin, twin_args, twin_kwargs), _run(module, args, kwargs)
    group = state.groups.whole if state.groups.attention.size == 1 else state.groups.attention
    # Ranks go on to backward, which communicates, only if all of them do.
    found = _together([_compare("the output", got.detach(), want.detach(), group)], state.groups.whole)
    if not found[0].error <= tolerance or not (got.requires_grad and want.requires_grad):
        return found
    for parameter in module.parameters():
        parameter.grad = None
    weights = torch.arange(want.numel(), device=want.device).cos().view_as(want).to(want.dtype)
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    if x is not None and twin_x is not None:
        found.append(_compare("the gradient of its input", _grad(x), _grad(twin_x), group))
    of, wanted = dict(twin.named_parameters()), {}
    for leaf, parameter in module.named_parameters():
        if parameter.requires_grad:
            full = _grad(of[leaf])
            wanted[leaf] = all_reduce(full, state.groups.dp.name) if state.groups.dp.size > 1 else full
    largest = max((float(full.norm()) for full in wanted.values()), default=0.0)
    own = dict(module.named_parameters())
    for leaf, full in wanted.items():
        cut = state.cuts.get(f"{name}.{leaf}" if name else leaf)
        least = ROUNDINGS * torch.finfo(full.dtype).eps * largest / tolerance
        want = full if cut is None else cut.take(full)
        found.append(_compare(f"the gradient of {leaf}", _grad(own[leaf]), want, None, least))
    return found


def _grad(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _inputs(args: tuple, kwargs: dict, replica: int) -> tuple[tuple, dict, Tensor | None]:
    """The arguments with fresh random rows in place of the hidden states, which then want a gradient."""
    tensors = [(i, a) for i, a in enumerate(args)] + list(kwargs.items())
    key, x = next(((k, t) for k, t in tensors if isinstance(t, Tensor) and t.is_floating_point()), (None, None))
    if x is None:
        return args, kwargs, None
    generator = torch.Generator().manual_seed(11 + replica)
    rows = torch.randn(x.shape, generator=generator).to(x.device, x.dtype).requires_grad_()
    if isinstance(key, int):
        return (*args[:key], rows, *args[key + 1 :]), kwargs, rows
    return args, {**kwargs, key: rows}, rows


def _run(module: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    with torch.enable_grad():
        output = module(*args, **kwargs)
    while not isinstance(output, Tensor):
        output = output.logits if hasattr(output, "logits") else output[0]
    return output


def _compare(what: str, got: Tensor, want: Tensor, group: Group | None, least: float = 0.0) -> _Compared:
    """`group`: over which a sum may be missing; every rank then takes part in one all-reduce. `least`: the size that a
    smaller tensor's difference is compared with."""
    total = None if group is None else all_reduce(got.contiguous(), group.name).double()
    if got.shape != want.shape:
        return _Compared(what, float("inf"), f"its shape is {tuple(got.shape)}, the uncut one's {tuple(want.shape)}")
    got, want = got.double(), want.double()
    size = want.norm().clamp_min(max(least, 1e-12))
    error = float((got - want).norm() / size)
    if error != error:
        return _Compared(what, float("inf"), "it is not finite")
    cause = ""
    times = float((got * want).sum() / (want * want).sum().clamp_min(1e-24))
    if total is not None and float((total - want).norm() / size) < 0.01 < error:
        cause = "each rank holds its share of it: a sum over the group is never paid"
    elif float((got - times * want).norm() / size) < 0.01 < error:
        counted = f"{times:.3g} times the uncut one"
        cause = f"it is {counted}: " + ("summed more than once" if times > 1 else "part of a sum is missing")
    return _Compared(what, error, cause)


def _together(found: list[_Compared], group: Group) -> list[_Compared]:
    """What all ranks saw, so that all of them raise the same; the first rank with the largest error speaks."""
    everywhere: list[Any] = [None] * group.size
    if group.size > 1:
        dist.all_gather_object(everywhere, found, group=process_group(group.name))
    else:
        everywhere = [found]
    shortest = min(len(one) for one in everywhere)
    return [max((one[i] for one in everywhere), key=lambda c: c.error) for i in range(shortest)]
