"""Every private PyTorch name tpfuse uses, each with what to do when it is gone.

No other file uses a module or name of torch that starts with an underscore, but for
`torch.distributed._functional_collectives` and `torch.distributed._symmetric_memory`, the documented homes of the
collectives and of symmetric memory, and the names of operators (`torch.ops.aten._to_copy`).
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import inspect
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import fx, nn

from .errors import TPFuseError

if TYPE_CHECKING:
    from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass

#: The releases of torch that the tests run on (`make test-matrix`): the first and the last.
OLDEST, NEWEST = (2, 11), (2, 15)


def check_torch_version(version: str = torch.__version__) -> None:
    """Refuse a release that is too old, and warn of one that nobody has tried yet.

    Raises:
        TPFuseError: naming the version, the oldest that works, and what to do.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    release = (int(numbers[1]), int(numbers[2])) if numbers else NEWEST
    if release < OLDEST:
        raise TPFuseError(
            f"tpfuse needs torch {_dotted(OLDEST)} or newer, and this is torch {version}: "
            f"pip install --upgrade 'torch>={_dotted(OLDEST)}'"
        )
    if release > NEWEST:
        warnings.warn(
            f"tpfuse was tested with torch {_dotted(OLDEST)} to {_dotted(NEWEST)}, and this is torch {version}; "
            "if it fails, look for a newer tpfuse",
            stacklevel=2,
        )


