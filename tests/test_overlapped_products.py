"""overlap_all_reduce_norm: a large product in front of a boundary becomes a part of it; a small one never does."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.distributed.device_mesh import init_device_mesh

import tpfuse
from tpfuse.kernels import entry, rendezvous
from tpfuse.kernels.add_norm import add_norm_reference
from tpfuse.kernels.symmetric import copied, copies, dispatch
from tpfuse.passes.plan.sites import DEFAULT_REWRITES, OVERLAP
from tpfuse.passes.rewrite.overlap import find_product
from tpfuse.product_ops import PRODUCTS

from . import sequence_models
from .graphs import fake_world, relative_error
from .kernels.stub_kernel import in_place_of_gpus
from .models import HIDDEN, Stack, loss
from .products import KINDS, Behind, of_float8, scales_of_rows, whole_numbers
from .ranks import run_processes

SMALL = 4 * HIDDEN * 4  # bytes of four rows in float32
NAMED = {"rewrites": [*DEFAULT_REWRITES, OVERLAP]}


@pytest.fixture
def kernel(monkeypatch):
    torch._dynamo.reset()
    for module in ("tpfuse.product_ops", "tpfuse.passes.rewrite.overlap"):
        monkeypatch.setattr(f"{module}.FROM_BYTES", SMALL)
    with fresh_cache(), fake_world(2):
        yield in_place_of_gpus(monkeypatch)
    dispatch.default_table.cache_clear()
    dispatch.choose.cache_clear()
    torch._dynamo.reset()


def calls_of(code: str) -> list[str]:
    return re.findall(r"torch\.ops\.tpfuse\.(\w*all_reduce_norm)\.", code)


def compiled_code(model: nn.Module, x: torch.Tensor, options: dict = NAMED, dynamic: bool = False) -> tuple:
    fn = torch.compile(model, backend="tpfuse", options=options, dynamic=dynamic)
    with torch.no_grad():
        _, (code, *_) = run_and_get_code(fn, x)
    return fn, code


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_products_of_many_rows_are_part_of_their_boundaries(kernel, norm, dynamic):
    model = Stack(1, layers=1, norm=norm).eval()
    fn, code = compiled_code(model, torch.randn(6, HIDDEN), dynamic=dynamic)
    assert calls_of(code) == ["product_all_reduce_norm"] * 2
    with torch.no_grad():
        for rows in (6, 3, 9) if dynamic else (6, 6):  # 3: too few for the product to be handed on
            x = torch.randn(rows, HIDDEN)
            torch.testing.assert_close(fn(x), model(x), rtol=1e-5, atol=1e-5)


def test_products_of_few_rows_stay_where_they_were(kernel):
    model = Stack(1, layers=1).eval()
    _, code = compiled_code(model, torch.randn(3, HIDDEN))
    assert calls_of(code) == ["all_reduce_norm"] * 2


def in_chunks(monkeypatch) -> list[tuple[int, bool]]:
    """Large calls go to a stand-in for `copied`, which asks for chunks as that does; of each, how many they were, and
    whether of a product."""
    made = []

    def run(launch):
        chunks = copies.chunks_of(launch.call.rows)
        for first, stop in chunks if launch.call.product is not None else ():
            launch.call.product(first, stop)
        made.append((len(chunks), launch.call.product is not None))
        right = add_norm_reference(dataclasses.replace(launch.call, product=None, out=None))
        launch.out.y.copy_(right.y)
        if launch.out.residual_out is not None:
            launch.out.residual_out.copy_(right.residual_out)
        return launch.out, launch.sum

    monkeypatch.setattr(copied.CopiedLaunch, "run", run)
    monkeypatch.setattr("tpfuse.kernels.entry.FROM_BYTES", SMALL)
    return made


class OwnResidual(nn.Module):
    """The residual is the product itself."""

    def __init__(self):
        super().__init__()
        self.proj, self.norm = nn.Linear(HIDDEN, HIDDEN, bias=False), nn.RMSNorm(HIDDEN)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        part = self.proj(x)
        hidden = part + funcol.all_reduce(part, "sum", dist.group.WORLD)
        return self.norm(hidden), hidden


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shape", [(6, HIDDEN), (2, 3, HIDDEN)], ids=str)
def test_a_product_that_is_the_residual_too_stays_where_it_was(kernel, dynamic, shape):
    model, x = OwnResidual().eval(), torch.randn(shape)
    fn, code = compiled_code(model, x, dynamic=dynamic)
    assert calls_of(code) == ["all_reduce_norm"]
    with torch.no_grad():
        for got, right in zip(fn(x), model(x), strict=True):
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


def test_batch_invariant_calls_take_no_product_and_no_copy_slot(kernel, monkeypatch):
    asked = []
    workspace_of = entry.workspace_of
    monkeypatch.setattr(entry, "workspace_of", lambda *a, **k: asked.append(k["copies"]) or workspace_of(*a, **k))
    monkeypatch.setattr(entry, "FROM_BYTES", SMALL)
    _, code = compiled_code(Stack(1, layers=1).eval(), torch.randn(6, HIDDEN), {**NAMED, "batch_invariant": True})
    assert calls_of(code) == ["all_reduce_norm"] * 2 and asked == [False, False]


@pytest.mark.parametrize(
    "options", [{}, {**NAMED, "inductor": {"max_autotune_gemm": True}}], ids=["not named", "products are tuned"]
)
def test_products_are_left_alone_without_the_name_and_where_they_are_tuned(kernel, options):
    _, code = compiled_code(Stack(1, layers=1).eval(), torch.randn(6, HIDDEN), options)
    assert calls_of(code) == ["all_reduce_norm"] * 2


def test_a_training_step_has_the_gradients_of_eager_mode(kernel):
    model = Stack(1, layers=1)
    x = torch.randn(6, HIDDEN)
    gradients = []
    for fn in (model, torch.compile(model, backend="tpfuse", dynamic=False, options=NAMED)):
        model.zero_grad()
        loss(fn(x)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for right, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def words_of(code: str) -> list[str]:
    return re.findall(r"product_all_reduce_norm\.\w+\(\[[^']*\], '([^']*)'", code)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_product_gives_the_bits_it_gave(kernel, monkeypatch, kind, dynamic):
    if kind.startswith("scales") and not scales_of_rows():
        pytest.skip("the CPU's product takes one scale")
    model = Behind(kind).eval()
    made = in_chunks(monkeypatch)
    outputs = []
    batches = [whole_numbers(rows, HIDDEN) for rows in ((6, 3, 9) if dynamic else (6, 6))]
    for options, words in (({}, []), (NAMED, [KINDS[kind][1]])):
        torch._dynamo.reset()
        with fresh_cache(), torch.no_grad():
            fn, code = compiled_code(model, batches[0], options, dynamic)
            assert words_of(code) == words
            made.clear()
            outputs.append([t for x in batches for t in fn(x)])
    assert len(made) == 2 and all(chunks > 1 and product for chunks, product in made)  # 3 rows: too few
    assert all(map(torch.equal, *outputs))


@pytest.mark.parametrize(("word", "factors"), [
    ("mm", [whole_numbers(7, 32), whole_numbers(32, 16)]),
    ("addmm", [whole_numbers(16), whole_numbers(7, 32), whole_numbers(32, 16)]),
    ("addmm", [whole_numbers(1, 16), whole_numbers(7, 32), whole_numbers(32, 16)]),
    ("mms", [whole_numbers(7, 32), whole_numbers(32, 16), whole_numbers(7, 5), whole_numbers(5, 16)]),
    ("scaled_mm", of_float8((), ())),
    ("scaled_mm", of_float8((1, 1), (1,))),
    ("scaled_mm, fast", [*of_float8((), ()), whole_numbers(16)]),
    ("scaled_mm", of_float8((7, 1), (1, 16))),
    ("scaled_mm, fast", [*of_float8((7, 1), (1, 16)), whole_numbers(16)]),
])  # fmt: skip
def test_rows_of_a_product_are_those_of_the_whole(word, factors):
    if word.startswith("scaled") and factors[2].numel() > 1 and not scales_of_rows():
        pytest.skip("the CPU's product takes one scale")
    names = {"mm": torch.mm, "addmm": torch.addmm, "mms": lambda a, b, c, d: a @ b + c @ d}
    scaled = partial(torch._scaled_mm, out_dtype=torch.float32, use_fast_accum=word.endswith("fast"))
    whole, out = names.get(word, scaled)(*factors), torch.full((7, 16), float("nan"))
    for first, stop in ((0, 1), (1, 4), (4, 7)):
        PRODUCTS[word](slice(first, stop), out[first:stop], *factors)
    assert torch.equal(out, whole)


def test_a_scale_of_each_row_goes_with_its_rows(monkeypatch):
    """Whatever the CPU's product takes: with one in its place that says what it was given."""
    given = []
    monkeypatch.setattr("tpfuse.product_ops.SCALED_MM", lambda *a, **k: given.append(a))
    factors = of_float8((7, 1), (1, 16))
    for first, stop in ((0, 3), (3, 7)):
        PRODUCTS["scaled_mm"](slice(first, stop), torch.empty(stop - first, 16), *factors)
    assert [(a.shape[0], scale_a.flatten().tolist()) for a, _, scale_a, *_ in given] == [
        (3, factors[2][:3].flatten().tolist()), (4, factors[2][3:].flatten().tolist())
    ]  # fmt: skip
    assert all(scale_a.data_ptr() % 16 == 0 and scale_b is factors[3] for _, _, scale_a, scale_b, *_ in given)


