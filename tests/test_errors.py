"""What errors say, where they place an argument's name and value, and the exit code of each."""

from __future__ import annotations

import inspect

import pytest

from bncli import errors
from bncli.errors import BncliError, RecipeError, Refused, UsageError, UsageErrors, printable


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (BncliError("the disk is full"), "the disk is full"),
        (UsageError("expected a number", field="eps"), "eps: expected a number"),
        (UsageError("expected a number", field="eps", value="x"), "eps x: expected a number"),
        (UsageError("expected one or more", field="jobs", value=0), "jobs 0: expected one or more"),
        (UsageError("the value has no name", value="x"), "the value has no name"),
        (RecipeError("r.yaml:3: unknown key", "r.yaml:5: is missing"), "r.yaml:3: unknown key\nr.yaml:5: is missing"),
        (UsageError("one", "two", field="sets", value="a=1"), "sets a=1: one\nsets a=1: two"),
        (UsageError("taken; write over it", field="out", permission="overwrite"),
         "out: taken; write over it with overwrite=True"),
    ],
)  # fmt: skip
def test_an_error_is_its_mistakes_each_behind_the_arguments_name_and_value(error: BncliError, text: str) -> None:
    assert str(error) == text


def test_its_lines_take_the_name_that_their_reader_knows_the_argument_by() -> None:
    error = UsageError("no such file", "nor folder", field="saved", value="x.json")
    assert error.lines("--from") == ["--from x.json: no such file", "--from x.json: nor folder"]
    assert error.lines(None, "--force") == ["no such file with --force", "nor folder with --force"]
    assert error.mistakes == ("no such file", "nor folder")


def test_an_error_is_made_of_itself_or_of_those_of_several_arguments() -> None:
    one, other = UsageError("too small", field="jobs", value=0), UsageError("no such device", field="device")
    both = UsageErrors(error for error in (one, other))
    assert one.errors == (one,)
    assert both.errors == (one, other)
    assert str(both) == "jobs 0: too small\ndevice: no such device"
    assert both.mistakes == ("jobs 0: too small", "device: no such device")
    assert both.field is None


EXIT_CODES = {
    "BncliError": 1,
    "UsageError": 2,
    "UsageErrors": 2,
    "RecipeError": 2,
    "DataError": 2,
    "FileError": 2,
    "RunFailed": 1,
    "Unavailable": 3,
}


def test_every_class_has_its_exit_code() -> None:
    classes = {
        name: each
        for name, each in vars(errors).items()
        if inspect.isclass(each) and issubclass(each, BncliError) and each is not Refused
    }
    assert {name: each.exit_code for name, each in classes.items()} == EXIT_CODES


def test_a_refusal_of_a_worker_keeps_the_exit_code_of_the_error_behind_it() -> None:
    refused = Refused("there is no GPU", exit_code=3, field="device", value="cuda")
    assert refused.exit_code == 3
    assert str(refused) == "device cuda: there is no GPU"


def test_the_exit_codes_are_those_that_the_command_line_documents() -> None:
    from bncli.cli import app

    words = {
        errors.OK: "success",
        errors.CHECK_FAILED: "a check or a run failed",
        errors.USAGE: "a mistake in a recipe, an option or the data",
        errors.UNAVAILABLE: "a device or kernel is not available",
        errors.DIVERGED: "diverged",
        errors.INTERRUPTED: "interrupted",
    }
    for code, meaning in words.items():
        assert f"{code} {meaning}" in str(app.info.epilog)


def test_a_control_character_is_shown_as_one_visible_character_and_all_others_as_they_are() -> None:
    kept = "a\tb\n\u00a0\u00e9\u6279\U0001f600\u2400\u200d"
    assert printable(kept) == kept
    assert (
        printable("\0\x1b[31m\r\x7f\x80\x9b\u2028\u202e\u2069.") == "\u2400\u241b[31m\u240d\u2421" + "\ufffd" * 5 + "."
    )
