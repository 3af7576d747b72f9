"""Which parameters the dp replicas' backward passes reach, agreed upon before the first sum over replicas.

Sums of gradients pair up by their order alone. Replicas may use different parameters in one step (another adapter, a
layer that is dropped, a vision tower): summed as backward reaches them, the gradients of different parameters of one
shape would be added up. So the replicas exchange one bit for each parameter, once in a backward pass, as soon as it is
about to communicate over dp. What all of them reach is summed where backward reaches it; what only some of them reach
is summed when backward is over, in the parameters' order, the others adding zeros. Every replica then holds the sum.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tpfuse._torch_private import (
    backward_reaches,
    backward_task,
    post_accumulate_hooks,
    under_dispatch_mode,
    when_backward_ends,
    wrapped_in_ddp,
)
from tpfuse.errors import PolicyError
from tpfuse.parallel.collectives import all_gather, first_order
from tpfuse.parallel.mesh import Group

#: What a replica says of itself besides its parameters, as the first number of its message.
_FREE, _BOUND, _NOT_ADDED = 0, 1, 2
_WHY = {
    _BOUND: "torch's FSDP or DDP, or a hook that runs after accumulation, takes gradients before backward is over",
    _NOT_ADDED: "torch.autograd.grad returns gradients and adds them to no parameter",
}


@dataclass
class _Task:
    """One backward pass: the parameters whose sums wait for its end, with the gradients that came so far."""

    waiting: dict[int, Tensor | None] = field(default_factory=dict)


class UsedParameters:
    """The parameters of one model of whose gradients sums over several replicas are owed, in the model's order."""

    def __init__(self, dp: Group) -> None:
        self.dp = dp
        self.names: list[str] = []
        self.sums: list[Callable[[Tensor], Tensor]] = []
        self.parameters: list[weakref.ref[Tensor]] = []
        self.bound = False
        self.tasks: dict[int, _Task] = {}

    def __deepcopy__(self, memo: dict) -> UsedParameters:
        memo[id(self)] = copied = UsedParameters(self.dp)
        return copied

    def add(self, name: str, parameter: Tensor, total: Callable[[Tensor], Tensor]) -> int:
        """The parameter's number. Known names keep theirs, and may stand for a new tensor."""
        if name in self.names:
            self.parameters[self.names.index(name)] = weakref.ref(parameter)
            return self.names.index(name)
        self.names.append(name)
        self.sums.append(total)
        self.parameters.append(weakref.ref(parameter))
        return len(self.names) - 1

    def called(self, parameter: Tensor, number: int) -> None:
        """Before a module's forward: the tensor that stands for the parameter now."""
        # Another tensor in a parameter's place is FSDP's, which takes the gradient away at once.
        self.bound = self.bound or self.parameters[number]() is not parameter or wrapped_in_ddp()
        self.parameters[number] = weakref.ref(parameter)

    def gradient(self, number: int, grad: Tensor | None) -> Tensor:
        """What a hook on the parameter gives: the sum, or zeros where the sum is added when backward is over."""
        first_order()
        if grad is None:  # of an operation that reaches the parameter, and gives it nothing
            parameter = self.parameters[number]()
            assert parameter is not None
            grad = torch.zeros_like(parameter)
        task = self.agree()
        if task is None or number not in task.waiting:
            return self.sums[number](grad)
        task.waiting[number] = grad
        return torch.zeros_like(grad)

    def agree(self) -> _Task | None:
        """Meets the other replicas, once in a backward pass; a collective over dp.

        Raises:
            PolicyError: on every rank, where replicas use different parameters and gradients cannot wait for the end.
        """
        if self.dp.size == 1 or not self.names or under_dispatch_mode():
            return None
        number = backward_task()
        if number not in self.tasks:
            # Entered first: a pass that raises does not meet again.
            self.tasks[number] = _Task()
            self.tasks[number].waiting.update(self._met())
            when_backward_ends(lambda: self._end(number))
        return self.tasks[number]

    def _met(self) -> dict[int, None]:
        own, says = self._own()
        device = next(p.device for ref in self.parameters if (p := ref()) is not None)
        message = torch.tensor([[says, *_packed(own)]], device=device)
        said = all_gather(message, self.dp.size, self.dp.name).tolist()
        bits = [_unpacked(row[1:], len(own)) for row in said]
        some = {i: None for i in range(len(own)) if len({row[i] for row in bits}) > 1}
        says = max(row[0] for row in said)
        if some and says != _FREE:
            users = {self.names[i]: [r for r, row in enumerate(bits) if row[i]] for i in list(some)[:3]}
            named = "; ".join(f"{name} on replica {', '.join(map(str, which))} only" for name, which in users.items())
            raise PolicyError(
                f"the dp replicas use different parameters in this backward pass ({named}), and {_WHY[says]}, so that "
                "their sums over the replicas cannot be put off to its end; use the same parameters on all replicas"
            )
        return some

    def _own(self) -> tuple[list[bool], int]:
        """Which parameters this backward pass reaches, and what else the others must know."""
        tensors = [ref() for ref in self.parameters]
        found = [(False, False) if t is None or not t.requires_grad else backward_reaches(t) for t in tensors]
        reached = [one for one, _ in found]
        if any(captured for _, captured in found):
            return reached, _NOT_ADDED
        hooked = any(isinstance(t, DTensor) or post_accumulate_hooks(t) for t in tensors if t is not None)
        return reached, _BOUND if self.bound or hooked else _FREE

    def _end(self, number: int) -> None:
        """Sums what only some replicas reached; at the end of a backward pass, on all ranks."""
        task = self.tasks.pop(number)
        with torch.no_grad():
            for at, grad in sorted(task.waiting.items()):
                parameter = self.parameters[at]()
                assert parameter is not None
                total = self.sums[at](torch.zeros_like(parameter) if grad is None else grad)
                parameter.grad = total if parameter.grad is None else parameter.grad.add_(total)


class _Agree(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, used: UsedParameters) -> Tensor:
        ctx.used = used
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.used.agree()
        return grad, None


def agree_before(x: Tensor, used: UsedParameters) -> Tensor:
    """x itself. In backward, where communication over dp follows, the replicas have met by then."""
    if torch.compiler.is_compiling() or not x.requires_grad or used.dp.size == 1:
        return x
    return _Agree.apply(x, used)


def _packed(bits: list[bool]) -> list[int]:
    return [sum(1 << i for i, bit in enumerate(bits[at : at + 62]) if bit) for at in range(0, len(bits), 62)]


def _unpacked(numbers: list[int], count: int) -> list[bool]:
    return [bool(numbers[i // 62] >> i % 62 & 1) for i in range(count)]
