"""Results as plain data and back: the same object, or an error that names the place."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from bncli.results.compare import Comparison
from bncli.results.gradcheck import BiasStep, Gradcheck
from bncli.results.profile import KernelProfile, StepProfile
from bncli.results.serialize import Mismatch, from_plain, to_plain
from bncli.results.train import RunResult


@dataclass(frozen=True)
class Point:
    step: int
    loss: float


@dataclass(frozen=True)
class Record:
    name: str
    status: Literal["done", "failed"]
    best: Point | None
    points: tuple[Point, ...]
    pair: tuple[str, float]
    costs: dict[str, float]
    right: bool = True
    seconds: float | None = None
    anything: Any = None


FULL = Record(
    "a", "done", Point(3, -math.inf), (Point(1, 0.1), Point(2, math.inf)), ("x", 5e-324), {"a": 1e300, "b": -math.inf}
)
EMPTY = Record("", "failed", None, (), ("Infinity", 0.0), {}, right=False, seconds=2.5, anything=[1, {"a": None}])


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(to_plain(value), allow_nan=False))


@pytest.mark.parametrize("record", [FULL, EMPTY], ids=["full", "empty"])
def test_what_is_written_as_json_reads_back_as_the_same_object(record: Record) -> None:
    assert from_plain(Record, through_json(record)) == record


def test_a_float_that_is_not_finite_is_a_text_in_json_and_a_number_again() -> None:
    record = dataclasses.replace(FULL, best=Point(0, math.nan), seconds=math.nan, costs={"a": math.nan})
    plain = through_json(record)
    assert plain["points"][1]["loss"] == "Infinity"
    assert plain["costs"] == {"a": "NaN"}
    again = from_plain(Record, plain)
    assert again.best is not None
    assert again.seconds is not None
    assert math.isnan(again.best.loss)
    assert math.isnan(again.seconds)
    assert math.isnan(again.costs["a"])
    assert again.points == record.points


def test_a_text_that_is_the_name_of_an_infinity_stays_a_text() -> None:
    assert from_plain(Record, through_json(EMPTY)).pair[0] == "Infinity"


def test_a_field_with_a_default_may_be_missing_as_in_files_of_before() -> None:
    plain = through_json(FULL)
    for name in ("right", "seconds", "anything"):
        del plain[name]
    assert from_plain(Record, plain) == FULL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "extra is not a known field"),
        ({"best": {"step": 1, "loss": 1.0, "speed": 2}}, "best.speed is not a known field"),
        ({"best": {"step": 1}}, "best.loss is missing"),
        ({"points": [{"step": 1, "loss": 1.0}, {"step": "1", "loss": 1.0}]},
         'points[1].step: expected a whole number, found "1"'),
        ({"points": [{"step": True, "loss": 1.0}]}, "points[0].step: expected a whole number, found true"),
        ({"points": [{"step": 1.0, "loss": 1.0}]}, "points[0].step: expected a whole number, found 1.0"),
        ({"points": [{"step": 1, "loss": None}]}, "points[0].loss: expected a number, found null"),
        ({"points": [{"step": 1, "loss": True}]}, "points[0].loss: expected a number, found true"),
        ({"points": [{"step": 1, "loss": "infinity"}]}, 'points[0].loss: expected a number, found "infinity"'),
        ({"points": {"step": 1}}, 'points: expected a list, found {"step": 1}'),
        ({"points": [3]}, "points[0]: expected an object, found 3"),
        ({"pair": ["x", 1.0, 2.0]}, 'pair: expected a list, found ["x", 1.0, 2.0]'),
        ({"pair": [1.0, "x"]}, "pair[0]: expected text, found 1.0"),
        ({"costs": {"a": "x"}}, 'costs.a: expected a number, found "x"'),
        ({"costs": []}, "costs: expected an object, found []"),
        ({"status": "lost"}, 'status: expected "done" or "failed", found "lost"'),
        ({"name": None}, "name: expected text, found null"),
        ({"name": ["a" * 50]}, 'name: expected text, found ["' + "a" * 38 + "..."),
    ],
)  # fmt: skip
def test_data_of_another_shape_are_refused_with_the_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Mismatch) as refused:
        from_plain(Record, {**through_json(FULL), **change})
    assert str(refused.value) == message


def test_data_that_are_no_object_at_all_are_refused() -> None:
    with pytest.raises(Mismatch, match=r"^the whole: expected an object, found 3$"):
        from_plain(Record, 3)


def types_within(hint: Any) -> set[Any]:
    """A type, those that it is made of, and those of the fields of a dataclass, all the way down."""
    inner = typing.get_type_hints(hint).values() if dataclasses.is_dataclass(hint) else typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return {hint}
    return {hint}.union(*(types_within(each) for each in inner))


READ_BACK = [RunResult, Comparison, KernelProfile, StepProfile, Gradcheck, BiasStep]


@pytest.mark.parametrize("result", READ_BACK, ids=lambda result: result.__name__)
def test_what_is_read_back_is_made_of_types_that_can_be(result: type) -> None:
    for each in types_within(result):
        origin, arguments = typing.get_origin(each), typing.get_args(each)
        if origin in (typing.Union, types.UnionType):
            assert len(set(arguments) - {type(None)}) == 1, f"{each}: a value of which of them?"
        elif origin is dict:
            assert arguments[0] is str
        elif origin not in (tuple, Literal) and not dataclasses.is_dataclass(each):
            assert each in {int, float, str, bool, type(None), Any, ...}


@pytest.mark.parametrize("plain", [{"step": 10**400, "loss": 1.0}, {"step": 1, "loss": -(10**400)}])
def test_a_whole_number_that_no_float_holds_is_refused_with_its_place(plain: dict[str, Any]) -> None:
    place = "step" if plain["loss"] == 1 else "loss"
    with pytest.raises(Mismatch, match=f"^{place}: expected a number of at most 64 bits, found -?1000"):
        from_plain(Point, plain)
