"""Hugging Face's continuous batching with `tp_plan="auto"`: tokens a second as shipped, under Inductor and tpfuse.

    torchrun --nproc-per-node N benchmarks/continuous_batching.py --out results.json
    ... --sequences 8 --ways plain tpfuse               a slice of it
    ... --cuda-graphs                                   with continuous batching's own CUDA graphs, in every way
    torchrun --nproc-per-node 2 benchmarks/continuous_batching.py --tiny           on CPUs: a rehearsal

The model has Llama-3-8B's sizes, fewer layers, random weights; prompts have different lengths. Each way has a model of
its own and keeps its manager (`persistent_manager`), as a server does, so that it compiles once.

    plain                        generate_batch as shipped, nothing compiled
    inductor, whole attention    compiled by Inductor; paged attention is one operator: keep_paged_attention_whole()
    tpfuse                       the same compiled by tpfuse
    inductor                     compiled by Inductor as transformers hands it over: 5.17 traces sdpa with its cache, in
                                 5.23 the graph breaks in every attention
    tpfuse, no integration       the same compiled by tpfuse; only where it is named

A round runs `generate_batch` once in every way. The first three take turns. The others, for which transformers' own
attention functions are put back, take turns with plain afterwards; their notes say how fast plain was then. Time is the
slowest rank's. The same for every way: attention is sdpa (what needs no other package), no CUDA graphs and no
asynchronous steps unless named (transformers' choice for sdpa), one size of the cache, no shared prefixes. Steps that
are compiled or captured are padded by transformers, to multiples of 8 queries and of 1024 keys; plain ones are not.
Memory stays with the process between two calls, where generate_batch would give it back to CUDA.

A way that raises is a record with a note, and the others go on. One that does not end within --limit seconds ends the
run, since its ranks may wait for each other: what was measured is written, with notes.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import random
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from generation import loaded_models, rates_of
from machine import cpu_machine, join_ranks, machine
from records import write_run

import tpfuse
from tpfuse.backend import tpfuse as tpfuse_backend
from tpfuse.integrations.transformers import keep_paged_attention_whole


@dataclass(frozen=True)
class Way:
    """backend: None where nothing is compiled."""

    backend: Any = None
    fullgraph: bool = False


WAYS = {
    "plain": Way(),
    "inductor, whole attention": Way("inductor", fullgraph=True),
    "tpfuse": Way(tpfuse_backend, fullgraph=True),
    "inductor": Way("inductor"),
    "tpfuse, no integration": Way(tpfuse_backend),
}
#: Those that take turns, with the integration; and afterwards without.
WHOLE = ("plain", "inductor, whole attention", "tpfuse")
SHIPPED = ("plain", "inductor", "tpfuse, no integration")


@dataclass(frozen=True)
class Record:
    """tokens_per_s: new tokens of all sequences over the seconds between the first and the last of them; spread:
    between the quartiles. What lies before and behind is the start and the end of transformers' thread, which waits for
    requests a tenth of a second at a time: call_tokens_per_s is that of the whole call.

    same_tokens: the share of new tokens that are plain's (sums in bfloat16 may round otherwise, and tokens part there).
    fused: boundaries fused in the graph of a step. note: why numbers are missing, or what else is to be known.
    """

    world: int
    sequences: int
    prompt: str
    tokens: int
    layers: int
    cuda_graphs: bool
    provider: str
    tokens_per_s: float | None = None
    spread: float | None = None
    call_tokens_per_s: float | None = None
    same_tokens: float | None = None
    fused: int | None = None
    note: str = ""


class Batches:
    """Prompts, and `generate_batch` of them."""

    def __init__(self, arguments: argparse.Namespace, vocabulary: int) -> None:
        self.tokens, self.graphs, self.most = arguments.tokens, arguments.cuda_graphs, max(arguments.sequences)
        self.lengths, self.rows = ((4, 16), 32) if arguments.tiny else ((16, 128), 512)
        chance = random.Random(1)
        # The first is long: with fewer queries than requests, the two sizes of the first batch would be held to be one.
        lengths = [self.lengths[1], *(chance.randint(*self.lengths) for _ in range(self.most - 1))]
        self.prompts = [[chance.randrange(3, vocabulary) for _ in range(length)] for length in lengths]

    def config(self, way: Way) -> Any:
        from transformers import CompileConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        page = 16
        pages = self.most * (-(-(self.lengths[1] + self.tokens) // page) + 1)
        sizes: dict[str, Any] = {
            "num_blocks": pages * 3 // 2,  # transformers holds new requests back when few are left
            "max_batch_tokens": self.rows, "max_requests_per_batch": self.most, "allow_block_sharing": False,
            "use_cuda_graph": self.graphs, "use_async_batching": False, "q_padding_interval_size": 8,
            # With CUDA graphs the whole cache is read in every step: there is one graph for each number of queries.
            "kv_padding_interval_size": pages * page * 3 // 2 if self.graphs else self.rows * 2,
        }  # fmt: skip
        known = {field.name for field in fields(ContinuousBatchingConfig)}
        sizes["page_size" if "page_size" in known else "block_size"] = page
        if "auto_switch_to_flash" in known:
            sizes["auto_switch_to_flash"] = False
        if way.backend is not None:
            # "default": torch.compile's own CUDA graphs belong to a thread, and continuous batching has its own.
            sizes["varlen_compile_config"] = CompileConfig(
                backend=way.backend, mode="default", fullgraph=way.fullgraph, dynamic=True
            )
        return ContinuousBatchingConfig(**sizes)

    def run(self, model: Any, way: Way, sequences: int) -> tuple[float, float, list[list[int]]]:
        """(seconds of the call, seconds between the first and the last new token, new tokens)."""
        from transformers import GenerationConfig

        ends_never = GenerationConfig(max_new_tokens=self.tokens, do_sample=False, eos_token_id=-1)
        dist.barrier()
        began = time.perf_counter()
        with patch.object(torch.cuda, "empty_cache", lambda: None):
            answers = model.generate_batch(
                self.prompts[:sequences], generation_config=ends_never, continuous_batching_config=self.config(way),
                max_new_tokens=self.tokens, record_timestamps=True, persistent_manager=True,
                warmup=False,  # it runs the largest size, whose mask is contiguous: that would be a graph of its own
            ).values()  # fmt: skip
        seconds = time.perf_counter() - began
        # transformers logs what goes wrong in its thread, and returns what there is.
        errors = [answer.error for answer in answers if answer.error]
        new = [list(answer.generated_tokens) for answer in answers]
        if errors or [len(each) for each in new] != [self.tokens] * sequences:
            raise RuntimeError(errors[0] if errors else f"{sum(map(len, new))} tokens came back for {len(new)} prompts")
        stamps = [stamp for answer in answers for stamp in answer.timestamps]
        return seconds, max(stamps) - min(stamps), new


class Measured:
    """Ways that take turns, until one fails: then it is left out, on every rank, with a note."""

    def __init__(self, models: dict[str, Any], batches: Batches, log: Log) -> None:
        self.models, self.batches, self.log = models, batches, log
        self.notes: dict[str, str] = {}
        self.fused: dict[str, int] = {}
        self.tokens: dict[tuple[str, int], list[list[int]]] = {}
        self.last: dict[tuple[str, int], float] = {}  # seconds between tokens in the last call, this rank's

    def call(self, name: str, sequences: int) -> tuple[float, float] | None:
        """(seconds of the call, seconds between tokens), or None where it failed on any rank."""
        if name in self.notes:
            return None
        failed, times = "", (0.0, 0.0)
        try:
            *got, self.tokens[name, sequences] = self.batches.run(self.models[name], WAYS[name], sequences)
            times = got[0], got[1]
            self.last[name, sequences] = got[1]
        except Exception as error:
            traceback.print_exc()
            failed = f"{type(error).__name__}: {error}"[:500]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, failed)
        if any(everyone):
            self.notes[name] = next(each for each in everyone if each)
            self.log(f"{name}: failed: {self.notes[name]}")
            return None
        return times

    def warm_up(self, names: Sequence[str], limit: float) -> None:
        for name in names:
            if name in self.fused:
                continue
            before = len(tpfuse.reports())
            # Two sequences first: a batch as large as the mask's buffer would be a graph of its own.
            few = min(2, *self.log.sequences)
            with self.limit(name, limit):
                for sequences in (few, *self.log.sequences):
                    for _ in range(2):
                        if times := self.call(name, sequences):
                            self.log(f"{name}: {sequences} sequences in {times[0]:.1f} s")
            self.fused[name] = max((report.fused_forward for report in tpfuse.reports()[before:]), default=0)
            self.log(f"{name}: warm, {len(tpfuse.reports()) - before} graphs by tpfuse, {self.fused[name]} fused")

    def rounds(self, names: Sequence[str], sequences: int, rounds: int, limit: float) -> dict[str, dict[str, Any]]:
        """What is measured of each way."""
        whole: dict[str, list[float]] = {name: [] for name in names}
        steps: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                with self.limit(name, limit):
                    times = self.call(name, sequences)
                if times:
                    whole[name].append(times[0])
                    steps[name].append(times[1])
        there = [name for name in names if name not in self.notes]
        tokens = sequences * self.batches.tokens
        calls = rates_of({name: whole[name] for name in there}, tokens)
        rates = rates_of({name: steps[name] for name in there}, tokens)
        out: dict[str, dict[str, Any]] = {name: {"note": self.notes[name]} for name in names if name in self.notes}
        for name in there:
            out[name] = {
                "tokens_per_s": rates[name][0], "spread": rates[name][1], "call_tokens_per_s": calls[name][0],
                "same_tokens": self._same(name, sequences), "fused": self.fused[name],
            }  # fmt: skip
        return out

    @contextmanager
    def limit(self, name: str, seconds: float) -> Iterator[None]:
        """The process ends where what is inside does not: a rank that waits in a collective hears nothing else. What
        else was called by then has a record of its last call."""

        def end() -> None:
            note = f"{name} did not end within {seconds:.0f} s"
            there = {(record.provider, record.sequences) for record in self.log.records}
            for (other, sequences), last in self.last.items():
                if sequences in self.log.sequences and (other, sequences) not in there and other != name:
                    rate = round(sequences * self.batches.tokens / last, 1)
                    self.log.add(sequences, other, tokens_per_s=rate, note=f"one call on one rank: {note}")
            for sequences in self.log.sequences:
                self.log.add(sequences, name, note=note)
            if self.log.rank:
                time.sleep(5)  # torchrun ends all ranks when one has ended, and the first still writes
            os._exit(1)

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _same(self, name: str, sequences: int) -> float | None:
        if ("plain", sequences) not in self.tokens:
            return None
        pairs = zip(self.tokens[name, sequences], self.tokens["plain", sequences], strict=True)
        same = [a == b for one, other in pairs for a, b in zip(one, other, strict=True)]
        return round(sum(same) / len(same), 4)


class Log:
    """Prints and writes what was measured so far, also when a way does not end."""

    def __init__(self, arguments: argparse.Namespace, rank: int, cuda: bool) -> None:
        self.arguments, self.rank, self.cuda = arguments, rank, cuda
        self.sequences, self.began = sorted(arguments.sequences), time.perf_counter()
        self.records: list[Record] = []

    def __call__(self, text: str) -> None:
        if self.rank == 0:
            print(f"[{time.perf_counter() - self.began:5.0f} s] {text}", flush=True)

    def add(self, sequences: int, name: str, **measured: Any) -> None:
        a = self.arguments
        prompt = "4 to 16" if a.tiny else "16 to 128"
        record = Record(dist.get_world_size(), sequences, prompt, a.tokens, a.layers, a.cuda_graphs, name, **measured)
        self.records.append(record)
        shown = {key: value for key, value in asdict(record).items() if key in measured}
        self(f"{sequences} sequences: {name}: " + ", ".join(f"{key} {value}" for key, value in shown.items()))
        self.write()

    def write(self) -> None:
        if self.rank == 0 and self.arguments.out:
            import transformers

            setting = f"Hugging Face continuous batching (transformers {transformers.__version__}), tp_plan=auto, sdpa"
            setting = f"linked GPUs, one process each; {setting}" if self.cuda else f"CPUs; {setting}"
            described = machine(setting) if self.cuda else cpu_machine() | {"setting": setting}
            write_run(self.arguments.out, described, self.records)


@contextmanager
def attention_as_shipped(shipped: dict[str, Any]) -> Iterator[None]:
    """keep_paged_attention_whole() is for good; what it put in the place of transformers' functions is taken out."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    ours = {name: functions[name] for name in shipped}
    for name, function in shipped.items():
        functions.register(name, function)
    try:
        yield
    finally:
        for name, function in ours.items():
            functions.register(name, function)


