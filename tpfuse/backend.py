"""`torch.compile(model, backend="tpfuse")`: Inductor with one more pass at its joint stage.

The pass runs where a graph is whole and has its collectives: on the joint forward and backward graph of training, and
on the forward graph of inference, after Inductor's own joint passes and the user's. Boundaries that an activation
checkpoint cuts in two wait until the joint graph is split, and are fused in its forward half.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from . import _torch_private as private
from . import gather_ops as _gather_ops  # noqa: F401 (with all operators)
from . import ops as _ops  # noqa: F401  (the rewritten graphs call these operators)
from .declared import Declaration, declarations
from .errors import FusionError, OptionError, PlanMismatchError, TPFuseError
from .options import Options, inductor_patches, parse_options
from .parallel.recorded_policy import check_groups, with_recorded_policy
from .parallel.rows_check import checking, take_marks
from .passes.facts.backward import backward_nodes
from .passes.facts.declared import as_functional
from .passes.facts.groups import resolve_group
from .passes.facts.refusals import Code
from .passes.pipeline import PassOptions, fuse
from .passes.rewrite.lower import lower
from .passes.rewrite.take_apart import take_apart
from .passes.verdict.steps import find_steps, with_late_steps
from .report import Report, record
from .runtime import held_numbers, report_store
from .runtime.ballots import Place, ledger
from .runtime.cache_key import cache_key
from .runtime.endings import Surroundings, surroundings, with_surroundings
from .runtime.guard import guard

log = logging.getLogger(__name__)

#: Why a graph runs without a compiler.
UNCOMPILED = (
    "the ranks of a group run graphs that differ here, and torch cannot compile this one as it was written, because a "
    "number of the program is symbolic in it (pass it as a tensor, or compile with dynamic=False)"
)
#: Why a graph is compiled a second time, at its first run.
DIFFER = "the ranks of a group run graphs that differ here, so what they send stays as it was written"


def tpfuse(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **more: Any,
) -> Callable[..., Any]:
    """The backend function that the `torch_dynamo_backends` entry point names.

    Args:
        gm: the graph Dynamo captured; example_inputs: its (fake) inputs.
        mode: torch.compile's mode, as for Inductor.
        options: see `tpfuse.options.Options`.
        more: torch.compile's other parameters, which some versions hand on and this backend has no use for.

    Raises:
        OptionError: an unknown option, a value that is not allowed, or another keyword that is not torch.compile's.
        FusionError: `expect_fused` or `strict` was not met.
    """
    try:
        for name in sorted(set(more) - private.torch_compile_parameters()):
            raise OptionError(
                f"the tpfuse backend was called with {name}={more[name]!r}, which it does not know; allowed are mode, "
                "options and torch.compile's own parameters. What is to be done differently belongs into options={...}"
            )
        return _compile(gm, example_inputs, parse_options(options, mode))
    except TPFuseError as error:
        raise private.raised_through_dynamo(error) from error.__cause__


def _compile(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    held_numbers.make_constant(gm)
    options = with_recorded_policy(options, gm)
    marks = take_marks(gm)
    if any(mark.says.fault for mark in marks):
        return checking(lambda *_: (), gm, marks)  # raises; a graph for these rows would never run
    spare = copy_graph(gm)
    around = surroundings(gm)
    tracing = private.tracing_again(example_inputs)
    book = ledger() if options.check_plans else None
    with held_numbers.until_compiled(), book.compiling() if book is not None else contextlib.nullcontext():
        compiled, report = _compiled(gm, example_inputs, options, around)

    def written() -> tuple[Callable[..., Any], Report]:
        """The same graph with everything sent as the program wrote it; called at the graph's first run."""
        # A rank without a kernel at a boundary cannot take part in its peers'.
        kernels = any(step.kernel for step in report.steps)
        as_written = replace(options, as_written=DIFFER, rewrites=() if kernels else options.rewrites)
        try:
            with tracing():
                again, its_report = _compiled(copy_graph(spare), example_inputs, as_written, around)
        except private.restarts_tracing():
            # Run operation by operation, torch 2.11 loses gradients of what an autograd.Function made.
            if trained(spare, example_inputs):
                raise PlanMismatchError(UNCOMPILED) from None
            warnings.warn(f"tpfuse runs a graph without a compiler: {UNCOMPILED}", stacklevel=2)
            again, its_report = copy_graph(spare), _uncompiled(report)
            record(its_report)
        return checking(again, spare, marks), its_report

    place = Place(*private.compilation(), private.compiled_codes())
    return guard(checking(compiled, spare, marks), report, options, written, place)