def _dotted(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"


# Here, because every file that depends on a release imports this one before it uses anything.
check_torch_version()

_c10d: Any = None
if dist.is_available():
    from torch.distributed import distributed_c10d as _c10d


def _resolved(name: str) -> dist.ProcessGroup:
    """The process group registered under `name` here. If `_resolve_process_group` goes: as in `process_group`."""
    return _c10d._resolve_process_group(name)


def process_group(name: str) -> dist.ProcessGroup | None:
    """The process group registered under `name` on this rank, or None.

    If `_resolve_process_group` goes: look the name up in `dist.distributed_c10d._world.pg_names`.
    """
    if not dist.is_available():
        return None
    try:
        return _resolved(name)
    except (RuntimeError, ValueError, KeyError):
        return None


def default_group() -> dist.ProcessGroup | None:
    """This rank's default process group, or None; cheap enough to ask at every call of a compiled graph.

    If `_world` goes: `dist.group.WORLD`, which costs twice as much.
    """
    return _c10d._world.default_pg if _c10d is not None else None


def default_store() -> Any:
    """The store through which the ranks met: a `Store`, whose stub leaves out `timeout` and `has_extended_api`.

    If `_get_default_store` goes: a PrefixStore over the store given to `init_process_group` by the caller.
    """
    return _c10d._get_default_store()


def groups_of(members: tuple[int, ...]) -> list[dist.ProcessGroup]:
    """Every process group of this rank with these members, the oldest first.

    If `_world` goes: as for `all_group_members`.
    """
    return [group for group in list(_c10d._world.pg_names) if tuple(dist.get_process_group_ranks(group)) == members]


def group_exists(group: dist.ProcessGroup | None) -> bool:
    """Whether `group` was not destroyed yet; may be asked by any thread.

    If `_world` goes: answer True, and a pulse ends with the last reference to its process group.
    """
    return group in _c10d._world.pg_map


def trace_on_fakes(function: Callable[..., Any], fakes: Sequence[Any]) -> fx.GraphModule:
    """The graph of `function` on fake tensors of one graph, in the operators that Inductor lowers.

    If `enable_python_dispatcher` goes: `make_fx` alone traces graphs without symbolic sizes.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch.fx.experimental.proxy_tensor import make_fx

    with enable_python_dispatcher(), fakes[0].fake_mode, torch.no_grad():
        return make_fx(function, decomposition_table=inductor_decompositions(), tracing_mode="real")(*fakes)


def raw_stream(device: int) -> int:
    """The address of the current stream of the GPU with this number; 0 for a CPU (-1).

    If `_cuda_getCurrentRawStream` goes: `torch.cuda.current_stream(device).cuda_stream`, at several times the cost.
    """
    return _raw_stream(device) if device >= 0 else 0


#: A build for CPUs has none.
_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)

#: The number of the GPU that kernels are launched on now. If `_cuda_getDevice` goes: `torch.cuda.current_device`.
current_gpu: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def set_group_timeout(group: dist.ProcessGroup, seconds: float) -> None:
    """How long an operation of `group` may wait, from now on.

    If `_set_pg_timeout` goes: leave the group as it is; `peer_timeout` is then the time given to `init_process_group`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that the name is deprecated, and that other backends have no timeout
        _c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


def group_timeout(group: dist.ProcessGroup) -> float | None:
    """How many seconds an operation of `group` may wait now; None where its backends do not tell.

    If `_get_backend` or `_timeout` goes: None, and a graph without a `peer_timeout` keeps another graph's.
    """
    for device in ("cuda", "cpu"):
        try:
            return group._get_backend(torch.device(device)).options._timeout.total_seconds()
        except (RuntimeError, AttributeError):
            continue
    return None


def torch_compile_parameters() -> set[str]:
    """The names of torch.compile's own parameters, which it may hand on to a backend."""
    return set(inspect.signature(torch.compile).parameters)


def compiling(frame: types.FrameType | None) -> bool:
    """Whether a thread that stands at `frame` is inside torch.compile's compiler.

    If `convert_frame` moves: answer False; a message then says less about a peer.
    """
    while frame is not None:
        if frame.f_code.co_filename.endswith("_dynamo/convert_frame.py"):
            return True
        frame = frame.f_back
    return False


def group_size(name: str) -> int:
    """How many ranks the group registered under `name` has; raises where there is none.

    If `_resolve_process_group` goes: as for `process_group`.
    """
    return _resolved(name).size()


def all_group_members() -> dict[str, tuple[int, ...]]:
    """Name -> members of every process group this rank belongs to.

    If `_world` goes: keep only the groups that appear in the graph.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return {}
    from torch.distributed import distributed_c10d

    names = distributed_c10d._world.pg_names
    return {name: tuple(dist.get_process_group_ranks(group)) for group, name in list(names.items())}


def register_local_tensor_rule(op: Any, decomposition: Callable[..., Any]) -> None:
    """Let `LocalTensorMode` (many ranks in one process) see through a custom op: run its decomposition in the mode.

    If `LocalTensorMode` goes: drop this; only tests use it.
    """
    try:
        from torch.distributed._local_tensor import LocalTensorMode
    except ImportError:
        return

    def rule(mode: Any, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with mode:
            return decomposition(*args, **(kwargs or {}))

    torch.library.register_torch_dispatch(op, LocalTensorMode, rule)


def raised_through_dynamo(error: Exception) -> Exception:
    """`error` as an exception that Dynamo does not wrap into BackendCompilerFailed, and that is still an instance of
    `error`'s class.

    If `ShortenTraceback` goes: return `error`; users then find it as `BackendCompilerFailed.inner_exception`.
    """
    try:
        from torch._dynamo.exc import ShortenTraceback
    except ImportError:
        return error
    kind = type(error)

    def init(self: Any, *args: Any) -> None:
        Exception.__init__(self, *args)
        self.first_useful_frame = None

    unwrapped = type(kind.__name__, (kind, ShortenTraceback), {"__init__": init, "__module__": kind.__module__})
    raised = unwrapped(*error.args)
    raised.__dict__.update(error.__dict__)
    raised.__cause__ = error.__cause__
    return raised


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's decomposition table, so that `inner="aot_eager"` shows the pass the same graph as Inductor does.

    If `select_decomp_table` goes: `torch._decomp.core_aten_decompositions()`.
    """
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def joint_graph_clean_up(gm: fx.GraphModule) -> None:
    """What Inductor's joint stage does to a graph before custom passes see it, as far as the recogniser depends on it.

    If `remove_noop_ops` goes: leave it out; the recogniser looks through clones and aliases anyway.
    """
    from torch._inductor.fx_passes.post_grad import remove_noop_ops

    remove_noop_ops(gm.graph)


@dataclass(frozen=True)
class GraphBreak:
    """A place at which Dynamo could not go on. reason: its own words, several lines; place: `file:line in function`."""

    reason: str
    place: str


def ending_break(gm: fx.GraphModule) -> GraphBreak | None:
    """The graph break that ended a Dynamo graph; None where it ended with its function.

    If `compile_subgraph_reason` goes: None, and reports say nothing about breaks.
    """
    return _as_break(getattr(gm, "compile_subgraph_reason", None))


def breaks_since(known: int) -> tuple[list[GraphBreak], int]:
    """The graph breaks of this process from number `known` on, and how many there are now; Dynamo forgets them at
    `torch.compiler.reset`, and counting begins anew.

    If `graph_break_reasons` goes: none, as for `ending_break`.
    """
    try:
        from torch._dynamo.utils import graph_break_reasons
    except ImportError:
        return [], 0
    new = graph_break_reasons[known if known <= len(graph_break_reasons) else 0 :]
    return [found for reason in new if (found := _as_break(reason)) is not None], len(graph_break_reasons)


def _as_break(reason: Any) -> GraphBreak | None:
    if not getattr(reason, "graph_break", False):
        return None
    stack = getattr(reason, "user_stack", None) or ()
    frame = stack[-1] if stack else None
    place = f"{frame.filename}:{frame.lineno} in {frame.name}" if frame is not None else ""
    return GraphBreak(str(getattr(reason, "reason", "")).strip(), place)


def callers() -> tuple[list[str], list[str]]:
    """The program's own functions on the stack while Dynamo compiles, innermost first: those that were to be compiled
    and run outside of any graph, and the forwards of modules that call what was compiled.

    If `compile_wrapper` goes: ([], []), and reports say less about what is around a graph.
    """
    frames: list[tuple[types.FrameType, bool]] = []
    outermost = 0
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if name.endswith("_dynamo/eval_frame.py") and frame.f_code.co_name == "compile_wrapper":
            outermost = len(frames)
        elif name.endswith("nn/modules/container.py") or not name.startswith((*_NO_PROGRAM, "<")):
            frames.append((frame, "forward" in frame.f_code.co_name))
        frame = frame.f_back
    inside = [_where(frame) for frame, _ in frames[:outermost]]
    return inside, [_where(frame) for frame, is_forward in frames[outermost:] if is_forward]


def _where(frame: types.FrameType) -> str:
    code = frame.f_code
    name = getattr(code, "co_qualname", code.co_name)
    return f"{name} ({code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno})"


#: Files whose functions are not the program's.
_NO_PROGRAM = (str(Path(torch.__file__).parent), str(Path(__file__).parent), str(Path(contextlib.__file__)))


def compiled_wrapper() -> type | None:
    """The class of what `torch.compile(module)` returns.

    If `OptimizedModule` goes: None, and nothing is said of wrappers that were never called.
    """
    try:
        from torch._dynamo.eval_frame import OptimizedModule
    except ImportError:
        return None
    return OptimizedModule


def backend_of(wrapper: Any) -> str:
    """The module that the backend of a compiled wrapper comes from, by its first part; '' if unknown."""
    seen, found = set(), getattr(getattr(wrapper, "dynamo_ctx", None), "callback", None)
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        compiler = getattr(found, "compiler_fn", None)
        if compiler is not None or getattr(found, "__module__", "").split(".")[0] == "tpfuse":
            return str(getattr(compiler or found, "__module__", "")).split(".")[0]
        found = getattr(found, "_torchdynamo_orig_backend", None) or getattr(found, "_torchdynamo_orig_callable", None)
    return ""


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Leave `text()` in torch's structured trace (TORCH_TRACE), for tlparse; it is not called without one.

    If `trace_structured` goes: nothing is left.
    """
    try:
        from torch._logging import trace_structured
    except ImportError:
        return
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)


def custom_graph_pass() -> type:
    """The base class of passes that Inductor's caches know by a key.

    If `CustomGraphPass` goes: a plain callable works, at the price of bypassed caches.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass

    return CustomGraphPass


def compile_with_inductor(gm: fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any]) -> Callable[..., Any]:
    """Inductor on a Dynamo graph; `patches` cover the lazily compiled backward too.

    If `compile_fx` goes: `torch.compile`'s own Inductor wrapper takes the same graph and inputs.
    """
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(gm, inputs, config_patches=patches)  # a path only where it compiles ahead of time
    return compiled


