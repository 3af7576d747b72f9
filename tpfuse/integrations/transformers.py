"""Hugging Face's continuous batching with one graph a step.

`generate_batch` and `transformers serve` keep paged attention out of what is compiled, so the graph breaks inside every
attention, and the sum behind it and the norm that reads it fall into different graphs. Here paged attention is one
operator of the graph that the compiler does not look into:

    from tpfuse.integrations.transformers import keep_paged_attention_whole
    keep_paged_attention_whole()
    compiled = CompileConfig(backend="tpfuse", mode="default", fullgraph=True, dynamic=True)
    model.generate_batch(inputs, continuous_batching_config=ContinuousBatchingConfig(
        varlen_compile_config=compiled, decode_compile_config=compiled))

It runs the same function of transformers on the same cache. `mode`: CompileConfig's own choice, "reduce-overhead", asks
for torch.compile's CUDA graphs, which belong to a thread, and continuous batching runs steps in one of its own; it
captures graphs itself (`use_cuda_graph`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._state import ATTENTIONS as _ORIGINAL
from .._state import BATCH_STEPS as _RUNNING
from .._state import LOCK

#: The functions that may be handed a paged cache. In 5.17 sdpa and flash attention have others for it.
_PAGED = ("sdpa", "flash_attention_2", "flash_attention_3", "paged|eager", "paged|sdpa", "paged|flash_attention_2",
          "paged|flash_attention_3")  # fmt: skip
#: What the model's own inputs are, and no business of its attention.
_OF_THE_MODEL = ("input_ids", "attention_mask", "position_ids", "logits_indices", "logits_processor_args", "use_cache",
                 "logits_to_keep")  # fmt: skip


@dataclass
class Running:
    """The step that runs: its model's attention modules by layer, and what continuous batching hands the attention
    besides its tensors (the cache, indices, lengths)."""

    layers: dict[int, nn.Module] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)


@torch.library.custom_op("tpfuse_transformers::paged_attention", mutates_args=())
def paged_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, name: str, layer: int, scaling: float | None,
    dropout: float, sliding_window: int | None,
) -> Tensor:  # fmt: skip
    """Write keys and values to the cache of the running step, and attend to what it holds.

    query: [1, heads, tokens, size]; key, value: [1, key-value heads, tokens, size]; mask: what transformers' function
    takes. Returns [1, tokens, heads, size of a value] in the query's dtype. Only the cache's own layer is written, and
    nothing else in a graph reads it.
    """
    step = _RUNNING[-1]
    given = {**step.given, "scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
    output, _ = _ORIGINAL[name](step.layers[layer], query, key, value, mask, **given)
    return output.clone() if output.data_ptr() == query.data_ptr() else output


@paged_attention.register_fake
def _(query, key, value, mask, name, layer, scaling, dropout, sliding_window):  # type: ignore[no-untyped-def]
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1])


def keep_paged_attention_whole() -> None:
    """From now on, compiled steps of continuous batching hold each paged attention as one operator. Calling it again
    changes nothing; attention outside of compiled steps is what it was.

    Raises ImportError where transformers has no continuous batching that hands the cache to the attention function.
    """
    from transformers.generation.continuous_batching import model_runner
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if _ORIGINAL:
        return
    runner = next((found for found in vars(model_runner).values() if hasattr(found, "_get_forward_fn")), None)
    if runner is None:
        raise ImportError(
            "transformers' continuous batching has no model runner with _get_forward_fn, which this integration steps "
            "into (5.23 has one); without it, generate_batch runs as it is, with a graph break in every attention"
        )
    for name in _PAGED:
        if name in ALL_ATTENTION_FUNCTIONS:
            with LOCK:
                _ORIGINAL[name] = ALL_ATTENTION_FUNCTIONS[name]
            ALL_ATTENTION_FUNCTIONS.register(name, _attention(name))
    choose = runner._get_forward_fn

    def _get_forward_fn(self: Any, *args: Any, **kwargs: Any) -> tuple[Callable[..., Any], bool]:
        forward, graphs = choose(self, *args, **kwargs)
        return _around(forward), graphs

    runner._get_forward_fn = _get_forward_fn


def _attention(name: str) -> Callable[..., Any]:
    original = _ORIGINAL[name]

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                  **kwargs: Any) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if kwargs.get("cache") is None or not torch.compiler.is_compiling():
            return original(module, query, key, value, attention_mask, **kwargs)
        taken = kwargs.get("scaling"), float(kwargs.get("dropout") or 0.0), kwargs.get("sliding_window")
        return paged_attention(query, key, value, attention_mask, name, module.layer_idx, *taken), None

    return attention


def _around(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(model: nn.Module, batch: dict[str, Any], *rest: Any) -> Any:
        with _running(model, batch):
            return forward(model, batch, *rest)

    return run


@contextmanager
def _running(model: nn.Module, batch: dict[str, Any]) -> Iterator[None]:
    given = {name: value for name, value in batch.items() if name not in _OF_THE_MODEL}
    indices = ((getattr(m, "layer_idx", None), m) for m in model.modules() if _attends(m))
    layers = {index: m for index, m in indices if isinstance(index, int)}
    with LOCK:
        _RUNNING.append(Running(layers, given))
    try:
        yield
    finally:
        with LOCK:
            _RUNNING.pop()


def _attends(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__


__all__ = ["keep_paged_attention_whole"]
