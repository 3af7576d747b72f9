"""Numbers exchanged from host to host: every rank gets what every other gave in the same exchange, however far apart
they run."""

from __future__ import annotations

import random
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from tpfuse.errors import PeerTimeoutError
from tpfuse.parallel import mailbox
from tpfuse.parallel.mailbox import Mailbox


@pytest.fixture(params=["extended", "plain"])
def store(request, monkeypatch, tmp_path):
    """A store that answers several keys at once, and one that does not."""
    made = dist.HashStore() if request.param == "extended" else dist.FileStore(str(tmp_path / "store"))
    made.set_timeout(timedelta(seconds=5))
    assert made.has_extended_api() == (request.param == "extended")
    monkeypatch.setattr(mailbox, "default_store", lambda: made)
    return made


def exchanged(size: int, times: int) -> list[list[list[list[int]]]]:
    """What each rank got each time; rank r gives [r, time], and sleeps a random while before."""
    got: list[list[list[list[int]]]] = [[] for _ in range(size)]

    def run(rank: int) -> None:
        box, pause = Mailbox("rows/1", rank, size), random.Random(rank)
        for at in range(times):
            time.sleep(pause.choice([0, 0, 0.001, 0.003]))
            got[rank].append(box.exchange([rank, at]))

    ranks = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    return got


@pytest.mark.usefixtures("store")
def test_every_rank_gets_what_all_gave_in_the_same_exchange():
    want = [[[rank, at] for rank in range(3)] for at in range(40)]
    assert exchanged(size=3, times=40) == [want] * 3


def test_one_key_for_both_turns_would_mix_exchanges(store, monkeypatch):
    """The negative control: without the second key a fast rank writes over what a slow one has not read."""
    store.set_timeout(timedelta(seconds=0.5))
    monkeypatch.setattr(mailbox, "_key", lambda name, turn, index: f"{name}/{index}")
    want = [[[rank, at] for rank in range(3)] for at in range(400)]
    monkeypatch.setattr(threading, "excepthook", lambda raised: None)
    assert exchanged(size=3, times=400) != [want] * 3


def test_a_rank_that_does_not_come_is_named(store):
    store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(PeerTimeoutError, match=r"\[1, 2\] did not come"):
        Mailbox("rows/1", 0, 3).exchange([7])