def measure(arguments: argparse.Namespace, log: Log, device: torch.device) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    models = loaded_models(arguments.ways, arguments.layers, arguments.tiny, device)
    log(f"{len(models)} models are loaded")
    attention = "paged|sdpa" if "paged|sdpa" in ALL_ATTENTION_FUNCTIONS else "sdpa"
    for model in models.values():
        model.set_attn_implementation(attention)
    shipped = dict(ALL_ATTENTION_FUNCTIONS.items())
    keep_paged_attention_whole()
    batches = Batches(arguments, next(iter(models.values())).config.vocab_size)
    measured = Measured(models, batches, log)

    whole = [name for name in WHOLE if name in arguments.ways]
    measured.warm_up(whole, arguments.limit)
    for sequences in log.sequences:
        for name, values in measured.rounds(whole, sequences, arguments.rounds, arguments.limit).items():
            log.add(sequences, name, **values)
    others = [name for name in SHIPPED if name in arguments.ways]
    if others not in ([], ["plain"]):
        with attention_as_shipped(shipped):
            measured.warm_up(others, arguments.limit)
            for sequences in log.sequences:
                results = measured.rounds(others, sequences, arguments.rounds, arguments.limit)
                plain = results.pop("plain", {}).get("tokens_per_s")
                for name, values in results.items():
                    note = values.get("note") or (f"took turns with plain at {plain} tokens/s" if plain else "")
                    log.add(sequences, name, **values | {"note": note})
    for model in models.values():
        model.destroy_cached_continuous_batching_manager()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS)[:4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=90, help="seconds for a way's first calls, and for a later one")
    parser.add_argument("--cuda-graphs", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="small sizes: a rehearsal")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "0")  # as continuous batching asks, before the group is there
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # it warns of persistent_manager in each call
    rank, device = join_ranks(300)
    measure(arguments, Log(arguments, rank, device.type == "cuda"), device)
    torch.compiler.reset()  # lets go of CUDA graphs: NCCL waits for those that hold its kernels
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