def inductor_mode_options(mode: str | None = None) -> dict[str, Any]:
    """Inductor's config for a mode, or all modes by name.

    If `list_mode_options` goes: keep the table of modes here.
    """
    from torch._inductor import list_mode_options

    return list_mode_options(mode) if mode is not None else list_mode_options()


def inductor_config() -> dict[str, Any]:
    """Inductor's current configuration, by option name.

    If `get_config_copy` goes: read the attributes of `torch._inductor.config`.
    """
    from torch._inductor import config

    return config.get_config_copy()


def inductor_settings(patches: dict[str, Any]) -> str | None:
    """Inductor's configuration under `patches`, as text that is the same in every process; None where a pass of the
    user's in it has no key.

    If `get_config_copy` goes: as for `inductor_config`.
    """
    settings: dict[str, Any] = inductor_config() | patches
    words = []
    keyed: Any = custom_graph_pass()
    for name, setting in sorted(settings.items()):
        parts: Sequence[Any] = setting if isinstance(setting, (list, tuple)) else (setting,)
        for part in parts:
            if isinstance(part, keyed):
                part = part.uuid()
                if part is None:
                    return None
            elif callable(part):
                if "pass" in name:
                    return None
                part = getattr(part, "__qualname__", type(part).__name__)
            words.append(f"{name}={part!r}")
    return "\n".join(words)


