"""The lines of docs/operations.md, on real ranks: one fails, all meet again and go on with right numbers."""

from __future__ import annotations

import datetime
import os
import queue
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tpfuse

from .models import HIDDEN, Stack
from .ranks import rank_context

LIMIT = 3.0
FAULT_AT, BATCHES = 2, 5


def lines_of_the_page() -> dict:
    page = Path(__file__).parents[1] / "docs/operations.md"
    [code] = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(compile(code, "docs/operations.md", "exec"), names)
    return names


def worker(rank: int, folder: str, fault: str, attempt: int, results) -> None:
    torch.set_num_threads(1)
    first, seen = attempt, []
    torch.manual_seed(0)
    stack = Stack(2, layers=2).eval()
    compiled = torch.compile(
        stack, backend="tpfuse", options={"inner": "aot_eager", "peer_timeout": LIMIT}, dynamic=False
    )
    batches = [torch.full((3, HIDDEN), 1.0 + n) for n in range(BATCHES)]
    answers: list = []

    def meet(attempt: int) -> None:
        seen.append(attempt)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store{attempt}", rank=rank, world_size=2,
            timeout=datetime.timedelta(seconds=60),
        )  # fmt: skip

    def model(batch):
        if (rank, len(answers), len(seen) - 1 + first) == (1, FAULT_AT, 0):
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            if fault == "skipped":
                answers.append(torch.zeros(()))  # and nothing is sent
                time.sleep(2 * LIMIT)
        try:
            return compiled(batch)
        except tpfuse.PeerTimeoutError as error:
            errors.append((error.rank, error.group, error.missing))
            with pytest.raises(tpfuse.PeerTimeoutError):  # again, whatever gloo says
                compiled(batch)
            raise

    errors: list = []
    with torch.no_grad():
        lines_of_the_page()["serve"](model, batches, answers, meet, attempt)
        wanted = [stack(batch) for batch in batches]
    right = [bool(torch.allclose(*pair, atol=1e-5)) for pair in zip(answers, wanted, strict=True)]
    results.put((rank, right, seen, errors))
    results.close()
    results.join_thread()
    os._exit(0)


@pytest.mark.parametrize(
    "fault",
    ["killed", pytest.param("stopped", marks=pytest.mark.nightly), pytest.param("skipped", marks=pytest.mark.nightly)],
)
def test_ranks_meet_again_after_a_fault_and_go_on(fault: str, tmp_path) -> None:
    context = rank_context()
    results = context.Queue()

    def start(rank: int, attempt: int):
        process = context.Process(target=worker, args=(rank, str(tmp_path), fault, attempt, results), daemon=True)
        process.start()
        return process

    processes = [start(rank, 0) for rank in range(2)]
    ended, deadline, continued = {}, time.monotonic() + 120, False
    try:
        while len(ended) < 2 and time.monotonic() < deadline:
            try:
                rank, *said = results.get(timeout=0.1)
                ended[rank] = said
            except queue.Empty:
                if processes[1].exitcode == -signal.SIGKILL:
                    processes[1] = start(1, 1)  # as a supervisor does
                state = Path(f"/proc/{processes[1].pid}/stat")
                if fault == "stopped" and not continued and ") T " in state.read_text():
                    time.sleep(2 * LIMIT)
                    os.kill(processes[1].pid, signal.SIGCONT)
                    continued = True
    finally:
        for process in processes:
            process.kill()
    assert set(ended) == {0, 1}, "a rank hangs"
    for rank, (right, seen, errors) in ended.items():
        assert right == [True] * BATCHES, (rank, right)
        assert seen[-1] == 1
        assert errors == ([] if (rank, fault) == (1, "killed") else [(rank, (0, 1), (1 - rank,))])
