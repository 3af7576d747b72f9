"""Calls by copies that are made again from records, over a real link: the results, and how many were first calls."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from tpfuse import product_ops
from tpfuse.boundary_spec import BoundarySpec
from tpfuse.errors import PeerTimeoutError
from tpfuse.kernels import entry, replay
from tpfuse.kernels.add_norm import add_norm_reference
from tpfuse.kernels.call import Call
from tpfuse.kernels.driver import Driver, driver
from tpfuse.kernels.rendezvous import check_peers
from tpfuse.kernels.symmetric import copies, noted
from tpfuse.quantisation import read_quantisation

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
INNER = 64  # of the products


@dataclass(frozen=True)
class Kind:
    """One of the calls that are alike but for their tensors. `scattered`: the exchange; `product`: the word of
    product_ops.py, where x is one and the operator's own; quant: how y is quantised."""

    scattered: bool
    product: str
    rows: int
    hidden: int
    dtype: torch.dtype
    norm: str
    quant: str = ""

    @property
    def name(self) -> str:
        boundary = "reduce_scatter_norm_gather" if self.scattered else "all_reduce_norm"
        return f"product_{boundary}" if self.product else boundary

    def spec(self, group_name: str) -> str:
        operands = (self.dtype, self.dtype, None, self.dtype, None, None)
        return BoundarySpec(
            norm=self.norm, eps=1e-6, out_dtype=self.dtype, hidden_dtype=self.dtype, group_name=group_name,
            operands=operands, overlap=True, quant=self.quant,
        ).text()  # fmt: skip


class Tensors:
    """Of one call: the ranks' x are products of a part of `left` and one of `right`."""

    def __init__(self, kind: Kind, seed: int, rank: int) -> None:
        g = torch.Generator(device="cuda").manual_seed(seed)
        self.kind, self.rank = kind, rank

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, device="cuda").to(kind.dtype)

        self.left, self.right = drawn(2, kind.rows, INNER), drawn(2, INNER, kind.hidden)
        self.bias = drawn(2, kind.hidden)
        self.residual, self.weight = drawn(kind.rows, kind.hidden), drawn(kind.hidden)
        share = kind.rows // 2
        self.own = slice(rank * share, (rank + 1) * share) if kind.scattered else slice(None)
        self.y = torch.full_like(self.residual, float("nan"))
        self.hidden = torch.full_like(self.residual[self.own], float("nan"))
        self.last: list[Tensor] = []
        if kind.quant:
            how = read_quantisation(kind.quant)
            self.last = [torch.empty(self.y.shape, dtype=how.q_dtype, device="cuda"),
                         torch.empty(how.scales_of(self.y.shape), dtype=how.scale_dtype, device="cuda")]  # fmt: skip

    def run(self, group_name: str) -> None:
        kind, factors = self.kind, [t.clone(memory_format=torch.preserve_format) for t in self.factors(self.rank)]
        x = (factors, kind.product) if kind.product else (torch.mm(*factors),)
        operator = getattr(torch.ops.tpfuse, kind.name)
        form = operator.quantised if kind.quant else operator.lean
        form(*x, self.y, kind.spec(group_name), self.residual[self.own], self.weight, self.hidden, *self.last)

    def factors(self, rank: int) -> list[Tensor]:
        """Of a rank's x, in the order of the product's word."""
        a, b, word = self.left[rank], self.right[rank], self.kind.product
        if word == "addmm":
            return [self.bias[rank], a, b]
        if word == "mms":
            half = INNER // 2
            return [a[:, :half], b[:half], a[:, half:], b[half:]]
        if word.startswith("scaled_mm"):
            scales = [torch.full((), 0.5, device="cuda"), torch.full((), 2.0, device="cuda")]
            if word == "scaled_mm":  # of each row and column
                scales = [scales[0].expand(len(a), 1).contiguous(), scales[1].expand(1, b.shape[1]).contiguous()]
            return [a.to(torch.float8_e4m3fn), b.t().contiguous().to(torch.float8_e4m3fn).t(), *scales]
        return [a, b]

    def part(self, rank: int) -> Tensor:
        """A rank's x in float64, rounded as that is."""
        a, b = self.left[rank].double(), self.right[rank].double()
        if self.kind.product.startswith("scaled_mm"):
            a, b = (t.to(torch.float8_e4m3fn).double() for t in (a, b))
        x = a @ b + (self.bias[rank].double() if self.kind.product == "addmm" else 0)
        return x.to(self.kind.dtype).double()

    def wrong(self) -> str:
        """What is, or nothing."""
        kind = self.kind
        call = Call(
            (self.part(0) + self.part(1)).float(), self.residual.float(), None, self.weight.float(), norm=kind.norm,
            eps=1e-6, out_dtype=F32, hidden_dtype=F32,
        )  # fmt: skip
        right = add_norm_reference(call)
        off = [
            ((got.float() - wanted).norm() / wanted.norm()).nan_to_num(float("inf")).item()
            for got, wanted in ((self.y, right.y), (self.hidden, right.residual_out[self.own]))
        ]
        if kind.quant:
            exact = read_quantisation(kind.quant).of(self.y)
            pairs = zip(self.last, exact, strict=True)
            if not all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs):
                off.append(float("inf"))
        return "" if max(off) < (1e-5 if kind.dtype == F32 else 6e-3) else f"off by {max(off):.1e}"