def compilation() -> tuple[int | None, int]:
    """(the number of the piece of code that Dynamo compiles now, how many times it has compiled it before).

    If `CompileContext` goes: (None, 0), and every compilation counts as one of new code.
    """
    from torch._guards import CompileContext

    number = CompileContext.current_compile_id()
    if number is None or number.frame_id is None:
        return None, 0
    return number.frame_id, number.frame_compile_id or 0


def tracing_again(inputs: Sequence[Any]) -> Callable[[], AbstractContextManager]:
    """Called while Dynamo has a graph with these inputs compiled: what makes a later compilation of that graph see the
    same symbols for its sizes and numbers. Without it a graph of symbolic sizes fits those of its first inputs alone.
    It holds Dynamo's lock: tracing patches what other threads' tracing patches too.

    If `TracingContext` goes: graphs that ranks do not agree on would have to be compiled once for each size. If
    `compile_lock` goes: a lock of our own, taken here and in the backend.
    """
    from torch._dynamo.convert_frame import compile_lock
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode

    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return lambda: compile_lock
    # Dynamo empties the context once it has what it compiled.
    known = [(t, context.tensor_to_context[t]) for t in tensor_leaves(inputs) if t in context.tensor_to_context]
    shapes = context.fake_mode.shape_env

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        anew = TracingContext(FakeTensorMode(shape_env=shapes))
        for tensor, symbols in known:
            anew.tensor_to_context[tensor] = symbols
        with compile_lock, tracing(anew):
            yield

    return again


def inductor_cache_dir() -> str:
    """Where Inductor keeps its caches.

    If `cache_dir` goes: `torch._inductor.config` and TORCHINDUCTOR_CACHE_DIR tell.
    """
    from torch._inductor.runtime.runtime_utils import cache_dir

    return cache_dir()


