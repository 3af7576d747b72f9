"""All that a process remembers between calls: every mutable object of the product, each with its owner and its lock.

The owner is the one module that writes to an item; others ask it. `LOCK` is held while an item is changed, never while
anything waits for another rank, a device or a compiler. Looking one entry up needs no lock. Items that hang on a
process group, a module or a class hold it weakly, and an entry goes with it. Nothing else in the packages is changed
once it is imported (`tests/test_remembered.py` looks), but for caches of pure functions and what torch itself keeps for
us: operators, and the functions of torch that `_torch_private` wraps once.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

if TYPE_CHECKING:
    import ast

    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from .declared import Declaration
    from .errors import PeerTimeoutError, PlanMismatchError
    from .integrations.transformers import Running
    from .parallel.changes import Part
    from .parallel.owners import Owned
    from .parallel.rows_check import RowsCheck
    from .report import Report
    from .runtime.ballots import Ledger
    from .runtime.heartbeat import Pulse
    from .runtime.limits import Limit

LOCK = threading.RLock()

#: The reports of every graph this process compiled, oldest first; only appended to.
#: Owner: tpfuse.report. Lock: LOCK.
REPORTS: list[Report] = []

#: What this process declared as all-reduces, by the operator's name; only added to.
#: Owner: tpfuse.declared. Lock: LOCK.
DECLARED: dict[str, Declaration] = {}

#: What an eager call is told -> the text of its spec.
#: Owner: tpfuse.lean. Lock: LOCK.
SPEC_TEXTS: dict[tuple, str] = {}

#: What our own operators gave for fake values before, by fake mode and by what tells calls apart.
#: Owner: tpfuse.passes.facts.fakes. Lock: LOCK.
FAKE_RESULTS: WeakKeyDictionary[Any, dict[tuple, list[torch.Tensor]]] = WeakKeyDictionary()

#: transformers' own attention functions, by name; filled once.
#: Owner: tpfuse.integrations.transformers. Lock: LOCK.
ATTENTIONS: dict[str, Callable[..., Any]] = {}

#: The step of continuous batching that runs; one at a time.
#: Owner: tpfuse.integrations.transformers. Lock: LOCK.
BATCH_STEPS: list[Running] = []

# -- around compiled graphs -------------------------------------------------------------------------------------------

#: The ledger of each world this process is part of, by its default group.
#: Owner: tpfuse.runtime.ballots. Lock: LOCK.
LEDGERS: WeakKeyDictionary[dist.ProcessGroup, Ledger] = WeakKeyDictionary()

#: The pulse of each world that has graphs with a `peer_timeout`.
#: Owner: tpfuse.runtime.heartbeat. Lock: LOCK.
PULSES: WeakKeyDictionary[dist.ProcessGroup, Pulse] = WeakKeyDictionary()

#: Groups that had a `peer_timeout` set, and the time they wait otherwise.
#: Owner: tpfuse.runtime.limits. Lock: LOCK.
LIMITS: WeakKeyDictionary[dist.ProcessGroup, Limit] = WeakKeyDictionary()

#: Groups over which a call failed, and how.
#: Owner: tpfuse.runtime.failures. Lock: LOCK.
FAILED: WeakKeyDictionary[dist.ProcessGroup, PeerTimeoutError | PlanMismatchError] = WeakKeyDictionary()


@dataclass
class Breaks:
    """named: how many of the process's graph breaks some report has named; Dynamo's list of them only grows."""

    named: int = 0


#: Owner: tpfuse.runtime.endings. Lock: LOCK.
BREAKS = Breaks()

#: By Dynamo's number of a piece of code and where it reads a float that a module holds: the value that was compiled in.
#: Owner: tpfuse.runtime.held_numbers. Lock: LOCK.
HELD_NUMBERS: dict[tuple[int, str], float] = {}

#: By compilation, the symbols that Dynamo was told to trace as constants; until it is over.
#: Owner: tpfuse.runtime.held_numbers. Lock: LOCK.
MADE_CONSTANT: dict[tuple[int | None, int], list[str]] = {}

# -- cut models -------------------------------------------------------------------------------------------------------

#: By module, the parameters and buffers that it owns by name.
#: Owner: tpfuse.parallel.owners. Lock: LOCK.
OWNERS: WeakKeyDictionary[nn.Module, dict[str, Owned]] = WeakKeyDictionary()

#: The modules of parallelized models.
#: Owner: tpfuse.parallel.changes. Lock: LOCK.
PARTS: WeakKeyDictionary[nn.Module, Part] = WeakKeyDictionary()


@dataclass
class Watching:
    """on: whether torch tells `changes` of every module that is set; once a process."""

    on: bool = False


#: Owner: tpfuse.parallel.changes. Lock: LOCK.
WATCHING = Watching()

#: Of each parallelized model, the kinds of calls (training, with gradients) that were looked at.
#: Owner: tpfuse.parallel.reads. Lock: LOCK.
LOOKED_AT: WeakKeyDictionary[nn.Module, frozenset[tuple[bool, bool]]] = WeakKeyDictionary()


class CutModels:
    """count: how many models were cut in this process; seen_by: how many there were when an optimizer was last looked
    at; steps: how many it has made since there was one."""

    def __init__(self) -> None:
        self.count = 0
        self.seen_by: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self.steps: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


#: Owner: tpfuse.parallel.earlier_state. Lock: LOCK.
CUT_MODELS = CutModels()

#: Meshes of one dimension, by their process group and their kind of device.
#: Owner: tpfuse.parallel.cut_tensor. Lock: LOCK.
MESHES: WeakKeyDictionary[dist.ProcessGroup, dict[str, DeviceMesh]] = WeakKeyDictionary()


class RowsChecks:
    """The checks of all models by the number that graphs know them by; an entry goes with its check, and no number
    comes twice: a graph that outlived its model finds nothing."""

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.by_key: WeakValueDictionary[int, RowsCheck] = WeakValueDictionary()

    def add(self, check: RowsCheck) -> int:
        with LOCK:
            key = next(self.numbers)
            self.by_key[key] = check
        return key


#: Owner: tpfuse.parallel.rows_check. Lock: LOCK.
ROWS_CHECKS = RowsChecks()


class Announced(threading.local):
    """The rows that the innermost `tpfuse.rows` announces."""

    # threading.local, not a ContextVar: Dynamo reads and guards it, and ranks that run as threads get one each. The
    # default belongs to the object, once a thread: torch 2.11 would read one of the class and never look again.
    def __init__(self) -> None:
        self.counts: tuple[int, ...] | None = None


#: Owner: tpfuse.parallel.rows. Lock: none, each thread has its own.
ANNOUNCED = Announced()

#: One thread parses at a time: CPython before 3.11.8 corrupts the recursion count of `ast.parse` when threads (ranks,
#: in tests) parse at once. Taken alone, never inside `LOCK`.
#: Owner: tpfuse.parallel.calls.
PARSING = threading.Lock()

#: The parsed methods of each class that was asked about; every layer of a model asks about the same few classes.
#: Owner: tpfuse.parallel.calls. Lock: PARSING.
METHODS: WeakKeyDictionary[type, list[ast.FunctionDef]] = WeakKeyDictionary()