@pytest.mark.parametrize("kinds", [
    ("bias", "bias"), ("bias", "none"), ("one scale", "one scale, bias"), ("none", "three products in views"),
], ids=str)  # fmt: skip
def test_two_ranks_have_the_numbers_they_had_whatever_the_others_product_is(kinds):
    results = run_processes(2, with_and_without_the_name, kinds)
    for rank, (plain, named, words) in enumerate(results):
        assert words == [KINDS[kinds[rank]][1]] and all(map(np.array_equal, plain, named))
    assert all(map(np.array_equal, results[0][1], results[1][1]))


def with_and_without_the_name(rank: int, kinds: tuple[str, str]) -> tuple[list, list, list[str]]:
    """What a rank gives without and with it, and the words of its products."""
    for module in ("tpfuse.product_ops", "tpfuse.passes.rewrite.overlap"):
        importlib.import_module(module).FROM_BYTES = SMALL
    torch.manual_seed(rank)
    model = Behind(kinds[rank]).eval()
    torch.manual_seed(2)
    x, outputs = whole_numbers(6, HIDDEN), []
    for options in ({}, NAMED):
        torch._dynamo.reset()
        fn, code = compiled_code(model, x, options)
        with torch.no_grad():
            outputs.append([t.numpy() for t in fn(x)])
    return *outputs, words_of(code)


