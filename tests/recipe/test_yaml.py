"""YAML 1.2's core schema: what scalars mean, what is refused and where, and that what is written reads back."""

from __future__ import annotations

import contextlib
import math
import re
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from bncli.recipe.yaml import MAX_DEPTH, MAX_VALUES, dump, parse


def problems(text: str) -> list[str]:
    return [str(mistake) for mistake in parse(text, "r.yaml").mistakes]


# --- scalars ------------------------------------------------------------------------------------------------------

SCALARS: list[tuple[str, Any]] = [
    ("3e-4", 0.0003), ("1e-3", 0.001), ("1e3", 1000.0), ("1E+3", 1000.0), ("-1.5e-7", -1.5e-7),
    (".5", 0.5), ("+.5", 0.5), ("5.", 5.0), ("012", 12), ("08", 8), ("+1", 1), ("-0", 0),
    ("0o17", 15), ("0x1F", 31), ("-0x1F", "-0x1F"), ("0b1", "0b1"), ("1_000", "1_000"), ("1,000", "1,000"),
    ("12:30:00", "12:30:00"), ("2026-01-31", "2026-01-31"), ("1.2.3", "1.2.3"), ("e3", "e3"), ("1e", "1e"), (".", "."),
    ("9223372036854775807", 2**63 - 1), ("-9223372036854775807", 1 - 2**63),
    (".inf", math.inf), ("-.INF", -math.inf), ("inf", "inf"), ("nan", "nan"),
    ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("y", "y"),
    ("true", True), ("False", False), ("tRUE", "tRUE"), ("null", None), ("~", None), ("", None), ("None", "None"),
    ("'012'", "012"), ('"1e3"', "1e3"), ("=", "="), ("<<", "<<"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "meaning"), SCALARS)
def test_a_scalar_means_what_the_core_schema_says(text: str, meaning: Any) -> None:
    value = parse(f"key: {text}", "r.yaml").root["key"]
    assert (type(value), value) == (type(meaning), meaning)


@pytest.mark.parametrize("escape", [r"\U00110000", r"\Uffffffff", r"\ud800", r"\ud83d\ude00"])
def test_an_escape_of_no_character_or_of_half_a_one_is_refused_with_its_line(escape: str) -> None:
    for text in (f'a: 1\nb: "x{escape}"', f'a: 1\n"{escape}": 2'):
        assert problems(text) == ["r.yaml:2: not YAML: an escape is of no character"]
    assert parse(r'"\U0001F600"', "r.yaml").root == "\U0001f600"


def test_not_a_number_is_a_float() -> None:
    assert math.isnan(parse(".nan", "r.yaml").root)


def meaning_by_python(text: str) -> Any:
    """The core schema through Python's own readers of numbers, which take a little more than it does."""
    readers = () if "_" in text else [lambda text: int(text, 0)] if re.match("0[ox]", text) else [int, float]
    for reader in readers:
        with contextlib.suppress(ValueError):
            return reader(text)
    return text


@settings(max_examples=300, deadline=None)
@given(st.text("0123456789+-.eExoaf_", min_size=1, max_size=9))
def test_a_word_is_a_number_where_the_core_schema_says_so(text: str) -> None:
    assume(text != "-")  # begins a list
    value = parse(f"key: {text}", "r.yaml").root["key"]
    expected = meaning_by_python(text)
    assert (type(value), value) == (type(expected), expected)


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_as_python_writes_it_reads_back(value: float) -> None:
    assert parse(repr(value), "r.yaml").root == value


# --- what is written reads back -----------------------------------------------------------------------------------

TRICKY = [
    "no",
    "012",
    "1e3",
    "null",
    "",
    "~",
    "true",
    "yes",
    "1_000",
    ".5",
    "0x1F",
    "- a",
    "a: b",
    "#",
    " x ",
    "a\nb",
    "\t",
]
texts = st.sampled_from(TRICKY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
scalars = st.none() | st.booleans() | st.integers(1 - 2**63, 2**63 - 1) | st.floats(allow_nan=False) | texts
plain_data = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=15
)


