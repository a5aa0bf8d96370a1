"""Results as plain data (what JSON holds) and back, strictly: the same object, or an error that names the place.

JSON has no infinities and no NaN. A float that is one is written as the text "Infinity", "-Infinity" or "NaN".
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")
NOT_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def to_plain(value: Any) -> Any:
    """Dataclasses to dicts, tuples to lists, non-finite floats to text, all the way down: what `json.dumps` takes."""
    return _finite(dataclasses.asdict(value))


def from_plain(kind: type[T], plain: Any) -> T:
    """The dataclass that `to_plain` took apart. Raises Mismatch, with the place, for data of another shape."""
    made: T = _rebuilt(kind, plain, "")
    return made


class Mismatch(ValueError):
    """Where plain data are not what a dataclass holds."""


def _rebuilt(hint: Any, plain: Any, path: str) -> Any:
    """Plain data as the type that the hint names, all the way down. Raises Mismatch with the place."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return plain
    if dataclasses.is_dataclass(hint):
        return _rebuilt_dataclass(typing.cast(type, hint), plain, path)
    if origin in (typing.Union, types.UnionType):  # here always `X | None`
        present = next(argument for argument in arguments if argument is not type(None))
        return None if plain is None else _rebuilt(present, plain, path)
    if origin is typing.Literal:
        _expect(plain in arguments, path, " or ".join(map(json.dumps, arguments)), plain)
        return plain
    if origin is tuple:
        same = arguments[-1] is ...
        _expect(isinstance(plain, list) and (same or len(plain) == len(arguments)), path, "a list", plain)
        hints = [arguments[0]] * len(plain) if same else arguments
        return tuple(_rebuilt(h, item, f"{path}[{i}]") for i, (h, item) in enumerate(zip(hints, plain, strict=True)))
    if origin is dict:
        _expect(isinstance(plain, dict), path, "an object", plain)
        return {key: _rebuilt(arguments[1], item, f"{path}.{key}") for key, item in plain.items()}
    if isinstance(plain, int):
        _expect(abs(plain) < 1 << 63, path, "a number of at most 64 bits", plain)
    if hint is float:
        plain = NOT_FINITE.get(plain, plain) if isinstance(plain, str) else plain
        _expect(isinstance(plain, int | float) and not isinstance(plain, bool), path, "a number", plain)
        return plain
    _expect(type(plain) is hint, path, {int: "a whole number", str: "text"}.get(hint, str(hint)), plain)
    return plain


_hints = functools.cache(typing.get_type_hints)


def _rebuilt_dataclass(kind: type, plain: Any, path: str) -> Any:
    _expect(isinstance(plain, dict), path, "an object", plain)
    hints = _hints(kind)
    values = {}
    unknown = sorted(plain.keys() - hints.keys())
    if unknown:
        raise Mismatch(f"{path}{'.' * bool(path)}{unknown[0]} is not a known field")
    for field in dataclasses.fields(kind):
        place = f"{path}.{field.name}".lstrip(".")
        if field.name in plain:
            values[field.name] = _rebuilt(hints[field.name], plain[field.name], place)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise Mismatch(f"{place} is missing")
    return kind(**values)


def _expect(right: bool, path: str, expected: str, found: Any) -> None:
    if not right:
        shown = json.dumps(found)
        raise Mismatch(f"{path or 'the whole'}: expected {expected}, found {shown[:40]}{'...' * (len(shown) > 40)}")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
