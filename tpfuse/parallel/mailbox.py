"""Small numbers from each rank of a group to all of them, from host to host: no collective, no wait for a device.

Everybody writes what it gives, with the count of the exchange, under a key of its own, and reads the others' keys
until they hold that count. Two keys a rank are used in turn. That is safe: a rank writes count c + 2 over count c only
after it has read everybody's c + 1, and each of them wrote that after it had read every c. The store is the one over
which the ranks met, and is asked again and again: a store that waits answers no other thread.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

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
        keys = [_key(self.name, self.count % 2, index) for index in range(self.size)]
        store.set(keys[self.index], json.dumps([self.count, own]))
        limit = store.timeout.total_seconds()
        asked, ends = 0, time.monotonic() + limit
        while True:
            posts = self._posts(store, keys)
            missing = [at for at, (count, _) in enumerate(posts) if count != self.count]
            if not missing:
                return [given for _, given in posts]
            if time.monotonic() > ends:
                raise PeerTimeoutError(
                    f"the dp replicas {missing} did not come to compare their rows within {limit:g} s", seconds=limit
                )
            asked += 1
            time.sleep(0 if asked < _AT_ONCE else _PAUSE)

    def _posts(self, store: Any, keys: list[str]) -> list[tuple[int, list[int]]]:
        """[count, what was given] of each rank; count 0 of one that never wrote under its key."""
        if self.count > 2 or store.check(keys):  # from then on every key is there, and one question is enough
            found = store.multi_get(keys) if store.has_extended_api() else [store.get(key) for key in keys]
            return [json.loads(text) for text in found]
        return [json.loads(store.get(key)) if store.check([key]) else (0, []) for key in keys]


def _key(name: str, turn: int, index: int) -> str:
    return f"tpfuse/{name}/{turn}/{index}"
