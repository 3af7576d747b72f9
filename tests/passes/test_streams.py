"""Residual streams that change their layout: whatever stands between a collective and its norm, the numbers stay."""

from __future__ import annotations

import pytest
import torch

from tpfuse.passes.verdict.accounting import performs
from tpfuse.policy import SharingPolicy

from .streams import HIDDEN, Mesh, check, inputs, mix, rewritten, rms

PAIR = Mesh(1, 2)
#: Shapes of hidden states over two ranks: square, even, with padding, and fewer rows than ranks.
SHAPES = [(4, 4), (2, 6), (1, 5), (1, 1)]


def own_rows_policy(residual="auto"):
    return SharingPolicy(2, 1, 1, residual=residual)


def two_layers(mesh, x, partial, weight, *, attention=None, addend=None):
    """Attention cut over the attention group and an MLP on own rows, twice. attention: what the partial sum is of the
    normed value; addend: what else is added to the stream."""
    for _ in range(2):
        y = rms(x, weight)
        x = x + (attention(mesh, y, partial) if attention else mesh.all_reduce(mix(y, partial)))
        x = x if addend is None else x + addend
        x = x + mesh.own_rows(lambda rows: mix(rows, weight), rms(x, weight))
    return (rms(x, weight),)


def sequence_first(mesh, y, partial):
    """Attention that wants [S, B, H] of a model whose hidden states are [B, S, H]."""
    return mesh.all_reduce(mix(y.transpose(0, 1), partial, 0)).transpose(0, 1)


def units_grouped(mesh, y, partial):
    """A sum over [B, S, 2, H / 2], whose halves are swapped before they are added."""
    halves = mesh.all_reduce(mix(y, partial).unflatten(-1, (2, -1)))
    return halves.transpose(-1, -2).flatten(-2)


@pytest.mark.parametrize(
    ("attention", "shape", "dynamic"),
    [
        *((sequence_first, shape, False) for shape in SHAPES),
        (units_grouped, (2, 6), False),
        (sequence_first, (2, 6), True),
    ],
)
def test_a_sum_that_is_rearranged_before_it_is_added(attention, shape, dynamic):
    """Own rows are cut in the order of the hidden states, so the partial sum is rearranged before it is scattered."""
    given = inputs(PAIR, *shape)
    program = lambda *tensors: two_layers(*tensors, attention=attention)  # noqa: E731
    report, executed = check(program, PAIR, given, own_rows_policy(), dynamic)
    assert {b.rewrite for b in report.boundaries} == {"scatter_dense"}
    assert executed == {"reduce_scatter": 2, "all_gather": 2}


def test_rows_that_are_rearranged_together_with_the_residual_keep_their_layout():
    def program(mesh, x, partial, weight):
        x = x.transpose(0, 1)
        y = rms(x, weight)
        x = (x + mesh.all_reduce(mix(y, partial))).transpose(0, 1)
        x = x + mesh.own_rows(lambda rows: mix(rows, weight), rms(x, weight))
        return (rms(x, weight),)

    report, executed = check(program, PAIR, inputs(PAIR, 3, 4), own_rows_policy("scattered"))
    (note,) = report.notes
    assert "residual='scattered' is declared" in note and "the residual is rearranged" in note
    # The stages behind it take their own rows of what it hands on.
    assert [b.rewrite for b in report.boundaries] == ["all_reduce_norm", "scatter_dense"]
    assert executed == {"all_reduce": 1, "all_gather": 1}


@pytest.mark.parametrize(
    ("shape", "dynamic"),
    [
        *((shape, False) for shape in [(), (HIDDEN,), (1, 1, HIDDEN), (4, 1, HIDDEN), (6, HIDDEN), (4, 6, 1)]),
        ((6, HIDDEN), True),
    ],
)
def test_a_value_that_is_broadcast_to_the_hidden_states(shape, dynamic):
    """A bias is added to own rows as it is; anything else is cut as the hidden states are."""
    extra = torch.randn(shape, dtype=torch.float64)
    program = lambda mesh, x, p, w, e: two_layers(mesh, x, p, w, addend=e)  # noqa: E731
    report, _ = check(program, PAIR, [*inputs(PAIR, 4, 6), extra], own_rows_policy(), dynamic)
    assert {b.rewrite for b in report.boundaries} == {"scatter_dense"}


# -- what reads the normed value --------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["none", "flat", "transposed"])
def test_own_rows_that_are_gathered_in_another_order(view):
    """Only a gather of the rows as they are is no longer needed once the stream is replicated."""

    def program(mesh, x, partial, weight, own):
        h = own + mesh.reduce_scatter(mix(x, partial))
        y = rms(h, weight)
        y = {"none": y, "flat": y.flatten(0, 1), "transposed": y.transpose(0, 1)}[view]
        return (mesh.all_gather(y) * 2,)

    own = [torch.randn(2, 3, HIDDEN, dtype=torch.float64) for _ in range(2)]
    policy = SharingPolicy(2, 1, 2, residual="replicated")
    report, executed = check(program, PAIR, [*inputs(PAIR, 4, 3), own], policy)
    assert {b.rewrite for b in report.boundaries if b.fused} == {"share_attention_group"}
    # The residual is gathered at the entry; rows in another order are cut again and gathered as before.
    assert executed == {"all_reduce": 1, "all_gather": 1 + (view == "transposed")}