def aot_autograd(**compilers: Any) -> Callable[..., Any]:
    """A Dynamo backend out of AOTAutograd with the compilers given.

    If it moves: `functorch.compile.aot_module_simplified` takes the same compilers.
    """
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(**compilers)


def without_cse() -> AbstractContextManager:
    """Within it, the partitioner keeps nodes that compute the same.

    If the setting goes: nothing needs to be done.
    """
    import torch._functorch.config as settings

    return settings.patch(cse=False) if hasattr(settings, "cse") else nullcontext()


def tensor_leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors in nested lists, tuples and dicts.

    If `_pytree` goes: `torch.utils.pytree`.
    """
    from torch.utils import _pytree

    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def map_tensors(function: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """`tree` with `function` applied to its tensors.

    If `_pytree` goes: `torch.utils.pytree`.
    """
    from torch.utils import _pytree

    return _pytree.tree_map_only(torch.Tensor, function, tree)


def new_fake_mode() -> Any:
    """A mode in which operators compute shapes and dtypes and nothing else.

    If `FakeTensorMode` moves: `torch.compiler` and `torch.export` trace under one; take it from there.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def new_fake_like(val: Any) -> torch.Tensor:
    """A fake tensor in `val`'s fake mode, with its sizes, strides, dtype and device, and memory of its own.

    If that way of making a `FakeTensor` goes: `val.new_empty_strided(val.shape, val.stride())` under `val.fake_mode`.
    """
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils._mode_utils import no_dispatch

    with no_dispatch():
        plain = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device="meta")
    return FakeTensor(val.fake_mode, plain, val.device)


def operator_schema(target: Any) -> torch.FunctionSchema | None:
    """The schema of an operator (`torch.ops.aten.add.Tensor`); None for anything else.

    If `_schema` goes: `torch.library` looks schemas up by name.
    """
    return getattr(target, "_schema", None)


def argument_names(target: Any) -> list[str]:
    """The names of an operator's arguments, in order; none for anything else. If `_schema` goes: as above."""
    schema = operator_schema(target)
    return [parameter.name for parameter in schema.arguments] if schema is not None else []


def auto_functionalized() -> Any:
    """The higher-order operator by which compiled graphs hold operators that write into their arguments:
    auto_functionalized(operator, **arguments) gives (what it returns, the tensors it wrote into, in its order).

    If it goes: leave fused operations as they are; a call then costs the host some 20 us more.
    """
    return torch.ops.higher_order.auto_functionalized


def operator_full_name(target: Any) -> str:
    """The name of an operator with its namespace ("aten::add"); "" for anything else."""
    schema = operator_schema(target)
    return schema.name if schema is not None else ""


def operator_name(target: Any) -> str:
    """The same without namespace ("add"); in-place forms keep their underscore ("add_"), overloads have one name."""
    return operator_full_name(target).split("::")[-1]


def compiles_on_one_rank() -> bool:
    """Whether graphs are kept free of what only one rank knows (2.13 and newer)."""
    config = sys.modules.get("torch.distributed.config")
    return bool(getattr(config, "compile_on_one_rank", False))


def qualified_operator(op: Any) -> str:
    """"ns::op" of torch.ops.ns.op or of what torch.library.custom_op returns, "ns::op.overload" of an overload; "" for
    anything else.

    If the names go: only an operator's name as a string is taken.
    """
    for name in ("_qualified_op_name", "_qualname"):
        if isinstance(found := getattr(op, name, None), str):
            return found
    return f"{operator_full_name(op)}.{op._overloadname}" if isinstance(op, torch._ops.OpOverload) else ""


def operator_overloads(name: str) -> list[Any]:
    """The operators that are called "ns::op", or the one called "ns::op.overload"; none where there is none yet."""
    namespace, _, rest = name.partition("::")
    op, _, overload = rest.partition(".")
    try:
        packet = getattr(getattr(torch.ops, namespace), op)
        return [getattr(packet, each) for each in ([overload] if overload else packet.overloads())]
    except AttributeError:
        return []


