"""A large product lies in the memory of the result behind it: where no copies are possible, what reads it gets numbers
and not what was written over them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tpfuse import product_ops
from tpfuse.boundary_spec import BoundarySpec
from tpfuse.kernels.call import AddNormOut, Call

from .products import whole_numbers
from .ranks import run_processes

ROWS, HIDDEN = 6, 16
BF16, F32 = torch.bfloat16, torch.float32


def product_into(y: Tensor, x: Tensor) -> Call:
    def multiply(first: int, stop: int) -> None:
        x[first:stop] = 3.0

    out = AddNormOut(y, None, None, None)
    return Call(x, norm="rms_norm", out_dtype=y.dtype, out=out, product=multiply)


def test_what_was_multiplied_in_place_is_read_elsewhere():
    y, x = torch.empty(4, 8), torch.empty(4, 8)
    for given in (y, y.view(2, 2, 8)):
        made = product_into(given, y).multiplied()
        y.fill_(float("nan"))
        assert made.product is None and (made.x == 3).all()
    assert product_into(y, x).multiplied().x is x


def boundary(name: str, factors: list[Tensor], x: Tensor, out_dtype: torch.dtype, rank: int) -> tuple[list, bool]:
    """The results of an operator behind a product and of the one without, in turn; whether x lay in y."""
    residual, weight = whole_numbers(ROWS, HIDDEN), whole_numbers(HIDDEN)
    if name != "all_reduce_norm":
        residual = residual.chunk(2)[rank].clone()
    spec = BoundarySpec(
        norm="rms_norm", eps=1e-6, out_dtype=out_dtype, hidden_dtype=F32, group_name=dist.group.WORLD.group_name,
        operands=(x.dtype, F32, None, F32, None, None), overlap=True,
    ).text()  # fmt: skip
    results = []
    for form, given in ((f"product_{name}", (factors, "mm")), (name, (x,))):
        y, hidden = torch.full((ROWS, HIDDEN), float("nan"), dtype=out_dtype), torch.empty_like(residual)
        getattr(torch.ops.tpfuse, form).lean(*given, y, spec, residual, weight, hidden)
        results += [[y, hidden]]
    return results, lay_in(results[0][0])


def backward(scattered: bool, factors: list[Tensor], x: Tensor, out_dtype: torch.dtype, rank: int) -> tuple[list, bool]:
    own = [whole_numbers(ROWS, HIDDEN), torch.full((ROWS, 1), 0.5), whole_numbers(ROWS, HIDDEN)]
    h, rstd, residual = (t.chunk(2)[rank].clone() for t in own) if scattered else own
    weight, results = whole_numbers(HIDDEN), []
    for given in ((factors, "mm"), ([x], "")):
        dx, total = torch.full((ROWS, HIDDEN), float("nan"), dtype=out_dtype), torch.empty_like(h)
        dweight = torch.empty(HIDDEN)
        torch.ops.tpfuse.reduce_norm_backward(
            *given, dx, h, None, rstd, weight, residual, total, dweight, norm="rms_norm", eps=1e-6, weight_offset=0.0,
            dtype=x.dtype, scattered=scattered, group_name=dist.group.WORLD.group_name,
        )  # fmt: skip
        results += [[dx, total, dweight]]
    return results, lay_in(results[0][0])


FILLED: list[int] = []


def lay_in(result: Tensor) -> bool:
    return FILLED[-1] == result.data_ptr()


def behind_products(rank: int) -> None:
    """Every operator that takes one, with results in the dtype of the product and in another."""
    product_ops.FROM_BYTES, mm = 1, product_ops.PRODUCTS["mm"]
    product_ops.PRODUCTS["mm"] = lambda rows, out, *given: FILLED.append(out.data_ptr()) or mm(rows, out, *given)
    names = "all_reduce_norm", "reduce_scatter_norm_gather"
    for operator, which in [*((boundary, name) for name in names), (backward, True), (backward, False)]:
        for out_dtype in (F32, BF16):
            torch.manual_seed(rank)
            factors = [whole_numbers(ROWS, 32), whole_numbers(32, HIDDEN)]
            torch.manual_seed(2)
            (got, right), in_place = operator(which, factors, torch.mm(*factors), out_dtype, rank)
            assert in_place == (out_dtype == F32), which
            assert not got[0].isnan().any() and all(map(torch.equal, got, right)), (which, out_dtype)


def test_where_no_copies_are_possible_the_numbers_are_those_of_a_product_that_lies_elsewhere():
    run_processes(2, behind_products)
