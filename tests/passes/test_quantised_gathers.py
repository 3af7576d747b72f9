"""Rows that are gathered and then quantised: own rows are quantised first, and gathered with their scales."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tpfuse
from tpfuse.passes.facts.groups import resolve_group
from tpfuse.passes.facts.refusals import Code
from tpfuse.passes.pipeline import PassOptions, fuse
from tpfuse.passes.plan.sites import REWRITES

from ..graphs import executed_collectives, fake_world, on_ranks, trace
from ..quantisations import E4M3, OPERATORS, SPELLINGS, same
from .test_gathers import all_gather
from .test_norm_backward import BF16, example, reduce_scatter

H, ROWS, BATCH, EPS = 256, 3, 2, 1e-6
#: The residual stream stays scattered, as where a policy says so.
STAYS = tuple(name for name in REWRITES if name != "share_attention_group")
WITHOUT = tuple(name for name in STAYS if name != "quantised_outputs")
QUANTISE = SPELLINGS | OPERATORS
#: Bytes of a row's scales.
SCALES = {"groups": 4 * H // 128}


@pytest.fixture(params=[2, 4])
def ranks(request):
    with fake_world(request.param):
        yield request.param


def world_size() -> int:
    return torch.distributed.get_world_size()


def boundary(partial: Tensor, r: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(y, h) of own rows."""
    h = r + reduce_scatter(partial, world_size())
    return F.rms_norm(h, (H,), weight, EPS), h


def flat(y: Tensor) -> Tensor:
    return all_gather(y, world_size())


def viewed(y: Tensor) -> Tensor:
    """[S / n, B, H], as Megatron has them, and flat rows behind."""
    return all_gather(y.view(ROWS, BATCH, H), world_size()).view(-1, H)


def along_the_sequence(y: Tensor) -> Tensor:
    """DTensor's form: [B, S / n, H], whose gather is cut and joined along the sequence."""
    return torch.cat(all_gather(y.view(BATCH, ROWS, H), world_size()).chunk(world_size()), 1)


def some(y: Tensor) -> Tensor:
    return all_gather(y, world_size())[1:-2]


FORMS = [flat, viewed, along_the_sequence, some]


def program(name: str, form: Callable = flat) -> Callable:
    def run(partial, r, weight):
        y, h = boundary(partial, r, weight)
        return (*QUANTISE[name](form(y)), h)

    return run


def scattered_along_the_sequence(partial, r, weight):
    """torchtitan's form: the sequence is put first for each collective."""
    scattered = reduce_scatter(partial.view(-1, BATCH, H), world_size())
    h = r.view(BATCH, ROWS, H) + scattered.permute(1, 0, 2)
    first = F.rms_norm(h, (H,), weight, EPS).permute(1, 0, 2).clone(memory_format=torch.contiguous_format)
    q, scale = SPELLINGS["by_hand"](all_gather(first, world_size()).permute(1, 0, 2))
    return q.reshape(-1, H), scale, h


def inputs(world: int, rows: int = ROWS * BATCH, dtype: torch.dtype = BF16) -> list:
    g = torch.Generator().manual_seed(0)

    def each(count: int) -> list:
        return [torch.randn(count, H, generator=g).to(dtype) for _ in range(world)]

    return [each(rows * world), each(rows), torch.randn(H, generator=g).to(dtype)]


def rewritten(gm, rewrites=STAYS, **options) -> tuple[torch.fx.GraphModule, tpfuse.Report]:
    outcome = fuse(copy.deepcopy(gm.graph), resolve_group, PassOptions(rewrites=rewrites, strict=True, **options))
    return torch.fx.GraphModule(gm, outcome.graph), outcome.report


def quantised_first(run: Callable, given: list, world: int, dynamic: bool = False, others: tuple = ()):
    """The graph and the report; on these inputs and the others every rank has the bits of the graph that quantises what
    it gathered."""
    before = trace(run, *example(given), dynamic=dynamic)
    plain, _ = rewritten(before, WITHOUT)
    after, report = rewritten(before)
    assert executed_collectives(after, *example(given)) == Counter(reduce_scatter=1, all_gather=1)
    assert report.boundaries[1].quantised and report.boundaries[1].bytes_after < report.boundaries[1].bytes_before
    for each in (given, *others):
        for was, now in zip(on_ranks(plain, world, *each), on_ranks(after, world, *each), strict=True):
            assert all(map(same, was, now))
            assert all(a.stride() == b.stride() or not a.numel() for a, b in zip(was, now, strict=True))
    return after, report