def _compiled(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, around: Surroundings
) -> tuple[Callable[..., Any], Report]:
    """What the inner compiler makes of the graph, and the report on it, which is recorded and meets the options."""
    fusion, patches = assemble(options)
    # Inductor holds a buffer that it will reuse. In a training step that can be the logits', through all of backward,
    # and its own estimate, whether there is room, misses it. The CPU has no allocator that would keep it for reuse.
    if any(tensor.device.type != "cpu" for tensor in trained(gm, example_inputs)):
        patches.setdefault("allow_buffer_reuse", False)
    name = report_store.key(gm, example_inputs, fusion.uuid(), private.inductor_settings(patches))
    spare = copy_graph(gm)
    compiled = _INNER[options.inner](gm, example_inputs, fusion, patches)
    if fusion.reports and not fusion.waiting:
        report = report_store.merge(fusion.reports)
        report_store.save(name, report)
    else:
        # A warm cache: nothing was traced, so the pass did not run, or not to its end.
        report = report_store.load(name) or trace_report(spare, example_inputs, options)
    check_groups(report, options.policy, options.ranks)
    report = with_surroundings(report, around)
    private.trace_artifact("tpfuse_report", lambda: str(report))
    log.debug("%s", report)
    record(report)
    check(report, options)
    return compiled, report