@pytest.mark.parametrize("view", ["none", "flat", "transposed", "halves"])
def test_own_rows_that_are_cut_in_another_order(view):
    def program(mesh, x, partial, weight):
        y = rms(x + mesh.all_reduce(mix(x, partial)), weight)
        views = {"none": y, "flat": y.flatten(0, 1), "transposed": y.transpose(0, 1)}
        return mesh.cut(views.get(view, y.unflatten(-1, (2, -1)))) * 2, y

    _, executed = check(program, PAIR, inputs(PAIR, 3, 5), own_rows_policy("scattered"))
    assert executed == {"reduce_scatter": 1, "all_gather": 1}


# -- stages of different layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [(False, True), (True, False), (False, True, False), (True, False, True)], ids=str)
@pytest.mark.parametrize("residual", ["auto", "scattered", "replicated"])
def test_layers_with_whole_and_with_cut_weights_follow_one_another(own, residual):
    """A stage on own rows takes them from the stream as it finds it, whatever layout the stage before has."""

    def program(mesh, x, partial, weight):
        for whole in own:
            y = rms(x, weight)
            x = x + mesh.all_reduce(mix(y, partial))
            y = rms(x, weight)
            x = x + (mesh.own_rows(lambda r: mix(r, weight), y) if whole else mesh.all_reduce(mix(y, partial)))
        return (rms(x, weight),)

    report, _ = check(program, PAIR, inputs(PAIR, 2, 3), own_rows_policy(residual))
    assert len(report.fused) == sum(b.collective == "all_reduce" for b in report.boundaries)


# -- groups -----------------------------------------------------------------------------------------------------------


def groups_used(graph):
    """The groups that a graph communicates over, by name."""
    used = (node.kwargs.get("group_name", node.args[-1] if node.args else None) for node in graph.graph.nodes)
    return {name for name, node in zip(used, graph.graph.nodes, strict=True) if performs(node)}


@pytest.mark.parametrize("residual", ["scattered", "replicated"])
def test_a_boundary_stays_in_the_group_it_was_written_for(residual):
    """Other groups have the same members; a group of its own may have another backend, stream or timeout."""

    def program(mesh, x, partial, weight, own):
        h = own + mesh.reduce_scatter(mix(x, partial))
        return mesh.all_gather(rms(h, weight)), h

    own = [torch.randn(2, 3, HIDDEN, dtype=torch.float64) for _ in range(2)]
    given = [*inputs(PAIR, 4, 3), own]
    for run in (program, two_layers):
        before, after, _ = rewritten(run, PAIR, given[: 4 if run is program else 3], own_rows_policy(residual))
        assert len(groups_used(before[1])) == 1
        assert groups_used(after[1]) == groups_used(before[1])


@pytest.mark.parametrize("dp_fastest", [False, True])
def test_rows_of_all_replicas_are_gathered_in_the_order_of_the_whole_group(dp_fastest):
    """One gather over the whole group stands for two only where its ranks follow one another as the rows do."""
    mesh = Mesh(2, 2, dp_fastest=dp_fastest)

    def program(mesh, x, partial, weight):
        y = rms(x + mesh.all_reduce(mix(x, partial)), weight)
        return mesh.all_gather(y.flatten(0, 1), "dp") * 2, mesh.cut(y) * 2

    _, executed = check(program, mesh, inputs(mesh, 2, 4), SharingPolicy(4, 2, None, residual="scattered"))
    assert executed == {"reduce_scatter": 1, "all_gather": 1 + dp_fastest}


# -- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 5), (3, 1), (2, 3)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_block_that_looks_at_other_rows_finds_zeros_for_padding(shape, dynamic):
    """LayerNorm makes its bias of a padded row; a block with a scale for all of its rows would see that."""

    def program(mesh, x, partial, weight):
        y = torch.nn.functional.layer_norm(x + mesh.all_reduce(mix(x, partial)), (HIDDEN,), weight, weight * 9)
        return mesh.own_rows(lambda rows: rows / rows.abs().amax(), y), mesh.cut(y) * 2

    policy = own_rows_policy("scattered")
    _, executed = check(program, PAIR, inputs(PAIR, *shape), policy, dynamic and shape == (2, 3))
    assert executed["reduce_scatter"] == 1


@pytest.mark.parametrize("rows_alone", [True, False])
def test_a_block_that_works_row_by_row_is_given_its_rows_as_they_are(rows_alone):
    def block(rows, weight):
        gate, up = torch.mm(rows, weight[:, None] * weight.repeat(2)).split(HIDDEN, -1)
        out = torch.nn.functional.silu(gate).view(1, -1, HIDDEN) * up.view(1, -1, HIDDEN)
        return (out if rows_alone else out.softmax(1)).view(-1, HIDDEN)

    def program(mesh, x, partial, weight):
        y = rms(x + mesh.all_reduce(mix(x, partial)), weight)
        return (mesh.own_rows(lambda rows: block(rows, weight), y),)

    given = inputs(PAIR, 1, 5)
    check(program, PAIR, given, own_rows_policy("scattered"))
    _, after, _ = rewritten(program, PAIR, given, own_rows_policy("scattered"))
    assert any("where" in str(node.target) for node in after[1].graph.nodes) != rows_alone
