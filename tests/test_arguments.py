"""What a cut module reads beside its hidden states, and what it gives back: in containers, or hidden."""

from __future__ import annotations

import collections
import dataclasses
import types
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.modeling_outputs import BaseModelOutput

import tpfuse

from .ranks import run_processes

H, HEADS, WORLD = 16, 4, 2


@dataclasses.dataclass(frozen=True)
class Box:
    states: torch.Tensor
    length: int = 1


class Dict(dict):
    pass


def mix(q, k, v):
    q, k, v = (t.unflatten(-1, (-1, H // HEADS)).transpose(-2, -3) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)


@tpfuse.attention(colwise=("q", "k", "v"), rowwise=("o",))
class Cross(nn.Module):
    def __init__(self, get, put):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(H, H, bias=False) for _ in range(4))
        self.get, self.put = get, put

    def forward(self, x, memory):
        states = self.get(memory)
        return self.put(self.o(mix(self.q(x), self.k(states), self.v(states))))


@tpfuse.attention(colwise=("q", "k", "v"), rowwise=("o",))
class First(nn.Module):
    """Gives its keys and values to the next one."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(H, H, bias=False) for _ in range(4))

    def forward(self, x):
        k, v = self.k(x), self.v(x)
        return self.o(mix(self.q(x), k, v)), {"kv": (k, v)}


@tpfuse.attention(colwise=("q",), rowwise=("o",))
class Second(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.o = (nn.Linear(H, H, bias=False) for _ in range(2))

    def forward(self, x, shared):
        return self.o(mix(self.q(x), *shared["kv"]))


class Net(nn.Module):
    def __init__(self, get, wrap, put, take):
        super().__init__()
        self.encoder, self.cross, self.wrap, self.take = nn.Linear(H, H), Cross(get, put), wrap, take

    def forward(self, x):
        return x + self.take(self.cross(x, self.wrap(self.encoder(x))))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.first, self.second = nn.Linear(H, H), First(), Second()

    def forward(self, x):
        x = self.encoder(x)
        y, shared = self.first(x)
        return self.second(x + y, shared)


def same(y):
    return y


WAYS = {
    "tensor": (same, same, same, same),
    "tuple": (lambda m: m[1][0], lambda e: (1, [e]), lambda y: (y, None), lambda o: o[0]),
    "ordered dict": (lambda m: m["a"], lambda e: collections.OrderedDict(a=e), lambda y: [y], lambda o: o[0]),
    "own dict": (lambda m: m["a"], lambda e: Dict(a=(e,))["a"] and Dict(a=e), lambda y: Dict(y=y), lambda o: o["y"]),
    "dataclass": (lambda m: m.states, Box, Box, lambda o: o.states),
    "outputs": (
        lambda m: m.last_hidden_state,
        lambda e: BaseModelOutput(last_hidden_state=e),
        lambda y: BaseModelOutput(last_hidden_state=y, hidden_states=(y,)),
        lambda o: o.last_hidden_state + o["hidden_states"][0],
    ),
    "namespace": (lambda m: m.a, lambda e: types.SimpleNamespace(a=e), same, same),
    "deque": (lambda m: m[0], lambda e: collections.deque([e]), same, same),
}  # fmt: skip
REFUSED = {
    "closure": (lambda m: m(), lambda e: lambda: e, same, same, "another way than its arguments"),
    "object": (lambda m: m.a, lambda e: type("O", (), {"a": e})(), same, same, "another way than its arguments"),
    "output": (same, same, lambda y: type("O", (), {"y": y})(), lambda o: o.y, "allowed for a cut module: tensors"),
}  # fmt: skip


def errors(rank: int) -> dict:
    policy = tpfuse.SharingPolicy(WORLD, 1)
    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("dp", "attn_tp"))
    makes = {name: lambda way=way: Net(*way) for name, way in WAYS.items()}
    makes |= {name: lambda way=way: Net(*way[:4]) for name, way in REFUSED.items()}
    makes["keys and values"] = Shared
    x, found = torch.randn(2, 3, H, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), {}
    for name, make in makes.items():
        torch.manual_seed(1)
        ref = make().double()
        torch.manual_seed(1)
        cut = tpfuse.parallelize(make().double(), mesh, policy)
        ref(x).pow(3).sum().backward()
        try:
            for _ in range(2):  # the second time nobody looks
                cut.zero_grad()
                cut(x).pow(3).sum().backward()
        except tpfuse.TPFuseError as error:
            found[name] = str(error)
            continue
        worst = 0.0
        for (key, p), q in zip(cut.named_parameters(), ref.parameters(), strict=True):
            own = cut._tpfuse.cuts.get(key)
            want = q.grad if own is None else own.take(q.grad)
            worst = max(worst, float((p.grad - want).norm() / want.norm()))
        found[name] = worst
    found["copy"] = copied(cut, x)
    return found


def copied(model: nn.Module, x: torch.Tensor) -> str:
    """A copy computes the same, and cannot be trained."""
    copy = deepcopy(model)
    with torch.no_grad():
        assert torch.equal(copy(x), model(x))
    with pytest.raises(tpfuse.PlanError) as raised:
        copy(x)
    return str(raised.value)


def test_gradients_of_what_comes_beside_the_hidden_states():
    for found in run_processes(WORLD, errors):
        refused = {name: found.pop(name) for name in REFUSED}
        assert "Copy the whole model first" in found.pop("copy")
        assert all(REFUSED[name][4] in str(words) for name, words in refused.items()), refused
        assert all(error < 1e-12 for error in found.values()), found


@tpfuse.dense_mlp(colwise=("up",), rowwise=("down",))
class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(H, 2 * H), nn.Linear(2 * H, H)

    def forward(self, x, more=None, twice=False):
        y = self.down(F.gelu(self.up(x)))
        y = y if more is None else y + more[0]
        return (y, y) if twice else y


def test_an_mlp_on_other_rows_takes_and_gives_one_tensor():
    """A second one would have the caller's rows, or another rank's."""
    for found in run_processes(WORLD, other_rows):
        assert all("called with 2" in more and "returned 2" in twice for more, twice in found), found


def other_rows(rank: int) -> list[list[str]]:
    found = []
    for dense, dp in ((1, 1), (None, WORLD)):
        mesh = init_device_mesh("cpu", (dp, WORLD // dp), mesh_dim_names=("dp", "attn_tp"))
        model = tpfuse.parallelize(nn.Sequential(Mlp()), mesh, tpfuse.SharingPolicy(WORLD, dp, dense))
        words = []
        x = torch.randn(4, H)
        for more in (dict(more=(x,)), dict(twice=True)):
            with pytest.raises(tpfuse.PlanError) as raised:
                model[0](x, **more)
            words.append(str(raised.value))
        found.append(words)
    return found