def trained(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[torch.Tensor]:
    """Parameters and inputs that get gradients; none where gradients are off."""
    tensors = (*private.tensor_leaves(example_inputs), *gm.parameters()) if torch.is_grad_enabled() else ()
    return [tensor for tensor in tensors if tensor.requires_grad]


def _uncompiled(report: Report) -> Report:
    """The report on a graph that runs as the program wrote it, operation by operation."""
    kept: dict[str, Any] = {"fused": False, "rewrite": None, "runs": "", "kernel": False}
    kept |= {"reason": UNCOMPILED, "code": Code.AS_WRITTEN.value}
    return replace(report, boundaries=[replace(b, **kept, after=b.before) for b in report.boundaries], steps=[])


def check(report: Report, options: Options) -> None:
    """Raise FusionError where the report does not meet `expect_fused` or `strict`."""
    if options.expect_fused is not None and report.boundaries and report.fused_forward != options.expect_fused:
        raise FusionError(
            f"expect_fused={options.expect_fused}, but {report.fused_forward} forward collectives were fused\n{report}"
        )
    if options.strict and report.missed:
        missed = "\n".join(f"{boundary.module or boundary.kind}: {boundary.reason}" for boundary in report.missed)
        raise FusionError(f"strict=True, but all-reduces that feed a norm stayed unfused\n{missed}\n{report}")


# -- the pass ---------------------------------------------------------------------------------------------------------


if TYPE_CHECKING:
    from ._torch_private import CustomGraphPass
else:
    CustomGraphPass = private.custom_graph_pass()


def _owner(graph: fx.Graph) -> fx.GraphModule:
    """The module that Inductor gave `graph` with; a pass may give it another graph."""
    if graph.owning_module is None:
        raise TPFuseError("internal error: Inductor gave a graph without its module")
    return graph.owning_module


def pass_options(options: Options, declared: tuple[Declaration, ...]) -> PassOptions:
    """What of the backend's options concerns the pass."""
    return PassOptions(
        options.rewrites, options.strict, options.policy, options.ranks, options.batch_invariant,
        as_written=options.as_written, declared=declared,
    )  # fmt: skip


def pass_options_of_a_half(options: Options, declared: tuple[Declaration, ...]) -> PassOptions:
    """The same for the forward half of a split graph, whose steps no peer is told of: it moves nothing."""
    why = options.as_written or "an activation checkpoint splits this graph before the boundary is fused"
    return replace(pass_options(options, declared), split=True, as_written=why)


class FusionPass(CustomGraphPass):
    """The pass as Inductor calls it. `before` is the user's own pass at the same stage, run first."""

    def __init__(self, options: Options, before: Sequence[Callable[[fx.Graph], None]] = ()):
        self.options = options
        self.before = tuple(before)
        #: As of now: what is declared later is for what is compiled later.
        self.declared = declarations()
        self.reports: list[Report] = []
        self.seconds = 0.0
        #: Names of the collectives in the last joint graph, while boundaries of it wait for its forward half.
        self.waiting: tuple[str, ...] = ()

    def __call__(self, graph: fx.Graph) -> None:
        owner = _owner(graph)
        for user_pass in self.before:
            user_pass(owner.graph)
        private.trace_artifact("tpfuse_graph_before", lambda: as_text(owner))
        outcome = fuse(owner.graph, resolve_group, pass_options(self.options, self.declared))
        if outcome.graph is not owner.graph:
            owner.graph = outcome.graph
        private.trace_artifact("tpfuse_graph_after", lambda: as_text(owner))
        self.reports.append(outcome.report)
        self.seconds += outcome.seconds
        waits = any(boundary.code == Code.ASTRIDE for boundary in outcome.report.boundaries)
        self.waiting = outcome.names if waits else ()

    def finish(self, graph: fx.Graph) -> None:
        """Fuse what waited for `graph`, the forward half of the last joint graph; any other graph stays as it is."""
        if not self.waiting or backward_nodes(graph):
            return
        owner = _owner(graph)
        names, self.waiting = self.waiting, ()
        before = len(find_steps(as_functional(graph, self.declared)[0], resolve_group))
        outcome = fuse(graph, resolve_group, pass_options_of_a_half(self.options, self.declared))
        if outcome.graph is not graph:
            owner.graph = outcome.graph
        self.seconds += outcome.seconds
        # Verdicts on collectives of inner graphs come last, and have no names.
        late = dict(zip(outcome.names, outcome.report.boundaries, strict=False))
        report = self.reports[-1]
        boundaries = list(report.boundaries)
        for index, name in enumerate(names):
            # Behind a boundary that waited, a gather that it takes in waited as well.
            waited = boundaries[index].code == Code.ASTRIDE or (name in late and late[name].fused)
            if waited and name in late and not boundaries[index].fused:
                boundaries[index] = late[name]
        inner = len(outcome.report.boundaries) - len(outcome.names)
        fewer = before - (outcome.report.collectives_after - inner)
        steps = with_late_steps(report.steps, outcome.report.steps)
        after = report.collectives_after - fewer
        self.reports[-1] = replace(report, boundaries=boundaries, collectives_after=after, steps=steps)

    def finish_half(self, graph: fx.Graph) -> None:
        """The same for either half as Inductor has it, whose own passes see gathers by themselves."""
        self.finish(graph)
        take_apart(_owner(graph).graph)

    def uuid(self) -> bytes | None:
        """None, which bypasses the caches, where a user's pass or a declaration's `resolve` has no key of its own."""
        return _key(self.options, self.declared, self.before)


class HalfPass(CustomGraphPass):
    """What Inductor calls on each half of the split graph: the user's own passes, and `then`. `fusion`: whose options
    and declarations are the cache's key."""

    def __init__(
        self, fusion: FusionPass, before: Sequence[Callable[[fx.Graph], None]], then: Callable[[fx.Graph], object]
    ):
        self.fusion = fusion
        self.before = tuple(before)
        self.then = then

    def __call__(self, graph: fx.Graph) -> None:
        owner = _owner(graph)
        for user_pass in self.before:
            user_pass(owner.graph)
        self.then(owner.graph)

    def uuid(self) -> bytes | None:
        return _key(self.fusion.options, self.fusion.declared, self.before)


def _key(
    options: Options, declared: Sequence[Declaration], before: Sequence[Callable[[fx.Graph], None]]
) -> bytes | None:
    if any(declaration.resolve is not None for declaration in declared):
        return None
    parts = [cache_key(options), repr([declaration.key for declaration in declared]).encode()]
    for user_pass in before:
        part = user_pass.uuid() if isinstance(user_pass, CustomGraphPass) else None
        if part is None:
            return None
        parts.append(part if isinstance(part, bytes) else repr(part).encode())
    return b"".join(parts)


# -- who compiles the rewritten graph ---------------------------------------------------------------------------------


def assemble(options: Options) -> tuple[FusionPass, dict[str, Any]]:
    """The pass behind the user's own at its stage, and Inductor's config patches with it in them."""
    patches = inductor_patches(options)
    fusion = FusionPass(options, _users_passes(patches, "joint_custom_post_pass"))
    patches["joint_custom_post_pass"] = fusion
    # The rest of the boundaries, once the joint graph is split; and at the end the form that costs the host least.
    for stage, then in (("post_grad_custom_pre_pass", fusion.finish_half), ("post_grad_custom_post_pass", lower)):
        patches[stage] = HalfPass(fusion, _users_passes(patches, stage), then)
    return fusion, patches


def _with_inductor(
    gm: fx.GraphModule, example_inputs: Sequence[Any], fusion: FusionPass, patches: dict[str, Any]
) -> Callable[..., Any]:
    return private.compile_with_inductor(gm, example_inputs, patches)


def _users_passes(patches: Mapping[str, Any], stage: str) -> tuple[Callable[[fx.Graph], None], ...]:
    passes = patches.get(stage, private.inductor_config()[stage])
    return tuple(passes) if isinstance(passes, (list, tuple)) else () if passes is None else (passes,)


def _with_aot_eager(
    gm: fx.GraphModule, example_inputs: Sequence[Any], fusion: FusionPass, patches: Mapping[str, Any]
) -> Callable[..., Any]:
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition

    def rewrite(joint: fx.GraphModule) -> None:
        private.joint_graph_clean_up(joint)
        fusion(joint.graph)
        joint.recompile()

    def boxed(compiled: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        fusion.finish(compiled.graph)
        compiled.recompile()
        return make_boxed_func(compiled.forward)

    def inference(compiled: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        rewrite(compiled)
        return boxed(compiled, inputs)

    def partition(joint: fx.GraphModule, joint_inputs: Sequence[Any], **kwargs: Any) -> Any:
        rewrite(joint)
        # Two equal all-reduces on one rank need not be equal on its peers, so none of them may go.
        with private.without_cse():
            return min_cut_rematerialization_partition(joint, joint_inputs, compiler="inductor", **kwargs)

    return private.aot_autograd(
        fw_compiler=boxed,
        bw_compiler=boxed,
        inference_compiler=inference,
        partition_fn=partition,
        decompositions=private.inductor_decompositions(),
        keep_inference_input_mutations=True,
    )(gm, example_inputs)


_INNER = {"inductor": _with_inductor, "aot_eager": _with_aot_eager}


def trace_report(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Report:
    """The report on a graph, by tracing it and throwing the result away: nothing is compiled and nothing runs."""
    fusion, patches = assemble(options)
    take_marks(gm)
    _with_aot_eager(gm, example_inputs, fusion, patches)
    return report_store.merge(fusion.reports)


def as_text(gm: fx.GraphModule) -> str:
    """A graph as readable Python, with shapes; for people."""
    return gm.print_readable(print_output=False)


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module of its own over the same parameters: compilers take ownership of the one they are given."""
    copied = fx.GraphModule(gm, private.copied(gm.graph))
    copied.meta = copy.copy(gm.meta)
    return copied
