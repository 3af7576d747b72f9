"""Modules, hooks, the backward pass and optimizers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def own_tensors(module: nn.Module) -> list[dict[str, Any]]:
    """The module's own tables of parameters and buffers, to be changed in place.

    If they go: `setattr(module, name, tensor)` replaces a parameter or buffer just as well.
    """
    return [module._parameters, module._buffers]


def backward_hooks(owner: nn.Module | torch.Tensor) -> dict[int, Any]:
    """The hooks on a module's or a parameter's gradients.

    If `_backward_hooks` goes: answer {}; `sum_gradients` must then be called once only.
    """
    return owner._backward_hooks or {}


def first_of(hooks: dict[int, Any], number: int) -> None:
    """Lets the hook of this number run before the others.

    If hooks are no dict any more: do nothing; hooks that others put on parameters then see partial gradients.
    """
    if number in hooks:
        # Autograd reads the plain dict in there, whose order `move_to_end` does not change.
        others = [(key, hook) for key, hook in hooks.items() if key != number]
        first = hooks[number]
        hooks.clear()
        hooks[number] = first
        hooks.update(others)


def forward_pre_hooks(module: nn.Module) -> dict[int, Any]:
    """The hooks in front of a module's forward.

    If `_forward_pre_hooks` goes: answer {}; a hook that is there twice changes nothing.
    """
    return module._forward_pre_hooks


def forward_hooks(module: nn.Module) -> dict[int, Any]:
    """The hooks behind a module's forward.

    If `_forward_hooks` goes: answer {}; what hooks pay is then not found again.
    """
    return module._forward_hooks


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """The modules that a module holds itself, by name; those it hands on from others are left out.

    If `_modules` goes: `dict(module.named_children())`, which leaves out a name that stands for None.
    """
    return module._modules


def replace_total_norm(total_norm: Any) -> None:
    """Let `torch.nn.utils.clip_grad_norm_` and `get_total_norm` find their norm by `total_norm(original, ...)`; once.

    If `_get_total_norm` goes: clip with `get_total_norm` in its place; without either, cut models need a clip of
    their own.
    """
    from torch.nn.utils import clip_grad

    original = getattr(clip_grad, "_get_total_norm", None)
    if original is None or hasattr(original, "_tpfuse_original"):
        return

    @functools.wraps(original)
    def known(*args: Any, **kwargs: Any) -> torch.Tensor:
        return total_norm(original, *args, **kwargs)

    known._tpfuse_original = original  # type: ignore[attr-defined]
    clip_grad._get_total_norm = known
    for module in (torch.nn.utils, clip_grad):
        if getattr(module, "get_total_norm", None) is original:
            vars(module)["get_total_norm"] = known


def see_overflows(seen: Any) -> None:
    """Let `torch.amp.GradScaler` tell `seen(optimizer, {device: whether a gradient overflowed})`, which may write into
    these tensors, before it decides about a step; once.

    If `_unscale_grads_` goes: ranks of cut models decide each by its own slices.
    """
    original = getattr(torch.amp.GradScaler, "_unscale_grads_", None)
    if original is None or hasattr(original, "_tpfuse_original"):
        return

    @functools.wraps(original)
    def told(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, optimizer, *args, **kwargs)
        seen(optimizer, found)
        return found

    told._tpfuse_original = original  # type: ignore[attr-defined]
    torch.amp.GradScaler._unscale_grads_ = told  # type: ignore[method-assign]


def backward_task() -> int:
    """The number of the backward pass that runs now.

    If it goes: 0, and replicas agree once, for all passes; they must then use the same parameters.
    """
    return torch._C._current_graph_task_id()


def backward_reaches(leaf: torch.Tensor) -> tuple[bool, bool]:
    """Whether the backward pass that runs now gives a leaf a gradient, and whether `torch.autograd.grad` asked for it.

    If it goes: (True, False); replicas must then use the same parameters.
    """
    node = torch.autograd.graph.get_gradient_edge(leaf).node
    try:
        return torch._C._will_engine_execute_node(node), False  # type: ignore[attr-defined]
    except RuntimeError as error:
        if "autograd.grad" not in str(error):
            raise
        return True, True


def when_backward_ends(callback: Callable[[], None]) -> None:
    """Run `callback` at the end of the backward pass that runs now.

    If it goes: a final callback of a hook on the loss.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]


def before_backward(look: Callable[[Any], None]) -> None:
    """Let `look(tensors)` see what every `backward()` that adds gradients to parameters starts from; once.

    If `_engine_run_backward` goes: nothing looks, and penalties on parameters of cut modules are counted by rank.
    """
    original = getattr(torch.autograd, "_engine_run_backward", None)
    if original is None or hasattr(original, "_tpfuse_original"):
        return

    @functools.wraps(original)
    def run(tensors: Any, *args: Any, accumulate_grad: bool = False, **kwargs: Any) -> Any:
        if accumulate_grad and not torch.compiler.is_compiling():
            look(tensors)
        return original(tensors, *args, accumulate_grad=accumulate_grad, **kwargs)

    run._tpfuse_original = original  # type: ignore[attr-defined]
    vars(torch.autograd)["_engine_run_backward"] = run


def post_accumulate_hooks(leaf: torch.Tensor) -> bool:
    """Whether something takes a leaf's gradient as soon as it is accumulated (an optimizer in backward).

    If `_post_accumulate_grad_hooks` goes: True, and replicas must use the same parameters.
    """
    return bool(getattr(leaf, "_post_accumulate_grad_hooks", None))


def wrapped_in_ddp() -> bool:
    """Whether a forward of DistributedDataParallel is running.

    If `_active_ddp_module` goes: True, and replicas must use the same parameters.
    """
    from torch.nn.parallel import DistributedDataParallel

    return getattr(DistributedDataParallel, "_active_ddp_module", None) is not None


def ranks_of_ddp() -> tuple[int, ...]:
    """The ranks over which the running forward of DistributedDataParallel replicates; () outside of one.

    If `_active_ddp_module` goes: (), and a model that is cut over these ranks is not refused.
    """
    from torch.nn.parallel import DistributedDataParallel

    module = getattr(DistributedDataParallel, "_active_ddp_module", None)
    return tuple(dist.get_process_group_ranks(module.process_group)) if module is not None else ()


def wrap_optimizer_state(saved: Any, loaded: Any) -> None:
    """Let `saved(optimizer, original)` answer for every optimizer's state_dict(), and what load_state_dict is given
    pass through `loaded(optimizer, state)`; once.

    If the class's methods can no longer be replaced: `register_state_dict_post_hook` and
    `register_load_state_dict_pre_hook` of each optimizer do the same.
    """
    kind = torch.optim.Optimizer
    if hasattr(kind.state_dict, "_tpfuse_original"):
        return
    save, load = kind.state_dict, kind.load_state_dict

    @functools.wraps(save)
    def state_dict(self: Any) -> dict[str, Any]:
        return saved(self, save)

    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        load(self, loaded(self, state_dict))

    state_dict._tpfuse_original = save  # type: ignore[attr-defined]
    kind.state_dict = state_dict  # type: ignore[method-assign]
    kind.load_state_dict = load_state_dict  # type: ignore[method-assign]