def storage_identity(val: torch.Tensor) -> int | None:
    """What tells the storage of a tensor, fake ones included, from others; None for those without one (sparse).

    If `_cdata` goes: `id(val.untyped_storage())` serves as long as the tensor keeps its storage object.
    """
    try:
        return val.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def under_dispatch_mode() -> bool:
    """Whether some mode (fake tensors, many ranks in one process, a tracer) sees every operator.

    If `_get_current_dispatch_mode` goes: answer False; then the row counts are compared under such modes too.
    """
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    return _get_current_dispatch_mode() is not None


def runs_as_it_stands(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether an operator on these tensors just runs: nobody traces, transforms or differentiates it, forward neither.

    If one of these looks goes: answer False, and eager calls cost the host what they did before.
    """
    if under_dispatch_mode() or not all(type(t) in _PLAIN for t in tensors):
        return False
    return torch._C._functorch.maybe_current_level() is None and torch.autograd.forward_ad._current_level < 0


_PLAIN = (torch.Tensor, nn.Parameter)


def without_modes() -> AbstractContextManager:
    """Operators run as they are inside it, under no dispatch mode (a fake-tensor mode, say).

    If `_disable_current_modes` goes: torch.utils._python_dispatch has the stack of modes to be taken off by hand.
    """
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def own_tensors(module: nn.Module) -> list[dict[str, Any]]:
    """The module's own tables of parameters and buffers, to be changed in place.

    If they go: `setattr(module, name, tensor)` replaces a parameter or buffer just as well.
    """
    return [module._parameters, module._buffers]


def backward_hooks(owner: nn.Module | torch.Tensor) -> dict[int, Any]:
    """The hooks on a module's or a parameter's gradients.

    If `_backward_hooks` goes: answer {}; `sum_gradients` must then be called once only.
    """
    return owner._backward_hooks or {}


def forward_pre_hooks(module: nn.Module) -> dict[int, Any]:
    """The hooks in front of a module's forward.

    If `_forward_pre_hooks` goes: answer {}; a hook that is there twice changes nothing.
    """
    return module._forward_pre_hooks


def flat_mesh_group(mesh: Any, name: str) -> dist.ProcessGroup:
    """The group of all ranks of a mesh with named dimensions; made at the first call, by all of its ranks.

    If `_flatten` goes: `torch.distributed.new_group` with the mesh's ranks, on every rank of the world.
    """
    return mesh._flatten(name).get_group()


def replace_total_norm(total_norm: Any) -> None:
    """Let `torch.nn.utils.clip_grad_norm_` and `get_total_norm` find their norm by `total_norm(original, ...)`; once.

    If `_get_total_norm` goes: clip with `get_total_norm` in its place; without either, cut models need a clip of
    their own.
    """
    from torch.nn.utils import clip_grad

    original = getattr(clip_grad, "_get_total_norm", None)
    if original is None or hasattr(original, "_tpfuse_original"):
        return

    @functools.wraps(original)
    def known(*args: Any, **kwargs: Any) -> torch.Tensor:
        return total_norm(original, *args, **kwargs)

    known._tpfuse_original = original  # type: ignore[attr-defined]
    clip_grad._get_total_norm = known
    for module in (torch.nn.utils, clip_grad):
        if getattr(module, "get_total_norm", None) is original:
            vars(module)["get_total_norm"] = known


def backward_task() -> int:
    """The number of the backward pass that runs now.

    If it goes: 0, and replicas agree once, for all passes; they must then use the same parameters.
    """
    return torch._C._current_graph_task_id()


def backward_reaches(leaf: torch.Tensor) -> tuple[bool, bool]:
    """Whether the backward pass that runs now gives a leaf a gradient, and whether `torch.autograd.grad` asked for it.

    If it goes: (True, False); replicas must then use the same parameters.
    """
    node = torch.autograd.graph.get_gradient_edge(leaf).node
    try:
        return torch._C._will_engine_execute_node(node), False  # type: ignore[attr-defined]
    except RuntimeError as error:
        if "autograd.grad" not in str(error):
            raise
        return True, True


def when_backward_ends(callback: Callable[[], None]) -> None:
    """Run `callback` at the end of the backward pass that runs now.

    If it goes: a final callback of a hook on the loss.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]