@pytest.mark.parametrize("name", QUANTISE)
def test_every_quantisation_of_rows_or_columns_is_done_before_the_gather(ranks, name):
    given = inputs(ranks)
    _, report = quantised_first(program(name), given, ranks)
    scatter, gather = report.boundaries
    assert scatter.fused and scatter.quantised == gather.quantised != ""
    assert (gather.rewrite, gather.fused, gather.code) == ("quantised_outputs", False, Code.LAYOUT_CHANGED.value)
    others = (ranks - 1) * ROWS * BATCH
    assert gather.bytes_before == others * H * 2
    assert gather.bytes_after == others * (H + SCALES.get(name, 4))
    assert (report.steps[1].dtype, report.steps[1].hidden) == ("uint8", H + SCALES.get(name, 4))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("name", ["float8_per_row", "groups", "int8_per_row"])
def test_what_moves_rows_between_the_two_is_done_to_rows_and_scales(ranks, name, form):
    _, report = quantised_first(program(name, form), inputs(ranks), ranks)
    assert [b.quantised != "" for b in report.boundaries] == [True, True]


def test_rows_that_are_permuted_around_the_gather(ranks):
    _, report = quantised_first(scattered_along_the_sequence, inputs(ranks), ranks)
    assert report.boundaries[1].rewrite == "quantised_outputs"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bytes_are_those_of_the_dtype(two_ranks, dtype):
    _, report = quantised_first(program("by_hand"), inputs(2, dtype=dtype), 2)
    gather = report.boundaries[1]
    assert (gather.bytes_before, gather.bytes_after) == (ROWS * BATCH * H * dtype.itemsize, ROWS * BATCH * (H + 4))


@pytest.mark.parametrize("form", [flat, some], ids=lambda form: form.__name__)
def test_symbolic_rows_and_no_rows_at_all(ranks, form):
    others = tuple(inputs(ranks, rows) for rows in ((0, 1, 5) if form is flat else (2, 5)))
    quantised_first(program("by_hand", form), inputs(ranks), ranks, dynamic=True, others=others)


def test_a_gather_for_each_product_sends_what_one_quantisation_gives(two_ranks):
    """Each product gathers for itself; the operation quantises once."""

    def run(partial, r, weight):
        y, h = boundary(partial, r, weight)
        return (*SPELLINGS["by_hand"](flat(y)), *SPELLINGS["by_hand"](viewed(y)), h)

    given = inputs(2)
    before = trace(run, *example(given))
    after, report = rewritten(before)
    assert [b.quantised for b in report.boundaries] == ["FP8 (e4m3) per row"] * 3
    outputs = on_ranks(after, 2, *given)
    for first, first_scale, second, second_scale, _ in outputs:
        assert same(first, second) and same(first_scale, second_scale)


def test_own_rows_that_are_quantised_by_the_program_too_are_the_same(two_ranks):
    def run(partial, r, weight):
        y, h = boundary(partial, r, weight)
        return (*SPELLINGS["groups"](y), *SPELLINGS["groups"](flat(y)), h)

    _, report = quantised_first(run, inputs(2), 2)
    assert report.boundaries[1].rewrite == "quantised_outputs"


@pytest.mark.parametrize("two_of_the_program", [False, True])
def test_an_operation_that_hands_out_another_one_leaves_it_to_plain_steps(two_ranks, two_of_the_program):
    """Of own rows, or of rows that are gathered as well."""

    def run(partial, r, weight):
        y, h = boundary(partial, r, weight)
        other = SPELLINGS["int8_per_row"](y if not two_of_the_program else viewed(y))
        return (*other, *SPELLINGS["by_hand"](flat(y)), h)

    given = inputs(2)
    before = trace(run, *example(given))
    (plain, _), (after, report) = rewritten(before, WITHOUT), rewritten(before)
    for was, now in zip(on_ranks(plain, 2, *given), on_ranks(after, 2, *given), strict=True):
        assert all(map(same, was, now))
    assert report.boundaries[0].quantised == "INT8 per row"
    assert report.boundaries[-1].quantised == "FP8 (e4m3) per row"
    assert report.boundaries[-1].bytes_after == ROWS * BATCH * (H + 4)


def padded(y: Tensor) -> Tensor:
    return flat(torch.constant_pad_nd(y, (0, 0, 0, 2)))


def swapped(y: Tensor) -> Tensor:
    return flat(y.flip(0))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", [padded, swapped], ids=lambda form: form.__name__)
def test_rows_that_are_padded_or_moved_in_front_of_the_gather(ranks, form, dynamic):
    """Every rank's padding is quantised as the program quantises it."""
    others = (inputs(ranks, 0), inputs(ranks, 5)) if dynamic else ()
    _, report = quantised_first(program("float8_per_row", form), inputs(ranks), ranks, dynamic, others)
    assert [b.quantised for b in report.boundaries] == ["", "FP8 (e4m3) per row"]


def test_rows_that_no_boundary_made(ranks):
    """An embedding's, say."""

    def run(own, weight):
        return SPELLINGS["int8_per_row"](flat(own * weight))

    _, own, weight = inputs(ranks)
    before = trace(run, own[0], weight)
    (plain, _), (after, report) = rewritten(before, WITHOUT), rewritten(before)
    for was, now in zip(on_ranks(plain, ranks, own, weight), on_ranks(after, ranks, own, weight), strict=True):
        assert all(map(same, was, now))
    assert [(b.rewrite, b.bytes_after) for b in report.boundaries] == [
        ("quantised_outputs", (ranks - 1) * ROWS * BATCH * (H + 4))
    ]
    (step,) = report.steps
    assert not step.sends.startswith("#") and not step.relies, "own rows are no two ranks' alike"


