"""Properties of residual streams that may change their layout, over random ones: on every rank of the mesh the
rewritten graph computes what the written one does, and the ranks communicate in step.

pytest tests/passes/test_random_streams.py -m nightly      hundreds of examples instead of a handful
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tpfuse.policy import SharingPolicy

from .streams import HIDDEN, Mesh, check, inputs, mix, rms

FEW = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))

pytestmark = pytest.mark.filterwarnings("error:tpfuse left a graph")

#: What is done to a block's input and undone to its result, once that is summed or gathered.
VIEWS = {
    "none": (lambda x: x, lambda y, x: y),
    "flat": (lambda x: x.flatten(0, -2), lambda y, x: y.view(x.shape)),
    "transposed": (lambda x: x.transpose(0, 1), lambda y, x: y.transpose(0, 1)),
    "copied": (lambda x: x.transpose(0, 1).contiguous(), lambda y, x: y.transpose(0, 1).contiguous()),
    "halves": (lambda x: x.unflatten(-1, (2, -1)), lambda y, x: y.transpose(-1, -2).flatten(-2)),
    "widened": (lambda x: x.unsqueeze(1), lambda y, x: y.squeeze(1)),
}
#: What is added besides, of the hidden states' shape and the norm's weight.
ADDENDS = {
    "bias": lambda x, weight: weight,
    "row": lambda x, weight: weight.view(1, -1),
    "positions": lambda x, weight: weight.expand(x.shape[-2], -1) * 1,
    "sequences": lambda x, weight: weight * torch.tanh(x[:, :1]),
    "number": lambda x, weight: weight[0],
    "column": lambda x, weight: x[..., :1] * 1,
}
NORMS = {
    "rms": rms,
    "layer": lambda x, weight: torch.nn.functional.layer_norm(x, x.shape[-1:], weight, weight, 1e-5),
    "rms_of_flat": lambda x, weight: rms(x.flatten(0, -2), weight).view(x.shape),
    "rms_of_transposed": lambda x, weight: rms(x.transpose(0, 1), weight).transpose(0, 1),
}


@dataclass(frozen=True)
class Block:
    """One block between two norms, as `parallelize` writes it.

    kind: "attention" (an all-reduce over the attention group), "own" (on own rows) or "replicas" (on the rows of all
    replicas). read: what the graph returns of it besides. residual: what becomes of the residual before the addition.
    """

    kind: str = "attention"
    view: str = "none"
    norm: str = "rms"
    addend: str | None = None
    residual: str = "as it is"
    read: frozenset[str] = frozenset()

    def run(self, mesh: Mesh, x: Tensor, partial: Tensor, weight: Tensor, returned: list[Tensor]) -> Tensor:
        y = NORMS[self.norm](x, weight)
        there, back = VIEWS[self.view]
        if self.kind == "attention":
            out = mesh.all_reduce(mix(there(y), partial.view(2, -1) if self.view == "halves" else partial))
        elif self.kind == "own":
            out = mesh.own_rows(lambda rows: mix(rows, weight), y)
        else:
            out = mesh.all_rows(lambda rows: mix(rows, partial), y)
        result = back(out, x) if self.kind == "attention" else out
        h = self._added(x, result, weight)
        seen = {"collective": out, "normed": y, "residual": x, "hidden": h, "cut": mesh.cut(y)}
        returned += [seen[name] * 2 for name in sorted(self.read)]
        return h

    def _added(self, x: Tensor, result: Tensor, weight: Tensor) -> Tensor:
        if self.residual == "scaled":
            x = x * 0.5
        if self.residual == "flat":
            h = (x.flatten(0, -2) + result.reshape(-1, HIDDEN)).view(x.shape)
        elif self.residual == "transposed":
            h = (x.transpose(0, 1) + result.transpose(0, 1)).transpose(0, 1)
        elif self.residual == "last":
            h = result + x
        else:
            h = x + result
        return h if self.addend is None else h + ADDENDS[self.addend](x, weight)


def often(usual, others):
    return st.one_of(st.just(usual), st.just(usual), st.sampled_from(sorted(others, key=str)))


def blocks(kinds):
    return st.builds(
        Block,
        kind=st.sampled_from(kinds),
        view=often("none", VIEWS),
        norm=often("rms", NORMS),
        addend=often(None, ADDENDS),
        residual=often("as it is", ("scaled", "flat", "transposed", "last")),
        read=often(frozenset(), [frozenset({n}) for n in ("collective", "normed", "residual", "hidden", "cut")]),
    )


policies = st.tuples(st.sampled_from(("auto", "scattered", "replicated")), st.sampled_from((None, 1, 1 << 20)))
shapes = st.sampled_from([(4, 4), (2, 3), (1, 5), (3, 1)])


def check_blocks(mesh: Mesh, drawn: list[Block], shape: tuple[int, ...], residual: str, max_rows: int | None) -> None:
    def program(mesh, x, partial, weight):
        returned: list[Tensor] = []
        for block in drawn:
            x = block.run(mesh, x, partial, weight, returned)
        return [rms(x, weight), *returned]

    policy = SharingPolicy(mesh.size, mesh.dp, None, residual=residual, max_rows=max_rows)
    check(program, mesh, inputs(mesh, *shape), policy)


PAIR = Mesh(1, 2)
pairs = dict(drawn=st.lists(blocks(("attention", "own")), min_size=2, max_size=5), shape=shapes, policy=policies)


@FEW
@given(**pairs)
def test_random_streams_of_one_replica(drawn, shape, policy):
    check_blocks(PAIR, drawn, shape, *policy)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@MANY
@given(**pairs)
def test_many_random_streams_of_one_replica(drawn, shape, policy):
    check_blocks(PAIR, drawn, shape, *policy)


REPLICAS = Mesh(2, 2)
four = dict(
    drawn=st.lists(blocks(("attention", "own", "replicas")), min_size=2, max_size=4), shape=shapes, policy=policies
)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@MANY
@given(**four)
def test_many_random_streams_of_two_replicas(drawn, shape, policy):
    check_blocks(REPLICAS, drawn, shape, *policy)


# -- written over a scattered stream ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scattered:
    """One block of a sequence-parallel model: norm of own rows, gather, partial sums, reduce-scatter, addition."""

    view: str = "none"
    norm: str = "rms"
    addend: str | None = None
    gathered: bool = True
    read: frozenset[str] = frozenset()

    def run(self, mesh: Mesh, own: Tensor, partial: Tensor, weight: Tensor, returned: list[Tensor]) -> Tensor:
        y = NORMS[self.norm](own, weight)
        there, _ = VIEWS[self.view]
        everybody = mesh.all_gather(there(y) if self.gathered else y)
        whole = everybody.reshape(mesh.attn * own.shape[0], *own.shape[1:])
        out = mesh.reduce_scatter(mix(whole, partial))
        h = own + out
        h = h if self.addend is None else h + ADDENDS[self.addend](own, weight)
        seen = {"collective": out, "normed": y, "residual": own, "hidden": h, "gathered": everybody}
        returned += [seen[name] * 2 for name in sorted(self.read)]
        return h


scattered_blocks = st.builds(
    Scattered,
    view=often("none", set(VIEWS) - {"halves"}),
    norm=often("rms", NORMS),
    addend=often(None, ADDENDS),
    gathered=st.booleans(),
    read=often(frozenset(), [frozenset({n}) for n in ("collective", "normed", "residual", "hidden", "gathered")]),
)
scattered = dict(drawn=st.lists(scattered_blocks, min_size=1, max_size=4), shape=shapes, policy=policies)


def check_scattered(drawn: list[Scattered], shape: tuple[int, ...], residual: str, max_rows: int | None) -> None:
    def program(mesh, own, partial, weight):
        returned: list[Tensor] = []
        for block in drawn:
            own = block.run(mesh, own, partial, weight, returned)
        return [mesh.all_gather(rms(own, weight)), *returned]

    given_inputs = inputs(PAIR, *shape)
    given_inputs[0] = [torch.randn(*shape, HIDDEN, dtype=torch.float64) for _ in range(2)]
    check(program, PAIR, given_inputs, SharingPolicy(2, 1, 2, residual=residual, max_rows=max_rows))


@FEW
@given(**scattered)
def test_random_scattered_streams(drawn, shape, policy):
    check_scattered(drawn, shape, *policy)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@MANY
@given(**scattered)
def test_many_random_scattered_streams(drawn, shape, policy):
    check_scattered(drawn, shape, *policy)
