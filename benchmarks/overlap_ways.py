"""Ways to overlap a product with the boundary behind it, as they were tried before one was chosen, on 2 linked GPUs.

    torchrun --nproc-per-node 2 benchmarks/overlap_ways.py --out results.json

The product, the boundary, the times and the checks are those of `overlap.py`, which measures the way that was chosen;
these are sketches, which give up no wait. Every way gives all rows of y and h to both ranks.

    product, boundary      each by itself; the larger of them is the limit of any overlap
    copy, local part       of the boundary: a rank's whole part to the peer by a copy engine; add + norm of two parts
    one after the other    the product, then the boundary as tpfuse dispatches it
    in line C/L            products of C chunks of rows; a copy engine sends each to the peer, a flag behind it; the
                           add + norm of a chunk stands L chunks later in the product's own stream, waiting for it
    beside C               the same, add + norm in a stream of its own, which one program holds back until the flag
    waiting C, P           the same, one kernel of P programs beside the products, in which each row waits for its flag
    pushed P               one Triton product whose programs store each finished tile here and at the peer, and count
                           it there; add + norm in P programs beside it (0: behind it)
    async TP               torch's own product + reduce-scatter, add + norm of own rows, a gather of y (NCCL): the form
                           of sequence parallelism, in which h stays scattered

**Who writes what.** Each rank has one slot for the peer's part and words for flags, in symmetric memory. A call begins
by advancing the rank's own count of calls and telling it to the peer (`_begin`): what this rank read of its slot
before is read, because it stood earlier in the same stream. A copy of this call starts once the peer has told the same
count (`_await`). A flag is a copy of the count behind the data, in the same stream; who waits for a chunk waits for a
flag of at least its own count. Counts only grow, so nothing is cleared, and a captured graph may be replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as memory
import triton
import triton.language as tl
from overlap import BF16, EPS, MODELS, Record, parsed, run
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tpfuse.kernels.call import Call
from tpfuse.kernels.entry import all_reduce_add_norm

FLAGS = 1024
READY = FLAGS - 1  # the word in which the peer says that its slot is free
TILE = (128, 256, 64)


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _begin(count_ptr, peer_flag):
    count = tl.load(count_ptr) + 1
    tl.store(count_ptr, count)
    tl.atomic_xchg(peer_flag, count, sem="release", scope="sys")


@triton.jit
def _wait(flag, least):
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    while seen < least:
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")


@triton.jit
def _await(count_ptr, flag):
    _wait(flag, tl.load(count_ptr))


@triton.jit(do_not_specialize=["first", "rows"])
def _finish(own, theirs, residual, weight, y, h, flags, count_ptr, eps, first, rows,
            H: tl.constexpr, CHUNK: tl.constexpr, EACH: tl.constexpr, WAIT: tl.constexpr):  # fmt: skip
    """y, h of `rows` rows from `first` on, row by row. Flag i is waited for by rows [i CHUNK, (i + 1) CHUNK) of these
    until it is EACH for every call."""
    at = tl.arange(0, H)
    w = tl.load(weight + at).to(tl.float32)
    least = tl.load(count_ptr) * EACH
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        if WAIT:
            _wait(flags + row // CHUNK, least)
        here = (first + row).to(tl.int64) * H + at
        s = tl.load(own + here).to(tl.float32) + tl.load(theirs + here).to(tl.float32)
        s += tl.load(residual + here).to(tl.float32)
        r = tl.rsqrt(tl.sum(s * s) / H + eps)
        tl.store(h + here, s.to(h.dtype.element_ty))
        tl.store(y + here, (s * r * w).to(y.dtype.element_ty))


@triton.jit
def _product_and_push(a_desc, b_desc, own, there, counts, M, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
                      BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """own = there = a b^T in tiles, rows of tiles first; counts[i], at the peer, counts the tiles of the i-th row."""
    across: tl.constexpr = N // BN
    for tile in range(tl.program_id(0), M // BM * across, tl.num_programs(0)):
        m, n = tile // across, tile % across
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(K // BK):
            a = a_desc.load([m * BM, k * BK])
            b = b_desc.load([n * BN, k * BK])
            total = tl.dot(a, b.T, total)
        rows, cols = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
        here = rows[:, None].to(tl.int64) * N + cols[None, :]
        done = total.to(own.dtype.element_ty)
        tl.store(there + here, done)
        tl.store(own + here, done)
        tl.debug_barrier()
        tl.atomic_add(counts + m, 1, sem="release", scope="sys")


# -- a product and its boundary ---------------------------------------------------------------------------------------


class Shared:
    """What the two ranks share: a slot for the peer's part, flags, and the streams of one rank."""

    def __init__(self, elements: int, device: torch.device) -> None:
        group = dist.group.WORLD.group_name
        self.peer = 1 - dist.get_rank()
        slot = memory.empty(elements, dtype=BF16, device=device)
        flags = memory.empty(2 * FLAGS, dtype=torch.int32, device=device)
        at_slot, at_flags = memory.rendezvous(slot, group), memory.rendezvous(flags, group)
        self.slot, self.there = slot, at_slot.get_buffer(self.peer, (elements,), BF16)
        self.flags, self.flags_there = flags, at_flags.get_buffer(self.peer, (2 * FLAGS,), torch.int32)
        #: One count for the flags of chunks, one for those of tiles, which only calls of `pushed` add to.
        self.counts = torch.zeros(2, dtype=torch.int32, device=device)
        self.copies, self.norms = torch.cuda.Stream(), torch.cuda.Stream(priority=-1)

    def at_rest(self) -> None:
        """Before another number of tiles is counted."""
        torch.cuda.synchronize()
        dist.barrier()
        self.flags.zero_()
        self.counts.zero_()
        torch.cuda.synchronize()
        dist.barrier()


