"""Read dataclasses from JSON that anybody may have written: policies, dispatch tables, reports.

    text -> plain values -> dataclass

Every refusal names the field by its path (`Table.entries[3].world`), what was there and what is allowed. Refused are
unknown, missing and repeated fields, wrong types (a bool is no integer), numbers that are not finite or have more
digits than any field needs, nesting deeper than any of these classes, and text that is not UTF-8. Nothing but the
declared fields is built, and nothing is ever imported, unpickled or evaluated.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from dataclasses_json import DataClassJsonMixin

from .errors import OptionError, TPFuseError

#: A report nests four levels deep: {"boundaries": [{"group": [0]}]}.
MAX_DEPTH = 8
MAX_DIGITS = 18

_T = TypeVar("_T", bound="StrictJson")


class StrictJson(DataClassJsonMixin):
    """dataclasses-json's mixin with readers that take nothing on trust.

    Writing is the mixin's own. `json_error` is the class of every refusal; a class's own `__post_init__` checks what
    its types do not say.
    """

    json_error: ClassVar[type[TPFuseError]] = OptionError

    @classmethod
    def from_dict(cls: type[_T], kvs: Any, *, infer_missing: bool = False) -> _T:
        """The object with these fields, nested ones included.

        Raises:
            json_error: as the module says, and whatever the constructor refuses.
        """
        return kvs if isinstance(kvs, cls) else _build(cls, kvs, cls.__name__, cls.json_error)

    @classmethod
    def from_json(
        cls: type[_T], s: str | bytes | bytearray, *, parse_float=None, parse_int=None, parse_constant=None,
        infer_missing: bool = False, **kw: Any,
    ) -> _T:  # fmt: skip
        """The object that `to_json` wrote. Raises as `from_dict`, and for text that is not JSON."""
        return cls.from_dict(parse(s, cls.__name__, cls.json_error))


def parse(text: str | bytes | bytearray, what: str, error: type[TPFuseError]) -> Any:
    """The plain values in a JSON text; `what` names the text in the message of a refusal, an `error`."""
    try:
        if isinstance(text, (bytes, bytearray)):
            text = text.decode("utf-8")
        too_deep = _too_deep(text)
        if too_deep is None:
            unique = functools.partial(_unique, what, error)
            return json.loads(text, parse_int=_bounded_int, object_pairs_hook=unique)
    except (ValueError, TypeError, AttributeError) as problem:
        if isinstance(problem, error):
            raise
        raise error(f"{what} is read from JSON, and this is not a JSON text: {problem}") from None
    raise error(f"{too_deep} of {what} nests deeper than {MAX_DEPTH} levels")


def check_integer(where: str, value: Any, least: int, most: int, error: type[TPFuseError], also: str = "") -> None:
    """Refuse anything but an integer from `least` to `most`; `also` names what else the caller allows."""
    allowed = f"allowed: {also + ' or ' if also else ''}an integer from {least} to {most}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise error(f"{where}={show(value)} is a {type(value).__name__}; {allowed}")
    if not least <= value <= most:
        raise error(f"{where}={show(value)}; {allowed}")


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print a number of some thousands of digits.
        return repr(x) if -(10**MAX_DIGITS) < x < 10**MAX_DIGITS else "a number of too many digits"


def show(value: Any) -> str:
    """`repr` for messages: short whatever the value is, and never an error itself."""
    short = _Short()
    short.maxstring = short.maxother = 80
    shown = short.repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


# -- text -> plain values ---------------------------------------------------------------------------------------------


class _Huge(float):
    """A number with more digits than any field may have: no field accepts it, so the field's check names it."""

    def __repr__(self) -> str:
        return "a number of too many digits"


def _bounded_int(digits: str) -> int | _Huge:
    # Converting takes quadratic time, and Python refuses to convert some thousands of digits.
    return int(digits) if len(digits) <= MAX_DIGITS else _Huge()


def _unique(what: str, error: type[TPFuseError], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in pairs:
        if name in out:
            raise error(f"the field {show(name)} is given twice in the JSON of {what}")
        out[name] = value
    return out


_TOKEN = re.compile(r'(?P<name>"[^"\\]*(?:\\.[^"\\]*)*")(?P<colon>\s*:)?|(?P<open>[\[{])|(?P<close>[\]}])', re.DOTALL)


def _too_deep(text: str) -> str | None:
    """What nests too deep, if anything: found before the parser, whose recursion Python limits, meets it."""
    depth, field = 0, "the text"
    for token in _TOKEN.finditer(text):
        if token["open"]:
            depth += 1
            if depth > MAX_DEPTH:
                return field
        elif token["close"]:
            depth -= 1
        elif depth == 1 and token["colon"]:
            field = f"the field {show(token['name'].strip(chr(34)))}"
    return None


# -- plain values -> dataclass ----------------------------------------------------------------------------------------


def _build(cls: type, given: Any, where: str, error: type[TPFuseError]) -> Any:
    if not isinstance(given, Mapping):
        raise error(f"{where} is read from an object with fields, not from {show(given)}")
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for name in given:
        if name not in known:
            raise error(f"unknown field {show(name)} of {where}; allowed: {', '.join(known)}")
    for name, field in known.items():
        if name not in given and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise error(f"the field {name!r} of {where} is missing")
    hints = _hints(cls)
    return cls(**{name: _value(hints[name], value, f"{where}.{name}", error) for name, value in given.items()})


def field_value(cls: type, name: str, given: Any, where: str, error: type[TPFuseError]) -> Any:
    """`given` as the type that the field `name` of a dataclass declares; `where` names it in a refusal, an `error`."""
    return _value(_hints(cls)[name], given, where, error)


@functools.lru_cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _value(hint: Any, value: Any, where: str, error: type[TPFuseError]) -> Any:
    """`value` as the type that the field declares."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        whole = [a for a in arguments if dataclasses.is_dataclass(a) or typing.get_origin(a) is not None]
        if not whole:
            return _plain(arguments, value, where, error)
        return None if value is None else _value(whole[0], value, where, error)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _build(hint, value, where, error)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise error(f"{where}={show(value)} is a {type(value).__name__}; allowed: a list")
        return origin(_value(arguments[0], item, f"{where}[{i}]", error) for i, item in enumerate(value))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise error(f"{where}={show(value)} is a {type(value).__name__}; allowed: an object")
        return {
            _value(arguments[0], key, f"the key {show(key)} of {where}", error): _value(
                arguments[1], item, f"{where}[{show(key)}]", error
            )
            for key, item in value.items()
        }
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise error(f"{where}={show(value)}; allowed: {', '.join(map(str, arguments))}")
        return value
    return _plain((hint,), value, where, error)


def _plain(hints: tuple[Any, ...], value: Any, where: str, error: type[TPFuseError]) -> Any:
    """A str, bool, int, float or None, as one of `hints`."""
    if Any in hints:
        return value
    kinds = {*hints, int} if float in hints else set(hints)
    if not isinstance(value, tuple(kinds)) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("None" if hint is type(None) else hint.__name__ for hint in hints)
        raise error(f"{where}={show(value)} is a {type(value).__name__}; allowed: {names}")
    if isinstance(value, float) and (not math.isfinite(value) or isinstance(value, _Huge)):
        raise error(f"{where}={show(value)}; allowed: a finite number")
    if isinstance(value, int) and not -(10**MAX_DIGITS) < value < 10**MAX_DIGITS:
        raise error(f"{where}={show(value)}; allowed: at most {MAX_DIGITS} digits")
    if isinstance(value, str) and not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise error(f"{where}={show(value)} holds half of a surrogate pair, which is no character")
    return value