# -- refused ----------------------------------------------------------------------------------------------------------


def refused(run: Callable, **options) -> tuple[tpfuse.Report, torch.fx.GraphModule]:
    given = inputs(2)
    after, report = rewritten(trace(run, *example(given)), **options)
    scatter, gather = report.boundaries[:2]
    assert gather.rewrite is None and not gather.quantised and gather.bytes_before == gather.bytes_after
    assert scatter.fused
    return report, after


def test_rows_that_are_read_as_they_are_besides_stay_as_they_are(two_ranks):
    """A router reads them in 16 bits: both would have to be gathered."""

    def run(partial, r, weight):
        rows = flat(boundary(partial, r, weight)[0])
        return (*SPELLINGS["by_hand"](rows), rows.view(-1, H) @ rows.t())

    report, _ = refused(run)
    gather = report.boundaries[1]
    assert gather.code == Code.USED_TWICE.value and "aten.mm.default" in gather.reason and "besides" in gather.reason


def test_own_rows_may_be_read_as_they_are(two_ranks):
    def run(partial, r, weight):
        y, h = boundary(partial, r, weight)
        return (*SPELLINGS["by_hand"](flat(y)), y @ y.t(), h)

    quantised_first(run, inputs(2), 2)


def test_two_quantisations_of_the_gathered_rows_stay_behind_it(two_ranks):
    def run(partial, r, weight):
        rows = flat(boundary(partial, r, weight)[0])
        return (*SPELLINGS["by_hand"](rows), *SPELLINGS["int8_per_row"](rows))

    assert refused(run)[0].boundaries[1].code == Code.USED_TWICE.value


@pytest.mark.parametrize(
    "quantise",
    [
        lambda rows: (rows.float() / (rows.abs().amax() / 448).float()).to(E4M3),  # one scale for all
        lambda rows: (rows.float() / (rows.abs().amax(0) / 448).float()).to(E4M3),  # one for a column
        lambda rows: (rows.sort(0).values.float()).to(E4M3),
    ],
    ids=["per tensor", "per column", "no scale"],
)
def test_what_needs_other_ranks_rows_stays_behind_the_gather(two_ranks, quantise):
    report, _ = refused(lambda *given: (quantise(flat(boundary(*given)[0])),))
    assert report.boundaries[1].code == Code.NO_NORM.value


def test_columns_that_are_cut_or_joined_stay_behind_the_gather(two_ranks):
    report, _ = refused(lambda *given: SPELLINGS["by_hand"](flat(boundary(*given)[0])[:, : H // 2]))
    assert not report.boundaries[0].quantised


def test_it_is_off_unless_it_is_named_and_in_graphs_that_stay_as_written(two_ranks):
    refused(program("by_hand"), rewrites=WITHOUT)
    for options in ({"split": True}, {"as_written": "peers differ"}):
        _, report = rewritten(trace(program("by_hand"), *example(inputs(2))), **options)
        assert [step.sends for step in report.steps] == ["#0", "#1"]
        assert not any(b.quantised for b in report.boundaries)


def test_a_training_graph_gathers_rows_as_they_are(two_ranks):
    def run(tangents, partial, r, weight):
        return (*program("by_hand")(partial, r, weight), tangents.exp())

    given = [[torch.randn(1, H) for _ in range(2)], *inputs(2)]
    _, report = rewritten(trace(run, *example(given)))
    assert [b.quantised for b in report.boundaries] == ["", ""]


# -- what ranks compare -----------------------------------------------------------------------------------------------


def sends(run: Callable) -> list[str]:
    return [step.sends for step in rewritten(trace(run, *example(inputs(2))))[1].steps]


def test_ranks_that_quantise_alike_say_that_they_send_the_same_and_others_do_not(two_ranks):
    """The bytes of INT8 rows look like those of FP8 rows."""

    def besides(partial, r, weight):
        y, h = boundary(partial, r, weight)
        return (h.sin(), *SPELLINGS["by_hand"](flat(y)), y)

    def padded_by_hand(partial, r, weight):
        return SPELLINGS["by_hand"](padded(boundary(partial, r, weight)[0]))

    plans = [sends(program(name)) for name in ("by_hand", "int8_per_row", "float8_per_row", "fbgemm")]
    assert all(first == "#0" and not second.startswith("#") for first, second in plans)
    assert len({second for _, second in plans}) == len(plans)
    assert sends(besides) == plans[0], "what else a rank does is its own affair"
    assert sends(padded_by_hand) == plans[0], "and how many rows it has, and what quantises them"