def post_accumulate_hooks(leaf: torch.Tensor) -> bool:
    """Whether something takes a leaf's gradient as soon as it is accumulated (an optimizer in backward).

    If `_post_accumulate_grad_hooks` goes: True, and replicas must use the same parameters.
    """
    return bool(getattr(leaf, "_post_accumulate_grad_hooks", None))


def wrapped_in_ddp() -> bool:
    """Whether a forward of DistributedDataParallel is running.

    If `_active_ddp_module` goes: True, and replicas must use the same parameters.
    """
    from torch.nn.parallel import DistributedDataParallel

    return getattr(DistributedDataParallel, "_active_ddp_module", None) is not None


def new_dtensor(kind: type, local: torch.Tensor, mesh: Any, placements: Sequence[Any], shape: Sequence[int]) -> Any:
    """An instance of `kind`, a subclass of DTensor, that holds `local` and has `shape`; nothing is communicated.

    If `_dtensor_spec` moves: `DTensor.from_local(local, mesh, placements, shape=..., stride=...)` has such a spec.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(torch.Size(shape), torch.empty(tuple(shape), device="meta").stride(), local.dtype)
    spec = DTensorSpec(mesh, tuple(placements), tensor_meta=meta)
    return DTensor.__new__(kind, local, spec, requires_grad=False)  # type: ignore[call-arg]


def local_of(tensor: Any) -> torch.Tensor:
    """What a DTensor holds on this rank, the very storage.

    If `_local_tensor` goes: `tensor.to_local()` without gradients.
    """
    return tensor._local_tensor


def part_of(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offsets, sizes) of what this rank holds of a DTensor.

    If `compute_local_shape_and_global_offset` goes: the DTensor's chunk of `torch.distributed.checkpoint` says it.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offsets), tuple(sizes)


def wrap_optimizer_state(saved: Any, loaded: Any) -> None:
    """Let every optimizer's state_dict() pass through `saved(optimizer, state)` and what load_state_dict is given
    through `loaded(optimizer, state)`; once.

    If the class's methods can no longer be replaced: `register_state_dict_post_hook` and
    `register_load_state_dict_pre_hook` of each optimizer do the same.
    """
    kind = torch.optim.Optimizer
    if hasattr(kind.state_dict, "_tpfuse_original"):
        return
    save, load = kind.state_dict, kind.load_state_dict

    @functools.wraps(save)
    def state_dict(self: Any) -> dict[str, Any]:
        return saved(self, save(self))

    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        load(self, loaded(self, state_dict))

    state_dict._tpfuse_original = save  # type: ignore[attr-defined]
    kind.state_dict = state_dict  # type: ignore[method-assign]
    kind.load_state_dict = load_state_dict  # type: ignore[method-assign]


def call_plainly(func: Any, args: tuple, kwargs: dict[str, Any] | None, handle: Any = None) -> Any:
    """Calls `func` as if the tensors among its arguments had no `__torch_function__`. With `handle`, every operator in
    it goes through `handle(operator, args, kwargs)`, in front of what a class of tensors would do.

    If `TorchDispatchMode` moves: 2.13 and later ask the class's own `__torch_dispatch__` as well.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    kwargs = kwargs or {}
    with torch._C.DisableTorchFunctionSubclass():
        if handle is None:
            return func(*args, **kwargs)

        class Handled(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
                return handle(func, args, kwargs or {})

        with Handled():
            return func(*args, **kwargs)
