"""The backend's options: what a user may write into `torch.compile(..., options={...})`, checked key by key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from . import _torch_private as private
from .errors import OptionError
from .passes.plan.sites import DEFAULT_REWRITES, REWRITES
from .policy import SharingPolicy
from .strict_json import field_value, show

INNER = ("inductor", "aot_eager")
#: Why nothing that is sent may change without the ranks' agreement.
UNCHECKED = "with options['check_plans'] False the ranks agree on nothing, so what they send stays as it was written"


@dataclass(frozen=True)
class Options:
    """Options of the tpfuse backend.

    policy: how the model was cut, where it was not cut by `parallelize`; otherwise it may only repeat the policy.
    expect_fused: the number of forward collectives that must be fused away in every graph that contains any.
    strict: an all-reduce that feeds a norm and stays unfused, or an internal error, raises. An all-reduce over the
        whole group that costs less than its factors at the policy's `max_rows` stays because the policy asks for it,
        and does not raise (`Boundary.demanded`); at rows that are only assumed, for want of `max_rows`, it raises.
    inner: who compiles the rewritten graph, "inductor" or "aot_eager".
    mode: one of torch.compile's modes; torch forbids its own mode= beside options=.
    inductor: Inductor's own options, as `torch.compile(backend="inductor", options=...)` takes them. A training step on
        a GPU is compiled with `allow_buffer_reuse` False unless it is given: a buffer kept for reuse can be its peak.
    rewrites: the rewrites that may be used; all but "norm_backward", "quantised_outputs" and "overlap_all_reduce_norm"
        unless it is given. The last is named on every rank or on none: it decides which kernel runs.
    batch_invariant: a row's result at a boundary is bitwise the same whatever the other rows are and however many: one
        order of summation at every size, which costs speed where another kernel would be faster. It holds on GPUs whose
        memory the ranks share (`Boundary.runs` says so); elsewhere the process group's all-reduce decides.
    check_plans: at a graph's first run the ranks of a group agree on what they send, where tpfuse changed it. False:
        they do not meet, and nothing that is sent is changed (no merged or moved steps, no changed layouts).
    plan_timeout: seconds that a graph's first run waits for its peers to agree; then what it sends stays as written.
    peer_timeout: seconds that a call may wait for a rank of its groups; None leaves it to the groups' own timeouts.
    ranks: of the whole TP group, as `parallelize` recorded them beside the policy; no option that a user gives.
    as_written: why what a rank sends must stay as the program wrote it, or ''; no option that a user gives.
    """

    policy: SharingPolicy | None = None
    expect_fused: int | None = None
    strict: bool = False
    inner: str = "inductor"
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
    rewrites: tuple[str, ...] = DEFAULT_REWRITES
    batch_invariant: bool = False
    check_plans: bool = True
    plan_timeout: float = 60.0
    peer_timeout: float | None = None
    ranks: tuple[int, ...] | None = None
    as_written: str = ""


#: What `parse_options` fills in itself, or the model's record does.
_OURS = ("ranks", "as_written")
#: What a user may give.
GIVEN = tuple(each.name for each in fields(Options) if each.name not in _OURS)


def parse_options(options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """Options from what torch.compile hands over.

    Raises OptionError for an unknown key (naming the nearest one), a wrong type or a value that is not allowed.
    """
    options = dict(options or {})
    for key, given in options.items():
        where = f"options[{key!r}]"
        if key not in GIVEN:
            raise OptionError(f"{where}: no such option; {_nearest(key, GIVEN)}")
        if key != "policy":
            options[key] = field_value(Options, key, given, where, OptionError)
        elif not isinstance(given, (SharingPolicy, type(None))):  # an object, where JSON has its fields
            allowed = "SharingPolicy or None"
            raise OptionError(f"{where}={show(given)} is a {type(given).__name__}; allowed: {allowed}")
    if mode is not None:
        if options.get("mode") not in (None, mode):
            raise OptionError(f"mode={mode!r} and options['mode']={options['mode']!r} disagree; give one of them")
        options["mode"] = mode
    parsed = Options(**options)
    if not parsed.check_plans:
        parsed = replace(parsed, as_written=UNCHECKED)
    _check_values(parsed)
    return parsed


def _check_values(options: Options) -> None:
    if options.inner not in INNER:
        raise OptionError(f"options['inner'] is {options.inner!r}; allowed: {', '.join(map(repr, INNER))}")
    if options.expect_fused is not None and options.expect_fused < 0:
        raise OptionError(f"options['expect_fused'] is {options.expect_fused}; allowed: 0 or more, or None")
    for name in ("plan_timeout", "peer_timeout"):
        seconds = getattr(options, name)
        if seconds is not None and not 0 < seconds < float("inf"):
            raise OptionError(f"options[{name!r}] is {seconds}; allowed: a positive, finite number of seconds")
    for name in options.rewrites:
        if name not in REWRITES:
            raise OptionError(f"options['rewrites'] names {name!r}; {_nearest(name, REWRITES)}")
    inductor_patches(options)


def inductor_patches(options: Options) -> dict[str, Any]:
    """Inductor's config patches for the mode and the options given, checked against Inductor's own keys.

    Raises OptionError for a mode or an Inductor option that does not exist.
    """
    patches: dict[str, Any] = {}
    if options.mode not in (None, "default"):
        modes = sorted({"default", *private.inductor_mode_options()})
        if options.mode not in modes:
            raise OptionError(f"options['mode'] is {options.mode!r}; {_nearest(options.mode, modes)}")
        patches.update(private.inductor_mode_options(options.mode))
    known = private.inductor_config()
    for key, given in options.inductor.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise OptionError(f"options['inductor'][{key!r}]: Inductor has no such option; {_nearest(name, known)}")
        patches[name] = given
    return patches


def _nearest(key: str, known: Any) -> str:
    matches = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.0)
    shown = f"allowed: {', '.join(known)}" if len(known) <= 12 else "see torch._inductor.list_options()"
    return f"did you mean {matches[0]!r}? ({shown})" if matches else shown