@pytest.mark.parametrize("kind", [
    "bias", "bias behind the product", "one scale, bias", "two products", "three products in views",
])  # fmt: skip
def test_gradients_behind_other_products_are_those_without_the_name(kernel, kind):
    model, x = Behind(kind), whole_numbers(6, HIDDEN)
    gradients = []
    for options, words in (({}, []), (NAMED, [KINDS[kind][1]])):
        torch._dynamo.reset()
        model.zero_grad()
        with fresh_cache():
            fn = torch.compile(model, backend="tpfuse", dynamic=False, options=options)
            _, codes = run_and_get_code(lambda fn=fn: sum(t.square().sum() for t in fn(x)).backward())
        assert words_of("".join(codes)) == words
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


class Parallel(nn.Module):
    """Attention and MLP read one norm, as in GPT-J, Falcon and Cohere. `once`: their sum is reduced, else each."""

    def __init__(self, once: bool):
        super().__init__()
        self.once, self.norm, self.last = once, nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.value, self.out, self.up, self.down = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.norm(x)
        attention, mlp = self.out(torch.tanh(self.value(y))), self.down(nn.functional.silu(self.up(y)))
        reduce = partial(funcol.all_reduce, reduceOp="sum", group=dist.group.WORLD)
        hidden = x + (reduce(attention + mlp) if self.once else reduce(attention) + reduce(mlp))
        return self.last(hidden), hidden


@pytest.mark.parametrize(("once", "shape", "dynamic"), [
    (True, (2, 5), False), (False, (2, 5), True), (False, (10,), False),
])  # fmt: skip
def test_attention_and_mlp_in_parallel_are_within_the_error_rule(kernel, once, shape, dynamic):
    torch.manual_seed(0)
    model = Parallel(once).bfloat16().eval()
    exact = copy.deepcopy(model).double()
    batches = [torch.randn(*shape, HIDDEN).bfloat16() for _ in range(20)]
    errors = []
    for options, words in (({}, []), (NAMED, ["mms"])):
        torch._dynamo.reset()
        with fresh_cache(), torch.no_grad():
            fn, code = compiled_code(model, batches[0], options, dynamic)
            assert words_of(code) == words
            errors.append(torch.tensor([relative_error(fn(x), exact(x.double())) for x in batches]).mean(0))
    old, new = errors
    assert (new <= 1.1 * old + torch.finfo(torch.bfloat16).eps / 2).all(), errors