def calls_made_again(rank: int, calls: int, quant: str, planted: str = "") -> tuple[list[str], int, int, int]:
    """What was wrong; how many calls were first calls, and how many should have been; a fingerprint of y of all calls.
    planted: which stream does not wait in calls that are made again, that of "copies" or the "caller"'s."""
    torch.cuda.set_device(rank)
    group_name = dist.new_group(backend="nccl").group_name
    product_ops.FROM_BYTES = entry.FROM_BYTES = 1
    firsts, leave = [], replay.Site.leave

    def left(site: replay.Site, *rest: object) -> None:
        firsts.append(site)
        leave(site, *rest)

    replay.Site.leave = left  # type: ignore[method-assign]
    if planted:
        os.environ["TPFUSE_PEER_TIMEOUT"] = "3"
        found = _planted(planted == "copies", late=rank == 0)
        noted.driver = lambda: found
    same, mine = random.Random(0), random.Random(rank + 1)
    shape = partial(same.choice, [(2, 1024), (6, 4096), (300, 1024), (1024, 4096)])
    kinds = [Kind(scattered, word, *shape(), dtype, norm) for dtype in (BF16, F16, F32) for scattered in (False, True)
             for norm in ("rms_norm", "layer_norm") for word in ("", "mm")]  # fmt: skip
    kinds += [Kind(scattered, word, 300, 4096, BF16, "rms_norm") for scattered in (False, True)
              for word in ("addmm", "mms", "scaled_mm", "scaled_mm, fast")]  # fmt: skip
    kinds += [Kind(scattered, "mm", 9000, 4096, BF16, "rms_norm") for scattered in (False, True)]
    kinds += [Kind(False, word, 40, 4096, BF16, "rms_norm", quant) for word in ("", "mm")]
    # The first call of these is made while a graph is captured, when their kernels are compiled.
    fresh = [Kind(scattered, "mm", 302, 4096, BF16, "rms_norm") for scattered in (False, True)]
    wrong, mark, beside = [], 0, torch.cuda.Stream()
    queue = [*kinds, *fresh, *(same.choice(kinds) for _ in range(calls - len(kinds) - len(fresh)))]
    while queue:
        batch = [queue.pop(0)]
        while queue and same.random() < 0.7 and not {batch[0], queue[0]} & set(fresh):
            batch.append(queue.pop(0))
        room = torch.empty(mine.randrange(1, 1 << 20), device="cuda")  # other addresses on each rank
        tensors = [Tensors(kind, len(queue) + n, rank) for n, kind in enumerate(batch)]
        main = torch.cuda.current_stream()
        stream = mine.choice((main, beside))
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            if mine.random() < 0.4:
                torch.cuda._sleep(mine.randrange(1000, 300_000))
            try:
                if batch[0] in fresh or (not planted and len(queue) < calls - len(kinds) and same.random() < 0.1):
                    _in_a_graph(tensors, group_name)
                else:
                    for each in tensors:  # none waits for the one before on the host
                        each.run(group_name)
            except PeerTimeoutError as late:
                assert planted
                return [*wrong, str(late)], len(firsts), 0, 0
        main.wait_stream(stream)
        for each in tensors:
            if said := each.wrong():
                wrong.append(f"{len(queue)} calls before the end, {each.kind}: {said}")
            mark += int(each.y.view(torch.int16).long().sum())
        del room, tensors
    torch.cuda.synchronize()
    if not planted:
        check_peers()
    # Whatever the product is.
    alike = {(kind.name, kind.spec(group_name), kind.rows, kind.hidden) for kind in (*kinds, *fresh)}
    return wrong, len(firsts), len(alike), mark


def _in_a_graph(tensors: list[Tensors], group_name: str) -> None:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for each in tensors:
            each.run(group_name)
    for _ in range(2):
        for each in tensors:
            each.y.fill_(float("nan"))
        graph.replay()
    torch.cuda.synchronize()  # before the graph goes


def _planted(copies_too_early: bool, late: bool) -> Driver:
    """Copies that do not wait for what they copy; or, of one rank whose copies are late, rows that are finished, in the
    memory of x, before they are sent."""
    real = driver()
    assert real is not None

    def copies_stream(stream: int) -> bool:
        return any(stream == lane.stream.cuda_stream for lane in copies._LANES.values())

    def wait(stream: int, event: int, flags: int) -> None:
        if copies_stream(stream) != copies_too_early:
            real.wait(stream, event, flags)

    def copy(to: int, source: int, size: int, stream: int) -> None:
        if late and not copies_too_early and not torch.cuda.is_current_stream_capturing():
            with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
                torch.cuda._sleep(200_000)
        real.copy(to, source, size, stream)

    return Driver(copy, real.record, wait)
