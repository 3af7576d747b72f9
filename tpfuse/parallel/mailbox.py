"""Small numbers from each rank of a group to all of them, from host to host: no collective, no wait for a device.

Everybody posts under a name and a count, and reads what the others posted; a post is taken away once everybody has
read it. They go through the store over which the ranks met, which is looked at again and again: a store that waits
answers no other thread.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import torch.distributed as dist

from tpfuse._torch_private import default_store
from tpfuse.errors import PeerTimeoutError

#: How often the store is asked without a pause, as peers are mostly as far.
_AT_ONCE = 200
_PAUSE = 0.0005


@dataclass
class Mailbox:
    """`name`: the same on all ranks of the group, and of no other mailbox. `index`: this rank's place among `size`."""

    name: str
    index: int
    size: int
    count: int = 0

    def exchange(self, own: list[int]) -> list[list[int]]:
        """What every rank gave, in their order. All ranks call it as often.

        Raises:
            PeerTimeoutError: a rank did not come within the store's timeout.
        """
        store, self.count = default_store(), self.count + 1
        store.set(self._key(self.index, self.count), json.dumps(own))
        others = [self._key(at, self.count) for at in range(self.size)]
        self._wait(store, others)
        said = [json.loads(store.get(key)) for key in others]
        # Whoever posts this time has read what was posted the last time.
        store.delete_key(self._key(self.index, self.count - 1))
        return said

    def _key(self, index: int, count: int) -> str:
        return f"tpfuse/{self.name}/{count}/{index}"

    def _wait(self, store: dist.Store, keys: list[str]) -> None:
        limit = store.timeout.total_seconds()
        asked, ends = 0, time.monotonic() + limit
        while not store.check(keys):
            asked += 1
            if time.monotonic() > ends:
                missing = [at for at, key in enumerate(keys) if not store.check([key])]
                raise PeerTimeoutError(
                    f"the dp replicas {missing} did not come to compare their rows within {limit:g} s", seconds=limit
                )
            time.sleep(0 if asked < _AT_ONCE else _PAUSE)