@pytest.mark.parametrize("how", ["plain", "megatron"])
def test_gradients_that_arrive_at_norms_are_sums_of_products(kernel, monkeypatch, how):
    """Of both layers: q, k and v, gate and up; in front of them the output projection. As compiled graphs hold them,
    whatever takes them along."""
    found = []

    def looked_at(graph: torch.fx.Graph) -> int:
        sums = r"_c10d_functional\.(all_reduce|reduce_scatter)"
        sent = [node.args[0] for node in graph.nodes if re.match(sums, str(node.target))]
        products = [find_product({"x": x}, dist.group.WORLD.group_name) for x in sent]
        found.append([(product.word, len(product.factors)) for product in products if product is not None])
        return 0

    monkeypatch.setattr("tpfuse.backend.lower", looked_at)
    model, mesh = sequence_models.whole(dtype=torch.bfloat16), init_device_mesh("cpu", (2,))
    model = sequence_models.cut_plainly(model, mesh) if how == "plain" else sequence_models.cut_by_hand(model, 0)
    tokens = torch.randint(0, sequence_models.TOKENS, (1, 16) if how == "plain" else (16, 1))
    torch.compile(model, backend="tpfuse", dynamic=False)(tokens).sum().backward()
    assert found[-1] == [("mm", 2), *[("mms", 4), ("mms", 6)] * sequence_models.LAYERS]


def test_both_kinds_of_large_calls_take_the_kernel_that_copies(kernel, monkeypatch):
    """With its product, chunk by chunk, or, on a rank whose graph has none, without: the peer cannot tell."""
    made = in_chunks(monkeypatch)
    model, x = Stack(1, layers=1).eval(), torch.randn(6, HIDDEN)
    for expected in (True, False):
        if not expected:  # a graph in which no product was found
            monkeypatch.setattr("tpfuse.passes.rewrite.lower.find_product", lambda *_: None)
        torch._dynamo.reset()
        with fresh_cache():
            fn, _ = compiled_code(model, x)
            made.clear()
            with torch.no_grad():
                torch.testing.assert_close(fn(x), model(x), rtol=1e-5, atol=1e-5)
        assert made == [(3, expected)] * 2


def test_the_ranks_compare_what_decides_the_kernel(kernel, monkeypatch):
    monkeypatch.setattr("tpfuse.passes.verdict.steps.runs_in_a_kernel", lambda *_: True)
    told = []
    for options in ({}, NAMED, {**NAMED, "batch_invariant": True}):
        compiled_code(Stack(1, layers=1).eval(), torch.randn(6, HIDDEN), options)
        told.append({step.told for step in tpfuse.reports()[-1].steps})
        torch._dynamo.reset()
    assert told == [{""}, {"overlap"}, {"batch_invariant overlap"}]


@pytest.mark.parametrize(("ranks", "rows", "said"), [
    (2, 6, "symmetric memory, by copy engines: rows travel while later ones are multiplied"),
    (2, 1, "overlap_all_reduce_norm begins at 32 MB of a rank's rows, and here are 0.000244"),
    (4, 6, "symmetric memory; overlap_all_reduce_norm takes groups of 2 ranks"),
], ids=["large", "small", "four ranks"])  # fmt: skip
def test_the_report_says_what_the_name_does_for_a_boundary(monkeypatch, ranks, rows, said):
    monkeypatch.setattr("tpfuse.passes.verdict.runs.why_not", lambda *_, **__: "")
    if rows == 6:
        monkeypatch.setattr("tpfuse.passes.verdict.runs.FROM_BYTES", SMALL)
    with fake_world(ranks):
        model = Stack(1, layers=1).eval()
        with torch.no_grad():
            named = tpfuse.explain(model, (torch.randn(rows, HIDDEN),), options=NAMED).boundaries
            plain = tpfuse.explain(model, (torch.randn(rows, HIDDEN),)).boundaries
    assert {said in boundary.runs and boundary.kernel for boundary in named} == {True}
    assert {boundary.runs for boundary in plain} == {"symmetric memory"}


@pytest.mark.parametrize("large", [True, False])
def test_a_call_that_may_be_made_by_copies_later_leaves_no_record(kernel, monkeypatch, large):
    """Its group has no copy slot yet (a first call under capture): replayed, it would not meet a peer that has one."""
    meet = rendezvous._meet
    without = {"copy_words": 0, "remote": None}
    monkeypatch.setattr(rendezvous, "_meet", lambda *a: (dataclasses.replace(meet(*a)[0], **without), ""))
    monkeypatch.setattr("tpfuse.passes.rewrite.lower.find_product", lambda *_: None)
    monkeypatch.setattr("tpfuse.kernels.entry.FROM_BYTES", SMALL if large else 1 << 40)
    compiled_code(Stack(1, layers=1).eval(), torch.randn(6, HIDDEN))
    [member] = rendezvous.WORKSPACE_REGISTRY.values()
    assert member.no_copies == large and bool(member.records.known) != large and kernel.launches
