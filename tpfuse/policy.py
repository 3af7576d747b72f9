"""The sharing policy: which ranks share one layer's weights, and so which ranks a boundary talks to.

Ranks are laid out dp slowest, attn_tp fastest: rank = dp_index * attn_tp_size + attn_tp_index. Three groups follow:
the attention group (the ranks of one replica), the dp group (the ranks that hold the same attention slice) and the
whole TP group. docs/policy.md explains the choices with a picture.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NoReturn

from .errors import PolicyError
from .strict_json import StrictJson, check_integer, show

Residual = Literal["replicated", "scattered", "auto"]

RESIDUALS = ("replicated", "scattered", "auto")
# No machine has more ranks than this, and no batch more rows; a larger number is a typing error, not a wish.
MAX_RANKS = 1 << 20
MAX_ROWS = 1 << 40
_GLOB = frozenset("*?[")


class FrozenDict(dict):
    """A dict that refuses changes, so that a frozen policy is frozen all the way down."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a SharingPolicy is frozen; use dataclasses.replace(policy, overrides={...})")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # type: ignore

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self):
        return type(self), (dict(self),)

    def __deepcopy__(self, memo: dict) -> FrozenDict:
        return self


class Overrides(FrozenDict):
    """Sizes by module-name glob. Two are equal when they mean the same: the same exact names in any order, since they
    win over every glob, and the same globs in the same order, since a later one wins over an earlier one."""

    def __eq__(self, other: object) -> bool:
        return _names_and_globs(self) == _names_and_globs(other) if isinstance(other, dict) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:  # type: ignore[override]
        names, globs = _names_and_globs(self)
        return hash((frozenset(names.items()), tuple(globs)))


def _names_and_globs(sizes: dict[str, int | None]) -> tuple[dict[str, int | None], list[tuple[str, int | None]]]:
    """What is exact names, and what is globs, which keep their order."""
    globs = {pattern: size for pattern, size in sizes.items() if not _GLOB.isdisjoint(pattern)}
    return {name: size for name, size in sizes.items() if name not in globs}, list(globs.items())


@dataclass(frozen=True)
class SharingPolicy(StrictJson):
    """Over how many ranks each kind of layer is sharded.

    Args:
        tp_size: ranks of the whole TP group.
        dp_size: data-parallel attention replicas in it; divides `tp_size`. `attn_tp_size` is `tp_size // dp_size`.
        moe_dense_tp_size: over how many ranks a dense MLP's weights are sharded: None (the whole TP group, the same
            as `tp_size`), 1 (each rank holds them whole and works on its own rows), or `attn_tp_size` (the attention
            group's ranks). Experts and shared experts of an MoE block are always cut over the whole TP group.
        overrides: the same choice for single dense MLPs, by globs over qualified module names (`*` also matches
            dots). An exact name wins over a glob, a later glob over an earlier one.
        residual: how the compiler should keep the residual stream between layers: "replicated" over attn_tp,
            "scattered", or "auto".
        max_rows: rows that every dp replica pads to around a gather over replicas, for replicas whose row counts
            differ and are not announced with `tpfuse.rows`. None: no padding.

    Raises:
        PolicyError: for a value of the wrong type, or sizes that cannot work together; and, from `from_json` and
            `from_dict`, for unknown, missing or repeated fields and for text that is not JSON.
    """

    json_error: ClassVar = PolicyError

    tp_size: int
    dp_size: int = 1
    moe_dense_tp_size: int | None = None
    overrides: Mapping[str, int | None] = field(default_factory=dict)
    residual: Residual = "auto"
    max_rows: int | None = None

    def __post_init__(self) -> None:
        self._check_int("tp_size", self.tp_size, MAX_RANKS)
        self._check_int("dp_size", self.dp_size, MAX_RANKS)
        if self.tp_size % self.dp_size:
            raise PolicyError(
                f"SharingPolicy.dp_size={self.dp_size} does not divide tp_size={self.tp_size}; "
                f"allowed: a divisor of tp_size"
            )
        self._check_dense_size("moe_dense_tp_size", self.moe_dense_tp_size)
        if not isinstance(self.overrides, Mapping):
            raise PolicyError(
                f"SharingPolicy.overrides={show(self.overrides)} is a {type(self.overrides).__name__}; "
                "allowed: a mapping from module-name globs to sizes"
            )
        for pattern, size in self.overrides.items():
            if not isinstance(pattern, str) or not pattern:
                raise PolicyError(
                    f"SharingPolicy.overrides has the key {show(pattern)}; allowed: a non-empty module-name glob"
                )
            self._check_dense_size(f"overrides[{pattern!r}]", size)
        object.__setattr__(self, "overrides", Overrides(self.overrides))
        if not isinstance(self.residual, str) or self.residual not in RESIDUALS:
            raise PolicyError(f"SharingPolicy.residual={show(self.residual)}; allowed: {', '.join(RESIDUALS)}")
        if self.max_rows is not None:
            self._check_int("max_rows", self.max_rows, MAX_ROWS)

    def _check_int(self, name: str, size: Any, most: int, also: str = "") -> None:
        check_integer(f"SharingPolicy.{name}", size, 1, most, PolicyError, also)

    def _check_dense_size(self, name: str, size: Any) -> None:
        if size is None:
            return
        self._check_int(name, size, MAX_RANKS, also="None")
        allowed = sorted({1, self.attn_tp_size, self.tp_size})
        if size not in allowed:
            raise PolicyError(
                f"SharingPolicy.{name}={size} is not possible with tp_size={self.tp_size} and dp_size={self.dp_size} "
                f"(attn_tp_size={self.attn_tp_size}); allowed: None, {', '.join(map(str, allowed))}. A dense MLP is "
                "held whole, or cut over all ranks of an attention group or of the TP group: its rows lie along the "
                "mesh's two axes (dp, attn_tp), and no process group is made of a part of an axis"
            )

    @property
    def attn_tp_size(self) -> int:
        """Ranks that share one replica's attention weights: `tp_size // dp_size`."""
        return self.tp_size // self.dp_size

    def dense_tp_size_of(self, name: str) -> int:
        """Over how many ranks the dense MLP with this qualified name is sharded: 1, attn_tp_size or tp_size."""
        size = self.moe_dense_tp_size
        for pattern, override in self.overrides.items():
            if fnmatch.fnmatchcase(name, pattern):
                size = override
        size = self.overrides.get(name, size)
        return self.tp_size if size is None else size

    def normalised(self) -> SharingPolicy:
        """The same choices with None written as the size it means, so that equal policies compare equal."""

        def size(given: int | None) -> int:
            return self.tp_size if given is None else given

        overrides = {pattern: size(given) for pattern, given in self.overrides.items()}
        return dataclasses.replace(self, moe_dense_tp_size=size(self.moe_dense_tp_size), overrides=overrides)

    def unmatched_overrides(self, names: Iterable[str]) -> list[str]:
        """The override globs that match none of these qualified names."""
        names = list(names)
        return [p for p in self.overrides if p not in names and not any(fnmatch.fnmatchcase(n, p) for n in names)]

    def to_dict(self, encode_json: bool = False) -> dict[str, Any]:
        """The fields as plain Python values."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**plain, "overrides": dict(self.overrides)}
