"""What all commands share: messages, the form of the result, and signals."""

from __future__ import annotations

import ast
import errno
import io
import signal
import sys

import pytest

from bncli.cli.console import OPTIONS, StopAtOnce, StopSignal, listed, print_error, print_result, system_errors
from bncli.errors import CODE_OF_YOURS, BncliError, RecipeError, RunFailed, UsageError, UsageErrors
from tests.cli.conftest import bncli
from tests.test_architecture import MODULES
from tests.test_documentation import options as commands


def test_several_mistakes_are_counted_and_listed(recipe: str) -> None:
    ran = bncli("train", recipe, "--set", "train.steps=0", "--set", "nrom=batch")
    lines = ran.err.splitlines()
    assert (ran.code, lines[0], len(lines)) == (2, "bncli: 2 mistakes", 3)


# --- messages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (UsageError("expected a number", field="fail_above", value="x"), "bncli: --fail-above x: expected a number"),
        (UsageError("is given twice", field="device"), "bncli: --device: is given twice"),
        (UsageError("no such file", field="saved", value="x.json"), "bncli: --from x.json: no such file"),
        (UsageError("not YAML", field="sets", value="a"), "bncli: --set a: not YAML"),
        (UsageError("no shape", field="inputs", value="3"), "bncli: --input 3: no shape"),
        (UsageError("too short", field="seconds", value=0), "bncli: --time 0: too short"),
        (RecipeError("r.yaml:3: unknown key"), "bncli: r.yaml:3: unknown key"),
        (UsageError(f"it is {CODE_OF_YOURS}", field="kernel", value="a:b", permission="allow_code"),
         "bncli: --kernel a:b: it is your own code, which would be executed; allow it with --allow-code"),
        (BncliError("contains a run; overwrite it", permission="overwrite"),
         "bncli: contains a run; overwrite it with --force"),
        (RunFailed("mine:norm raised ValueError: give allow_code=True or overwrite=True"),
         "bncli: mine:norm raised ValueError: give allow_code=True or overwrite=True"),
        (UsageErrors([UsageError("too small", field="jobs", value=0), UsageError("two mistakes", "in it")]),
         "bncli: 3 mistakes\n  --jobs 0: too small\n  two mistakes\n  in it"),
    ],
)  # fmt: skip
def test_an_argument_is_shown_as_the_option_that_it_came_from(
    capsys: pytest.CaptureFixture[str], error: BncliError, shown: str
) -> None:
    print_error(error)
    assert capsys.readouterr() == ("", shown + "\n")


def test_every_argument_that_an_error_names_has_its_option() -> None:
    options = {option for command in commands().values() for option in command}
    assert set(OPTIONS.values()) <= options
    fields = set()
    for file in MODULES.values():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UsageError":
                values = [keyword.value for keyword in node.keywords if keyword.arg in ("field", "permission")]
                fields |= {value.value for value in values if isinstance(value, ast.Constant)}
    assert fields
    assert {OPTIONS.get(field, "--" + field.replace("_", "-")) for field in fields} <= options


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            FileNotFoundError(2, "No such file", "a.txt"),
            2,
            "a.txt: No such file; check that path",
        ),
        (OSError(errno.ENAMETOOLONG, "Name too long", "a"), 2, "a: Name too long; check that path"),
        (OSError(errno.ENOSPC, "No space", "a"), 1, "a: cannot be written: No space; it is kept"),
        (OSError(errno.ENOSPC, "No space"), 1, "standard output: cannot be written: No space; it is kept"),
        (
            OSError(errno.EMFILE, "Too many", "a"),
            1,
            "a: Too many; check that path, and the limits",
        ),
        (BlockingIOError(errno.EAGAIN, "No process"), 1, "the system: No process; check "),
        (MemoryError(), 1, "out of memory; free some, raise its limit, or ask for less; it is kept"),
        (RuntimeError("CUDA out of memory. Tried 2 GiB.\nMore."), 1, "out of memory; free some"),
        (ImportError("libtorch.so: failed to map segment from shared object"), 1, "out of memory"),
        (UnicodeEncodeError("ascii", "\xe9", 0, 1, "ordinal not in range"), 2, "set LC_ALL=C.UTF-8"),
    ],
)
def test_what_the_system_refuses_is_a_sentence_with_an_exit_code(error: Exception, code: int, said: str) -> None:
    with pytest.raises(BncliError) as refused, system_errors("it is kept"):
        raise error
    assert said in str(refused.value)
    assert refused.value.exit_code == code


@pytest.mark.parametrize("bug", [RuntimeError("shapes differ"), ImportError("no module"), ValueError("0"), KeyError(1)])
def test_any_other_error_stays_visible(bug: Exception) -> None:
    with pytest.raises(type(bug)) as raised, system_errors():
        raise bug
    assert raised.value is bug


# --- options and results ------------------------------------------------------------------------------------------


def test_names_are_separated_by_commas_or_repeated_and_count_once() -> None:
    assert listed(["native, fused", "fused", ",mine:norm,"]) == ("native", "fused", "mine:norm")
    assert listed(None) == listed([]) == listed([""]) == ()


def test_a_text_is_printed_as_it_is_and_ends_its_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("[bold]a[/]", "[bold]a[/]\n"):
        print_result(text)
        assert capsys.readouterr().out == "[bold]a[/]\n"


# --- signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_first_signal_asks_to_stop_and_the_second_stops_at_once(
    capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int
) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop()
        signal.raise_signal(number)
        assert stop()
        assert stop.exit_code == code
        assert "a second signal stops at once" in capsys.readouterr().err
        with pytest.raises(StopAtOnce) as stopped:
            signal.raise_signal(number)
    assert stopped.value.exit_code == code
    assert signal.getsignal(number) is before


def test_work_that_yields_what_it_has_finished_stops_at_the_first_signal() -> None:
    with StopSignal(at_once=True), pytest.raises(StopAtOnce) as stopped:
        signal.raise_signal(signal.SIGINT)
    assert stopped.value.exit_code == 130
    assert isinstance(stopped.value, KeyboardInterrupt)


def test_a_hang_up_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop()
            signal.raise_signal(signal.SIGTERM)
            assert stop()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_message_that_cannot_be_written_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise self.error

        error: Exception

    for error in (OSError(errno.EIO, "gone"), RuntimeError("reentrant call")):
        stream = Gone()
        stream.error = error
        monkeypatch.setattr(sys, "stderr", stream)
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop()