class Layer:
    def __init__(self, shared: Shared, rows: int, k: int, hidden: int, device: torch.device) -> None:
        own = torch.Generator(device).manual_seed(1 + dist.get_rank())
        same = torch.Generator(device).manual_seed(9)

        def numbers(*shape: int, by: torch.Generator = own, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=by, device=device, dtype=BF16) * scale

        shared.at_rest()
        self.shared, self.rows, self.hidden, self.device = shared, rows, hidden, device
        self.a, self.w = numbers(rows, k), numbers(hidden, k, scale=k**-0.5)
        self.residual, self.weight = numbers(rows, hidden, by=same), numbers(hidden, by=same)
        self.own, self.y, self.h = (torch.empty_like(self.residual) for _ in range(3))
        self.out: tuple[Tensor, Tensor | None] = self.y, self.h
        self.slot, self.there = (t[: rows * hidden].view(rows, hidden) for t in (shared.slot, shared.there))
        self.programs = torch.cuda.get_device_properties(device).multi_processor_count

    # One rank's part of a way, step by step.

    def multiply(self, first: int, stop: int) -> None:
        torch.mm(self.a[first:stop], self.w.t(), out=self.own[first:stop])

    def boundary(self) -> None:
        call = Call(self.own, self.residual, weight=self.weight, norm="rms_norm", eps=EPS, out_dtype=BF16,
                    hidden_dtype=BF16, group_name=dist.group.WORLD.group_name)  # fmt: skip
        done = all_reduce_add_norm(call)
        assert done is not None, "no kernel for this boundary"
        self.out = done[0].y, done[0].residual_out

    def begin(self, which: int) -> None:
        _begin[(1,)](self.shared.counts[which:], self.shared.flags_there[READY + which * FLAGS :], num_warps=1)

    def await_(self, word: int, which: int = 0) -> None:
        _await[(1,)](self.shared.counts[which:], self.shared.flags[word + which * FLAGS :], num_warps=1)

    def finish(self, first: int, rows: int, programs: int, flag: int = 0, chunk: int = 1 << 20, wait: bool = True,
               which: int = 0, each: int = 1) -> None:  # fmt: skip
        flags = self.shared.flags[which * FLAGS + flag :]
        _finish[(programs or rows,)](
            self.own, self.slot, self.residual, self.weight, self.y, self.h, flags, self.shared.counts[which:], EPS,
            first, rows, H=self.hidden, CHUNK=chunk, EACH=each, WAIT=wait, num_warps=max(self.hidden // 512, 4),
        )  # fmt: skip
        self.out = self.y, self.h

    def send(self, first: int, stop: int, flag: int) -> None:
        self.there[first:stop].copy_(self.own[first:stop])
        self.shared.flags_there[flag : flag + 1].copy_(self.shared.counts[:1])

    def chunks(self, count: int) -> list[tuple[int, int]]:
        each = self.rows // count
        return [(i * each, (i + 1) * each) for i in range(count)]

    def forked(self) -> None:
        """The stream of copies begins once the peer's slot is free."""
        self.begin(0)
        self.shared.copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.shared.copies):
            self.await_(READY)

    def multiplied_and_sent(self, count: int, after: Callable[[int], Any]) -> None:
        for i, (first, stop) in enumerate(self.chunks(count)):
            self.multiply(first, stop)
            self.shared.copies.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.shared.copies):
                self.send(first, stop, i)
            after(i)

    def joined(self, *streams: torch.cuda.Stream) -> None:
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)

    # The ways.

    def one_after_the_other(self) -> None:
        self.multiply(0, self.rows)
        self.boundary()

    def local_part(self) -> None:
        self.finish(0, self.rows, 0, wait=False)

    def copy(self) -> None:
        self.there.copy_(self.own)

    def in_line(self, count: int, late: int) -> None:
        pieces = self.chunks(count)

        def finish(i: int) -> None:
            if 0 <= i < count:
                self.finish(pieces[i][0], pieces[i][1] - pieces[i][0], 0, flag=i)

        self.forked()
        self.multiplied_and_sent(count, lambda i: finish(i - late))
        for i in range(count - late, count):
            finish(i)
        self.joined(self.shared.copies)

    def beside(self, count: int) -> None:
        pieces = self.chunks(count)

        def finish(i: int) -> None:
            self.shared.norms.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.shared.norms):
                self.await_(i)
                self.finish(pieces[i][0], pieces[i][1] - pieces[i][0], 0, wait=False)

        self.forked()
        self.multiplied_and_sent(count, finish)
        self.joined(self.shared.copies, self.shared.norms)

    def waiting(self, count: int, programs: int) -> None:
        self.forked()
        self.shared.norms.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.shared.norms):
            self.finish(0, self.rows, programs, chunk=self.rows // count)
        self.multiplied_and_sent(count, lambda i: None)
        self.joined(self.shared.copies, self.shared.norms)

    def pushed(self, programs: int) -> None:
        bm, bn, bk = TILE
        self.begin(1)
        self.await_(READY, 1)

        def finish(how_many: int) -> None:
            self.finish(0, self.rows, how_many, chunk=bm, which=1, each=self.hidden // bn)

        if programs:
            self.shared.norms.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.shared.norms):
                finish(programs)
        a, b = TensorDescriptor.from_tensor(self.a, [bm, bk]), TensorDescriptor.from_tensor(self.w, [bn, bk])
        _product_and_push[(self.programs - programs,)](
            a, b, self.own, self.there, self.shared.flags_there[FLAGS:], self.rows, self.hidden, self.a.shape[1],
            BM=bm, BN=bn, BK=bk, num_warps=8, num_stages=3,
        )  # fmt: skip
        if programs:
            self.joined(self.shared.norms)
        else:
            finish(0)

    def async_tp(self) -> None:
        group, world = dist.group.WORLD.group_name, dist.get_world_size()
        own = torch.ops.symm_mem.fused_matmul_reduce_scatter(self.a, self.w.t(), "sum", 0, group)
        each = self.rows // world
        first = dist.get_rank() * each
        h = own + self.residual[first : first + each]
        part = torch.nn.functional.rms_norm(h, (self.hidden,), self.weight, EPS)
        dist.all_gather_into_tensor(self.y, part)
        self.out = self.y, None


def ways_of(layer: Layer) -> dict[str, Callable[[], Any]]:
    ways: dict[str, Callable[[], Any]] = {
        "product": lambda: layer.multiply(0, layer.rows),
        "boundary": layer.boundary,
        "copy": layer.copy,
        "local part": layer.local_part,
        "one after the other": layer.one_after_the_other,
    }
    for count, late in ((2, 1), (4, 1), (4, 2), (8, 1), (8, 2), (8, 3)):
        ways[f"in line {count}/{late}"] = lambda count=count, late=late: layer.in_line(count, late)
    for count in (2, 4, 8):
        ways[f"beside {count}"] = lambda count=count: layer.beside(count)
    for count, programs in ((4, 16), (8, 16), (8, 32)):
        ways[f"waiting {count}, {programs}"] = lambda c=count, p=programs: layer.waiting(c, p)
    for programs in (0, 12, 24):
        ways[f"pushed {programs}"] = lambda programs=programs: layer.pushed(programs)
    ways["async TP"] = layer.async_tp
    return ways


def layers_of(rows: list[int], models: list[str]) -> Callable[..., Layer]:
    shared: list[Shared] = []

    def make(count: int, k: int, hidden: int, device: torch.device) -> Layer:
        if not shared:
            shared.append(Shared(max(rows) * max(MODELS[name][0] for name in models), device))
        return Layer(shared[0], count, k, hidden, device)

    return make


def _show(records: list[Record]) -> None:
    first = records[0]
    cells = [f"{r.provider} {r.us or r.note}{'' if r.same in (True, None) else ' RANKS DIFFER'}" for r in records]
    print(f"{first.model} {first.product} {first.rows}:", *cells, sep="  ", flush=True)


if __name__ == "__main__":
    given = parsed(__doc__, ["8b"], [4096, 8192])
    run(given, layers_of(given.rows, given.models), ways_of, _show)
