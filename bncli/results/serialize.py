"""Results as plain data (what JSON holds) and back, strictly: the same object, or an error that names the place.

JSON has no infinities and no NaN. A float that is one is written as the text "Infinity", "-Infinity" or "NaN".
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
PLAIN = (str, int, bool, type(None))
NOT_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def to_plain(value: Any) -> Any:
    """Dataclasses to dicts, tuples to lists, non-finite floats to text, all the way down: what `json.dumps` takes."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, float):
        finite = math.isfinite(value)
        return value if finite else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    value = vars(value) if dataclasses.is_dataclass(value) else value
    return {name: to_plain(item) for name, item in value.items()} if isinstance(value, dict) else value


def from_plain(kind: type[T], plain: Any) -> T:
    """The dataclass that `to_plain` took apart. Raises Mismatch, with the place, for data of another shape."""
    hint: Any = kind
    made: T = _reader(hint)(plain)
    return made


class Mismatch(ValueError):
    """Where plain data are not what a dataclass holds. words: what is wrong there, after the place."""

    def __init__(self, words: str, place: str = "") -> None:
        super().__init__((place.lstrip(".") or "the whole") + words)
        self.words, self.place = words, place


# --- readers: plain data to what they hold; each raises Mismatch ---------------------------------------------------

Reader = Callable[[Any], Any]


@functools.cache  # a hint is looked into once: that takes longer than to read what it describes
def _reader(hint: Any) -> Reader:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return lambda plain: plain
    if dataclasses.is_dataclass(hint):
        return _dataclass_reader(typing.cast(type, hint))
    if origin in (typing.Union, types.UnionType):  # here always `X | None`
        present = _reader(next(argument for argument in arguments if argument is not type(None)))
        return lambda plain: None if plain is None else present(plain)
    if origin is typing.Literal:
        return lambda plain: plain if plain in arguments else _refuse(" or ".join(map(json.dumps, arguments)), plain)
    if origin is tuple:
        same, readers = arguments[-1] is ..., [_reader(each) for each in arguments if each is not ...]
        return lambda plain: (
            tuple(_each(itertools.repeat(readers[0]) if same else readers, plain))
            if isinstance(plain, list) and (same or len(plain) == len(readers))
            else _refuse("a list", plain)
        )
    if origin is dict:
        value = _reader(arguments[1])
        return lambda plain: dict(zip(plain, _each(itertools.repeat(value), _object(plain)), strict=True))
    if hint in (int, float):
        return lambda plain: _number(hint, plain)
    expected = "text" if hint is str else str(hint)
    return lambda plain: plain if type(plain) is hint else _refuse(expected, plain)


def _number(kind: type, plain: Any) -> Any:
    if kind is float and isinstance(plain, str):
        plain = NOT_FINITE.get(plain, plain)
    if type(plain) not in (int, kind):
        _refuse("a number" if kind is float else "a whole number", plain)
    return plain if type(plain) is float or abs(plain) < 1 << 63 else _refuse("a number of at most 64 bits", plain)


def _dataclass_reader(kind: type) -> Reader:
    readers = {name: _reader(hint) for name, hint in typing.get_type_hints(kind).items()}
    fields, missing = dataclasses.fields(kind), dataclasses.MISSING
    required = [each.name for each in fields if each.default is missing and each.default_factory is missing]

    def read(plain: Any) -> Any:
        if unknown := sorted(_object(plain).keys() - readers.keys()):
            raise Mismatch(" is not a known field", f".{unknown[0]}")
        for name in required:
            if name not in plain:
                raise Mismatch(" is missing", f".{name}")
        return kind(**dict(zip(plain, _each(map(readers.__getitem__, plain), plain), strict=True)))

    return read


def _each(readers: Iterable[Reader], plain: list[Any] | dict[str, Any]) -> list[Any]:
    """Each item of a list, or value of a dict, by its reader."""
    made: list[Any] = []
    try:
        for reader, item in zip(readers, plain.values() if isinstance(plain, dict) else plain, strict=False):
            made.append(reader(item))
    except Mismatch as error:
        at = len(made)
        raise Mismatch(
            error.words, (f".{list(plain)[at]}" if isinstance(plain, dict) else f"[{at}]") + error.place
        ) from None
    return made


def _object(plain: Any) -> dict[str, Any]:
    return plain if isinstance(plain, dict) else _refuse("an object", plain)


def _refuse(expected: str, found: Any) -> NoReturn:
    shown = json.dumps(found)
    raise Mismatch(f": expected {expected}, found {shown[:40]}{'...' * (len(shown) > 40)}")