@settings(max_examples=300, deadline=None)
@given(plain_data)
@example({"\x85": "a\x85b", "c": ["\u2028", "\xa0", "x \ny", "\0"]})
def test_plain_data_reads_back_as_it_was_written(data: Any) -> None:
    tree = parse(dump(data), "r.yaml")
    assert not tree.mistakes
    assert repr(tree.root) == repr(data)  # tells 1 from 1.0 and from true, and keeps the order of keys


def test_a_list_of_scalars_stays_on_one_line_and_a_repeated_one_is_written_out() -> None:
    widths = [10, 20]
    assert dump({"a": widths, "b": widths}) == "a: [10, 20]\nb: [10, 20]\n"


# --- where things stand -------------------------------------------------------------------------------------------


def test_every_value_knows_its_line() -> None:
    tree = parse("# a comment\na:\n  b: 1\n  c:\n    - 2\n    - {d: 3}\n", "r.yaml")
    assert tree.root == {"a": {"b": 1, "c": [2, {"d": 3}]}}
    assert tree.where == {
        (): "r.yaml:2",
        ("a",): "r.yaml:2",
        ("a", "b"): "r.yaml:3",
        ("a", "c"): "r.yaml:4",
        ("a", "c", 0): "r.yaml:5",
        ("a", "c", 1): "r.yaml:6",
        ("a", "c", 1, "d"): "r.yaml:6",
    }


def test_an_alias_has_the_value_of_its_anchor_and_the_lines_of_its_keys() -> None:
    tree = parse("a: &x {b: 1}\nc: *x\n", "r.yaml")
    assert tree.root == {"a": {"b": 1}, "c": {"b": 1}}
    assert tree.where["c",] == "r.yaml:2"


def test_line_ends_of_windows_and_a_key_that_is_a_number_are_read() -> None:
    assert parse("1: a\r\ntrue: b\r\n", "r.yaml").root == {"1": "a", "true": "b"}


@pytest.mark.parametrize("text", ["", "\n", "# only a comment\n", "---\n", "null\n", "~"])
def test_a_text_without_a_value_is_nothing(text: str) -> None:
    tree = parse(text, "r.yaml")
    assert (tree.root, tree.mistakes) == (None, [])


# --- what is refused ----------------------------------------------------------------------------------------------

NO_TAG = "is not allowed; write the plain value"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2\n", "2: not YAML: while parsing a flow sequence from line 1, expected ',' or ']', but got ':'"),
        ('a: "x\nb: 2\n', "3: not YAML: while scanning a quoted scalar from line 1, found unexpected end of stream"),
        ("a:\n\tb: 1\n", "2: not YAML: while scanning for the next token, "
         "found character '\\t' that cannot start any token"),
        ("a: b: c\n", "1: not YAML: mapping values are not allowed here"),
        ("a: *x\n", "1: not YAML: found undefined alias 'x'"),
        ("a: 1\nb: \x07\n", "2: not YAML: the character '\\x07' is not allowed"),
        ("a: 1\n---\na: 2\n", "2: not YAML: expected a single document in the stream from line 1, "
         "but found another document"),
        ("%YAML 2.0\n---\na: 1\n", "1: not YAML: found incompatible YAML document (version 1.* is required)"),
        ("a: 1\nb: 2\na: 3\n", "3: a: appears twice; the first is in r.yaml:1"),
        ("a: {b: 1, b: 2}\n", "1: a.b: appears twice; the first is in r.yaml:1"),
        ("? [1, 2]\n: 3\n", "1: the recipe: a key must be a plain word"),
        ("a:\n  !x b: 3\n", "2: a: a key must be a plain word"),
        ("a: !!int abc\n", f"1: a: the tag !!int {NO_TAG}"),
        ("a: !!str 0.1\n", f"1: a: the tag !!str {NO_TAG}"),
        ("a: !!set {b}\n", f"1: a: the tag !!set {NO_TAG}"),
        ("a: !mine [1]\n", f"1: a: the tag !mine {NO_TAG}"),
        ("a: !!python/object/apply:os.system [ls]\n", f"1: a: the tag !!python/object/apply:os.system {NO_TAG}"),
        ("a: 9223372036854775808\n", "1: a: a whole number of more than 64 bits"),
        (f"a: {'9' * 5000}\n", "1: a: a whole number of more than 64 bits"),
        ("a: &x [*x]\n", "1: a.1: an alias of a value that contains it"),
        ("a: &x\n  b:\n    c: *x\n", "3: a.b.c: an alias of a value that contains it"),
    ],
    ids=range(21),
)  # fmt: skip
def test_what_a_recipe_may_not_hold_is_refused_at_its_line(text: str, message: str) -> None:
    assert problems(text) == [f"r.yaml:{message}"]


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 9)
)


