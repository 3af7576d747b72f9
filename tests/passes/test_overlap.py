"""Which products overlap_all_reduce_norm takes along: those whose rows are surely computed one without the other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.graphs import fake_world, relative_error, trace
from tests.products import F8, of_float8
from tpfuse.passes.rewrite.overlap import find_product
from tpfuse.product_ops import PRODUCTS


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch):
    monkeypatch.setattr("tpfuse.passes.rewrite.overlap.FROM_BYTES", 1)
    with fake_world(2):
        yield


def found_in(fn: Callable, *factors: torch.Tensor, dynamic: bool = False) -> str | None:
    """The word for the product that `fn` of these factors returns, if it is taken."""
    [x] = trace(fn, *factors, dynamic=dynamic, decompose=False).graph.find_nodes(op="output")[0].all_input_nodes
    found = find_product({"x": x, "residual": None}, dist.group.WORLD.group_name)
    return None if found is None else found.word


def float8_product(*given: torch.Tensor, **more: object) -> torch.Tensor:
    return torch._scaled_mm(*given, out_dtype=torch.bfloat16, **more)


A, B, BIAS = torch.randn(7, 32), torch.randn(32, 16), torch.randn(16)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("fn", "factors", "word"), [
    (torch.addmm, (BIAS, A, B), "addmm"),
    (torch.addmm, (BIAS[None], A, B), "addmm"),
    (float8_product, of_float8((7, 1), (1, 16)), "scaled_mm"),
    (partial(torch.addmm, alpha=2), (BIAS, A, B), None),
    (partial(torch.addmm, beta=0.5), (BIAS, A, B), None),
    (torch.addmm, (torch.randn(7, 16), A, B), None),
    (torch.addmm, (torch.randn(7, 1), A, B), None),
    (torch.addmm, (torch.randn(()), A, B), None),
    (lambda bias, a, b: torch.addmm(bias.expand(-1, 16), a, b), (torch.randn(7, 1), A, B), None),
    (lambda a, b, s, t, r: float8_product(a, b, s, t, scale_result=r), [*of_float8((), ()), torch.ones(())], None),
    (lambda a, b, *scales: float8_product(a, b.contiguous(), *scales), of_float8((), ()), None),
    (lambda a, b, *scales: float8_product(a.t().contiguous().t(), b, *scales), of_float8((), ()), None),
])  # fmt: skip
def test_which_products_are_taken(fn, factors, word, dynamic):
    assert found_in(fn, *factors, dynamic=dynamic) == word


@pytest.mark.parametrize(("dtype", "scale_dtype", "scale_a", "scale_b"), [
    (F8, torch.float8_e8m0fnu, (512,), (512,)),  # of blocks of 32
    (F8, torch.float32, (128, 2), (2, 128)),  # of blocks of 128
    (F8, torch.float32, (128, 1), (1, 1)),
    (torch.float4_e2m1fn_x2, torch.float32, (), ()),
], ids=str)  # fmt: skip
def test_products_with_scales_of_blocks_are_left_alone(dtype, scale_dtype, scale_a, scale_b):
    """As they stand in a graph, whether or not this torch has a kernel for them."""
    graph = fx.Graph()
    with FakeTensorMode():
        fakes = [torch.empty(128, 128, dtype=dtype), torch.empty(128, 128, dtype=dtype).t()]
        fakes += [torch.empty(shape, dtype=scale_dtype) for shape in (scale_a, scale_b)]
        out = torch.empty(128, 128, dtype=torch.bfloat16)
    factors = [graph.placeholder(f"factor_{i}") for i in range(4)]
    x = graph.call_function(torch.ops.aten._scaled_mm.default, (*factors, None, None, torch.bfloat16))
    graph.output(x)
    for node, fake in zip((*factors, x), (*fakes, out), strict=True):
        node.meta["val"] = fake
    assert find_product({"x": x}, dist.group.WORLD.group_name) is None


# -- sums of products --------------------------------------------------------------------------------------------------


def in_rows(word: str, factors: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """A product as a kernel asks for it, some rows at a time."""
    out = torch.full(like.shape, float("nan"), dtype=like.dtype)
    rows = out.view(-1, like.shape[-1])
    for first, stop in ((0, 1), (1, 4), (4, rows.shape[0])):
        PRODUCTS[word](slice(first, stop), rows[first:stop], *factors)
    return out


def taken(fn: Callable, factors: list[torch.Tensor], dynamic: bool = False) -> tuple[fx.GraphModule, str | None]:
    """(the graph of `fn`, as it is without its product and what that was read through, the word for the product)."""
    gm = trace(fn, *factors, dynamic=dynamic, decompose=False)
    [output] = gm.graph.find_nodes(op="output")
    x = output.all_input_nodes[0]
    found = find_product({"x": x, "residual": None}, dist.group.WORLD.group_name)
    if found is None:
        return gm, None
    with gm.graph.inserting_before(output):
        like = gm.graph.call_function(torch.full, ([*fn(*factors).shape], 0.0), {"dtype": x.meta["val"].dtype})
        output.args = (gm.graph.call_function(in_rows, (found.word, [*found.factors], like)),)
    found.erase(gm.graph)
    gm.graph.lint()
    gm.recompile()
    left = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.add.Tensor}
    assert not left & {node.target for node in gm.graph.nodes}
    return gm, found.word


def factors_of(products: int, dtype: torch.dtype, make: Callable = torch.randn) -> list[torch.Tensor]:
    return [t.to(dtype) for i in range(products) for t in (make(8, 24 + 8 * i), make(24 + 8 * i, 16))]


def two(a, b, c, d):
    return a @ b + c @ d


def two_in_views(a, b, c, d):
    return ((a @ b).view(2, 4, 16) + (c @ d).view(2, 4, 16)).view(4, 2, 16)


def two_rows_in_other_views(a, b, c, d):
    return (a @ b).view(1, 8, 16) + (c @ d).view(8, 1, 16).view(1, 8, 16)


def two_in_one(a, b, c, d):
    return torch.addmm(a @ b, c, d)


#: As compiled graphs hold it.
cast = torch.ops.prims.convert_element_type.default
wide = partial(cast, dtype=torch.float32)


def two_wide(a, b, c, d):
    return cast(wide(a @ b) + wide(c @ d), a.dtype)


def three(a, b, c, d, e, f):
    return (a @ b).view(1, 8, 16) + (c @ d).view(1, 8, 16) + (e @ f).view(1, 8, 16)


def three_from_behind(a, b, c, d, e, f):
    return a @ b + (c @ d + e @ f)


def three_in_one(a, b, c, d, e, f):
    return torch.addmm(torch.addmm(a @ b, c, d).view(8, 16), e, f)


def three_wide(a, b, c, d, e, f):
    return cast(wide(a @ b) + wide(c @ d) + wide(e @ f), a.dtype)


def four(a, b, c, d, e, f, g, h):
    return (a @ b + c @ d) + (e @ f + g @ h)


def four_wide(a, b, c, d, e, f, g, h):
    return cast(wide(a @ b) + wide(c @ d) + wide(e @ f) + wide(g @ h), a.dtype)


def four_wide_in_views(a, b, c, d, e, f, g, h):
    parts = [wide((a @ b).view(2, 4, 16)), wide((c @ d).view(2, 4, 16))]
    parts += [wide((e @ f).view(2, 4, 16)), wide((g @ h).view(2, 4, 16))]
    return cast(parts[0] + parts[1] + parts[2] + parts[3], a.dtype)


def five(a, b, c, d, e, f, g, h, i, j):
    return a @ b + c @ d + e @ f + (g @ h + i @ j)


SUMS = {two: 2, two_in_views: 2, two_rows_in_other_views: 2, two_in_one: 2, two_wide: 2, three: 3, three_from_behind: 3,
        three_in_one: 3, three_wide: 3, four: 4, five: 5}  # fmt: skip
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("fn", SUMS)
def test_sums_of_products_are_taken_with_all_that_makes_them_up(fn, dynamic):
    for dtype in (F32, BF16):
        # Of -1, 0 and 1, and so no more than 200 in all: nothing is rounded.
        factors = factors_of(SUMS[fn], dtype, lambda *shape: torch.randint(-1, 2, shape))
        gm, word = taken(fn, factors, dynamic)
        got, right = gm(*factors), fn(*factors)
        assert word == "mms" and got.dtype == dtype and torch.equal(got, right)


@pytest.mark.parametrize("fn", SUMS)
def test_a_sum_of_products_is_within_the_error_rule(fn):
    """On average over 20 seeds, with products of one size and of very different sizes."""
    for sizes in (1.0, 1.0, 1.0, 1.0, 1.0), (8.0, 1.0, 0.1, 1.0, 4.0), (0.1, 1.0, 8.0, 0.5, 0.1):
        gm, word = taken(fn, factors_of(SUMS[fn], BF16))
        assert word == "mms"
        old, new = [], []
        for seed in range(20):
            torch.manual_seed(seed)
            factors = factors_of(SUMS[fn], BF16)
            factors[::2] = [a * size for a, size in zip(factors[::2], sizes, strict=False)]
            halves = [t.double() for t in factors]
            exact = [sum(a @ b for a, b in zip(halves[::2], halves[1::2], strict=True))]
            old += relative_error([fn(*factors).view(8, 16)], exact)
            new += relative_error([gm(*factors).view(8, 16)], exact)
        rounding = torch.finfo(BF16).eps / 2
        assert sum(new) / 20 <= 1.1 * sum(old) / 20 + rounding, (sizes, sum(new) / 20, sum(old) / 20)


def read_by_others(a, b, c, d):
    product = a @ b
    return product + c @ d, product


def read_by_a_factor(a, b, c, d):
    product = a @ b
    return product + torch.relu(product) @ d[:16]


def of_itself(a, b, c, d):
    product = a @ b
    return product + product


def factor_of_itself(a, b, c, d):
    product = a[:, :16] @ b[:16]
    return torch.addmm(product, a[:, :8], product)


def transposed(a, b, c, d):
    return (a @ b).view(8, 4, 4).transpose(1, 2) + (c @ d).view(8, 4, 4)


def of_other_rows(a, b, c, d):
    """Rows of x are in several rows of one product."""
    return (a @ b).view(4, 32) + c[:4] @ d.repeat(1, 2)


LEFT = [
    (lambda a, b, c, d: torch.add(a @ b, c @ d, alpha=2), 2, F32),
    (lambda a, b, c, d: torch.addmm(a @ b, c, d, alpha=2), 2, F32),
    (lambda a, b, c, d: torch.addmm(a @ b, c, d, beta=2), 2, F32),
    (lambda a, b, c, d: a @ b + c @ d + a[:, :16], 2, F32),
    (lambda a, b, c, d: a @ b + torch.relu(c @ d), 2, F32),
    (lambda a, b, c, d: a @ b + c[:1] @ d, 2, F32),
    (lambda a, b, c, d: torch.addmm(b[0], a, b) + c @ d, 2, F32),
    (lambda a, b, c, d: wide(a @ b) + wide(c @ d), 2, BF16),
    (lambda a, b, c, d: cast(cast(a @ b, torch.int32) + cast(c @ d, torch.int32), a.dtype), 2, F32),
    (lambda a, b, c, d: a @ b + cast(c.bfloat16() @ d.bfloat16(), a.dtype), 2, F16),
    (lambda a, b, c, d: cast(cast(a @ b + c @ d, torch.bfloat16), a.dtype), 2, F16),
    (lambda a, b, c, d: cast(a @ b + c @ d, torch.bfloat16), 2, F32),
    (lambda a, b, c, d: cast(wide(a @ b) + wide(c) @ wide(d), a.dtype), 2, BF16),
    (read_by_others, 2, F32),
    (read_by_a_factor, 2, F32),
    (of_itself, 2, F32),
    (factor_of_itself, 2, F32),
    (transposed, 2, F32),
    (of_other_rows, 2, F32),
    # Four sums so far would be rounded; in the graph four products are, and one sum.
    (four_wide, 4, BF16),
    (four_wide_in_views, 4, BF16),
]


@pytest.mark.parametrize(("fn", "products", "dtype"), LEFT)
@pytest.mark.parametrize("dynamic", [False, True])
def test_other_sums_are_left_alone(fn, products, dtype, dynamic):
    assert taken(fn, factors_of(products, dtype), dynamic)[1] is None


@pytest.mark.parametrize(("fn", "word"), [
    (two, "mms"), (two_wide, "mms"), (three, "mms"), (three_from_behind, "mms"), (three_in_one, "mms"),
    (three_wide, None), (four, None), (five, None),
])  # fmt: skip
def test_in_float16_no_sum_comes_about_that_the_graph_has_not(fn, word):
    """It may be infinite where all of them are not."""
    assert taken(fn, factors_of({**SUMS, four: 4}[fn], F16))[1] == word
