"""The stream of copies and its events, recorded again by each call: what stands behind what, on streams that only note
what they are told. As CUDA has it, who is told to wait for an event waits for what it was when it was told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tpfuse.kernels.symmetric import copies

DEVICE = torch.device("cuda", 0)


class Stream:
    """`done`: for each step, all steps of any stream that are over when it begins."""

    def __init__(self, *_: Any) -> None:
        self.before: set[str] = set()
        self.done: dict[str, set[str]] = {}

    def step(self, name: str) -> None:
        assert name not in self.done
        self.done[name] = set(self.before)
        self.before.add(name)

    def wait_event(self, event: Event) -> None:
        self.before |= event.seen

    def wait_stream(self, other: Stream) -> None:
        self.before |= other.before


class Event:
    def __init__(self) -> None:
        self.seen: set[str] = set()

    def record(self, stream: Stream) -> None:
        self.seen = set(stream.before)


@pytest.fixture
def gpu(monkeypatch) -> SimpleNamespace:
    gpu = SimpleNamespace(now=Stream(), ws="a workspace")
    monkeypatch.setattr(copies, "_LANES", {})
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.now)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(gpu, "now", stream))
    gpu.main = gpu.now
    return gpu


def call(gpu: SimpleNamespace, number: int, chunks: int, fails_at: int = -1) -> None:
    """The steps of a call as `Copies` makes them."""
    with copies._Beside(gpu.ws, DEVICE) as beside:
        for chunk in range(chunks):
            gpu.now.step(f"multiplied {number} {chunk}")
            beside.follow()
            with beside.sending(chunk):
                assert gpu.now is not gpu.main
                gpu.now.step(f"sent {number} {chunk}")
                if chunk == fails_at:
                    raise ZeroDivisionError
        for chunk in range(chunks):
            beside.behind(chunk)
            gpu.now.step(f"finished {number} {chunk}")


def test_a_chunk_is_sent_behind_its_product_and_finished_behind_its_own_send(gpu: SimpleNamespace) -> None:
    for number, chunks in enumerate((3, 1, 3, 2)):
        call(gpu, number, chunks)
        lane = copies._LANES[gpu.ws].stream
        for chunk in range(chunks):
            assert f"multiplied {number} {chunk}" in lane.done[f"sent {number} {chunk}"]
            finished = gpu.main.done[f"finished {number} {chunk}"]
            assert f"sent {number} {chunk}" in finished
            later = f"sent {number} {chunk + 1}"
            assert later not in finished, "it would wait for more than its own chunk"
    assert len(copies._LANES) == 1 and len(copies._LANES[gpu.ws].sent) == 3  # one event a chunk, kept


def test_a_call_that_raises_while_it_sends_leaves_the_callers_stream_in_use_and_behind_its_copies(gpu) -> None:
    call(gpu, 0, 2)
    with pytest.raises(ZeroDivisionError):
        call(gpu, 1, 3, fails_at=1)
    assert gpu.now is gpu.main
    gpu.now.step("next")
    assert {"sent 1 0", "sent 1 1"} <= gpu.main.done["next"]
    call(gpu, 2, 3)
    assert all(f"sent 2 {chunk}" in gpu.main.done[f"finished 2 {chunk}"] for chunk in range(3))
