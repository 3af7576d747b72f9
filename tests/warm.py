"""Imported where ranks are forked from: what Dynamo and AOTAutograd set up at their first compilation is done once.

Nothing here leaves a report, a process group, a thread or a compiled graph behind; there is no backward pass, since the
threads of autograd do not survive a fork.
"""

import gc

import torch
import torch._dynamo
from torch import nn


def compile_something() -> None:
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4), nn.SiLU()).eval()
    with torch.no_grad():
        for dynamic in (False, True):
            compiled = torch.compile(lambda x: model(x) + x.sin(), backend="aot_eager", dynamic=dynamic)
            compiled(torch.ones(3, 4))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


compile_something()
# What was imported is not looked at by collections in the ranks, nor copied because of them.
gc.collect()
gc.freeze()
