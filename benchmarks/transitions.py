"""What happens between two blocks, from the policy alone: the table of `policy_table.py`, and of a test. Pure Python.

    (incoming layout, owed groups, residual's layout, what the consumer needs, policy) -> collectives and a rewrite

Producers say what they owe and consumers which rows they need; both depend on the policy for a dense MLP. `transition`
puts the two together. Every choice and price is the planner's own (`tpfuse.passes.plan.layouts`), which sees one stage
here where it sees a model's chain of stages in a graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from tpfuse.errors import PolicyError
from tpfuse.passes.plan.layouts import (
    FACTORED,
    NOMINAL_ROWS,
    RESIDUAL_LAYOUTS,
    SCATTERED,
    TP_ATTN_FULL,
    UNFACTORED,
    Sizes,
    Stage,
    Step,
    chain_steps,
    choose,
    normalised,
    paid,
    stage_steps,
    wanted,
)
from tpfuse.policy import SharingPolicy

PRODUCERS = ("embedding", "attention", "dense_mlp", "moe", "attention∥dense_mlp")
CONSUMERS = ("attention", "dense_mlp", "moe", "final_norm", "output")


@dataclass(frozen=True)
class Transition:
    """One boundary: its residual's layout before and after, its collectives as written and as rewritten.

    rewrite: its name, or None where the collectives stay as they are written.
    """

    rewrite: str | None
    layout_in: str
    layout_out: str
    before: tuple[Step, ...]
    after: tuple[Step, ...]


def sizes_of(policy: SharingPolicy, row_bytes: float) -> Sizes:
    """`row_bytes`: bytes of one row of hidden states. Rows are the policy's maximum, else a nominal batch."""
    return Sizes(policy.attn_tp_size, policy.dp_size, (policy.max_rows or NOMINAL_ROWS) * row_bytes)


def owed_by(producer: str, dense: int | None, policy: SharingPolicy) -> tuple[str, ...]:
    """What a producer hands on (see `layouts.Stage.addend`); a parallel block hands on two addends.

    dense: over how many ranks the dense MLP's weights are cut.
    """
    mlp = _cut_over(dense, policy)
    of_mlp = {"whole": "owed_whole", "attention": "owed_attn", "none": "own_rows"}[mlp]
    return {
        "embedding": ("owed_attn",),
        "attention": ("owed_attn",),
        "dense_mlp": (of_mlp,),
        "moe": ("owed_whole" if policy.dp_size > 1 else "owed_attn",),
        "attention∥dense_mlp": ("owed_attn", of_mlp),
    }[producer]


def needed_by(consumer: str, dense: int | None, policy: SharingPolicy) -> str:
    """Which rows of the normed value a consumer needs (see `layouts.Stage.wants`)."""
    of_mlp = {"whole": "dp_rows", "attention": "all_rows", "none": "own_rows"}[_cut_over(dense, policy)]
    of_moe = "dp_rows" if policy.dp_size > 1 else "all_rows"
    return {"dense_mlp": of_mlp, "moe": of_moe}.get(consumer, "all_rows")


def _cut_over(dense: int | None, policy: SharingPolicy) -> str:
    """The group a dense MLP is cut over. Degenerate sizes fall together: the smallest group of that size is meant."""
    if dense == 1:
        return "none" if policy.attn_tp_size > 1 else "attention"
    return "attention" if dense == policy.attn_tp_size else "whole"


def transition(
    producer: str, consumer: str, policy: SharingPolicy, residual: str = TP_ATTN_FULL, row_bytes: float = 8192.0,
    dense: tuple[int, int] | None = None,
) -> Transition:  # fmt: skip
    """What one boundary becomes.

    Args:
        residual: the layout in which the residual stream arrives; the boundary is written in the same one.
        row_bytes: bytes of one row of hidden states.
        dense: over how many ranks the dense MLPs before and after are cut, where they differ from the policy's default.

    Raises:
        PolicyError: for a block or a layout that does not exist, and for a residual that cannot be scattered.
    """
    for what, given, allowed in (
        ("producer", producer, PRODUCERS),
        ("consumer", consumer, CONSUMERS),
        ("residual", residual, RESIDUAL_LAYOUTS),
    ):
        if given not in allowed:
            raise PolicyError(f"transition({what}={given!r}): allowed: {', '.join(allowed)}")
    if residual == SCATTERED and producer == "embedding":
        raise PolicyError("an embedding begins the residual stream: no residual arrives, so none can be scattered")
    if policy.attn_tp_size == 1:
        residual = TP_ATTN_FULL  # with one rank a share of the rows is all of them
    default = policy.normalised().moe_dense_tp_size
    before_dense, after_dense = dense or (default, default)
    sizes = sizes_of(policy, row_bytes)
    addends = owed_by(producer, before_dense, policy)
    want = needed_by(consumer, after_dense, policy)
    if len(addends) > 1 and residual == SCATTERED:
        raise PolicyError(
            f"{producer} pays two sums before one norm; its residual stream is kept {TP_ATTN_FULL}, so no residual "
            "arrives scattered"
        )
    # Outputs have the eager layout, and so has a block of two sums.
    stays = policy.attn_tp_size == 1 or len(addends) > 1 or consumer == "output"
    arriving = int(residual == SCATTERED)
    stage = Stage(
        addends[0], frozenset({want}), linked=False, outside=False, fixed=TP_ATTN_FULL if stays else None,
        arriving=arriving,
    )  # fmt: skip
    # Over a scattered residual the gather form is what is written.
    written = stage_steps(stage, SCATTERED, sizes) if arriving else _eager(addends, want, sizes)
    (layout,) = choose([stage], sizes, policy.residual)
    if len(addends) > 1:
        after = (*_both_paid(addends, sizes), *wanted(want, layout, sizes))
    else:
        after = chain_steps([stage], [layout], sizes)
    rewrite = _rewrite(addends, want, consumer, residual, layout, written, after)
    return Transition(rewrite, residual, layout, written, after)


def _eager(addends: tuple[str, ...], want: str, sizes: Sizes) -> tuple[Step, ...]:
    """The collectives of eager mode: a sum over the whole group is one all-reduce."""
    steps = [normalised(UNFACTORED, sizes) if a == "owed_whole" else paid(a, TP_ATTN_FULL, sizes) for a in addends]
    return (*(step for part in steps for step in part), *wanted(want, TP_ATTN_FULL, sizes))


def _both_paid(addends: tuple[str, ...], sizes: Sizes) -> tuple[Step, ...]:
    """Two addends of one norm. What both owe to one group is paid at once; a sum over the whole group is factored, so
    that its second half joins the other's."""
    if "owed_whole" in addends:
        return normalised(FACTORED, sizes)
    return tuple(step for addend in dict.fromkeys(addends) for step in paid(addend, TP_ATTN_FULL, sizes))


def _rewrite(
    addends: tuple[str, ...], want: str, consumer: str, residual: str, layout: str, before: tuple, after: tuple
) -> str | None:
    crosses = "owed_whole" in addends or want == "dp_rows"
    if residual == SCATTERED:
        return "reduce_scatter_norm" if layout == SCATTERED else "share_attention_group"
    if layout == SCATTERED:
        return "gather_full_tp" if crosses else "scatter_dense"
    if "owed_whole" in addends and before != after:
        return "gather_full_tp"
    reduces = [step for step in before if step.collective == "all_reduce"]
    if consumer == "output" or not reduces or "owed_whole" in addends:
        return None
    return "merge_all_reduces" if len(reduces) > 1 else "all_reduce_norm"