def test_a_yaml_bomb_of_aliases_is_refused() -> None:
    assert problems(BOMB) == ["r.yaml: its aliases expand to more than 20,000 values; write out what is needed"]
    assert parse(BOMB, "r.yaml").root is None


def test_a_text_with_too_many_values_is_refused() -> None:
    found = {count: problems("- 1\n" * count) for count in (MAX_VALUES - 1, MAX_VALUES)}
    assert found == {
        MAX_VALUES - 1: [],
        MAX_VALUES: ["r.yaml: has more than 20,000 values; a recipe is a short YAML file"],
    }


DEEP = [opening * depth + "1" + closing * depth for depth in (MAX_DEPTH + 1, 5000)
        for opening, closing in (("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", ""))]  # fmt: skip
THROUGH_ALIASES = f"a: &x {'[' * 25}1{']' * 25}\nb: {'[' * 25}*x{']' * 25}\n"


@pytest.mark.parametrize("text", [*DEEP, THROUGH_ALIASES], ids=range(9))
def test_deep_nesting_is_refused(text: str) -> None:
    assert problems(text) == ["r.yaml: is nested too deeply; a recipe has at most 40 levels"]


def test_all_that_is_refused_in_one_text_is_said() -> None:
    assert len(problems("a: !x 1\nb: !y 2\nc: 1\nc: 2\n")) == 3


# --- values of flags ----------------------------------------------------------------------------------------------


def test_a_value_stands_where_it_is_told_to() -> None:
    tree = parse("[1, {a: no}]", "--set k.l=[1, {a: no}]", ("k", "l"))
    assert tree.root == [1, {"a": "no"}]
    assert set(tree.where) == {("k", "l"), ("k", "l", 0), ("k", "l", 1), ("k", "l", 1, "a")}
    assert set(tree.where.values()) == {"--set k.l=[1, {a: no}]"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\nother: 2", "--set: expected one value"),
        ("b: c", "--set: not YAML: mapping values are not allowed here"),
        ("[1", "--set: not YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"),
        ("!!x 3", "--set: k: the tag !!x is not allowed; write the plain value"),
        ("{a: 1, a: 2}", "--set: k.a: appears twice"),
    ],
)
def test_a_bad_value_is_refused_without_a_line(text: str, message: str) -> None:
    assert [str(mistake) for mistake in parse(text, "--set", ("k",)).mistakes] == [message]


@settings(max_examples=300, deadline=None)
@given(st.text("01.eE-+~nul[]{},:#&*!|>'\"%@? a_", max_size=12))
def test_a_value_is_read_as_it_would_be_after_a_key_in_a_file(text: str) -> None:
    file, value = parse(f"section:\n  key: {text}\n", "r.yaml"), parse(text, "--set", ("section", "key"))
    assert bool(file.mistakes) == bool(value.mistakes)
    if not file.mistakes:
        assert repr(file.root) == repr({"section": {"key": value.root}})
